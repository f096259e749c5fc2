"""The watched queries of this process: another attempt holds them, or may hold them."""

from collections.abc import Collection
from dataclasses import replace

from consumers.executor.lease_monitor import LeaseMonitor
from consumers.executor.query import Query
from db.data.runs import RunState
from queryd.events import Status


class Watch:
    """The parked queries of this process, by id. A second record of one id replaces the first: it is the newer one."""

    def __init__(self, lease_seconds: float) -> None:
        self._parked: dict[str, Query] = {}
        self._leases = LeaseMonitor(lease_seconds)

    def park(self, query: Query) -> None:
        """Begin to watch a query."""
        self._parked[query.facts.query_id] = query

    def drop(self, query_id: str) -> None:
        """Stop watching."""
        self._parked.pop(query_id, None)

    def forget_leases(self) -> None:
        """Observe all leases anew, because the database did not answer."""
        self._leases.forget()

    @property
    def queries(self) -> list[Query]:
        """What is watched now."""
        return list(self._parked.values())

    def observe(
        self, asked: Collection[str], states: dict[str, RunState], asked_at: float
    ) -> tuple[list[Query], list[Query]]:
        """Judge by what the database says: queries that are terminal or gone, and queries that may be claimed.

        Both leave the watch. `asked` are the ids that were read after `asked_at`: a query that was parked later is not
        among them, and its state is not known.
        """
        finished: list[Query] = []
        takeable: list[Query] = []
        dead = self._leases.observe(states.values(), asked_at)
        for query_id in asked:
            query, state = self._parked.get(query_id), states.get(query_id)
            if query is None:
                continue
            if state is None or Status(state.status).terminal:
                finished.append(query)
            elif state.lease_token is None or query_id in dead:
                takeable.append(replace(query, state=state, stale_lease_version=state.lease_renewal))
            else:
                continue
            del self._parked[query_id]
        return finished, takeable
