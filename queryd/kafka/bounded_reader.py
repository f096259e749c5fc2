"""Read partitions from given offsets to their ends, without a consumer group. Blocks."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo, OffsetSpec

from queryd.kafka.outages import QUIET
from queryd.kafka.record import Partition

_BROKER_SECONDS = 15.0
# A broker in reach answers each fetch, with records or with the end. An abandoned transaction hides what follows it for
# its own 10 s, and for up to 10 s more until the broker looks for it.
SILENCE_SECONDS = 30.0
# How many records one batch has at most, and how long one poll waits for the first of them.
_BATCH = 500
_POLL_SECONDS = 0.1
# At 0 the embedded broker does not answer.
_SHORTEST_FETCH_MILLIS = 1

_CONFIG = {
    # librdkafka requires a name. The group is never joined, and nothing is committed to it.
    "group.id": "queryd-bounded-reader",
    "enable.auto.commit": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    # The broker reports the end by a fetch that finds nothing, which takes half a second by default.
    "fetch.wait.max.ms": 20,
    # Bounds of the prefetch; the default is 64 MB.
    "queued.max.messages.kbytes": 16_384,
    "fetch.max.bytes": 8_388_608,
}
# Errors that end in no retry of librdkafka's.
_REFUSALS = {
    KafkaError._FATAL,
    KafkaError._AUTHENTICATION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}


class EndNotReached(Exception):
    """The broker was silent for too long: what the log holds before its end is not known."""


class LogChanged(Exception):
    """An offset that was to be read has left the log, by retention or because the topic was created again."""


class BoundedReader:
    """Reads the committed records of partitions, each partition's in order. Use it as a context manager.

    `positions` has the next offset of each partition: every record before it was handed over.
    """

    def __init__(self, config: Mapping[str, Any], starts: Mapping[Partition, int], *, reset: str = "error") -> None:
        """`reset` says where reading goes on if an offset has left the log: by default it raises `LogChanged`."""
        self.positions = dict(starts)
        self._closed = threading.Event()
        # A cancelled task leaves its thread in `poll` for a moment: the consumer must not be closed meanwhile.
        self._turn = threading.Lock()
        self._consumer = Consumer(dict(config) | QUIET | _CONFIG | {"auto.offset.reset": reset})

    def __enter__(self) -> "BoundedReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is being read, also in another thread."""
        with self._turn:
            if not self._closed.is_set():
                self._closed.set()
                self._consumer.close()

    def read_to(
        self,
        ends: Mapping[Partition, int] | None = None,
        *,
        most: int = _BATCH,
        silence_seconds: float = SILENCE_SECONDS,
        stopping: threading.Event | None = None,
    ) -> Iterator[list[Message]]:
        """Batches of up to `most` records before `ends`; without `ends`, until each partition's end was seen once.

        The broker's answer to a fetch reports the end: a watermark may be out of date on the embedded broker. Setting
        `stopping` ends the iterator early, and so does `close`. A later call goes on from `positions`.

        Raises:
            EndNotReached: the broker was silent for `silence_seconds`.
            LogChanged: an offset has left the log.
            KafkaException: the broker refuses, or the client has failed for good.
        """
        unread = {place for place, position in self.positions.items() if _is_before(position, ends, place)}
        with self._turn:
            if self._closed.is_set():
                return
            assigned = [TopicPartition(*place, self.positions[place]) for place in unread]
            self._consumer.assign(assigned)
            # A partition that an earlier call paused stays paused when it is assigned again.
            self._consumer.resume(assigned)
        heard = time.monotonic()
        while unread and not (stopping is not None and stopping.is_set()):
            with self._turn:
                if self._closed.is_set():
                    return
                # `consume` alone would wait until it has all of them.
                first = self._consumer.poll(_POLL_SECONDS)
                messages = [] if first is None else [first, *self._consumer.consume(most - 1, 0)]
            answers = [message for message in messages if is_answer(message)]
            if records := [message for message in answers if self._receive(message, ends, unread)]:
                yield records
            if answers:
                # After the caller's own time.
                heard = time.monotonic()
            elif time.monotonic() - heard > silence_seconds:
                topic, partition = min(unread)
                raise EndNotReached(
                    f"the end of {topic}/{partition} is not known: no answer for {silence_seconds:.0f} s"
                )

    def _receive(self, message: Message, ends: Mapping[Partition, int] | None, unread: set[Partition]) -> bool:
        """Move the position; True for a record that is to be handed over."""
        place, offset = _place(message), message.offset()
        if place not in unread:
            return False
        assert offset is not None
        is_end = message.error() is not None
        is_wanted = not is_end and _is_before(offset, ends, place)
        position = offset + 1 if is_wanted else offset
        self.positions[place] = position if ends is None else min(position, ends[place])
        if (is_end and ends is None) or not _is_before(self.positions[place], ends, place):
            unread.discard(place)
            # Otherwise a busy partition that is finished would crowd out the others.
            self._consumer.pause([TopicPartition(*place)])
        return is_wanted


