"""How does queryd talk to Kafka? By a consumer loop, a bounded reader, a producer and a transactional producer."""
