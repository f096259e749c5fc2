"""The sweep: expired results, what dead attempts left in the bucket, rows that have outlived their time, and notes.

Everything is judged by the database after it was listed, and every step may be cut short and repeated: what is left
over is found again. That several sweep at once would be harmless; a lock only saves the work.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import structlog
from psycopg.types.json import Jsonb

from db.connection import Connection, DatabaseUnavailable
from db.data.outbox import shard_of
from db.data.retention import (
    Find,
    StoredResult,
    Tombstone,
    delete_queries,
    forget_notes,
    judge,
    opened_sweep,
    read_now,
    read_outlived,
    read_sweep,
    try_lock,
    write_sweep,
)
from processes import scratch
from queryd.headers import build_headers, continue_trace
from results.location import ROOT, read_key
from results.retention.bucket import Bucket, Listed, Page, split_location
from results.retention.expiry import expire_batch
from results.store import StoreAccess, StoreRefused, StoreUnavailable
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.retention")

# An attempt counts as dead for good once it has been dead for so many leases.
_DEAD_LEASES = 2
# Where many executors look, one sweeps: the others find that it was done within this part of the interval.
_FRESH = 0.5
# How often a command asks for the right to sweep while another process has it.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """What retention needs of the settings. Times in seconds; `scratch` with the beginnings of its folders' names."""

    data_url: str
    bucket: str
    lease_seconds: float
    result_seconds: float
    row_seconds: float
    interval_seconds: float
    scratch: Path
    scratch_prefixes: tuple[str, ...]


@dataclass(slots=True)
class Swept:
    """How many were removed. `expired` are results, `objects` and `uploads` what nobody had announced."""

    expired: int = 0
    objects: int = 0
    uploads: int = 0
    rows: int = 0
    query_cancellations: int = 0
    deleted_ids: int = 0
    dead_letters: int = 0
    saved_queries: int = 0
    scratch: int = 0


class SweepUnderWay(Exception):
    """Another process sweeps and does not come to its end: ask again later."""


class Retention:
    """Sweeps once, or forever. `access` gives access to the bucket."""

    def __init__(self, rules: RetentionRules, access: StoreAccess) -> None:
        self._rules = rules
        self._access = access

    async def sweep_for_ever(self) -> None:
        """Sweep every interval, with jitter; a sweep that was cut short goes on at the next."""
        while True:
            await asyncio.sleep(self._rules.interval_seconds * random.uniform(0.7, 1.0))  # noqa: S311 — jitter
            try:
                await self._sweep_if_due()
            except (DatabaseUnavailable, StoreUnavailable, StoreRefused) as error:
                _log.warning(LogEvent.RETENTION_POSTPONED, reason=str(error))

    async def sweep(self, *, patience_seconds: float) -> Swept:
        """Sweep everything, from its beginning to its end, waiting for another process that sweeps.

        Raises `SweepUnderWay`, `DatabaseUnavailable`, `StoreUnavailable`, `StoreRefused`.
        """
        async with opened_sweep(self._rules.data_url) as connection:
            latest = time.monotonic() + patience_seconds
            while not await try_lock(connection):
                if time.monotonic() > latest:
                    raise SweepUnderWay("another process is sweeping")
                await asyncio.sleep(_LOOK_SECONDS)
            return await self._sweep(connection, start="")

    async def _sweep_if_due(self) -> None:
        # Its own machine's scratch every executor sweeps by itself.
        removed = await self._sweep_scratch()
        async with opened_sweep(self._rules.data_url) as connection:
            if not await try_lock(connection):
                return
            start, fresh = await read_sweep(connection, self._rules.bucket, self._rules.interval_seconds * _FRESH)
            if fresh and not start:
                return
            swept = await self._sweep(connection, start)
        swept.scratch += removed
        _log.info(LogEvent.RETENTION_SWEPT, **asdict(swept))

    async def _sweep(self, connection: Connection, start: str) -> Swept:
        sweep = _Sweep(connection, self._access, self._rules)
        await sweep.expire()
        await sweep.remove_strays(start)
        await sweep.abort_uploads()
        await sweep.remove_rows()
        await sweep.forget()
        sweep.swept.scratch = await self._sweep_scratch()
        return sweep.swept

    async def _sweep_scratch(self) -> int:
        root = self._rules.scratch
        return sum([await asyncio.to_thread(scratch.sweep, root, each) for each in self._rules.scratch_prefixes])


