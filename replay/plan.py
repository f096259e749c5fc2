"""The plan: what a replay would do, found out without doing it."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from db.connection import Connection, unavailable_told_apart
from queryd.kafka.record import Partition
from queryd.topics import TopicIdentity
from replay.copies import HeaderRules
from replay.kinds import SKIP_REASONS, Judge, Note, ReplayKind, Skip, Verdict, judge_records
from replay.log import OffsetRange, Pinned, Window, open_reader, pin, read_batches
from replay.marks import Marks
from replay.selection import Selection

# As the executor takes them: a batch is one look into the database of some milliseconds.
_BATCH = 500
_FIRST_IDS = 5
# Enough to tell two plans apart by accident; short enough to be typed.
_HASH_DIGITS = 16
_NOT_ASKED: tuple[object, ...] = (None, frozenset())


class NothingMatches(ValueError):
    """There is nothing to be replayed; the sentence says what was looked at."""


class PlanStale(ValueError):
    """What would be replayed now is not what was planned: plan again."""


@dataclass(frozen=True, slots=True)
class RangePlan:
    """What lies in one range: records that match, and which those are, and such as are skipped."""

    range: OffsetRange
    matched: int
    skipped: int
    marks: Marks


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be published, by `matched`, and what of it is known, by `notes`; what would be skipped, and why.

    `scanned` records were read in all; those that are neither were not asked for. `first_ids` are those of the records,
    not of copies with other ids. `hash` stands for all of that but the
    notes, which change by themselves.
    """

    kind: str
    hash: str
    pinned: Pinned
    ranges: tuple[RangePlan, ...]
    scanned: int
    matched: int
    notes: Mapping[Note, int]
    skipped: Mapping[Skip, int]
    first_ids: tuple[str, ...]


@dataclass(slots=True)
class Tally:
    """Verdicts counted."""

    scanned: int = 0
    notes: Counter[Note] = field(default_factory=Counter)
    skipped: Counter[Skip] = field(default_factory=Counter)

    @property
    def matched(self) -> int:
        """How many copies there are."""
        return self.notes.total()

    def add(self, verdict: Verdict) -> None:
        """One more."""
        self.scanned += 1
        if verdict.note is not None:
            self.notes[verdict.note] += 1
        if verdict.skip is not None:
            self.skipped[verdict.skip] += 1


async def plan(
    connection: Connection,
    config: dict[str, Any],
    kind: ReplayKind,
    window: Window,
    selection: Selection,
    headers: HeaderRules,
    told: Callable[[int, int], None] = lambda _read, _all: None,
) -> Plan:
    """Find out what a replay would do. `told` hears how many offsets of how many were read.

    Raises `WindowRefused`, `NothingMatches`, `PatchRefused`, `TopicUnknown`, `EndNotReached` and `DatabaseUnavailable`.
    """
    judge = kind.begin()
    pinned = await asyncio.to_thread(pin, config, kind.topics, window)
    total, by_place = Tally(), {(each.topic, each.partition): Tally() for each in pinned.ranges}
    digests = {place: hashlib.sha256() for place in by_place}
    marks = {(each.topic, each.partition): Marks.of(each) for each in pinned.ranges}
    first_ids: list[str] = []
    offsets = sum(each.end - each.start for each in pinned.ranges)
    async for verdicts in judge_ranges(connection, config, judge, pinned.ranges):
        for verdict in verdicts:
            place = verdict.record.topic, verdict.record.partition
            total.add(verdict)
            by_place[place].add(verdict)
            if verdict.copy is not None:
                digests[place].update(f"{verdict.record.offset}\n".encode())
                marks[place].add(verdict.record.offset)
                if len(first_ids) < _FIRST_IDS:
                    first_ids.append(verdict.copy.was or verdict.copy.query_id or "unreadable")
        told(total.scanned, offsets)
    if not total.matched:
        raise NothingMatches(_describe_nothing(total))
    return Plan(
        kind=kind.name,
        hash=_hash(
            kind, pinned, window, selection, headers, {place: each.hexdigest() for place, each in digests.items()}
        ),
        pinned=pinned,
        ranges=tuple(
            RangePlan(each, by_place[place].matched, by_place[place].skipped.total(), marks[place])
            for each, place in ((each, (each.topic, each.partition)) for each in pinned.ranges)
        ),
        scanned=total.scanned,
        matched=total.matched,
        notes=dict(total.notes),
        skipped=dict(total.skipped),
        first_ids=tuple(first_ids),
    )


async def judge_ranges(
    connection: Connection, config: dict[str, Any], judge: Judge, ranges: Sequence[OffsetRange]
) -> AsyncIterator[list[Verdict]]:
    """All records of the ranges judged, batch by batch, and nothing sent. Raises as `plan`."""
    with open_reader(config, ranges, {}) as reader:
        async for records in read_batches(reader, ranges, _BATCH):
            with unavailable_told_apart():
                verdicts = await judge_records(judge, connection, records)
            yield verdicts


def describe_asked(window: Window, selection: Selection, headers: HeaderRules) -> dict[str, Any]:
    """What was asked for, as JSON; `read_asked` reads it."""
    return {
        "window": {name: _to_json(value) for name, value in asdict(window).items() if value not in _NOT_ASKED},
        "selection": {name: _to_json(value) for name, value in asdict(selection).items() if value not in _NOT_ASKED},
        "headers": {name: _to_json(value) for name, value in asdict(headers).items() if value not in _NOT_ASKED},
    }


def read_asked(asked: Mapping[str, Any]) -> tuple[Window, Selection, HeaderRules]:
    """What `describe_asked` has written."""
    window: dict[str, Any] = {
        name: datetime.fromisoformat(value) if name in ("since", "until") else _from_json(value)
        for name, value in asked["window"].items()
    }
    selection = {name: _from_json(value) for name, value in asked["selection"].items()}
    headers = {name: _from_json(value) for name, value in asked["headers"].items()}
    return Window(**window), Selection(**selection), HeaderRules(**headers)


def describe_topics(topics: Mapping[str, TopicIdentity]) -> dict[str, str]:
    """Each topic's identity as one text."""
    return {topic: f"{identity.cluster_id}/{identity.topic_id}" for topic, identity in topics.items()}


def _hash(
    kind: ReplayKind,
    pinned: Pinned,
    window: Window,
    selection: Selection,
    headers: HeaderRules,
    matches: Mapping[Partition, str],
) -> str:
    """The records that match are in it by their offsets, and not where the scan ended: new records that are not asked
    for leave a plan as good as it was."""
    return _digest(
        {
            "kind": kind.name.value,
            "options": dict(kind.options),
            "asked": describe_asked(window, selection, headers),
            "topics": describe_topics(pinned.topics),
            "matches": sorted((*place, digest) for place, digest in matches.items()),
        }
    )[:_HASH_DIGITS]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, frozenset):
        return sorted(list(each) if isinstance(each, tuple) else each for each in value)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return frozenset(tuple(each) if isinstance(each, list) else each for each in value)
    return value


def _describe_nothing(total: Tally) -> str:
    if not total.scanned:
        return "there are no records in these partitions at that time: look at the times"
    if not total.skipped:
        return f"none of the {total.scanned} records that were read lies in the window and is asked for: look at both"
    why = ", ".join(f"{count} {skip.value} (it {SKIP_REASONS[skip]})" for skip, count in sorted(total.skipped.items()))
    return f"nothing of the {total.scanned} records that were read can be replayed: {why}"
