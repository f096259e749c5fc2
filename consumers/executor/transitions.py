"""Transitions of many queries that fall due together share one database transaction.

That batching, not more connections, is what makes small queries fast: a commit costs some 3 ms, a row in a batch
0.1 ms.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Generic, TypeVar

import psycopg
import structlog

from consumers.executor.spacing import Spacing
from db.clock import DatabaseClock
from db.connection import Connection, DataPool, statement
from db.data.attempts import Claim, Ended, Ending, HandBack, claim, end, hand_back
from db.data.datasets import Caller, Dataset, read_granted
from db.data.limits import try_lock_running
from db.data.runs import RunState, read_states
from db.retrying import until_available
from queryd.events import Mode, Status
from telemetry.events import LogEvent
from telemetry.metrics import METRICS

_log = structlog.get_logger("queryd.transitions")

# As many rows as one transaction moves in some 50 ms; more would make the first wait for the last.
_BATCH = 500
# Under load endings wait for each other: no slot waits for an ending, and a transaction costs some 2 ms of CPU.
_ENDINGS_APART_SECONDS = 0.08

_LANES = {mode.topic.value: mode.value for mode in Mode}

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class RowRefused(Exception):
    """The database refused this one row for what is in it; repeating it would not help."""


async def run_batch(
    run: Callable[[Sequence[_Item]], Awaitable[Sequence[_Answer]]], items: Sequence[_Item]
) -> list[_Answer | RowRefused]:
    """Call `run` with the items and return its answers in the items' order.

    While the database is unavailable, the call is repeated. After a data error the batch is split in halves until the
    bad row is alone; its answer is `RowRefused`.
    """
    try:
        return list(await until_available(partial(run, items), "postgres data"))
    except (psycopg.DataError, psycopg.IntegrityError) as error:
        if len(items) == 1:
            _log.error(
                LogEvent.ROW_REFUSED,
                query_id=getattr(items[0][0] if isinstance(items[0], tuple) else items[0], "query_id", None),
                error=type(error).__name__,
                sqlstate=error.sqlstate,
            )
            return [RowRefused(type(error).__name__)]
    half = len(items) // 2
    return [*await run_batch(run, items[:half]), *await run_batch(run, items[half:])]


@dataclass(slots=True)
class _Waiting(Generic[_Item, _Answer]):
    item: _Item
    answer: "asyncio.Future[_Answer]"


class Batcher(Generic[_Item, _Answer]):
    """Collects items while a batch is under way and sends them together next. Idle, an item goes at once.

    `run` answers a batch in its order, see `run_batch`.
    """

    def __init__(
        self, run: Callable[[Sequence[_Item]], Awaitable[Sequence[_Answer]]], spacing: Spacing | None = None
    ) -> None:
        """`spacing` lets more items share one transaction under load."""
        self._run = run
        self._spacing = spacing
        self._waiting: list[_Waiting[_Item, _Answer]] = []
        self._runner: asyncio.Task[None] | None = None

    async def submit(self, item: _Item) -> _Answer:
        """The item's answer, once its transaction is committed; raises `RowRefused`."""
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, answer))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._work_off())
        return await answer

    async def _work_off(self) -> None:
        # The loop turns once, so that everything due in this very turn comes along.
        await asyncio.sleep(0)
        while self._waiting:
            if self._spacing is not None:
                await self._spacing.wait()
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            try:
                answers = await run_batch(self._run, [waiting.item for waiting in batch])
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


class Refusal(Enum):
    """Why a query that nobody holds was not claimed, and waits."""

    # As many of its org's queries run, here and elsewhere, as may.
    LIMIT = auto()
    # Another worker counts that org's queries just now.
    BUSY = auto()


class EndResult(Enum):
    """What came of ending a query."""

    # It has ended as we said.
    ENDED = auto()
    # Somebody else has ended it, or it was deleted.
    OVER = auto()
    # It is still our attempt's and can't succeed, for its cancel came first.
    CANCELLED = auto()
    # It is another attempt's, or the database can't store the row.
    NOT_OURS = auto()


