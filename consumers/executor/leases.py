"""Leases: an attempt is ours while we renew it. One loop renews all of them together."""

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum, auto

from db.connection import DataPool, statement
from db.data.attempts import Renewal, renew
from db.retrying import until_available
from telemetry.metrics import METRICS


class Stop(Enum):
    """Why an attempt must end before it is finished."""

    LOST = auto()
    CANCELLED = auto()
    DRAINING = auto()


@dataclass(slots=True, eq=False)
class Lease:
    """One attempt's lease. `stopped` resolves when the attempt must end before its time.

    `ending` is true once the attempt's own end is on its way: then a renewal may well find no lease any more.
    """

    query_id: str
    token: str
    ending: bool = False
    stopped: "asyncio.Future[Stop]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def stop(self, why: Stop) -> None:
        """Ask the attempt to end; the first reason stands."""
        if not self.stopped.done():
            self.stopped.set_result(why)


class Leases:
    """The leases that this process holds."""

    def __init__(self, pool: DataPool, lease_seconds: float, renew_seconds: float) -> None:
        self._pool = pool
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._held: dict[str, Lease] = {}

    def add(self, lease: Lease) -> None:
        """Renew the lease of a claimed attempt until `remove`. Before the claim is committed there is no lease."""
        self._held[lease.token] = lease

    def remove(self, lease: Lease) -> None:
        """Renew the lease no longer."""
        self._held.pop(lease.token, None)

    def stop_all(self, why: Stop) -> None:
        """Ask every attempt to end."""
        for lease in self._held.values():
            lease.stop(why)

    def stop(self, query_id: str, why: Stop) -> bool:
        """Ask the attempt at that query to end; False if there is none here."""
        mine = [lease for lease in self._held.values() if lease.query_id == query_id]
        for lease in mine:
            lease.stop(why)
        return bool(mine)

    async def renew_for_ever(self) -> None:
        """Renew every few seconds. While the database is away nothing can be decided: a lease that ran out meanwhile
        is found lost at the next renewal, and every write is fenced anyway."""
        while True:
            started = time.monotonic()
            if self._held:
                await until_available(self._renew, "postgres data")
            await asyncio.sleep(max(0.0, self._renew_seconds - (time.monotonic() - started)))

    async def _renew(self) -> None:
        asked = list(self._held.values())
        renewals = [Renewal(lease.query_id, lease.token, self._lease_seconds) for lease in asked]
        async with statement(self._pool) as connection:
            kept = await renew(connection, renewals)
        for lease in asked:
            # An attempt that ended while the answer was on its way has nothing to lose any more.
            if lease.token not in self._held or lease.ending:
                continue
            if lease.query_id not in kept:
                METRICS.lose_lease()
                lease.stop(Stop.LOST)
            elif kept[lease.query_id]:
                lease.stop(Stop.CANCELLED)
