"""How far live traffic is behind is counted by what still waits, not by what retention has removed."""

from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from replay.pace import measure_group_lag
from tests.integration.queries import new_id
from tests.integration.records import PATIENCE_SECONDS, config_of
from tests.servers.kafka import Kafka

pytestmark = pytest.mark.needs_kafka


@pytest.mark.slow
def test_removed_records_wait_for_nobody(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    config, topic = config_of(kafka), unique_topic(2)
    new, old = new_id(), new_id()
    _write(config, topic, {0: 10, 1: 4})
    # One group has committed less than is removed afterwards, and more of the other partition.
    _commit(config, old, TopicPartition(topic, 0, 3), TopicPartition(topic, 1, 2))
    assert measure_group_lag(config, new, [topic]) == 14
    assert measure_group_lag(config, old, [topic]) == 9
    _remove(config, TopicPartition(topic, 0, 6))
    assert measure_group_lag(config, new, [topic]) == 4 + 4
    assert measure_group_lag(config, old, [topic]) == 4 + 2
    _remove(config, TopicPartition(topic, 0, 10), TopicPartition(topic, 1, 4))
    assert measure_group_lag(config, new, [topic]) == 0
    assert measure_group_lag(config, old, [topic]) == 0
    _write(config, topic, {1: 1})
    assert measure_group_lag(config, new, [topic]) == 1
    assert measure_group_lag(config, old, [topic]) == 1


def _write(config: dict[str, Any], topic: str, records: dict[int, int]) -> None:
    producer = Producer(config)
    for partition, count in records.items():
        for _ in range(count):
            producer.produce(topic, b"a record", partition=partition)
    assert producer.flush(PATIENCE_SECONDS) == 0


def _commit(config: dict[str, Any], group: str, *offsets: TopicPartition) -> None:
    consumer = Consumer(config | {"group.id": group, "enable.auto.commit": False})
    try:
        consumer.commit(offsets=list(offsets), asynchronous=False)
    finally:
        consumer.close()


def _remove(config: dict[str, Any], *before: TopicPartition) -> None:
    """Remove what lies before these offsets, as retention does."""
    # Named, for it answers no more once it is collected.
    admin = AdminClient(config)
    for removed in admin.delete_records(list(before)).values():
        removed.result(PATIENCE_SECONDS)
