"""A replay under way: batch by batch judged, published, acknowledged and noted."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.connection import unavailable_told_apart
from db.data.replays import Replay, ReplayStatus, check_hold
from queryd.headers import continue_trace
from queryd.kafka.record import Partition, Record
from queryd.topics import TopicIdentity
from replay.copies import HeaderRules
from replay.journal import Journal, ReplayRefused
from replay.kinds import Note, ReplayKind, Skip, Verdict, judge_records
from replay.log import OffsetRange, Window, open_reader, read_batches
from replay.marks import Marks
from replay.outlet import Outlet
from replay.pace import LagGuard, TokenBucket
from replay.plan import Plan, describe_asked, describe_topics, judge_ranges
from replay.selection import Selection
from telemetry.traces import SpanName, linked_spans

# What is sent between two checkpoints, and so what a crash may send again.
BATCH = 500
# How often to look whether live traffic has caught up, or somebody has asked for the end.
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it has come: copies published of those planned, and how many records wait where it is held back."""

    published: int
    planned: int
    behind: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended, or `ACTIVE` where it was stopped and can be resumed. `counts` are as in its row."""

    status: ReplayStatus
    counts: Mapping[str, Any]


def describe_plan(
    plan: Plan, kind: ReplayKind, window: Window, selection: Selection, headers: HeaderRules
) -> dict[str, Any]:
    """The plan as it stands in the replay's row: all that is needed to go on, and for whoever audits it."""
    return {
        "hash": plan.hash,
        "asked": describe_asked(window, selection, headers),
        "options": dict(kind.options),
        "topics": describe_topics(plan.pinned.topics),
        "ranges": [[each.range.topic, each.range.partition, each.range.start, each.range.end] for each in plan.ranges],
        "marks": [each.marks.dump() for each in plan.ranges],
        "matched": plan.matched,
        "notes": {note.value: count for note, count in plan.notes.items()},
        "skipped": {skip.value: count for skip, count in plan.skipped.items()},
    }


def read_ranges(replay: Replay) -> list[OffsetRange]:
    """The ranges of a plan in a replay's row."""
    return [OffsetRange(*each) for each in replay.plan["ranges"]]


def read_marks(replay: Replay) -> dict[Partition, Marks]:
    """The records that a plan in a replay's row means."""
    ranges = read_ranges(replay)
    return {
        (each.topic, each.partition): Marks.load(each, text)
        for each, text in zip(ranges, replay.plan["marks"], strict=True)
    }


def check_topics(replay: Replay, topics: Mapping[str, TopicIdentity]) -> None:
    """Raises `ReplayRefused` where a topic is not the one that was planned for."""
    now = describe_topics(topics)
    for topic, identity in replay.plan["topics"].items():
        if now.get(topic) != identity:
            raise ReplayRefused(
                f"{topic} is not the topic that replay {replay.id} was planned for: it was made anew, or is another "
                "cluster's. What it was about is gone; cancel it if it has not ended, and plan again"
            )


async def list_pairs(
    journal: Journal, config: dict[str, Any], kind: ReplayKind, replay: Replay
) -> list[tuple[str, str]]:
    """The queries of a replay as new ones, each with its copy's id, found out by another pass over its ranges.

    Raises as `Replayer.run`.
    """
    pairs: list[tuple[str, str]] = []
    marks = read_marks(replay)
    async for verdicts in judge_ranges(journal.connection, config, kind.begin(), read_ranges(replay)):
        copies = [verdict.copy for verdict in verdicts if _is_marked(marks, verdict.record)]
        pairs += [(each.was, each.query_id) for each in copies if each is not None and each.was and each.query_id]
    return pairs


def _is_marked(marks: Mapping[Partition, Marks], record: Record) -> bool:
    return marks[record.topic, record.partition].holds(record.offset)


# What may happen to a planned record meanwhile, without anything being wrong.
_EXPECTED = frozenset({Skip.REDRIVEN, Skip.DELETED, Skip.SUPERSEDED, Skip.TOO_LARGE})


def _hold_to_plan(verdict: Verdict, *, planned: bool) -> Verdict:
    """Only what was planned is sent; what was planned and is judged otherwise now says so."""
    if not planned:
        return Verdict(verdict.record, skip=verdict.skip)
    if verdict.copy is None and verdict.skip not in _EXPECTED:
        return Verdict(verdict.record, skip=Skip.CHANGED)
    return verdict


