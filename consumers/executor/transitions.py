"""Transitions of many queries that fall due together share one database transaction.

That batching, not more connections, is what makes small queries fast: a commit costs some 3 ms, a row in a batch
0.1 ms.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

import psycopg
import structlog

from db.clock import DatabaseClock
from db.connection import Connection, DataPool, statement
from db.data.attempts import Claim, Ending, HandBack, claim, end, hand_back
from db.data.limits import try_lock_running
from db.data.runs import RunState, read_states
from db.retrying import until_available
from queryd.events import Mode, Status
from telemetry.events import LogEvent
from telemetry.metrics import METRICS

_log = structlog.get_logger("queryd.transitions")

# As many rows as one transaction moves in some 50 ms; more would make the first wait for the last.
_BATCH = 500
# A slot waits for its claim, so claims go at once. An ending keeps nobody from working: a reader who waits for it does
# not notice 10 ms, and under load it halves the commits.
_ENDINGS_APART_SECONDS = 0.01

_LANES = {mode.topic.value: mode.value for mode in Mode}

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class RowRefused(Exception):
    """The database refused this one row for what is in it; repeating it would not help."""


@dataclass(slots=True)
class _Waiting(Generic[_Item, _Answer]):
    item: _Item
    answer: "asyncio.Future[_Answer]"


class Batcher(Generic[_Item, _Answer]):
    """Collects items while a batch is under way and sends them together next. Idle, an item goes at once.

    `run` answers a batch in its order. While the database is away it is repeated for ever; an error of data splits the
    batch until the one row that caused it stands alone and gets `RowRefused`.
    """

    def __init__(
        self, run: Callable[[Sequence[_Item]], Awaitable[Sequence[_Answer]]], apart_seconds: float = 0.0
    ) -> None:
        """`apart_seconds`: under load, batches start at least this far apart, so that more share one transaction."""
        self._run = run
        self._apart_seconds = apart_seconds
        self._last_start = -apart_seconds
        self._waiting: list[_Waiting[_Item, _Answer]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: _Item) -> _Answer:
        """The item's answer, once its transaction is committed; raises `RowRefused`."""
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, answer))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._work_off())
        return await answer

    async def run_all(self, items: Sequence[_Item]) -> list[_Answer | RowRefused]:
        """Answers of a batch that is whole already, such as one poll's records."""
        return await self._send(items)

    async def _work_off(self) -> None:
        # The loop turns once, so that everything due in this very turn comes along.
        await asyncio.sleep(0)
        while self._waiting:
            await asyncio.sleep(self._last_start + self._apart_seconds - time.monotonic())
            self._last_start = time.monotonic()
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            try:
                answers = await self._send([waiting.item for waiting in batch])
            except Exception as error:  # noqa: BLE001 — handed on to each waiter, whose own it is
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, RowRefused):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

    async def _send(self, items: Sequence[_Item]) -> list[_Answer | RowRefused]:
        async def run() -> Sequence[_Answer]:
            return await self._run(items)

        try:
            return list(await until_available(run, "postgres data"))
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(items) == 1:
                _log.error(
                    LogEvent.ROW_REFUSED,
                    query_id=getattr(items[0], "query_id", None),
                    error=type(error).__name__,
                    sqlstate=error.sqlstate,
                )
                return [RowRefused(type(error).__name__)]
        half = len(items) // 2
        return [*await self._send(items[:half]), *await self._send(items[half:])]


class Refusal(Enum):
    """Why a query that nobody holds was not claimed, and waits."""

    # As many of its org's queries run, here and elsewhere, as may.
    LIMIT = auto()
    # Another worker counts that org's queries just now.
    BUSY = auto()


