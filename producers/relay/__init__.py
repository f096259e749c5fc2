"""Outbox to Kafka, exactly once: each committed event is published once, in order per query."""
