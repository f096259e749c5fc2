"""The stack from wheels: Postgres, an S3 server and a Kafka broker on loopback, for the demo and for tests."""
