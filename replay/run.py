"""A replay under way: batch by batch judged, published, acknowledged, and written to its checkpoint."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.data.replays import Replay, ReplayStatus, check_hold
from queryd.headers import continue_trace
from queryd.kafka.record import Partition, Record
from replay.journal import Journal
from replay.kinds import Judge, Skip, Tally, Verdict, judge_records
from replay.log import open_reader, read_batches
from replay.marks import Marks
from replay.outlet import Outlet
from replay.pace import LagGuard, TokenBucket
from replay.plan import BATCH, read_marks, read_ranges
from replay.spec import ReplayName
from telemetry.traces import SpanName, linked_spans

# How often to look whether live traffic has caught up, or the replay was cancelled.
_LOOK_SECONDS = 1.0

# What may happen to a planned record meanwhile, without anything being wrong.
_EXPECTED = frozenset({Skip.REDRIVEN, Skip.DELETED, Skip.SUPERSEDED, Skip.TOO_LARGE})

# Receives the copies published, those planned, and how many records of live traffic wait if the replay waits for them.
OnPublished = Callable[[int, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended, or `ACTIVE` if it was stopped and can be resumed. `counts` are those of its row."""

    status: ReplayStatus
    counts: Mapping[str, Any]


class Replayer:
    """Carries out one replay that the journal has locked. `run` returns at its end, or once it was asked to stop."""

    def __init__(
        self,
        journal: Journal,
        replay: Replay,
        judge: Judge,
        outlet: Outlet,
        kafka: dict[str, Any],
        *,
        rate: float,
        guard: LagGuard,
        on_progress: OnPublished,
    ) -> None:
        """`rate` in records a second."""
        self._journal = journal
        self._replay = replay
        self._judge = judge
        self._outlet = outlet
        self._kafka = kafka
        self._bucket = TokenBucket(rate)
        # A second's worth at most: the rows that a batch locks are locked no longer than that.
        self._batch = max(1, min(BATCH, int(rate)))
        self._guard = guard
        self._on_progress = on_progress
        self._stopping = asyncio.Event()
        self._tally = Tally.read(replay.counts)
        self._positions = _read_positions(replay.checkpoint)
        self._marks = read_marks(replay)

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._stopping.set()

    async def run(self) -> Outcome:
        """From the replay's checkpoint to its end.

        Raises `ReplayRefused`, `LogChanged`, `NotDelivered`, `EndNotReached`, `KafkaException` and
        `DatabaseUnavailable`; it can be resumed then.
        """
        status = ReplayStatus(self._replay.status)
        ranges = read_ranges(self._replay)
        # A judge of last events must see its window from the beginning.
        starts = {} if self._replay.kind == ReplayName.STATUS else self._positions
        self._report(None)
        with open_reader(self._kafka, ranges, starts) as reader:
            batches = read_batches(reader, ranges, self._batch)
            while status is ReplayStatus.ACTIVE and (records := await anext(batches, None)) is not None:
                status = await self._wait_for_live_traffic()
                if status is not ReplayStatus.ACTIVE:
                    break
                if self._stopping.is_set():
                    return Outcome(status, self._counts())
                async with self._journal.connection.transaction():
                    verdicts = await judge_records(self._judge, self._journal.connection, records)
                    published = await self._publish(
                        [self._hold_to_plan(each) for each in verdicts if not self._is_done(each.record)]
                    )
                self._tally.add(published)
                for place, offset in reader.positions.items():
                    self._positions[place] = max(offset, self._positions.get(place, 0))
                status = await self._save()
                self._report(None)
        ended = ReplayStatus.DONE if status is ReplayStatus.ACTIVE else ReplayStatus.CANCELLED
        await self._journal.end(self._replay.id, ended, self._counts())
        return Outcome(ended, self._counts())

    async def _publish(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Publish all copies, acknowledged; the verdicts after that. Raises `NotDelivered`."""
        copies = [verdict.copy for verdict in verdicts if verdict.copy is not None]
        if not copies:
            return list(verdicts)
        await self._bucket.take(len(copies))
        with linked_spans(SpanName.REPLAY, [each.origin for each in copies]) as traceparents:
            records = [
                each.to_record(traceparent or continue_trace(None))
                for each, traceparent in zip(copies, traceparents, strict=True)
            ]
            accepted = iter(await self._outlet.publish(records, self._check_connection))
        return [
            verdict if verdict.copy is None or next(accepted) else Verdict(verdict.record, skip=Skip.TOO_LARGE)
            for verdict in verdicts
        ]

    async def _check_connection(self) -> None:
        """Raises psycopg's error if the connection is gone, and with it the locks on the rows."""
        await check_hold(self._journal.connection)

    def _hold_to_plan(self, verdict: Verdict) -> Verdict:
        """Only what was planned is published; a planned record that is judged otherwise now counts as changed."""
        if not is_marked(self._marks, verdict.record):
            return Verdict(verdict.record, skip=verdict.skip)
        if verdict.copy is None and verdict.skip not in _EXPECTED:
            return Verdict(verdict.record, skip=Skip.CHANGED)
        return verdict

    def _is_done(self, record: Record) -> bool:
        """True if an earlier process has dealt with the record."""
        return record.offset < self._positions.get((record.topic, record.partition), 0)

    async def _wait_for_live_traffic(self) -> ReplayStatus:
        """Wait while live traffic is behind; the replay's status then."""
        while not self._stopping.is_set() and await self._guard.is_exceeded():
            self._report(self._guard.behind)
            if (status := await self._save()) is not ReplayStatus.ACTIVE:
                return status
            try:
                await asyncio.wait_for(self._stopping.wait(), _LOOK_SECONDS)
            except TimeoutError:
                continue
        return ReplayStatus.ACTIVE

    async def _save(self) -> ReplayStatus:
        checkpoint = {f"{topic}/{partition}": offset for (topic, partition), offset in self._positions.items()}
        return await self._journal.save(self._replay.id, checkpoint, self._counts())

    def _counts(self) -> dict[str, Any]:
        return {"published": self._tally.copies, **self._tally.to_json()}

    def _report(self, behind: int | None) -> None:
        self._on_progress(self._tally.copies, int(self._replay.plan["matched"]), behind)


def is_marked(marks: Mapping[Partition, Marks], record: Record) -> bool:
    """True if the plan contains the record."""
    return marks[record.topic, record.partition].holds(record.offset)


def _read_positions(checkpoint: Mapping[str, Any]) -> dict[Partition, int]:
    positions = {}
    for name, offset in checkpoint.items():
        topic, _, partition = name.rpartition("/")
        positions[topic, int(partition)] = int(offset)
    return positions
