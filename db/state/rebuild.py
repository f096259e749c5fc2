"""`query_status` made anew beside the live one, and what the two differ in.

The copy is a temporary table: no other session sees it, nothing of it is logged, and it goes with its session, however
that ends. It is filled by the projector's own statements.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg.rows import class_row

from db.connection import Connection, conninfo, unavailable_told_apart
from db.rows import to_arrays
from db.state.query_status import DELETE, MOVE_TASKS, UPSERT, QueryStatusRow

# Two keys: a number space of ours in Postgres state, and its only member. Session-level, as the copy is. The server
# lets go of a session a moment after its process has, and one rebuild may follow upon another.
LIMIT_WAITING_FOR_OTHERS = "SET lock_timeout = '2s'"
LOCK = "SELECT pg_advisory_lock(711, 0)"

# Unlike a service's statements these read whole tables and join them, once each: planned for what is there, and for as
# long as they take. A server that has gone is noticed by the connection's own limits.
PREPARE_SESSION = """
SET lock_timeout = 0;
SET statement_timeout = 0;
SET plan_cache_mode = auto;
-- A copy of some 200,000 queries in memory; what is above it goes to files.
SET temp_buffers = '64MB';
SET work_mem = '64MB';
"""

_COLUMNS: LiteralString = """query_id, org_id, user_id, task_id, mode, status, sequence, attempt, row_count, bytes,
    error_code, error_message, output_location, occurred_at"""
_LIVE: LiteralString = """s.query_id, s.org_id, s.user_id, s.task_id, s.mode, s.status, s.sequence, s.attempt,
    s.row_count, s.bytes, s.error_code, s.error_message, s.output_location, s.occurred_at"""
_REBUILT: LiteralString = _LIVE.replace("s.", "r.")

MAKE = """
CREATE TEMPORARY TABLE rebuilt_status (LIKE query_status INCLUDING DEFAULTS, PRIMARY KEY (query_id));
CREATE TEMPORARY TABLE rebuilt_difference (query_id UUID PRIMARY KEY, kind TEXT NOT NULL);
"""
# Nobody else analyzes a temporary table.
ANALYZE = "ANALYZE rebuilt_status"
COUNT = "SELECT count(*) FROM rebuilt_status"

STAGE = UPSERT.replace("INSERT INTO query_status ", "INSERT INTO pg_temp.rebuilt_status ")
UNSTAGE = DELETE.replace("FROM query_status ", "FROM pg_temp.rebuilt_status ")

# The rows as they stand, for queries of which the source can't tell.
KEEP = f"""
INSERT INTO rebuilt_status ({_COLUMNS})
SELECT {_COLUMNS} FROM query_status WHERE query_id = ANY(%(query_ids)s::uuid[])
ON CONFLICT DO NOTHING
"""  # noqa: S608

DIFFER = f"""
INSERT INTO rebuilt_difference
SELECT coalesce(r.query_id, s.query_id),
       CASE WHEN s.query_id IS NULL THEN 'missing' WHEN r.query_id IS NULL THEN 'surplus' ELSE 'stale' END
FROM rebuilt_status r FULL JOIN query_status s ON s.query_id = r.query_id
WHERE ({_LIVE}) IS DISTINCT FROM ({_REBUILT})
"""  # noqa: S608
FORGET_DIFFERENCE = "TRUNCATE rebuilt_difference"
ANALYZE_DIFFERENCE = "ANALYZE rebuilt_difference"
COUNT_DIFFERENCE = """
SELECT count(*) FILTER (WHERE kind = 'missing') AS missing, count(*) FILTER (WHERE kind = 'stale') AS stale,
       count(*) FILTER (WHERE kind = 'surplus') AS surplus
