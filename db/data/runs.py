"""What stands in the database about queries: read by whoever must decide from the truth and not from memory."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from psycopg.rows import class_row

from db.connection import Connection


@dataclass(frozen=True, slots=True)
class RunState:
    """A query as the database has it, at `read_at` of the database's clock.

    `late` means that its deadline has passed on the database's clock and on this worker's. `queued_at` is the broker's
    append time.
    """

    query_id: str
    org_id: str
    user_id: str | None
    mode: str
    status: str
    sql_hash: str
    saved_query_id: str | None
    task_id: str | None
    output_format: str | None
    fingerprint: bytes
    topic: str
    partition: int
    record_offset: int
    traceparent: str
    sequence: int
    attempt: int
    crashes: int
    token: str | None
    queued_at: datetime
    started_at: datetime | None
    late: bool
    cancelled: bool
    lease_token: str | None
    lease_renewal: int | None
    read_at: datetime

    @property
    def overdue(self) -> bool:
        """True when it has waited in the queue for too long."""
        return self.late and self.attempt == 0


READ_STATES = """
SELECT q.id::text AS query_id, q.org_id::text AS org_id, q.user_id::text AS user_id, q.mode, q.status, q.sql_hash,
       q.saved_query_id::text AS saved_query_id, q.task_id::text AS task_id, q.output_format,
       r.fingerprint, r.topic, r.partition, r.record_offset, r.traceparent,
       r.sequence, r.attempt, r.crashes, r.token::text AS token, r.queued_at, r.started_at,
       coalesce(r.deadline <= least(now(), %(worker_now)s), false) AS late,
       r.cancelled OR EXISTS (SELECT FROM query_cancellations c
                              WHERE c.query_id = q.id AND c.org_id = q.org_id) AS cancelled,
       l.token::text AS lease_token, l.renewal AS lease_renewal,
       clock_timestamp() AS read_at
FROM query_runs r
JOIN query_results q ON q.id = r.query_id
LEFT JOIN query_leases l ON l.query_id = r.query_id
WHERE r.query_id = ANY(%(query_ids)s::uuid[])
"""

# Overdue and cancelled queries: at most 1,000 of each without a lease (the longest overdue first), and all with a
# lease, because only running queries have one.
# `left_behind`: an attempt of the query has started, so its next attempt takes it over. End the query only if its
# record will not be delivered again. After `forsaken` seconds `left_behind` is false, and the query ends in any case.
_OVERDUE = """
SELECT r.query_id::text AS query_id, r.topic, r.partition, r.record_offset,
       r.attempt > 0 AND NOT r.cancelled
       AND r.deadline > least(now(), %(worker_now)s) - make_interval(secs => %(forsaken)s) AS left_behind
"""
_IS_LATE = """
    r.deadline <= least(now(), %(worker_now)s)
    AND (r.attempt = 0 OR r.deadline <= least(now(), %(worker_now)s) - make_interval(secs => %(grace)s))
"""
_HAS_NO_LEASE = "NOT EXISTS (SELECT FROM query_leases l WHERE l.query_id = r.query_id)"
READ_OVERDUE = f"""
({_OVERDUE} FROM query_runs r WHERE {_IS_LATE} AND {_HAS_NO_LEASE} ORDER BY r.deadline LIMIT 1000)
UNION
({_OVERDUE} FROM query_runs r
 WHERE r.cancelled AND r.deadline IS NOT NULL AND {_HAS_NO_LEASE} ORDER BY r.query_id LIMIT 1000)
UNION
{_OVERDUE} FROM query_leases l JOIN query_runs r ON r.query_id = l.query_id
WHERE {_IS_LATE} OR (r.cancelled AND r.deadline IS NOT NULL)
"""


@dataclass(frozen=True, slots=True)
class Overdue:
    """A query to be ended, with its record's coordinates. `left_behind`: only if its record will not come any more."""

    query_id: str
    topic: str
    partition: int
    record_offset: int
    left_behind: bool


