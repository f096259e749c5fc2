"""The copy of a record: what it keeps, and what it says of where it comes from."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from queryd.headers import ReplayHeader, find_traceparent
from queryd.kafka.record import BY_KEY, NewRecord, Record
from replay.spec import HeaderRules

# A copy's trace is its replay's; the record's own is kept beside it, as a link.
_NEVER_KEPT = frozenset({"traceparent", "tracestate"}) | {header.value for header in ReplayHeader}
# A count above this was never counted.
_MOST_DIGITS = 9

Pairs = list[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class Copy:
    """A record to publish. `origin` is the original's traceparent, `was` its query's id if the copy has another."""

    topic: str
    key: bytes | None
    value: bytes | None = field(repr=False)
    headers: Pairs = field(repr=False)
    query_id: str | None
    origin: str | None
    partition: int = BY_KEY
    was: str | None = None

    def to_record(self, traceparent: str) -> NewRecord:
        """The record as it is published, in the trace of the replay."""
        headers = [*self.headers, ("traceparent", traceparent.encode())]
        return NewRecord(self.topic, self.key, self.value, headers, self.partition)


def copy_unchanged(record: Record, replay_id: str, rules: HeaderRules, query_id: str) -> Copy:
    """The same key and value, in the record's partition, whatever its producer's partitioner made of the key."""
    headers = copy_headers(record, replay_id, rules)
    origin = find_traceparent(record.headers)
    return Copy(record.topic, record.key, record.value, headers, query_id, origin, record.partition)


def copy_headers(
    record: Record, replay_id: str, rules: HeaderRules, changed: Mapping[str, str | None] | None = None
) -> Pairs:
    """A record's headers for its copy. `changed` has new values; None removes a header."""
    kept: Pairs = []
    for name, value in record.headers:
        if name.lower() in _NEVER_KEPT or not rules.keeps(name):
            continue
        if changed is None or name not in changed:
            kept.append((name, value))
        elif (new := changed[name]) is not None:
            kept.append((name, new.encode()))
    added = {
        ReplayHeader.ID: replay_id,
        ReplayHeader.COUNT: str(read_number(record, ReplayHeader.COUNT) + 1),
        ReplayHeader.TOPIC: record.topic,
        ReplayHeader.PARTITION: str(record.partition),
        ReplayHeader.OFFSET: str(record.offset),
        ReplayHeader.TIMESTAMP: None if record.timestamp_ms is None else str(record.timestamp_ms),
        ReplayHeader.TRACEPARENT: find_traceparent(record.headers),
    }
    return [*kept, *((name.value, value.encode()) for name, value in added.items() if value is not None)]


def read_number(record: Record, header: str) -> int:
    """A header's number, of the last of that name; 0 if there is none, or no number."""
    text = read_text(record, header) or ""
    # `isdecimal` accepts digits of every script, in any number.
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else 0


def read_text(record: Record, header: str) -> str | None:
    """A header's text, of the last of that name."""
    values = [value for name, value in record.headers if name == header and value is not None]
    return values[-1].decode("utf-8", "replace") if values else None


def make_new_id(replay_id: str, query_id: str) -> str:
    """The id of a copy that is a query of its own: `uuid5(replay_id, query_id)`, the same however often it is made."""
    return str(uuid.uuid5(uuid.UUID(replay_id), query_id))