FROM rebuilt_difference
"""
READ_DIFFERENCE = """
SELECT query_id::text FROM rebuilt_difference
WHERE %(after)s::uuid IS NULL OR query_id > %(after)s::uuid
ORDER BY rebuilt_difference.query_id
LIMIT %(limit)s
"""

# Readers go on, writers wait until the transaction ends. Only the lock has so little time: a longer transaction would
# otherwise stop, through us, every writer behind us. 3 s is more than the second after which a waiting lock ends an
# autovacuum of the table.
LIMIT_WAITING = "SET LOCAL lock_timeout = '3s'"
LOCK_WRITERS_OUT = "LOCK TABLE query_status, consumer_offsets IN SHARE ROW EXCLUSIVE MODE"
WAIT_AGAIN = "SET LOCAL lock_timeout = 0"
_BETWEEN_WAITS_SECONDS = 0.5
# Some ten tries; whoever holds the table for longer is no writer of ours.
_LOCK_SECONDS = 40.0

SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"

# A row that is as it should be keeps its `updated_at`, and nobody waits for it.
REMOVE_SURPLUS = """
DELETE FROM query_status s USING rebuilt_difference d WHERE d.kind = 'surplus' AND s.query_id = d.query_id
"""
PUT_RIGHT = f"""
INSERT INTO query_status ({_COLUMNS})
SELECT {_REBUILT} FROM rebuilt_difference d JOIN rebuilt_status r ON r.query_id = d.query_id
WHERE d.kind <> 'surplus'
ORDER BY r.query_id
ON CONFLICT (query_id) DO UPDATE
SET org_id = excluded.org_id, user_id = excluded.user_id, task_id = excluded.task_id, mode = excluded.mode,
    status = excluded.status, sequence = excluded.sequence, attempt = excluded.attempt,
    row_count = excluded.row_count, bytes = excluded.bytes, error_code = excluded.error_code,
    error_message = excluded.error_message, output_location = excluded.output_location,
    occurred_at = excluded.occurred_at, updated_at = now()
"""  # noqa: S608

# One query a task, the one that the projector would have let decide: the first that ended, else one that runs.
READ_OPEN_TASKS = """
SELECT DISTINCT ON (s.task_id) s.task_id::text, s.org_id::text, s.status, s.error_code, s.occurred_at
FROM query_status s JOIN tasks t ON t.id = s.task_id AND t.org_id = s.org_id
WHERE t.status IN ('Queued', 'Running') AND s.status <> 'Queued'
  AND (%(after)s::uuid IS NULL OR s.task_id > %(after)s::uuid)
ORDER BY s.task_id, s.status IN ('Succeeded', 'Failed') DESC, s.occurred_at
LIMIT %(limit)s
"""

READ_OTHER_TOPICS = """
SELECT EXISTS (SELECT FROM consumer_offsets WHERE (cluster_id, topic_id) <> (%(cluster_id)s, %(topic_id)s))
"""

# As many as the projector moves at most, so that no task is held for long.
_TASKS_AT_ONCE = 500


class RebuildUnderWay(Exception):
    """Another process rebuilds this state database now."""


class TablesMissing(Exception):
    """The state database has none of our tables: `queryd db upgrade` makes them."""


class WritersBusy(Exception):
    """Somebody writes to `query_status` in a transaction that does not end."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows that the live table lacks, has with another content, and has too many."""

    missing: int
    stale: int
    surplus: int


@dataclass(frozen=True, slots=True)
class OpenTask:
    """What moves a task that is not at its end."""

    task_id: str
    org_id: str
    status: str
    error_code: str | None
    occurred_at: Any


@asynccontextmanager
async def opened_rebuild(url: str) -> AsyncIterator[Connection]:
    """A connection with an empty copy, on which each statement is its own transaction.

    Raises `RebuildUnderWay` and `TablesMissing`; and `DatabaseUnavailable`, also out of the context: then the copy is
    gone.
    """
    with unavailable_told_apart():
        async with await psycopg.AsyncConnection.connect(
            conninfo(url, "rebuild"), autocommit=True, prepare_threshold=None
        ) as connection:
            await connection.execute(LIMIT_WAITING_FOR_OTHERS)
            try:
                await connection.execute(LOCK)
            except psycopg.errors.LockNotAvailable:
                raise RebuildUnderWay("another rebuild of the state database is under way") from None
            await connection.execute(PREPARE_SESSION)
            try:
                await connection.execute(MAKE)
            except psycopg.errors.UndefinedTable:
                raise TablesMissing("the state database has no tables of ours: run queryd db upgrade first") from None
            yield connection


async def stage(connection: Connection, rows: Sequence[QueryStatusRow]) -> None:
    """Write rows into the copy, as the projector writes into the live table; at most one row a query."""
    if rows:
        await connection.execute(STAGE, to_arrays(QueryStatusRow, rows))


