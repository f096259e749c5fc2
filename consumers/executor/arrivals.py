"""Who is admitted next: orgs take turns here too, so that one's burst of requests delays nobody else's admission."""

import asyncio
from collections import deque

from consumers.executor.admission import Legible
from queryd.events import OrgId, QueryId


class Arrivals:
    """Requests that were read and are not admitted yet. An org's own keep their order, and so do those of one id: the
    first is the query's own, whoever else claims the id."""

    def __init__(self) -> None:
        self._of_org: dict[OrgId, deque[Legible]] = {}
        # By which org's turns an id comes: the first that named it.
        self._org_of_id: dict[QueryId, OrgId] = {}
        # Orgs with requests, the one that waits for longest first.
        self._turns: deque[OrgId] = deque()
        self._arrived = asyncio.Event()

    def put(self, item: Legible) -> None:
        """Append to the org's requests."""
        org = self._org_of_id.setdefault(item.query_id, item.org_id)
        if org not in self._of_org:
            self._of_org[org] = deque()
            self._turns.append(org)
        self._of_org[org].append(item)
        self._arrived.set()

    async def wait_for_requests(self) -> None:
        """Wait until at least one request is there."""
        while not self._turns:
            self._arrived.clear()
            await self._arrived.wait()

    def take(self, limit: int) -> list[Legible]:
        """Remove and return up to `limit` requests. Orgs take turns, one request each."""
        taken: list[Legible] = []
        while self._turns and len(taken) < limit:
            org = self._turns.popleft()
            requests = self._of_org[org]
            item = requests.popleft()
            taken.append(item)
            self._org_of_id.pop(item.query_id, None)
            if requests:
                self._turns.append(org)
            else:
                del self._of_org[org]
        return taken
