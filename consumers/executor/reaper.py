"""The reaper: ends queries past their deadline and cancelled ones that no live lease holds, even if their record is
gone."""

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import structlog

from consumers.executor.endings import CANCELLED, fail, overdue_failure
from consumers.executor.lease_monitor import LeaseMonitor
from consumers.executor.status_event import QueryFacts
from consumers.executor.transitions import EndResult, Transitions
from db.clock import DatabaseClock, elapsed
from db.connection import DatabaseUnavailable, DataPool, statement
from db.data.runs import RunState, read_overdue, read_states
from db.retrying import until_available
from queryd.events import Status
from telemetry.events import LogEvent
from telemetry.traces import SpanName, span

_log = structlog.get_logger("queryd.reaper")

# How often each executor looks: a query past its deadline is ended within this time. One indexed read. It must be
# shorter than the lease monitor's longest gap.
_SECONDS = 3.0
_TAKE_OVER_SECONDS = 5.0
# A query whose record's partition nobody has had for this long, because its topic was deleted, say, ends all the same.
_FORSAKEN_SECONDS = 3600.0

IsOver = Callable[[str, int, int], bool]


class Reaper:
    """Runs in every executor; that several find the same query costs a statement that matches nothing."""

    def __init__(self, pool: DataPool, clock: DatabaseClock, transitions: Transitions, lease_seconds: float) -> None:
        self._pool = pool
        # The executor that has the query's record takes it over within a lease and a moment.
        self._grace = lease_seconds + _TAKE_OVER_SECONDS
        self._clock = clock
        self._transitions = transitions
        self._leases = LeaseMonitor(lease_seconds)

    async def reap_for_ever(self, is_over: IsOver) -> None:
        """Look every few seconds, with jitter so that executors don't look together. `is_over` as for `reap`."""
        while True:
            await asyncio.sleep(_SECONDS * random.uniform(0.7, 1.0))  # noqa: S311 — jitter, not a secret
            await until_available(partial(self._reap_or_forget, is_over), "postgres data")

    async def _reap_or_forget(self, is_over: IsOver) -> None:
        try:
            await self.reap(is_over)
        except DatabaseUnavailable:
            self._leases.forget()
            raise

    async def reap(self, is_over: IsOver) -> int:
        """End what is overdue now and not held; returns how many were found. Raises `DatabaseUnavailable`.

        `is_over` answers for a topic, a partition and an offset whether the record there will not be delivered any
        more, see `Subscription.is_over`: a query that was left behind waits for its record for as long as Kafka is
        away, and for a slot for as long as all are busy.
        """
        asked_at = elapsed()
        async with statement(self._pool) as connection:
            found = await read_overdue(connection, grace=self._grace, forsaken=_FORSAKEN_SECONDS)
            due = [
                each.query_id
                for each in found
                if not each.left_behind or is_over(each.topic, each.partition, each.record_offset)
            ]
            states = await read_states(connection, due) if due else {}
        return await self._end_all(states.values(), self._leases.observe(states.values(), asked_at))

    async def end(self, query_ids: Sequence[str]) -> None:
        """End those of the queries that have no lease; they are overdue or cancelled. Raises `DatabaseUnavailable`."""
        async with statement(self._pool) as connection:
            states = await read_states(connection, query_ids)
        await self._end_all(states.values(), dead_leases=())

    async def _end_all(self, states: Iterable[RunState], dead_leases: Collection[str]) -> int:
        free = [
            state
            for state in states
            if not Status(state.status).terminal
            and (state.lease_token is None or state.query_id in dead_leases)
            # Another worker may have started it again since it was found.
            and (state.cancelled or state.late)
        ]
        await asyncio.gather(*map(self._end, free))
        return len(free)

    async def _end(self, state: RunState) -> None:
        facts = QueryFacts.from_state(state)
        failure = CANCELLED if state.cancelled else overdue_failure(Status(state.status))
        with span(
            SpanName.REAP, facts.traceparent, query_id=facts.query_id, org_id=facts.org_id, attempt=state.attempt
        ):
            now = self._clock.now()
            result = await self._transitions.end(
                fail(facts, state, failure, now=now, stale_lease_version=state.lease_renewal)
            )
        if result is EndResult.ENDED:
            _log.info(
                LogEvent.QUERY_REAPED,
                query_id=facts.query_id,
                org_id=facts.org_id,
                attempt=state.attempt,
                error_code=failure.code.value,
            )
