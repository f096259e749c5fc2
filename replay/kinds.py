"""What the kinds of replays have in common: each judges records, and makes copies of those that are to be replayed."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from db.connection import Connection
from queryd.kafka.record import Record
from queryd.registry import URL_VARIABLE
from replay.copies import Copy


class ReplayName(StrEnum):
    """What is replayed; also the scope on which one replay at a time is active."""

    REQUESTS = "requests"
    DEAD_LETTERS = "dead-letters"
    STATUS = "status"
    STATE_DB = "state-db"


class Skip(StrEnum):
    """Why a record of the selection is not replayed."""

    UNREADABLE = "unreadable"
    NO_REGISTRY = "no_registry"
    INVALID = "invalid"
    CONFLICT = "conflict"
    DELETED = "deleted"
    PARKED = "parked"
    REDRIVEN = "redriven"
    FOREIGN = "foreign"
    SUPERSEDED = "superseded"
    UNFINISHED = "unfinished"
    REPEATED = "repeated"
    TOO_LARGE = "too_large"
    CHANGED = "changed"


SKIP_REASONS: Mapping[Skip, str] = {
    Skip.UNREADABLE: "can't be read",
    Skip.NO_REGISTRY: f"is in Confluent's wire format: set {URL_VARIABLE} to read it",
    Skip.INVALID: "breaks the contract: its dead letter is what can be replayed",
    Skip.CONFLICT: "has the query_id of another request: its dead letter is what can be replayed",
    Skip.DELETED: "belongs to a query that was deleted for good",
    Skip.PARKED: "was sent again as often as --max-redrives allows",
    Skip.REDRIVEN: "was sent again before, under an id of its own",
    Skip.FOREIGN: "is no dead letter of queryd's",
    Skip.SUPERSEDED: "is not its query's last event",
    Skip.UNFINISHED: "belongs to a query that is not finished",
    Skip.REPEATED: "lies in the window before",
    Skip.TOO_LARGE: "would be larger than its topic takes",
    Skip.CHANGED: "would no longer be replayed as it was planned: look at it, and plan again",
}


class Note(StrEnum):
    """What becomes of a copy, as far as it is known."""

    FINISHED = "finished"
    IN_WORK = "in_work"
    UNKNOWN = "unknown"
    AS_NEW = "as_new"
    OWN_ID = "own_id"
    NEW_ID = "new_id"
    LAST_EVENT = "last_event"


NOTES: Mapping[Note, str] = {
    Note.FINISHED: "of finished queries: nothing changes",
    Note.IN_WORK: "of queries that wait or run: nothing changes",
    Note.UNKNOWN: "of queries that were never accepted: these run",
    Note.AS_NEW: "as queries of their own: these run",
    Note.OWN_ID: "under their own id",
    Note.NEW_ID: "under a new id, for theirs is taken",
    Note.LAST_EVENT: "last events, byte for byte",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A record judged: its copy, or why there is none. Neither says that it was not meant at all."""

    record: Record
    copy: Copy | None = None
    note: Note | None = None
    skip: Skip | None = None


# One pass over a window; records come in order by partition.
Judge = Callable[[Connection, Sequence[Record]], Awaitable[list[Verdict]]]


async def judge_records(judge: Judge, connection: Connection, records: Sequence[Record]) -> list[Verdict]:
    """Verdicts in the records' order. One whose headers are beyond the client can't be copied, whatever it is."""
    legible = [record for record in records if record.has_headers]
    verdicts = iter(await judge(connection, legible) if legible else [])
    return [next(verdicts) if record.has_headers else Verdict(record, skip=Skip.UNREADABLE) for record in records]


class ReplayKind(Protocol):
    """What is replayed, and how."""

    @property
    def name(self) -> ReplayName:
        """Its name."""
        ...

    @property
    def topics(self) -> Sequence[str]:
        """Where its records lie."""
        ...

    @property
    def follows_all(self) -> bool:
        """True where a pass must see its window from the beginning, even to go on in the middle."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """What else makes it another plan: JSON, without SQL or values."""
        ...

    def begin(self) -> Judge:
        """A new pass. Where records must stay as they are judged until they are sent, the judge holds them in the
        connection's transaction."""
        ...