class Replayer:
    """Carries out one replay that the journal holds. `run` returns at its end, or once it has been asked to stop."""

    def __init__(
        self,
        journal: Journal,
        outlet: Outlet,
        config: dict[str, Any],
        kind: ReplayKind,
        *,
        rate: float,
        guard: LagGuard,
        told: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        """`rate` in records a second; `told` hears of progress."""
        self._journal = journal
        self._outlet = outlet
        self._config = config
        self._kind = kind
        self._bucket = TokenBucket(rate)
        # A second's worth at most: the rows that a batch holds are held no longer than that.
        self._batch = max(1, min(BATCH, int(rate)))
        self._guard = guard
        self._told = told
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._stopping.set()

    async def run(self, replay: Replay) -> Outcome:
        """From the replay's checkpoint to its end.

        Raises `ReplayRefused`, `LogChanged`, `NotDelivered`, `EndNotReached`, `KafkaException` and
        `DatabaseUnavailable`; it can be resumed then.
        """
        done, marks = _Done.read(replay), read_marks(replay)
        if replay.status == ReplayStatus.CANCELLING:
            return await self._leave(replay, done, ReplayStatus.CANCELLING)
        judge = self._kind.begin()
        starts = {} if self._kind.follows_all else done.positions
        planned = int(replay.plan["matched"])
        self._told(Progress(done.published, planned, None))
        ranges = read_ranges(replay)
        with open_reader(self._config, ranges, starts) as reader:
            async for records in read_batches(reader, ranges, self._batch):
                status = await self._hold_back(replay, done, planned)
                if status is not ReplayStatus.ACTIVE or self._stopping.is_set():
                    return await self._leave(replay, done, status)
                with unavailable_told_apart():
                    async with self._journal.connection.transaction():
                        verdicts = [
                            _hold_to_plan(each, planned=_is_marked(marks, each.record))
                            for each in await judge_records(judge, self._journal.connection, records)
                            if not done.covers(each.record)
                        ]
                        sent = await self._publish(verdicts)
                done.add(sent)
                done.move(reader.positions)
                status = await self._save(replay, done)
                self._told(Progress(done.published, planned, None))
                if status is not ReplayStatus.ACTIVE:
                    return await self._leave(replay, done, status)
        await self._journal.end(replay.id, ReplayStatus.DONE, done.counts())
        return Outcome(ReplayStatus.DONE, done.counts())

    async def _publish(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """All copies, acknowledged; the verdicts as they are then. Raises `NotDelivered`."""
        copies = [verdict.copy for verdict in verdicts if verdict.copy is not None]
        if not copies:
            return list(verdicts)
        await self._bucket.take(len(copies))
        with linked_spans(SpanName.REPLAY, [each.origin for each in copies]) as traceparents:
            records = [
                each.to_record(traceparent or continue_trace(None))
                for each, traceparent in zip(copies, traceparents, strict=True)
            ]
            taken = iter(await self._outlet.publish(records, self._check_hold))
        return [
            verdict if verdict.copy is None or next(taken) else Verdict(verdict.record, skip=Skip.TOO_LARGE)
            for verdict in verdicts
        ]

    async def _check_hold(self) -> None:
        """Raises `DatabaseUnavailable` where the connection is gone, and with it what it held."""
        with unavailable_told_apart():
            await check_hold(self._journal.connection)

    async def _hold_back(self, replay: Replay, done: "_Done", planned: int) -> ReplayStatus:
        """Wait while live traffic suffers; the replay's status then."""
        status = ReplayStatus.ACTIVE
        while status is ReplayStatus.ACTIVE and not self._stopping.is_set() and await self._guard.suffers():
            self._told(Progress(done.published, planned, self._guard.behind))
            status = await self._save(replay, done)
            try:
                await asyncio.wait_for(self._stopping.wait(), _LOOK_SECONDS)
            except TimeoutError:
                continue
        return status

    async def _save(self, replay: Replay, done: "_Done") -> ReplayStatus:
        status = await self._journal.save(replay.id, done.checkpoint(), done.counts())
        if status is None:
            raise ReplayRefused(f"replay {replay.id} is no longer there: its org or user was deleted")
        return status

    async def _leave(self, replay: Replay, done: "_Done", status: ReplayStatus) -> Outcome:
        if status is ReplayStatus.CANCELLING:
            await self._journal.end(replay.id, ReplayStatus.CANCELLED, done.counts())
            return Outcome(ReplayStatus.CANCELLED, done.counts())
        return Outcome(status, done.counts())


@dataclass(slots=True)
class _Done:
    """What is behind us: positions by partition, and counts."""

    positions: dict[Partition, int]
    notes: Counter[Note]
    skipped: Counter[Skip]

    @classmethod
    def read(cls, replay: Replay) -> "_Done":
        positions = {}
        for name, offset in replay.checkpoint.items():
            topic, _, partition = name.rpartition("/")
            positions[topic, int(partition)] = int(offset)
        notes = Counter({Note(name): count for name, count in replay.counts.get("notes", {}).items()})
        skipped = Counter({Skip(name): count for name, count in replay.counts.get("skipped", {}).items()})
        return cls(positions, notes, skipped)

    @property
    def published(self) -> int:
        return self.notes.total()

    def covers(self, record: Record) -> bool:
        """Whether an earlier process has dealt with the record."""
        return record.offset < self.positions.get((record.topic, record.partition), 0)

    def add(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            if verdict.note is not None:
                self.notes[verdict.note] += 1
            if verdict.skip is not None:
                self.skipped[verdict.skip] += 1

    def move(self, positions: Mapping[Partition, int]) -> None:
        for place, offset in positions.items():
            self.positions[place] = max(offset, self.positions.get(place, 0))

    def checkpoint(self) -> dict[str, int]:
        return {f"{topic}/{partition}": offset for (topic, partition), offset in self.positions.items()}

    def counts(self) -> dict[str, Any]:
        return {
            "published": self.published,
            "notes": {note.value: count for note, count in self.notes.items()},
            "skipped": {skip.value: count for skip, count in self.skipped.items()},
        }
