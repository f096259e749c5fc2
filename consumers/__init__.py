"""Who reads from Kafka? The executor (requests to results), the projector (status to the state database)."""
