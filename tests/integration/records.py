"""What lies in a topic, on either broker."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from queryd.events import Topic
from service.topics import apply_topics
from tests.servers.kafka import Kafka

# Waiting for what must come: generous, for a machine may be busy; it only ends a test that hangs.
PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.02
_MARKER = "queryd_test_end"
# As few as still make the order of partitions show.
_PARTITIONS = 3


def config_of(kafka: Kafka) -> dict[str, Any]:
    """librdkafka's configuration for the broker."""
    return {"bootstrap.servers": kafka.bootstrap}


def prepare_topics(kafka: Kafka) -> dict[str, Any]:
    """Make the contract's topics unless they are there; librdkafka's configuration."""
    config = config_of(kafka)
    known = AdminClient(config).list_topics(timeout=PATIENCE_SECONDS).topics
    if any(topic not in known for topic in Topic):
        apply_topics(config, _PARTITIONS, replication=1)
    return config


async def read_topic(kafka: Kafka, topic: str) -> list[Message]:
    """Every record that a reader at read_committed sees, from the earliest on; in order within a partition."""
    return await asyncio.to_thread(_read_topic, config_of(kafka), topic)


def _read_topic(config: dict[str, Any], topic: str) -> list[Message]:
    reader = {"group.id": str(uuid.uuid4()), "enable.auto.commit": False, "isolation.level": "read_committed"}
    consumer = Consumer(config | reader)
    try:
        partitions = consumer.list_topics(topic, timeout=PATIENCE_SECONDS).topics[topic].partitions
        # The end is a record of our own, for the embedded broker's watermarks can't be trusted.
        marker = _mark_ends(config, topic, list(partitions))
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        found: list[Message] = []
        ends: set[int | None] = set()
        while ends != set(partitions):
            message = consumer.poll(PATIENCE_SECONDS)
            assert message is not None, "the topic's end did not come"
            assert message.error() is None, message.error()
            if headers_of(message).get(_MARKER) == marker:
                ends.add(message.partition())
            elif _MARKER not in headers_of(message):
                found.append(message)
        return found
    finally:
        consumer.close()


def _mark_ends(config: dict[str, Any], topic: str, partitions: list[int]) -> bytes:
    """Write one record into each partition: the tombstone of a query that never was, which means nothing to anybody."""
    marker = str(uuid.uuid4()).encode()
    producer = Producer(config)
    for partition in partitions:
        producer.produce(topic, key=str(uuid.uuid4()), partition=partition, headers=[(_MARKER, marker)])
    assert producer.flush(PATIENCE_SECONDS) == 0
    return marker


def write(
    config: dict[str, Any], topic: str, key: str, value: bytes | None, partition: int = 0, timestamp_ms: int = 0
) -> int:
    """Write one record, of now or of that time; its offset."""
    offsets: list[int | None] = []
    producer = Producer(config)
    producer.produce(
        topic,
        key=key,
        value=value,
        partition=partition,
        timestamp=timestamp_ms,
        on_delivery=lambda _, message: offsets.append(message.offset()),
    )
    assert producer.flush(PATIENCE_SECONDS) == 0
    [offset] = offsets
    assert offset is not None
    return offset


def headers_of(message: Message) -> dict[str, bytes | None]:
    """A record's headers, each name once."""
    headers: Any = message.headers() or ()
    return dict(headers)


async def until(
    condition: Callable[[], Awaitable[bool]], *tasks: "asyncio.Task[None]", seconds: float = PATIENCE_SECONDS
) -> None:
    """Return once the condition holds; raises what one of the tasks raised, and TimeoutError after so many seconds."""
    async with asyncio.timeout(seconds):
        while not await condition():
            for task in tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(_LOOK_SECONDS)
