"""Who runs next: in each lane a weighted fair queue over orgs; one org's ten thousand don't delay another's one.

Source: start-time fair queueing (Goyal, Vin, Cheng 1996), each query counted as one unit of work. The org whose next
query has the smallest start tag is next, so that an org that was idle comes before all who have had their turn.
"""

import asyncio
import heapq
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from operator import attrgetter

from consumers.executor.query import Query

# Orgs without waiting queries of which something is remembered at most, roughly.
_REMEMBERED = 1_000


@dataclass(frozen=True, slots=True)
class Turn:
    """A waiting query and its position among its org's queries.

    `take` and `take_now` set `charged`, the virtual time that the org pays, and `releases`, how many of the org's
    queries had ended by then.
    """

    number: int
    query: Query
    charged: float = 0.0
    releases: int = 0


class FairQueue:
    """The waiting queries of one lane. An org's own queries keep their order.

    An org that may not run more just now is held: its queries wait, and nobody's slot waits for them.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Turn]] = {}
        self._numbers = count()
        # Orgs that are due, by start tag; the count keeps ties in order, and tells an entry that is no longer true.
        self._due: list[tuple[float, int, str]] = []
        self._entries: dict[str, int] = {}
        self._order = count()
        # Where an org's last turn ends on the virtual clock, and its next one begins if it has more waiting.
        self._finish: dict[str, float] = {}
        self._virtual_time = 0.0
        self._held: dict[str, asyncio.TimerHandle] = {}
        self._releases: dict[str, int] = {}
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return sum(len(queries) for queries in self._waiting.values())

    def put(self, query: Query) -> None:
        """Append to the org's queries; one that was claimed before goes in front of them."""
        org = query.facts.org_id
        queries = self._waiting.setdefault(org, deque())
        if query.state.attempt:
            queries.appendleft(Turn(-next(self._numbers), query))
        else:
            queries.append(Turn(next(self._numbers), query))
        self._schedule(org)

    async def take(self) -> Turn:
        """The next query, waiting for one if there is none."""
        while (due := self._pop_due()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        return self._begin_turn(*due)

    def _begin_turn(self, start: float, org: str) -> Turn:
        self._virtual_time = start
        queries = self._waiting[org]
        turn = queries.popleft()
        # What the newest query knows of the org's weight: a change holds from here on.
        charged = 1.0 / (queries[-1] if queries else turn).query.limits.weight
        self._finish[org] = self._virtual_time + charged
        if queries:
            self._schedule(org)
        else:
            del self._waiting[org]
            self._forget_idle()
        return replace(turn, charged=charged, releases=self._releases.get(org, 0))

    def take_now(self, most: int) -> list[Turn]:
        """Return the next queries whose turn it is, at most so many, without waiting.

        Ends before a query that was claimed before, and before more of an org's than may run at once.
        """
        turns: list[Turn] = []
        taken: Counter[str] = Counter()
        while len(turns) < most and (due := self._pop_due()) is not None:
            start, org = due
            query = self._waiting[org][0].query
            limit = query.limits.running_queries
            if query.state.attempt or (limit is not None and taken[org] >= limit):
                self._push_due(start, org)
                break
            taken[org] += 1
            turns.append(self._begin_turn(start, org))
        return turns

    def put_back(self, turn: Turn, seconds: float) -> None:
        """The query could not be run, because its org may not run more just now: it waits in its old place.

        Its org is held for that long, or until `release`; not at all where it was released since the query was taken.
        """
        org = turn.query.facts.org_id
        queries = self._waiting.setdefault(org, deque())
        insort(queries, turn, key=attrgetter("number"))
        if org in self._finish:
            self._finish[org] -= turn.charged
        # Where its next query is due already, that was reckoned with a turn that it did not have.
        self._entries.pop(org, None)
        if turn.releases == self._releases.get(org, 0) and org not in self._held:
            self._hold(org, seconds)
        self._schedule(org)

    def release(self, org: str, rest_seconds: float = 0.0) -> None:
        """One of the org's queries has ended, so that another may run: at once, or after a rest."""
        if len(self._releases) > _REMEMBERED:
            # Whoever's turn is under way is then not held once.
            self._releases.clear()
        self._releases[org] = self._releases.get(org, 0) + 1
        if (timer := self._held.get(org)) is not None:
            timer.cancel()
            del self._held[org]
        if rest_seconds > 0.0:
            self._entries.pop(org, None)
            self._hold(org, rest_seconds)
        self._schedule(org)

    def drop(self, unwanted: Callable[[Query], bool]) -> None:
        """Remove the waiting queries that are unwanted."""
        for org, queries in list(self._waiting.items()):
            kept = deque(each for each in queries if not unwanted(each.query))
            if kept:
                self._waiting[org] = kept
            else:
                del self._waiting[org]
                self._entries.pop(org, None)

    def _schedule(self, org: str) -> None:
        """See to it that an org with waiting queries is due, unless it is held."""
        if org in self._entries or org in self._held or org not in self._waiting:
            return
        # An org that was idle starts at the present virtual time: it has saved nothing up.
        self._push_due(max(self._virtual_time, self._finish.get(org, 0.0)), org)
        self._arrived.set()

    def _push_due(self, start: float, org: str) -> None:
        entry = next(self._order)
        self._entries[org] = entry
        heapq.heappush(self._due, (start, entry, org))

    def _pop_due(self) -> tuple[float, str] | None:
        while self._due:
            start, entry, org = heapq.heappop(self._due)
            if self._entries.get(org) == entry:
                del self._entries[org]
                return start, org
        return None

    def _hold(self, org: str, seconds: float) -> None:
        self._held[org] = asyncio.get_running_loop().call_later(seconds, self._let_go, org)

    def _let_go(self, org: str) -> None:
        del self._held[org]
        self._schedule(org)

    def _forget_idle(self) -> None:
        if not self._waiting:
            self._finish.clear()
            self._due.clear()
            self._virtual_time = 0.0
        elif len(self._finish) > 2 * len(self._waiting) + _REMEMBERED:
            # An org whose last turn is past has no claim on it any more.
            self._finish = {org: at for org, at in self._finish.items() if at > self._virtual_time}
