"""A record as received from Kafka, and one to be produced."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

_log = logging.getLogger("queryd.kafka.record")

# librdkafka's value for a partition that its partitioner chooses by the key.
BY_KEY = -1

Partition = tuple[str, int]
Headers = Sequence[tuple[str, str | bytes | None]]


class NewRecord(NamedTuple):
    """A record to be produced. `partition` is `BY_KEY`, or fixed."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    partition: int = BY_KEY


@dataclass(frozen=True, slots=True)
class Record:
    """One record as received. Times: `timestamp_ms` since the epoch, `polled_at` on this process's monotonic clock.

    `epoch` numbers the assignment that delivered it. `has_headers` is False if the headers can't be read.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None = field(repr=False)
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp_ms: int | None
    appended_by_broker: bool
    polled_at: float
    epoch: int
    has_headers: bool = True

    @property
    def size(self) -> int:
        """Bytes of key and value."""
        return len(self.key or b"") + len(self.value or b"")


def to_record(message: Message, epoch: int = 0) -> Record:
    """The record of a message that is no error."""
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None and partition is not None and offset is not None
    kind, millis = message.timestamp()
    headers = _read_headers(message)
    return Record(
        topic=topic,
        partition=partition,
        offset=offset,
        key=_to_bytes(message.key()),
        value=_to_bytes(message.value()),
        headers=headers or (),
        timestamp_ms=millis if millis >= 0 else None,
        appended_by_broker=kind == TIMESTAMP_LOG_APPEND_TIME,
        polled_at=time.monotonic(),
        epoch=epoch,
        has_headers=headers is not None,
    )


def _read_headers(message: Message) -> tuple[tuple[str, bytes | None], ...] | None:
    """None if a name is not UTF-8, which the binding can't decode. Key and value contain all that matters."""
    try:
        headers: Any = message.headers() or ()
    except (SystemError, UnicodeError):
        where = {"topic": message.topic(), "partition": message.partition(), "offset": message.offset()}
        _log.warning("can't read a record's headers; continuing without them", extra=where)
        return None
    return tuple((name, _to_bytes(value)) for name, value in headers)


def _to_bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
