"""The state database from Postgres data: each query's last event, which was committed there before it was published."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import structlog

from consumers.projector import to_row
from db.connection import Connection, DataPool, transaction
from db.data.last_events import PAGE, count_queries, read_last_events, read_last_events_of
from db.state.query_status import QueryStatusRow
from db.state.rebuild import compare, keep_live, read_difference, stage, unstage
from queryd.codec import InvalidEvent, NoRegistry, Undecodable, decode_status
from replay.rebuild.source import Reading, Report, SourceName
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.rebuild")


class PostgresSource:
    """`query_runs`, every query of it."""

    def __init__(self, pool: DataPool, generation: str, queries: int) -> None:
        self._pool = pool
        self._generation = generation
        self._queries = queries
        self._events = 0
        self._unreadable: set[str] = set()

    @property
    def facts(self) -> Mapping[str, Any]:
        """The database, by its outbox's generation."""
        return {"source": SourceName.POSTGRES, "generation": self._generation}

    @property
    def reading(self) -> Reading:
        """What has been read so far."""
        return Reading(self._events, len(self._unreadable))

    async def stage(self, connection: Connection, report: Report) -> None:
        """Fill the copy from all queries; one that comes or goes meanwhile is `settle`'s affair."""
        after: str | None = None
        while found := await self._read_page(after):
            after = found[-1][0]
            await self._take(connection, found)
            self._events += len(found)
            await report(self._events, max(self._queries, self._events))

    async def settle(self, connection: Connection) -> None:
        """Ask again for each query in which copy and live table differ.

        Postgres data is never behind the live table. What it does not know now was deleted, also if the copy has it;
        what the live table knows better has gone on since it was copied.
        """
        await compare(connection)
        async for query_ids in read_difference(connection, PAGE):
            async with transaction(self._pool) as data:
                events = await read_last_events_of(data, query_ids)
            # Anew, and not over what was copied: of an id that was asked for again the sequence has begun again.
            await unstage(connection, query_ids)
            await self._take(connection, events.items())
            await keep_live(connection, [query_id for query_id in query_ids if query_id in self._unreadable])

    async def write_offsets(self, connection: Connection) -> None:
        """None: Postgres data knows nothing of the log. A projector goes on where it was, or begins at the log's
        beginning, and what it reads has sequences that were seen."""

    async def _read_page(self, after: str | None) -> list[tuple[str, bytes]]:
        async with transaction(self._pool) as data:
            return await read_last_events(data, after)

    async def _take(self, connection: Connection, events: Iterable[tuple[str, bytes]]) -> None:
        rows, unreadable = await asyncio.to_thread(_decode, events)
        for query_id in unreadable - self._unreadable:
            _log.error(LogEvent.STATUS_UNREADABLE, reason="the last event in Postgres data", query_id=query_id)
        self._unreadable |= unreadable
        await stage(connection, rows)


@asynccontextmanager
async def opened_postgres(pool: DataPool) -> AsyncIterator[PostgresSource]:
    """Postgres data as a source; raises `DatabaseUnavailable`."""
    async with transaction(pool) as data:
        generation, queries = await count_queries(data)
    yield PostgresSource(pool, generation, queries)


def _decode(events: Iterable[tuple[str, bytes]]) -> tuple[list[QueryStatusRow], set[str]]:
    """The rows, and the ids of queries without an event that can be read. Raises `NoRegistry`, `RegistryAway`."""
    rows, unreadable = [], set()
    for query_id, encoded in events:
        try:
            rows.append(to_row(decode_status(encoded)))
        except NoRegistry:
            # A setting is missing; nothing is wrong with the event.
            raise
        except (Undecodable, InvalidEvent):
            unreadable.add(query_id)
    return rows, unreadable