class Transitions:
    """The steps of a query after its admission, many queries in one statement.

    Safe to repeat after the answer of a COMMIT was lost: the state of a query that a statement did not change is read.
    """

    def __init__(self, pool: DataPool, clock: DatabaseClock, running_queries: int | None = None) -> None:
        """`running_queries`: how many an org may run at once that has no limit of its own."""
        self._pool = pool
        self._clock = clock
        self._running_queries = running_queries
        self._endings = Batcher(self._end, Spacing(_ENDINGS_APART_SECONDS))
        self._hand_backs = Batcher(self._hand_back)

    async def claim(self, wanted: Sequence[tuple[Claim, Caller]]) -> list[tuple[Dataset, ...] | Refusal | None]:
        """Claim queries, each for an attempt on behalf of its caller.

        Returns for each, in order: the datasets that its caller may read if it is claimed, the `Refusal` if it must
        wait, None if it can't be claimed.
        """
        answers = await run_batch(self._claim, wanted)
        return [None if isinstance(answer, RowRefused) else answer for answer in answers]

    async def end(self, ending: Ending) -> EndResult:
        """Bring a query to its terminal status."""
        try:
            return await self._endings.submit(ending)
        except RowRefused:
            # A retry won't help: the query is taken over, and each takeover counts as a crash, up to MAX_CRASHES.
            return EndResult.NOT_OURS

    async def hand_back(self, given: HandBack) -> None:
        """Give an attempt up."""
        await self._hand_backs.submit(given)

    async def read(self, query_ids: Sequence[str]) -> dict[str, RunState]:
        """Read the states of queries; raises `DatabaseUnavailable`."""
        async with statement(self._pool) as connection:
            return await self._read(connection, query_ids)

    async def _claim(self, wanted: Sequence[tuple[Claim, Caller]]) -> list[tuple[Dataset, ...] | Refusal | None]:
        claims = [item for item, _ in wanted]
        async with statement(self._pool) as connection:
            limited = {item.org_id for item in claims if item.limited}
            claimed, refused = await self._claim_within_limits(connection, claims, limited)
            unknown = [item.query_id for item in claims if item.token not in claimed and item.query_id not in refused]
            states = await self._read(connection, unknown)
            claimed |= {
                item.token
                for item in claims
                # A claim that is repeated because the answer of the first was lost.
                if (state := states.get(item.query_id)) is not None
                and state.token == item.token
                and not Status(state.status).terminal
            }
            callers = [caller for item, caller in wanted if item.token in claimed]
            granted = await read_granted(connection, callers) if callers else {}
        return [granted[caller] if item.token in claimed else refused.get(item.query_id) for item, caller in wanted]

    async def _claim_within_limits(
        self, connection: Connection, claims: Sequence[Claim], limited: set[str]
    ) -> tuple[set[str], dict[str, Refusal]]:
        """Claim, with the limited orgs locked so that they can be counted.

        Returns the tokens of what is claimed, and what is refused and why, by query id.
        """
        async with _lock_running(connection, limited) as locked:
            answer = await claim(
                connection,
                claims,
                running_queries=self._running_queries,
                locked_org_ids=locked,
            )
        claimed = answer.claimed
        refused = {
            query_id: Refusal.LIMIT if org_id in locked else Refusal.BUSY
            for query_id, org_id in answer.refused.items()
            if org_id in limited
        }
        # An org whose limit is news was refused for want of its lock.
        again = [item for item in claims if item.query_id in answer.refused.keys() - refused.keys()]
        if again:
            more = await self._claim_within_limits(connection, again, {item.org_id for item in again})
            claimed, refused = claimed | more[0], refused | more[1]
        return claimed, refused

    async def _end(self, endings: Sequence[Ending]) -> list[EndResult]:
        async with statement(self._pool) as connection:
            ended = await end(connection, endings)
            # A batch may have two endings of one query.
            carried_out = {
                item.query_id: place
                for place, item in reversed(list(enumerate(endings)))
                if item.query_id in ended and ended[item.query_id].token == item.token
            }
            places = set(carried_out.values())
            unknown = [item.query_id for place, item in enumerate(endings) if place not in places]
            states = await self._read(connection, unknown)
        for query_id, place in carried_out.items():
            _count(endings[place], ended[query_id])
        return [
            EndResult.ENDED if place in places else _find_result(item, states.get(item.query_id))
            for place, item in enumerate(endings)
        ]

    async def _hand_back(self, given: Sequence[HandBack]) -> list[None]:
        async with statement(self._pool) as connection:
            await hand_back(connection, given)
        return [None] * len(given)

    async def _read(self, connection: Connection, query_ids: Sequence[str]) -> dict[str, RunState]:
        states = await read_states(connection, query_ids) if query_ids else {}
        if states:
            self._clock.update(max(state.read_at for state in states.values()))
        return states


def _count(ending: Ending, ended: Ended) -> None:
    """Count a query that ended here in the metrics."""
    METRICS.end_query(
        _LANES.get(ended.topic, ended.topic),
        ending.error_code,
        total_seconds=max(0.0, ended.total.total_seconds()),
        run_ms=ending.duration_ms,
        result_bytes=ending.result_bytes,
        rows=ending.row_count,
    )


def _find_result(ending: Ending, state: RunState | None) -> EndResult:
    """What came of an ending that the statement did not carry out."""
    if state is None:
        return EndResult.OVER
    ours = ending.token is not None and state.token == ending.token
    if Status(state.status).terminal:
        # Ours where the statement is repeated because its first answer was lost.
        repeated = ours and state.sequence == ending.sequence + 1 and state.status == ending.status
        return EndResult.ENDED if repeated else EndResult.OVER
    return EndResult.CANCELLED if ours and state.cancelled else EndResult.NOT_OURS


@asynccontextmanager
async def _lock_running(connection: Connection, org_ids: Collection[str]) -> AsyncIterator[Collection[str]]:
    """Those orgs whose running queries only we can count within the context. Without any it costs nothing."""
    if not org_ids:
        yield ()
        return
    async with connection.transaction():
        yield await try_lock_running(connection, org_ids)
