"""A record of `query.status`, understood: a query's event, or its deletion."""

from collections.abc import Callable
from dataclasses import dataclass, field

from queryd.codec import InvalidEvent, NoRegistry, Undecodable, decode_status
from queryd.events import Invalid, QueryId, QueryStatusChanged, parse_uuid
from queryd.headers import ReplayHeader
from queryd.kafka.record import Record


class Unreadable(ValueError):
    """A record that holds no event: queryd's relay did not write it. The sentence quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class StatusRecord:
    """One record. `event` is None for a tombstone: the query was deleted for good, and its data must go."""

    query_id: QueryId
    event: QueryStatusChanged | None
    record: Record = field(repr=False)

    @property
    def replay_id(self) -> str | None:
        """The replay that published it again; None for the story as it happened."""
        for name, value in self.record.headers:
            if name == ReplayHeader.ID and value is not None:
                return value.decode("ascii", "replace")
        return None


def read_status(record: Record) -> StatusRecord:
    """What a record says; raises `Unreadable`, and `NoRegistry` for what this process lacks a setting to read."""
    try:
        if record.value is None:
            return StatusRecord(_read_key(record), None, record)
        event = decode_status(record.value)
    except NoRegistry:
        # An event of queryd's: who passed over it would lose it.
        raise
    except (Undecodable, InvalidEvent, Invalid) as error:
        raise Unreadable(str(error)) from None
    return StatusRecord(event.query_id, event, record)


def read_all(records: list[Record], unreadable: Callable[[Record, str], None]) -> list[StatusRecord]:
    """What the records say; those that hold no event are told to `unreadable`, with the reason, and passed over."""
    read = []
    for record in records:
        try:
            read.append(read_status(record))
        except Unreadable as error:
            unreadable(record, str(error))
    return read


def _read_key(record: Record) -> QueryId:
    return QueryId(parse_uuid((record.key or b"").decode("ascii", "replace"), "the key"))
