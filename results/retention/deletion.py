"""Hard deletion: everything of one org, or of one user in it, for good.

Once a row is gone, no attempt can finish its query: its token stands nowhere any more. A worker finds its lease lost at
the next renewal and stops, and redeliveries are refused by the ids that are kept. What a worker that was stopped still
stores after that belongs to a deleted id, and a later sweep takes it.
"""

import asyncio
import time
from dataclasses import dataclass

from db.connection import Connection
from db.data.cancellations import NewCancellation, cancel
from db.data.retention import (
    Scope,
    delete_belongings,
    delete_queries,
    delete_saved,
    judge_deleted,
    opened_sweep,
    read_now,
    read_queries,
    read_unfinished,
    remember_deleted,
)
from queryd.events import OrgId
from results.location import org_prefix
from results.retention.bucket import Bucket, Listed, Page
from results.retention.sweep import delete_results, make_tombstones, to_finds
from results.store import StoreAccess

_CANCELS = 500
# How often to ask whether the cancelled queries have ended.
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class DeletionRules:
    """What a deletion needs of the settings. `stop_seconds` is how long cancelled queries may take to end."""

    data_url: str
    bucket: str
    stop_seconds: float


@dataclass(slots=True)
class Deleted:
    """How many were removed. `stopped` are the queries that still waited or ran; they are among `queries`."""

    queries: int = 0
    stopped: int = 0
    saved_queries: int = 0
    datasets: int = 0
    dataset_grants: int = 0
    org_limits: int = 0
    replays: int = 0
    query_cancellations: int = 0
    pii_access_log: int = 0
    objects: int = 0
    uploads: int = 0


async def delete_for_good(rules: DeletionRules, access: StoreAccess, scope: Scope) -> Deleted:
    """Delete everything of the scope. May be killed at any moment, and repeated until it finds nothing.

    Raises `DatabaseUnavailable`, `StoreUnavailable`, `StoreRefused`.
    """
    # The right to sweep is not needed: a sweep beside us removes what we would, or judges by rows that we left.
    async with opened_sweep(rules.data_url) as connection:
        deletion = _Deletion(connection, access, rules, scope)
        await deletion.stop()
        await deletion.delete_rows()
        await deletion.delete_belongings()
        await deletion.delete_objects()
        return deletion.deleted


class _Deletion:
    """One deletion on one connection."""

    def __init__(self, connection: Connection, access: StoreAccess, rules: DeletionRules, scope: Scope) -> None:
        self._connection = connection
        self._access = access
        self._bucket = Bucket(access, rules.bucket)
        self._rules = rules
        self._scope = scope
        self.deleted = Deleted()

    async def stop(self) -> None:
        """Cancel what waits or runs, and give it time to end: its children and uploads then end with it.

        What has not ended by then loses its row all the same.
        """
        unfinished = await read_unfinished(self._connection, self._scope)
        self.deleted.stopped = len(unfinished)
        for start in range(0, len(unfinished), _CANCELS):
            some = unfinished[start : start + _CANCELS]
            wishes = [NewCancellation(each, self._scope.org_id, None, None) for each in some]
            await cancel(self._connection, wishes)
        latest = time.monotonic() + self._rules.stop_seconds
        while unfinished and time.monotonic() < latest:
            await asyncio.sleep(_LOOK_SECONDS)
            unfinished = await read_unfinished(self._connection, self._scope)

    async def delete_rows(self) -> None:
        """Delete queries with all that hangs on them, and write their tombstones."""
        while batch := await read_queries(self._connection, self._scope):
            query_ids = [result.query_id for result in batch]
            # Committed before the rows go: a redelivery is refused from now on.
            await remember_deleted(self._connection, query_ids)
            # Their rows say in which bucket they lie; those without a row are found below their org's prefix.
            self.deleted.objects += await delete_results(self._access, batch)
            tombstones = make_tombstones(query_ids, await read_now(self._connection))
            rows, entries, cancellations = await delete_queries(self._connection, tombstones, audit=True)
            self.deleted.queries += rows
            self.deleted.pii_access_log += entries
            self.deleted.query_cancellations += cancellations

    async def delete_belongings(self) -> None:
        """Delete what else the scope owns."""
        self.deleted.saved_queries += await delete_saved(self._connection, self._scope)
        for table, count in (await delete_belongings(self._connection, self._scope)).items():
            setattr(self.deleted, table, getattr(self.deleted, table) + count)

    async def delete_objects(self) -> None:
        """Delete what lies below the org's prefix and has no row any more."""
        prefix = org_prefix(OrgId(self._scope.org_id))
        async for page in self._bucket.list_objects(prefix):
            gone = await self._judge(page)
            self.deleted.objects += await self._bucket.delete(listed.key for listed in gone)
        async for page in self._bucket.list_uploads(prefix):
            self.deleted.uploads += await self._bucket.abort(await self._judge(page))

    async def _judge(self, page: Page) -> list[Listed]:
        places = await judge_deleted(self._connection, to_finds(page), everything=self._scope.user_id is None)
        return [page.listed[place] for place in sorted(places)]
