"""Watching queries that somebody else holds, or that nobody may hold any more.

A lease is dead when its renewal number has stood still on our own monotonic clock: for its whole length, or, where the
steady clock has passed its expiry, for longer than a holder waits between two renewals. No clock alone takes a lease
from a holder that renews it. While the database is out of reach nobody can renew; once it is back, holders have a
moment to do so before they count as dead.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from consumers.executor.admission import Admitted
from db.clock import elapsed
from db.data.runs import RunState
from db.retrying import ASKED_AGAIN_SECONDS
from queryd.events import Status


@dataclass(slots=True)
class _Watched:
    query: Admitted
    renewal: int | None
    since: float


class Watch:
    """The parked queries of this process, by id. A second record of one id replaces the first: it is the newer one."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        # Renewed every third of a lease, or when it is tried again after an outage.
        self._renewed_within = max(lease_seconds / 3 + 1.0, ASKED_AGAIN_SECONDS)
        self._watched: dict[str, _Watched] = {}

    def __len__(self) -> int:
        return len(self._watched)

    def park(self, query: Admitted) -> None:
        """Begin to watch a query."""
        self._watched[query.facts.query_id] = _Watched(query, query.state.lease_renewal, elapsed())

    def drop(self, query_id: str) -> None:
        """Stop watching."""
        self._watched.pop(query_id, None)

    @property
    def queries(self) -> list[Admitted]:
        """What is watched now."""
        return [watched.query for watched in self._watched.values()]

    def observe(
        self, asked: Collection[str], states: dict[str, RunState], reached_since: float
    ) -> tuple[list[Admitted], list[Admitted]]:
        """Judge by what stands in the database: queries that are terminal or gone, and queries that may be claimed.

        Both leave the watch. `asked` are the ids that were read: a query that was parked while the answer was on its
        way is not in it, and that says nothing about the query. `reached_since` as `DatabaseClock` tells it.
        """
        finished: list[Admitted] = []
        takeable: list[Admitted] = []
        for query_id in asked:
            watched = self._watched.get(query_id)
            if watched is None:
                continue
            state = states.get(query_id)
            if state is None or Status(state.status).terminal:
                finished.append(watched.query)
            elif (taken := self._judge(watched, state, reached_since)) is not None:
                takeable.append(taken)
            else:
                continue
            del self._watched[query_id]
        return finished, takeable

    def _judge(self, watched: _Watched, state: RunState, reached_since: float) -> Admitted | None:
        query = replace(watched.query, state=state, stale_lease_version=None)
        if state.overdue:
            # The reaper's to end, which makes sure of the time.
            return None
        if state.lease_token is None:
            return query
        if state.lease_renewal != watched.renewal:
            watched.renewal, watched.since = state.lease_renewal, elapsed()
            return None
        stood_still = elapsed() - max(watched.since, reached_since)
        if not state.lease_alive and stood_still >= self._renewed_within:
            return query
        if stood_still > self._lease_seconds:
            return replace(query, stale_lease_version=state.lease_renewal)
        return None
