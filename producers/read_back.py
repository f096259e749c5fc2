"""Reading a topic to its end, to find out what an earlier process had written there before it died."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from confluent_kafka import Consumer, IsolationLevel, KafkaError, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from queryd.outages import QUIET

_BROKER_SECONDS = 15.0
# A broker that is there answers a fetch within its own half second, with records or with the end. Nothing at all for
# this long, and the end is not known.
# An abandoned transaction hides what follows for its own 10 s, and up to 10 s more until the broker looks.
SILENCE_SECONDS = 30.0
# How many records are taken at once, and how long is waited for the first of them.
_AT_ONCE = 500
_ENDS_GROUP = "queryd-ends"
_LOOK_SECONDS = 0.1
# A fetch that only needs the end offset should not wait, but at 0 the embedded broker does not answer.
_FETCH_WAIT_MILLIS = 1


class EndNotReached(Exception):
    """The broker went silent before the topic's end was read: what had been written is not known."""


class Silence:
    """How long nothing has been heard."""

    def __init__(self) -> None:
        self._heard = time.monotonic()

    def end(self) -> None:
        """Something is heard."""
        self._heard = time.monotonic()

    def lasts(self) -> bool:
        """True when it has lasted for too long."""
        return time.monotonic() - self._heard > SILENCE_SECONDS


def read_ends(config: dict[str, Any], topic: str) -> dict[int, int]:
    """The offsets behind the last records of a topic, by partition, open transactions included. Blocks.

    Every broker returns the correct end with a fetch. The embedded broker's answer to ListOffsets may be out of date.
    Raises `EndNotReached` and `KafkaException`.
    """
    # The binding gives it no types.
    latest: Callable[[], Any] = OffsetSpec.latest
    listed = _read_offsets(config, topic, latest())
    reading = {
        "group.id": _ENDS_GROUP,
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "isolation.level": "read_uncommitted",
        "fetch.wait.max.ms": _FETCH_WAIT_MILLIS,
    }
    consumer = Consumer(config | QUIET | reading | {"auto.offset.reset": "latest"})
    ends: dict[int, int] = {}
    try:
        consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in listed.items()])
        silence = Silence()
        while len(ends) < len(listed):
            for message in consumer.consume(_AT_ONCE, _LOOK_SECONDS):
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    continue
                partition = _partition(message)
                if partition not in ends:
                    _, ends[partition] = consumer.get_watermark_offsets(TopicPartition(topic, partition), cached=True)
                    silence.end()
            if silence.lasts():
                raise EndNotReached(f"the broker did not say where {topic} ends within {SILENCE_SECONDS:.0f} s")
    finally:
        consumer.close()
    return ends


def read_starts(config: dict[str, Any], topic: str) -> dict[int, int]:
    """The offsets of the first records that a topic still holds, by partition; of an empty one its end. Blocks.

    Raises `KafkaException`.
    """
    # The binding gives it no types.
    earliest: Callable[[], Any] = OffsetSpec.earliest
    return _read_offsets(config, topic, earliest())


def _read_offsets(config: dict[str, Any], topic: str, spec: Any) -> dict[int, int]:
    admin = AdminClient(config | QUIET)
    partitions = admin.list_topics(topic, timeout=_BROKER_SECONDS).topics[topic].partitions
    wanted = {TopicPartition(topic, partition): spec for partition in partitions}
    found = admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=_BROKER_SECONDS)
    return {place.partition: future.result().offset for place, future in found.items()}


def read_to_end(
    config: dict[str, Any], group: str, topic: str, starts: Mapping[int, int], ends: Mapping[int, int] | None = None
) -> Iterator[Message]:
    """All committed records of a topic, from `starts` by partition (else from the earliest), to `ends` at least: where
    they end now by default, for a topic that nobody writes to meanwhile.

    Blocks. The end of a partition is where the broker's own answer to a fetch says that it is: unlike a watermark that
    is asked for, it is right on the embedded broker too. Raises `EndNotReached` and `KafkaException`.
    """
    reading = {"group.id": group, "enable.auto.commit": False, "enable.partition.eof": True}
    consumer = Consumer(config | QUIET | reading | {"auto.offset.reset": "earliest"})
    try:
        partitions = consumer.list_topics(topic, timeout=_BROKER_SECONDS).topics[topic].partitions
        unread = set(partitions)
        consumer.assign([TopicPartition(topic, partition, starts.get(partition, 0)) for partition in partitions])
        silence = Silence()
        while unread:
            for message in consumer.consume(_AT_ONCE, _LOOK_SECONDS):
                error = message.error()
                if error is None:
                    silence.end()
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    partition, end = _partition(message), message.offset()
                    assert end is not None
                    # An open transaction keeps what lies behind it back, until it has ended or its time is over.
                    if end >= (ends or {}).get(partition, 0):
                        silence.end()
                        unread.discard(partition)
            if silence.lasts():
                raise EndNotReached(f"{topic} could not be read to its end")
    finally:
        consumer.close()


def _partition(message: Message) -> int:
    partition = message.partition()
    assert partition is not None
    return partition