async def unstage(connection: Connection, query_ids: Sequence[str]) -> None:
    """Remove queries from the copy."""
    if query_ids:
        await connection.execute(UNSTAGE, {"query_ids": list(query_ids)})


async def keep_live(connection: Connection, query_ids: Sequence[str]) -> None:
    """Take queries that the copy lacks into it as the live table has them."""
    if query_ids:
        await connection.execute(KEEP, {"query_ids": list(query_ids)})


async def count_staged(connection: Connection) -> int:
    """How many queries the copy has; it is complete now, and analyzed."""
    await connection.execute(ANALYZE)
    row: Any = await (await connection.execute(COUNT)).fetchone()
    count: int = row[0]
    return count


@asynccontextmanager
async def snapshot(connection: Connection) -> AsyncIterator[None]:
    """A transaction that sees the live table, and the offsets, as of one moment."""
    async with connection.transaction():
        await connection.execute(SNAPSHOT)
        yield


@asynccontextmanager
async def writers_locked_out(connection: Connection) -> AsyncIterator[None]:
    """A transaction during which nobody else writes to `query_status` and `consumer_offsets`; readers go on.

    Raises `WritersBusy` when the lock can't be had within 40 s.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while not await _try_to_lock(connection):
        if time.monotonic() > deadline:
            raise WritersBusy("query_status is held by somebody's transaction")
        # Writers have waited behind us: let them through before the next try.
        await asyncio.sleep(_BETWEEN_WAITS_SECONDS)
    try:
        yield
    except BaseException:
        await connection.rollback()
        raise
    await connection.commit()


async def _try_to_lock(connection: Connection) -> bool:
    await connection.execute("BEGIN")
    try:
        await connection.execute(LIMIT_WAITING)
        await connection.execute(LOCK_WRITERS_OUT)
        await connection.execute(WAIT_AGAIN)
    except psycopg.errors.LockNotAvailable:
        await connection.rollback()
        return False
    return True


async def compare(connection: Connection) -> Difference:
    """How the live table differs from the copy, of which a note is kept for what follows."""
    await connection.execute(FORGET_DIFFERENCE)
    await connection.execute(DIFFER)
    await connection.execute(ANALYZE_DIFFERENCE)
    async with connection.cursor(row_factory=class_row(Difference)) as cursor:
        await cursor.execute(COUNT_DIFFERENCE)
        difference = await cursor.fetchone()
    assert difference is not None
    return difference


async def read_difference(connection: Connection, limit: int) -> AsyncIterator[list[str]]:
    """The ids of the queries that differ, at most `limit` at a time."""
    after: str | None = None
    while True:
        cursor = await connection.execute(READ_DIFFERENCE, {"after": after, "limit": limit})
        found = [query_id for (query_id,) in await cursor.fetchall()]
        if not found:
            return
        yield found
        after = found[-1]


async def put_right(connection: Connection) -> None:
    """Make the live table's content that of the copy, where `compare` has found that it differs."""
    await connection.execute(REMOVE_SURPLUS)
    await connection.execute(PUT_RIGHT)


async def move_open_tasks(connection: Connection) -> int:
    """Move the tasks that are behind their queries, as the projector would; how many those were.

    Each batch is a transaction, so that it is of no harm to be stopped in between, and to be repeated.
    """
    moved = 0
    after: str | None = None
    while True:
        async with connection.cursor(row_factory=class_row(OpenTask)) as cursor:
            await cursor.execute(READ_OPEN_TASKS, {"after": after, "limit": _TASKS_AT_ONCE})
            tasks = await cursor.fetchall()
        if not tasks:
            return moved
        moved += (await connection.execute(MOVE_TASKS, to_arrays(OpenTask, tasks))).rowcount
        after = tasks[-1].task_id


async def has_other_topics(connection: Connection, cluster_id: str, topic_id: str) -> bool:
    """True when the live table was also fed from another topic, or from another cluster."""
    cursor = await connection.execute(READ_OTHER_TOPICS, {"cluster_id": cluster_id, "topic_id": topic_id})
    row: Any = await cursor.fetchone()
    return bool(row[0])
