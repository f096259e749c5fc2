"""The state database, made anew beside the live one and then swapped.

The copy is filled at leisure from the log or from Postgres data. Then, in one transaction that keeps writers out and
lets readers be, it is caught up with what the projector has written meanwhile, and the live table is brought to its
content by what differs. So readers see the old table or the new one, whatever stands on the table stays, and a running
projector goes on. A rebuild that dies before has changed nothing; it begins again from the start.
"""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from db.connection import Connection, DataPool, transaction
from db.data.last_events import count_queries
from db.data.replays import ReplayStatus
from db.state.rebuild import (
    Difference,
    compare,
    count_staged,
    move_open_tasks,
    opened_rebuild,
    put_right,
    snapshot,
    writers_locked_out,
)
from replay.journal import Journal
from replay.plan import OnProgress, digest_json
from replay.rebuild.from_log import opened_log
from replay.rebuild.from_postgres import opened_postgres
from replay.rebuild.source import Reading, Report, Source, SourceName
from replay.refused import PlanStale, ReplayRefused

# How soon a cancel takes effect.
_CHECKPOINT_SECONDS = 2.0


class RebuildCancelled(ReplayRefused):
    """The replay was cancelled."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a rebuild has made of its source, beside the live table.

    `queries` stand in the copy; `queries_in_data` were known to Postgres data before it was begun.
    """

    facts: Mapping[str, Any]
    reading: Reading
    queries: int
    queries_in_data: int
    difference: Difference

    @property
    def hash(self) -> str:
        """Stands for what was read from, and for the rows that would go: these are told in plain behind the dash.

        Neither changes by live traffic. The rows to come and to change may, and no fewer of them would be right.
        """
        return f"{digest_json(self.facts)}-{self.difference.surplus}"

    def describe(self) -> dict[str, Any]:
        """As JSON: counts, ids of the topic and offsets."""
        return {
            **self.facts,
            **asdict(self.reading),
            "queries": self.queries,
            "queries_in_data": self.queries_in_data,
            **asdict(self.difference),
        }


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was done: the rows that differed are right now, and so many tasks were behind."""

    found: Found
    tasks: int

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return self.found.describe() | {"tasks": self.tasks}


class Rebuild:
    """One rebuild: `check`, `stage`, and then `plan` or `swap`."""

    def __init__(self, connection: Connection, source: Source, queries_in_data: int) -> None:
        self._connection = connection
        self._source = source
        self._queries_in_data = queries_in_data
        self._staged = 0

    def check(self, plan_hash: str) -> None:
        """Raise `PlanStale` for the hash of a plan that was made over another source."""
        self._allowed(plan_hash)

    async def stage(self, report: Report) -> None:
        """Make the copy.

        `report` hears how much is read; what it raises ends the rebuild, which has changed nothing. Raises
        `EndNotReached`, `LogChanged`, `KafkaException`, `DatabaseUnavailable`.
        """
        await self._source.stage(self._connection, report)
        self._staged = await count_staged(self._connection)

    async def plan(self) -> Found:
        """What `swap` would do, as of now. Raises as `stage`."""
        async with snapshot(self._connection):
            return await self._compare()

    async def swap(self, plan_hash: str) -> Rebuilt:
        """Give the live table the copy's content, and move the tasks.

        Raises `PlanStale` where more rows would go than the plan has told of, `WritersBusy`, and as `stage`; nothing
        is changed then.
        """
        allowed = self._allowed(plan_hash)
        async with writers_locked_out(self._connection):
            found = await self._compare()
            if found.difference.surplus > allowed:
                raise PlanStale(
                    f"{found.difference.surplus} rows would go, and the plan has told of {allowed}: plan again"
                )
            await put_right(self._connection)
            await self._source.write_offsets(self._connection)
        return Rebuilt(found, await move_open_tasks(self._connection))

    async def _compare(self) -> Found:
        await self._source.settle(self._connection)
        return Found(
            facts=self._source.facts,
            reading=self._source.reading,
            queries=self._staged,
            queries_in_data=self._queries_in_data,
            difference=await compare(self._connection),
        )

    def _allowed(self, plan_hash: str) -> int:
        """How many rows the plan has said will go."""
        digest, _, surplus = plan_hash.partition("-")
        if digest != digest_json(self._source.facts) or not surplus.isdecimal():
            raise PlanStale("the plan was made over another source, or another topic: plan again")
        return int(surplus)


async def carry_out(
    rebuild: Rebuild, journal: Journal, replay_id: str, plan_hash: str, on_progress: OnProgress
) -> Rebuilt:
    """Stage and swap, and write the replay's end. After an error of the network or a server it can be resumed.

    Raises `RebuildCancelled`, `PlanStale`, and as `Rebuild.stage` and `Rebuild.swap`.
    """
    checkpoint = time.monotonic()

    async def report(read: int, total: int) -> None:
        nonlocal checkpoint
        on_progress(read, total)
        if time.monotonic() - checkpoint > _CHECKPOINT_SECONDS:
            checkpoint = time.monotonic()
            if await journal.save(replay_id, {}, {"read": read, "total": total}) is not ReplayStatus.ACTIVE:
                raise RebuildCancelled("the rebuild was cancelled; nothing was changed")

    try:
        rebuild.check(plan_hash)
        await rebuild.stage(report)
        rebuilt = await rebuild.swap(plan_hash)
    except RebuildCancelled:
        await journal.end(replay_id, ReplayStatus.CANCELLED, {})
        raise
    except PlanStale:
        await journal.end(replay_id, ReplayStatus.FAILED, {})
        raise
    await journal.end(replay_id, ReplayStatus.DONE, rebuilt.describe())
    return rebuilt


@asynccontextmanager
async def opened(name: SourceName, state_url: str, pool: DataPool, kafka: dict[str, Any]) -> AsyncIterator[Rebuild]:
    """A rebuild of the state database from a source. `kafka` is used by the log alone.

    Raises `RebuildUnderWay`, `TablesMissing`, `ReplayRefused`, `TopicUnknown`, `KafkaException` and
    `DatabaseUnavailable`.
    """
    async with transaction(pool) as data:
        _, queries_in_data = await count_queries(data)
    async with opened_rebuild(state_url) as connection, _opened_source(name, connection, pool, kafka) as source:
        yield Rebuild(connection, source, queries_in_data)


def _opened_source(
    name: SourceName, connection: Connection, pool: DataPool, kafka: dict[str, Any]
) -> AbstractAsyncContextManager[Source]:
    match name:
        case SourceName.LOG:
            return opened_log(connection, kafka)
        case SourceName.POSTGRES:
            return opened_postgres(pool)