# What an event about a query needs beside the step itself, for a worker that has no request in memory.
_CANONICAL = """
SELECT q.id::text AS query_id, q.org_id::text AS org_id, q.user_id::text AS user_id, q.mode, q.status, q.sql_hash,
       q.saved_query_id::text AS saved_query_id, q.task_id::text AS task_id, q.output_format, q.output_location,
       q.row_count, q.bytes, q.duration_ms, q.error_code, q.error_message, q.created_at, q.updated_at
FROM query_results q
"""
READ_CANONICAL = _CANONICAL + "WHERE q.id = ANY(%(query_ids)s::uuid[])"
# Uses the index on (org_id, created_at).
LIST_CANONICAL = (
    _CANONICAL
    + """
WHERE q.org_id = %(org_id)s
  AND (%(user_id)s::uuid IS NULL OR q.user_id = %(user_id)s::uuid)
  AND (%(since)s::timestamptz IS NULL OR q.created_at >= %(since)s)
  AND (%(until)s::timestamptz IS NULL OR q.created_at < %(until)s)
  AND (%(mode)s::text IS NULL OR q.mode = %(mode)s)
  AND q.status = ANY(%(statuses)s::text[])
ORDER BY q.created_at DESC, q.id
LIMIT %(limit)s
"""
)


@dataclass(frozen=True, slots=True)
class CanonicalRow:
    """A row of `query_results`, ids as strings."""

    query_id: str
    org_id: str
    user_id: str | None
    mode: str
    status: str
    sql_hash: str
    saved_query_id: str | None
    task_id: str | None
    output_format: str | None
    output_location: str | None
    row_count: int | None
    bytes: int | None
    duration_ms: int | None
    error_code: str | None
    error_message: str | None
    created_at: datetime
    updated_at: datetime


# Stands in the row's `files` for a result that is no object but in the query's last event. The index of what expires
# finds it, and its bytes are nowhere else.
INLINE_FILE = {"inline": True}

READ_FILES = """
SELECT jsonb_path_query_array(files, '$[*] ? (exists(@.key))') FROM query_runs WHERE query_id = %(query_id)s
"""
READ_LAST_EVENT = "SELECT last_event FROM query_runs WHERE query_id = %(query_id)s"


async def read_states(connection: Connection, query_ids: Iterable[str]) -> dict[str, RunState]:
    """The states of the queries that exist, by id."""
    async with connection.cursor(row_factory=class_row(RunState)) as cursor:
        await cursor.execute(READ_STATES, {"query_ids": list(query_ids), "worker_now": datetime.now(UTC)})
        return {state.query_id: state for state in await cursor.fetchall()}


async def read_overdue(connection: Connection, *, grace: float, forsaken: float) -> list[Overdue]:
    """Read overdue and cancelled queries: at most 1,000 of each without a lease, and all with a lease.

    `grace` and `forsaken` in seconds are for those that were started once and not cancelled.
    """
    async with connection.cursor(row_factory=class_row(Overdue)) as cursor:
        limits = {"worker_now": datetime.now(UTC), "grace": grace, "forsaken": forsaken}
        await cursor.execute(READ_OVERDUE, limits)
        return await cursor.fetchall()


async def read_canonical(connection: Connection, query_ids: Iterable[str]) -> dict[str, CanonicalRow]:
    """The canonical rows of the queries that exist, by id."""
    async with connection.cursor(row_factory=class_row(CanonicalRow)) as cursor:
        await cursor.execute(READ_CANONICAL, {"query_ids": list(query_ids)})
        return {row.query_id: row for row in await cursor.fetchall()}


@dataclass(frozen=True, slots=True)
class QueryFilter:
    """Selects an org's queries. A field that is None does not filter. Times have a timezone; `until` is exclusive."""

    org_id: str
    user_id: str | None
    since: datetime | None
    until: datetime | None
    statuses: Sequence[str]
    mode: str | None


async def list_canonical(connection: Connection, wanted: QueryFilter, limit: int) -> list[CanonicalRow]:
    """Read the newest matching queries, at most `limit`."""
    async with connection.cursor(row_factory=class_row(CanonicalRow)) as cursor:
        await cursor.execute(LIST_CANONICAL, asdict(wanted) | {"limit": limit})
        return await cursor.fetchall()


async def read_files(connection: Connection, query_id: str) -> list[dict[str, Any]]:
    """The objects of a query's result: key, bytes, rows, etag, sha256. Empty when there is none."""
    cursor = await connection.execute(READ_FILES, {"query_id": query_id})
    row = await cursor.fetchone()
    return list(row[0]) if row else []


async def read_last_event(connection: Connection, query_id: str) -> bytes | None:
    """The bytes of a query's last event, in which an inline result is; None where there is no such query."""
    row = await (await connection.execute(READ_LAST_EVENT, {"query_id": query_id})).fetchone()
    return None if row is None else row[0]
