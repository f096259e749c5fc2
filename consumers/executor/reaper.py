"""The reaper: ends any query that nobody holds and whose time is over, or that was cancelled, even if its message is
gone."""

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from consumers.executor.endings import CANCELLED, fail, overdue_failure
from consumers.executor.story import QueryFacts
from consumers.executor.transitions import EndResult, Transitions
from db.clock import DatabaseClock
from db.connection import DataPool, transaction
from db.data.runs import RunState, read_canonical, read_overdue, read_states
from db.retrying import until_available
from queryd.events import Status
from telemetry.events import LogEvent
from telemetry.traces import SpanName, span

_log = structlog.get_logger("queryd.reaper")

# How often each executor looks: a query past its deadline is ended within this time. One indexed read.
_SECONDS = 5.0
_BATCH = 1_000
_TAKE_OVER_SECONDS = 5.0
# A query whose record's partition nobody has had for this long, because its topic was deleted, say, ends all the same.
_FORSAKEN_SECONDS = 3600.0

IsOver = Callable[[str, int, int], bool]


class Reaper:
    """Runs in every executor; that several find the same query costs a statement that matches nothing."""

    def __init__(self, pool: DataPool, clock: DatabaseClock, transitions: Transitions, lease_seconds: float) -> None:
        self._pool = pool
        # Whoever has the query's record takes it over within a lease and a moment.
        self._grace = lease_seconds + _TAKE_OVER_SECONDS
        self._clock = clock
        self._transitions = transitions

    async def reap_for_ever(self, is_over: IsOver) -> None:
        """Look every few seconds, with jitter so that executors don't look together. `is_over` as for `reap`."""
        while True:
            await asyncio.sleep(_SECONDS * random.uniform(0.7, 1.0))  # noqa: S311 — jitter, not a secret
            await until_available(partial(self.reap, is_over), "postgres data")

    async def reap(self, is_over: IsOver) -> int:
        """End what is overdue now; returns how many were found. Raises `DatabaseUnavailable`.

        `is_over` answers for a topic, a partition and an offset whether the record there will not be delivered any
        more, see `Subscription.is_over`: a query that was left behind waits for its record for as long as Kafka is
        away, and for a slot for as long as all are busy.
        """
        async with transaction(self._pool) as connection:
            await self._clock.check(connection)
            if not self._clock.settled:
                # Whoever was kept from renewing or finishing by the database comes first, and who knows better what
                # time it is.
                return 0
            found = await read_overdue(
                connection, _BATCH, self._clock.steady_now(), grace=self._grace, forsaken=_FORSAKEN_SECONDS
            )
        overdue = [
            each.query_id
            for each in found
            if not each.left_behind or is_over(each.topic, each.partition, each.record_offset)
        ]
        if overdue:
            await self.end(overdue)
        return len(overdue)

    async def end(self, query_ids: Sequence[str]) -> None:
        """End those of the queries that nobody holds; they are overdue or cancelled. Raises `DatabaseUnavailable`."""
        async with transaction(self._pool) as connection:
            await self._clock.check(connection)
            states = await read_states(connection, query_ids, self._clock.steady_now())
            rows = await read_canonical(connection, query_ids)
        await asyncio.gather(
            *(
                self._end(QueryFacts.from_row(rows[query_id], state.traceparent), state)
                for query_id, state in states.items()
                if query_id in rows and not state.lease_alive and not Status(state.status).terminal
                # Between the two reads somebody may have begun it anew.
                if state.cancelled or state.late
            )
        )

    async def _end(self, facts: QueryFacts, state: RunState) -> None:
        failure = CANCELLED if state.cancelled else overdue_failure(Status(state.status))
        with span(
            SpanName.REAP, facts.traceparent, query_id=facts.query_id, org_id=facts.org_id, attempt=state.attempt
        ):
            ending = fail(facts, state, failure, now=self._clock.now())
            result = await self._transitions.end(ending)
        if result is EndResult.ENDED:
            _log.info(
                LogEvent.QUERY_REAPED,
                query_id=facts.query_id,
                org_id=facts.org_id,
                attempt=state.attempt,
                error_code=failure.code.value,
            )
