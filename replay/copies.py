"""The copy of a record: what it keeps, what it loses, and what it says of where it comes from."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from queryd.headers import ReplayHeader, find_traceparent
from queryd.kafka.record import NewRecord, Record

# A copy's trace is its replay's; the record's own is kept beside it, as a link.
_TRACE = frozenset({"traceparent", "tracestate"})
_OURS = frozenset(header.value for header in ReplayHeader)

Pairs = list[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """Which of a record's headers its copy keeps: all but `denied`, or, where any is named, only those `allowed`.
    Names are compared without regard to case."""

    allowed: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()

    def keeps(self, name: str) -> bool:
        """Whether a header of that name stays."""
        lower = name.lower()
        if lower in _TRACE or lower in _OURS or lower in self.denied:
            return False
        return not self.allowed or lower in self.allowed


@dataclass(frozen=True, slots=True)
class Copy:
    """A record to be published. `origin` is its own traceparent, `was` its
    query's id where the copy has another."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None = field(repr=False)
    headers: Pairs = field(repr=False)
    query_id: str | None
    origin: str | None
    was: str | None = None

    def to_record(self, traceparent: str) -> NewRecord:
        """The record as it is published, in the trace of the replay."""
        headers = [*self.headers, ("traceparent", traceparent.encode())]
        return NewRecord(self.topic, self.key, self.value, headers, self.partition)


def copy_as_it_is(record: Record, replay_id: str, rules: HeaderRules, query_id: str) -> Copy:
    """The same key and value, to where the record was, whatever its producer's partitioner made of the key."""
    return Copy(
        topic=record.topic,
        partition=record.partition,
        key=record.key,
        value=record.value,
        headers=copy_headers(record, replay_id, rules),
        query_id=query_id,
        origin=find_traceparent(record.headers),
    )


def copy_headers(
    record: Record, replay_id: str, rules: HeaderRules, changed: Mapping[str, str | None] | None = None
) -> Pairs:
    """A record's headers for its copy. `changed` are such that get another value, or none and so go."""
    changes = changed or {}
    kept: Pairs = []
    for name, value in record.headers:
        if not rules.keeps(name):
            continue
        if name in changes:
            told = changes[name]
            if told is not None:
                kept.append((name, told.encode()))
        else:
            kept.append((name, value))
    said = {
        ReplayHeader.ID: replay_id,
        ReplayHeader.COUNT: str(count_replays(record) + 1),
        ReplayHeader.TOPIC: record.topic,
        ReplayHeader.PARTITION: str(record.partition),
        ReplayHeader.OFFSET: str(record.offset),
    }
    if record.timestamp_ms is not None:
        said[ReplayHeader.TIMESTAMP] = str(record.timestamp_ms)
    if (traceparent := find_traceparent(record.headers)) is not None:
        said[ReplayHeader.TRACEPARENT] = traceparent
    return [*kept, *((name.value, value.encode()) for name, value in said.items())]


def count_replays(record: Record) -> int:
    """How often the record was replayed before it lay here."""
    return read_number(record, ReplayHeader.COUNT)


def read_number(record: Record, header: str) -> int:
    """A header's number, of the last of that name; 0 where there is none, or no number."""
    values = [value for name, value in record.headers if name == header and value is not None]
    text = values[-1].decode("ascii", "replace") if values else ""
    # `isdecimal` knows digits of every script, and as many as you like.
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else 0


def read_text(record: Record, header: str) -> str | None:
    """A header's text, of the last of that name."""
    values = [value for name, value in record.headers if name == header and value is not None]
    return values[-1].decode("utf-8", "replace") if values else None


def mint(replay_id: str, name: str) -> str:
    """The id of a copy that is a query of its own: `uuid5(replay_id, query_id)`, the same however often it is made."""
    return str(uuid.uuid5(uuid.UUID(replay_id), name))


# A count above this was never counted.
_MOST_DIGITS = 9