class _Sweep:
    """One sweep on one connection."""

    def __init__(self, connection: Connection, access: StoreAccess, rules: RetentionRules) -> None:
        self._connection = connection
        self._access = access
        self._rules = rules
        self._bucket = Bucket(access, rules.bucket)
        self.swept = Swept()

    async def expire(self) -> None:
        """Results whose time is over by the database's clock: the row first, then the objects."""
        while expired := await expire_batch(self._connection):
            await delete_results(self._access, expired)
            self.swept.expired += len(expired)

    async def remove_strays(self, start: str) -> None:
        """Objects that no terminal row points to, once their attempt is dead for twice the lease."""
        async for page in self._bucket.list_objects(ROOT, start):
            gone = await self._judge(page, unfinished=False)
            self.swept.objects += await self._bucket.delete(listed.key for listed in gone)
            if page.listed:
                await write_sweep(self._connection, self._bucket.name, page.listed[-1].key)
        await write_sweep(self._connection, self._bucket.name, "", finished=True)

    async def abort_uploads(self) -> None:
        """Unfinished uploads of ended queries and dead attempts."""
        async for page in self._bucket.list_uploads(ROOT):
            self.swept.uploads += await self._bucket.abort(await self._judge(page, unfinished=True))

    async def remove_rows(self) -> None:
        """Rows that have outlived their time, with their tombstones; what they still point to goes first."""
        while outlived := await read_outlived(self._connection, self._rules.row_seconds):
            await delete_results(self._access, outlived)
            query_ids = [result.query_id for result in outlived]
            tombstones = make_tombstones(query_ids, await read_now(self._connection))
            rows, _, _ = await delete_queries(self._connection, tombstones, audit=False)
            self.swept.rows += rows

    async def forget(self) -> None:
        """Notes that nobody can need any more."""
        for table, count in (await forget_notes(self._connection)).items():
            setattr(self.swept, table, count)

    async def _judge(self, page: Page, *, unfinished: bool) -> list[Listed]:
        finds = to_finds(page)
        if not finds:
            return []
        places = await judge(
            self._connection,
            finds,
            unfinished=unfinished,
            store_now=page.told_at,
            grace_seconds=_DEAD_LEASES * self._rules.lease_seconds,
            unknown_seconds=self._rules.result_seconds,
        )
        return [page.listed[place] for place in sorted(places)]


async def delete_results(access: StoreAccess, results: Sequence[StoredResult]) -> int:
    """Delete the objects of results, wherever they lie: the bucket of an old one may be an earlier setting's.

    How many there were by their rows. Raises `StoreUnavailable` and `StoreRefused`.
    """
    pairs = sorted(
        (split_location(result.location)[0], file["key"])
        for result in results
        if result.location is not None
        for file in result.files
    )
    buckets = groupby(pairs, key=itemgetter(0))
    return sum([await Bucket(access, name).delete([key for _, key in some]) for name, some in buckets])


def to_finds(page: Page) -> list[Find]:
    """What of a page attempts of ours have written; anything else is not ours to judge."""
    return [
        Find(place, attempt.query_id, attempt.attempt, attempt.prefix, listed.modified)
        for place, listed in enumerate(page.listed)
        if (attempt := read_key(listed.key)) is not None
    ]


def make_tombstones(query_ids: Iterable[str], now: datetime) -> list[Tombstone]:
    """The ends of queries' stories in the status topic. Deterministic ids: the same deletion is the same event."""
    return [_make_tombstone(query_id, now) for query_id in query_ids]


def _make_tombstone(query_id: str, now: datetime) -> Tombstone:
    event_id = str(uuid.uuid5(uuid.UUID(query_id), "deleted"))
    headers = build_headers(
        event_type="queryd.QueryDeleted",
        event_id=event_id,
        subject=query_id,
        time=now,
        source="queryd",
        traceparent=continue_trace(None),
        schema="",
    )
    # There is no value that these could be about.
    del headers["ce_dataschema"], headers["content-type"]
    return Tombstone(query_id, shard_of(query_id), event_id, Jsonb(headers))
