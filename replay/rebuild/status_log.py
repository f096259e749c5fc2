"""The status topic as a rebuild reads it: by assignment and without a group, so that nobody else's reading changes."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from producers.read_back import SILENCE_SECONDS, EndNotReached
from queryd.events import Topic
from queryd.outages import QUIET
from queryd.subscription import Record

# How many records are taken at once, and how long is waited for the first of them.
_AT_ONCE = 1_000
_LOOK_SECONDS = 0.1
# A record that the projector has read is there to be read, so that it comes with the next fetch; while it is waited for
# the projector waits too.
_CATCH_UP_SECONDS = 5.0

_READING = {
    # Never joined and never committed to: librdkafka wants a name.
    "group.id": "queryd-rebuild",
    "enable.auto.commit": False,
    "enable.partition.eof": True,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    # Bounds of the prefetch, as every subscription of ours has them.
    "queued.max.messages.kbytes": 16_384,
    "fetch.max.bytes": 8_388_608,
}


class LogChanged(Exception):
    """What was to be read is no longer in the log."""


class StatusLog:
    """The committed records of the status topic from `starts` by partition, each partition's in order.

    Blocks; one thread at a time. Use it as a context manager, whose end ends what is being read.
    """

    def __init__(self, config: dict[str, Any], starts: Mapping[int, int]) -> None:
        # The offset behind the last record that was handed over; a partition of which none was is left out.
        self.positions: dict[int, int] = {}
        # How far the broker has said that there is nothing to hand over: markers, holes, and the end count.
        self._told: dict[int, int] = {}
        self._starts = dict(starts)
        self._closed = False
        # A cancelled read leaves its thread behind for a moment: the consumer must not be closed under it.
        self._turn = threading.Lock()
        self._consumer = Consumer(config | QUIET | _READING)
        self._consumer.assign([TopicPartition(Topic.STATUS, partition, first) for partition, first in starts.items()])

    def __enter__(self) -> "StatusLog":
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._closed = True
            self._consumer.close()

    def read_to_end(self) -> Iterator[list[Record]]:
        """Batches of records until each partition's end has been met once; what is written meanwhile may be among them.

        The end is what comes with the broker's answer to a fetch. Raises `EndNotReached`, `LogChanged`,
        `KafkaException`.
        """
        return self._read(lambda: self._told.keys() >= self._starts.keys(), SILENCE_SECONDS)

    def read_up_to(self, offsets: Mapping[int, int]) -> Iterator[list[Record]]:
        """Batches of records until those before `offsets`, by partition, have been handed over. Raises as
        `read_to_end`, and within seconds."""
        return self._read(
            lambda: all(
                max(self.positions.get(partition, 0), self._told.get(partition, 0)) >= offset
                for partition, offset in offsets.items()
            ),
            _CATCH_UP_SECONDS,
        )

    def _read(self, done: Callable[[], bool], patience_seconds: float) -> Iterator[list[Record]]:
        heard = time.monotonic()
        while not done():
            with self._turn:
                if self._closed:
                    return
                # One poll for the first, then what is already here: `consume` alone waits until it has them all.
                first = self._consumer.poll(_LOOK_SECONDS)
                messages = [] if first is None else [first, *self._consumer.consume(_AT_ONCE - 1, 0)]
            if records := [record for message in messages if (record := self._receive(message)) is not None]:
                yield records
            if messages:
                heard = time.monotonic()
            elif time.monotonic() - heard > patience_seconds:
                raise EndNotReached(f"{Topic.STATUS} could not be read to its end")

    def _receive(self, message: Message) -> Record | None:
        error, partition, offset = message.error(), message.partition(), message.offset()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            _judge(error)
            return None
        assert partition is not None and offset is not None
        if error is not None:
            self._told[partition] = offset
            return None
        self.positions[partition] = offset + 1
        return Record(
            topic=Topic.STATUS,
            partition=partition,
            offset=offset,
            key=_bytes(message.key()),
            value=_bytes(message.value()),
            # What a query's row says is in the event alone.
            headers=(),
            timestamp_ms=None,
            appended_by_broker=False,
            polled_at=0.0,
            epoch=0,
        )


def _judge(error: KafkaError) -> None:
    """Raise for what librdkafka does not mend by itself."""
    if error.code() == KafkaError._AUTO_OFFSET_RESET:
        raise LogChanged(f"{Topic.STATUS} has changed while it was read: plan again")
    if error.fatal() or error.code() == KafkaError._FATAL:
        raise KafkaException(error)


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
