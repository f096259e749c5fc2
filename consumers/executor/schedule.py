"""Who runs next: in each lane a weighted fair queue over orgs; one org's ten thousand don't delay another's one.

Source: start-time fair queueing (Goyal, Vin, Cheng 1996), each query counted as one unit of work.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

from consumers.executor.admission import Admitted

# Orgs without waiting queries whose last turn is remembered at most, roughly.
_REMEMBERED = 1_000


class FairQueue:
    """The waiting queries of one lane. An org's own queries keep their order."""

    def __init__(self, weight_of: Callable[[str], float] = lambda _org: 1.0) -> None:
        self._weight_of = weight_of
        self._waiting: dict[str, deque[Admitted]] = {}
        # Orgs with waiting queries, by the virtual time at which their first one is due; the count keeps ties in order.
        self._due: list[tuple[float, int, str]] = []
        self._last_due: dict[str, float] = {}
        self._virtual_time = 0.0
        self._order = count()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return sum(len(queries) for queries in self._waiting.values())

    def put(self, query: Admitted) -> None:
        """Append to the org's queries."""
        org = query.facts.org_id
        queries = self._waiting.setdefault(org, deque())
        queries.append(query)
        if len(queries) == 1:
            self._schedule(org)
        self._arrived.set()

    async def take(self) -> Admitted:
        """The next query, waiting for one if there is none."""
        while not self._due:
            self._arrived.clear()
            await self._arrived.wait()
        self._virtual_time, _, org = heapq.heappop(self._due)
        queries = self._waiting[org]
        query = queries.popleft()
        if queries:
            self._schedule(org)
        else:
            del self._waiting[org]
            self._forget_idle()
        return query

    def drop(self, unwanted: Callable[[Admitted], bool]) -> list[Admitted]:
        """Remove and return the waiting queries that are unwanted."""
        dropped = [query for queries in self._waiting.values() for query in queries if unwanted(query)]
        if dropped:
            for org in list(self._waiting):
                kept = deque(query for query in self._waiting[org] if not unwanted(query))
                if kept:
                    self._waiting[org] = kept
                else:
                    del self._waiting[org]
                    self._last_due.pop(org, None)
            self._due = [entry for entry in self._due if entry[2] in self._waiting]
            heapq.heapify(self._due)
        return dropped

    def _schedule(self, org: str) -> None:
        # An org that was idle starts at the present virtual time: it has saved nothing up.
        due = max(self._virtual_time, self._last_due.get(org, 0.0)) + 1.0 / self._weight_of(org)
        self._last_due[org] = due
        if len(self._last_due) > 2 * len(self._waiting) + _REMEMBERED:
            # An org whose last turn is past has no claim on it any more.
            self._last_due = {each: at for each, at in self._last_due.items() if at > self._virtual_time}
        heapq.heappush(self._due, (due, next(self._order), org))

    def _forget_idle(self) -> None:
        if not self._waiting:
            self._last_due.clear()
            self._virtual_time = 0.0