def _is_before(offset: int, ends: Mapping[Partition, int] | None, place: Partition) -> bool:
    return ends is None or offset < ends.get(place, 0)


def _place(message: Message) -> Partition:
    topic, partition = message.topic(), message.partition()
    assert topic is not None and partition is not None
    return topic, partition


def is_answer(message: Message) -> bool:
    """True for a record or an end; False for an error that librdkafka retries. Raises for all other errors."""
    error = message.error()
    if error is None or error.code() == KafkaError._PARTITION_EOF:
        return True
    if error.code() == KafkaError._AUTO_OFFSET_RESET:
        raise LogChanged(
            f"{message.topic()} has changed while it was read, by retention or because it was created again: plan again"
        )
    if error.fatal() or error.code() in _REFUSALS:
        raise KafkaException(error)
    return False


def read_ends(config: Mapping[str, Any], topic: str) -> dict[int, int]:
    """The offsets behind the last records of a topic, by partition, open transactions included. Blocks.

    Every broker returns the correct end with a fetch; the embedded broker's answer to ListOffsets may be out of date.
    Raises `EndNotReached` and `KafkaException`.
    """
    # The binding has no types for it.
    latest: Callable[[], Any] = OffsetSpec.latest
    listed = list_offsets(config, topic, latest())
    fetching = {"isolation.level": "read_uncommitted", "fetch.wait.max.ms": _SHORTEST_FETCH_MILLIS}
    consumer = Consumer(dict(config) | QUIET | _CONFIG | fetching | {"auto.offset.reset": "latest"})
    ends: dict[int, int] = {}
    try:
        consumer.assign([TopicPartition(topic, partition, found.offset) for partition, found in listed.items()])
        heard = time.monotonic()
        while len(ends) < len(listed):
            message = consumer.poll(_POLL_SECONDS)
            if message is not None and is_answer(message) and (place := _place(message))[1] not in ends:
                _, ends[place[1]] = consumer.get_watermark_offsets(TopicPartition(*place), cached=True)
                consumer.pause([TopicPartition(*place)])
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE_SECONDS:
                raise EndNotReached(f"the broker did not report the end of {topic} within {SILENCE_SECONDS:.0f} s")
    finally:
        consumer.close()
    return ends


def read_starts(config: Mapping[str, Any], topic: str) -> dict[int, int]:
    """The offsets of the first records that a topic still holds, by partition; an empty one's end. Blocks.

    Raises `KafkaException`.
    """
    # The binding has no types for it.
    earliest: Callable[[], Any] = OffsetSpec.earliest
    return {partition: found.offset for partition, found in list_offsets(config, topic, earliest()).items()}


def list_offsets(config: Mapping[str, Any], topic: str, spec: Any) -> dict[int, ListOffsetsResultInfo]:
    """The broker's answer to ListOffsets, by partition; offset and timestamp are -1 if no record fits. Blocks.

    The embedded broker returns wrong ends, see `read_ends`. Raises `KafkaException`.
    """
    admin = AdminClient(dict(config) | QUIET)
    partitions = admin.list_topics(topic, timeout=_BROKER_SECONDS).topics[topic].partitions
    wanted = {TopicPartition(topic, partition): spec for partition in partitions}
    found = admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=_BROKER_SECONDS)
    return {place.partition: future.result() for place, future in found.items()}
