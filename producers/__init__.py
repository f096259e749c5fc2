"""Who writes to Kafka? The relay (outbox to Kafka) and the dead letters."""
