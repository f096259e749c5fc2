"""What the kinds of replays have in common: each judges records, and copies those that are to be replayed."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from db.connection import Connection
from queryd.kafka.record import Record
from queryd.registry import URL_VARIABLE
from replay.copies import Copy


class _Described(StrEnum):
    """A value, and a sentence about the records that have it."""

    description: str

    def __new__(cls, value: str, description: str = "") -> "_Described":
        """Each member is written as a pair."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.description = description
        return member


class Skip(_Described):
    """Why a record of the selection is not replayed. The sentence begins with *it*."""

    UNREADABLE = "unreadable", "can't be read"
    NO_REGISTRY = "no_registry", f"is in Confluent's wire format: set {URL_VARIABLE} to read it"
    INVALID = "invalid", "breaks the contract: its dead letter is what can be replayed"
    CONFLICT = "conflict", "has the query_id of another request: its dead letter is what can be replayed"
    DELETED = "deleted", "belongs to a query that was deleted for good"
    PARKED = "parked", "was sent again as often as --max-redrives allows"
    REDRIVEN = "redriven", "was sent again before, under an id of its own"
    FOREIGN = "foreign", "is no dead letter of queryd's"
    SUPERSEDED = "superseded", "is not its query's last event"
    UNFINISHED = "unfinished", "belongs to a query that is not finished"
    REPEATED = "repeated", "lies in the window before"
    TOO_LARGE = "too_large", "would be larger than its topic takes"
    CHANGED = "changed", "would no longer be replayed as it was planned: look at it, and plan again"


class Note(_Described):
    """What becomes of a copy, as far as it is known. The sentence begins with the number of copies."""

    FINISHED = "finished", "of finished queries: nothing changes"
    IN_WORK = "in_work", "of queries that wait or run: nothing changes"
    UNKNOWN = "unknown", "of queries that were never accepted: these run"
    AS_NEW = "as_new", "as queries of their own: these run"
    OWN_ID = "own_id", "under their own id"
    NEW_ID = "new_id", "under a new id, for theirs is taken"
    LAST_EVENT = "last_event", "last events, byte for byte"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A record judged: its copy, or why there is none. A record without both was not asked for."""

    record: Record
    copy: Copy | None = None
    note: Note | None = None
    skip: Skip | None = None


# One pass over a window; records come in order by partition. A judge that returns copies of what may change holds it in
# the connection's transaction.
Judge = Callable[[Connection, Sequence[Record]], Awaitable[list[Verdict]]]


async def judge_records(judge: Judge, connection: Connection, records: Sequence[Record]) -> list[Verdict]:
    """Verdicts in the records' order. A record whose headers the client can't read can't be copied."""
    readable = [record for record in records if record.has_headers]
    verdicts = iter(await judge(connection, readable) if readable else [])
    return [next(verdicts) if record.has_headers else Verdict(record, skip=Skip.UNREADABLE) for record in records]


@dataclass(slots=True)
class Tally:
    """Verdicts counted."""

    notes: Counter[Note] = field(default_factory=Counter)
    skipped: Counter[Skip] = field(default_factory=Counter)

    @classmethod
    def read(cls, counts: Mapping[str, Any]) -> "Tally":
        """What `to_json` has written."""
        notes = Counter({Note(name): count for name, count in counts.get("notes", {}).items()})
        return cls(notes, Counter({Skip(name): count for name, count in counts.get("skipped", {}).items()}))

    @property
    def copies(self) -> int:
        """How many copies there are."""
        return self.notes.total()

    def add(self, verdicts: Iterable[Verdict]) -> None:
        """Count them."""
        for verdict in verdicts:
            if verdict.note is not None:
                self.notes[verdict.note] += 1
            if verdict.skip is not None:
                self.skipped[verdict.skip] += 1

    def to_json(self) -> dict[str, dict[str, int]]:
        """Notes and reasons with their counts."""
        return {
            "notes": {note.value: count for note, count in self.notes.items()},
            "skipped": {skip.value: count for skip, count in self.skipped.items()},
        }
