"""The settings that make an Apache Kafka quick and small for tests, whichever way it is started."""

VERSION = "4.2.0"


def broker_settings(nodes: int) -> dict[str, str]:
    """Settings of each broker in a cluster of so many nodes, by their names in `server.properties`."""
    replicas = str(min(nodes, 3))
    in_sync = str(min(nodes, 2))
    return {
        "auto.create.topics.enable": "false",
        "num.partitions": "1",
        "default.replication.factor": replicas,
        "min.insync.replicas": in_sync,
        # Internal topics: as many replicas as there are nodes, and few partitions, for each is files and start-up time.
        "offsets.topic.replication.factor": replicas,
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": in_sync,
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": in_sync,
        "share.coordinator.state.topic.num.partitions": "4",
        # A first member need not wait 3 s for others.
        "group.initial.rebalance.delay.ms": "0",
        # A killed member is missed after 6 s instead of 45 s, in KIP-848 groups where only the broker decides.
        "group.min.session.timeout.ms": "1000",
        "group.consumer.min.session.timeout.ms": "1000",
        "group.consumer.session.timeout.ms": "6000",
        "group.consumer.min.heartbeat.interval.ms": "500",
        "group.consumer.heartbeat.interval.ms": "1000",
        # A dead producer's transaction is aborted within a second of its timeout, not ten.
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
        # Small segments that are soon rolled, and a cleaner that looks at them every second in little memory.
        "log.segment.bytes": str(16 << 20),
        "log.cleaner.backoff.ms": "1000",
        "log.cleaner.dedupe.buffer.size": str(16 << 20),
        "log.initial.task.delay.ms": "1000",
        "log.retention.check.interval.ms": "1000",
        # Index files are allocated in full, three to a partition; 10 MB each would fill a small disk.
        "log.index.size.max.bytes": str(512 << 10),
        "num.network.threads": "2",
        "num.io.threads": "4",
        "num.recovery.threads.per.data.dir": "1",
        "background.threads": "2",
    }