class Transitions:
    """The steps of a query after its admission. Each answers with what then stands in the database; None: no such row.

    Safe to repeat when the answer of a COMMIT was lost: who holds the token, or what status stands, is read back.
    """

    def __init__(self, pool: DataPool, clock: DatabaseClock, running_queries: int | None = None) -> None:
        """`running_queries`: how many an org may run at once that has no limit of its own."""
        self._pool = pool
        self._clock = clock
        self._running_queries = running_queries
        self._claims = Batcher(self._claim)
        self._endings = Batcher(self._end, _ENDINGS_APART_SECONDS)
        self._hand_backs = Batcher(self._hand_back)

    async def claim(self, wanted: Claim) -> RunState | Refusal | None:
        """Take a query for an attempt: it is ours if its token then is ours."""
        return await self._claims.submit(wanted)

    async def end(self, ending: Ending) -> RunState | None:
        """Bring a query to its terminal status: done if that then stands at our sequence, with our token."""
        return await self._endings.submit(ending)

    async def hand_back(self, given: HandBack) -> RunState | None:
        """Give an attempt up."""
        return await self._hand_backs.submit(given)

    async def read(self, query_ids: Sequence[str]) -> dict[str, RunState]:
        """What stands now, for judging by the clock too; raises `DatabaseUnavailable`."""
        async with statement(self._pool) as connection:
            await self._clock.check(connection)
            return await self._read(connection, query_ids)

    async def _claim(self, claims: Sequence[Claim]) -> list[RunState | Refusal | None]:
        async with statement(self._pool) as connection:
            refused = await self._claim_within_limits(
                connection, claims, {item.org_id for item in claims if item.limited}
            )
            states = await self._read(connection, [item.query_id for item in claims])
        return [refused.get(item.query_id) or states.get(item.query_id) for item in claims]

    async def _claim_within_limits(
        self, connection: Connection, claims: Sequence[Claim], limited: set[str]
    ) -> dict[str, Refusal]:
        """Claim, with the limited orgs locked so that they can be counted; why which queries are refused."""
        async with _lock_running(connection, limited) as locked:
            found = await claim(
                connection,
                claims,
                self._clock.steady_now(),
                running_queries=self._running_queries,
                locked_org_ids=locked,
            )
        refused = {
            query_id: Refusal.LIMIT if org_id in locked else Refusal.BUSY
            for query_id, org_id in found.items()
            if org_id in limited
        }
        # An org whose limit is news was refused for want of its lock.
        again = [item for item in claims if item.query_id in found.keys() - refused.keys()]
        if again:
            refused |= await self._claim_within_limits(connection, again, {item.org_id for item in again})
        return refused

    async def _end(self, endings: Sequence[Ending]) -> list[RunState | None]:
        moved = 0

        async def move(connection: Connection) -> None:
            nonlocal moved
            moved = await end(connection, endings, self._clock.steady_now())

        states = await self._move(move, [item.query_id for item in endings])
        self._count(endings, states, moved)
        return states

    def _count(self, endings: Sequence[Ending], states: Sequence[RunState | None], moved: int) -> None:
        """Tell the metrics of the queries that ended here, each once whatever other workers tell."""
        now = self._clock.steady_now()
        done = [
            (ending, state)
            for ending, state in zip(endings, states, strict=True)
            if state is not None and Status(state.status).terminal and state.sequence == ending.sequence + 1
        ]
        ours = [(ending, state) for ending, state in done if ending.token is not None and ending.token == state.token]
        # Without a token any worker may have been first: as many are ours as the statement moved.
        open_to_all = [(ending, state) for ending, state in done if ending.token is None]
        for ending, state in [*ours, *open_to_all[: max(0, moved - len(ours))]]:
            METRICS.end_query(
                _LANES.get(state.topic, state.topic),
                ending.error_code,
                total_seconds=(now - state.queued_at).total_seconds(),
                run_ms=ending.duration_ms,
                result_bytes=ending.result_bytes,
                rows=ending.row_count,
            )

    async def _hand_back(self, given: Sequence[HandBack]) -> list[RunState | None]:
        return await self._move(lambda connection: hand_back(connection, given), [item.query_id for item in given])

    async def _move(
        self, change: Callable[[Connection], Awaitable[None]], query_ids: Sequence[str]
    ) -> list[RunState | None]:
        # The change is one statement, and so whole by itself; what then stands is read after its commit.
        async with statement(self._pool) as connection:
            await change(connection)
            states = await self._read(connection, query_ids)
        return [states.get(query_id) for query_id in query_ids]

    async def _read(self, connection: Connection, query_ids: Sequence[str]) -> dict[str, RunState]:
        states = await read_states(connection, query_ids, self._clock.steady_now()) if query_ids else {}
        if states:
            self._clock.tell(max(state.read_at for state in states.values()))
        return states


@asynccontextmanager
async def _lock_running(connection: Connection, org_ids: Collection[str]) -> AsyncIterator[Collection[str]]:
    """Those orgs whose running queries only we can count within the context. Without any it costs nothing."""
    if not org_ids:
        yield ()
        return
    async with connection.transaction():
        yield await try_lock_running(connection, org_ids)
