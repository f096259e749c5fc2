"""The broker that the other tests stand on: does it do what they take for granted?"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from tests.servers.kafka import Kafka

# A first member joins in about a second on Apache and in half its session timeout (6 s) on the embedded broker.
_FETCH_SECONDS = 20.0
# Long enough that a record which must not come would have come: the marker behind it arrives within milliseconds.
_QUIET_SECONDS = 1.0
_FLUSH_SECONDS = 10.0


def test_a_record_goes_in_and_comes_out(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    topic = unique_topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "enable.idempotence": True})
    producer.produce(topic, key=b"key", value=b"value", headers={"ce_type": b"test"})
    assert producer.flush(_FLUSH_SECONDS) == 0
    with _consumer(kafka) as consumer:
        consumer.subscribe([topic])
        message = _next(consumer)
        assert (message.key(), message.value(), message.headers()) == (b"key", b"value", [("ce_type", b"test")])
        consumer.commit(message=message, asynchronous=False)
        (committed,) = consumer.committed([TopicPartition(topic, 0)], timeout=_FETCH_SECONDS)
        assert committed.offset == 1


def test_a_topic_has_the_partitions_and_settings_that_were_asked_for(
    kafka: Kafka, unique_topic: Callable[..., str]
) -> None:
    topic = unique_topic(6, cleanup_policy="compact")
    with _consumer(kafka) as consumer:
        assert len(consumer.list_topics(topic, timeout=_FETCH_SECONDS).topics[topic].partitions) == 6


@pytest.mark.needs_kafka
def test_an_aborted_transaction_is_invisible_at_read_committed(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    topic = unique_topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": str(uuid.uuid4())})
    producer.init_transactions(_FLUSH_SECONDS)
    for value, finish in ((b"aborted", producer.abort_transaction), (b"committed", producer.commit_transaction)):
        producer.begin_transaction()
        producer.produce(topic, value=value)
        assert producer.flush(_FLUSH_SECONDS) == 0
        finish(_FLUSH_SECONDS)
    with _consumer(kafka) as consumer:
        consumer.assign([TopicPartition(topic, 0, 0)])
        assert _next(consumer).value() == b"committed"
        # Two records and two markers.
        assert consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=_FETCH_SECONDS) == (0, 4)


@pytest.mark.needs_kafka
def test_an_open_transaction_is_invisible_until_it_commits(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    topic = unique_topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": str(uuid.uuid4())})
    producer.init_transactions(_FLUSH_SECONDS)
    producer.begin_transaction()
    producer.produce(topic, value=b"open")
    assert producer.flush(_FLUSH_SECONDS) == 0
    with _consumer(kafka) as consumer:
        consumer.assign([TopicPartition(topic, 0, 0)])
        assert consumer.poll(_QUIET_SECONDS) is None
        producer.commit_transaction(_FLUSH_SECONDS)
        assert _next(consumer).value() == b"open"


@pytest.mark.needs_kafka
def test_a_group_of_the_new_protocol_receives(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    topic = unique_topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    producer.produce(topic, value=b"value")
    assert producer.flush(_FLUSH_SECONDS) == 0
    with _consumer(kafka, protocol="consumer") as consumer:
        consumer.subscribe([topic])
        assert _next(consumer).value() == b"value"


@contextmanager
def _consumer(kafka: Kafka, protocol: str = "classic") -> Iterator[Consumer]:
    classic: dict[str, str | int | bool] = {"session.timeout.ms": 6000} if protocol == "classic" else {}
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap,
            "group.id": str(uuid.uuid4()),
            "group.protocol": protocol,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            **classic,
        }
    )
    try:
        yield consumer
    finally:
        consumer.close()


def _next(consumer: Consumer) -> Message:
    message = consumer.poll(_FETCH_SECONDS)
    assert message is not None
    assert message.error() is None
    return message
