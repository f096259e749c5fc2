"""Retention: what may go, judged by what stands in the database now, and its removal.

A listing of the bucket is older than the answer of these statements: whatever an attempt has announced by then is kept,
and what they let go can never be announced any more, for its attempt's token is no longer in the row, or the row is
terminal, or gone.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db.connection import Connection, conninfo, unavailable_told_apart
from db.data.runs import INLINE_FILE
from db.rows import to_arrays

# Two keys: the second number space of ours beside the relay's, and its only member. Session-level: the lock goes when
# its connection goes.
TRY_LOCK = "SELECT pg_try_advisory_lock(712, 0)"
# A sweeper that was stopped loses its connection after this, and with it the lock. Between two statements lies one call
# to the store at most, which gives up after 66 s.
LIMIT_IDLENESS = "SET idle_session_timeout = '2min'"

# As many rows as one transaction removes in some 100 ms.
_BATCH = 500

READ_NOW = "SELECT now()"

READ_SWEEP = """
SELECT position,
       coalesce(finished_at BETWEEN now() - make_interval(secs => %(fresh_seconds)s) AND now(), false) AS fresh
FROM sweeps WHERE bucket = %(bucket)s
"""

WRITE_SWEEP = """
INSERT INTO sweeps AS s (bucket, position, finished_at)
VALUES (%(bucket)s, %(position)s, CASE WHEN %(finished)s THEN now() END)
ON CONFLICT (bucket) DO UPDATE
SET position = excluded.position, finished_at = coalesce(excluded.finished_at, s.finished_at)
"""

# An ended row changes no more but by its expiry and its deletion, so what is read here without a lock still holds then.
READ_DUE = """
SELECT r.query_id::text AS query_id, r.traceparent,
       CASE WHEN r.files @> %(inline_file)s THEN r.last_event END AS inline_event
FROM query_runs r
WHERE r.expires_at <= now() AND r.files <> '[]'
ORDER BY r.expires_at
LIMIT %(limit)s
"""

# The row goes first: from then on it promises nothing, and its objects are strays. `was` is the row before. An inline
# result goes from the row and is told again without itself in this one statement, so once, and never of a query that
# was deleted meanwhile.
EXPIRE = """
WITH input AS (
    SELECT * FROM unnest(%(query_id)s::uuid[], %(shard)s::smallint[], %(event_id)s::uuid[], %(payload)s::bytea[],
                         %(headers)s::jsonb[]) AS i(query_id, shard, event_id, payload, headers)
), due AS (
    SELECT r.query_id, r.files FROM query_runs r
    WHERE r.query_id IN (SELECT i.query_id FROM input i) AND r.files <> '[]'
    ORDER BY r.query_id
    FOR UPDATE SKIP LOCKED
), emptied AS (
    UPDATE query_runs r SET files = '[]', last_event = coalesce(i.payload, r.last_event)
    FROM due JOIN input i USING (query_id)
    WHERE r.query_id = due.query_id
), told AS (
    INSERT INTO outbox (shard, event_id, query_id, type, payload, headers)
    SELECT i.shard, i.event_id, i.query_id, 'QueryStatusChanged', i.payload, i.headers
    FROM due JOIN input i USING (query_id)
    WHERE i.payload IS NOT NULL
    ORDER BY i.query_id
)
UPDATE query_results q SET output_location = NULL, updated_at = now()
FROM due JOIN query_results was ON was.id = due.query_id
WHERE q.id = due.query_id
RETURNING due.query_id::text, coalesce(was.output_location, due.files -> 0 ->> 'location') AS location, due.files
"""


@dataclass(frozen=True, slots=True)
class DueResult:
    """A result whose time is over; `inline_event` is its query's last event, where that carries it."""

    query_id: str
    traceparent: str
    inline_event: bytes | None


@dataclass(frozen=True, slots=True)
class Expiry:
    """A result to let go. With a payload it is an inline one, and the payload its event without it."""

    query_id: str
    shard: int
    event_id: str | None = None
    payload: bytes | None = None
    headers: Jsonb | None = None


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result, or a failure's `error.json`, of which the row told: its prefix as a URL, None where there is no object
    (an inline result has none), and its files."""

    query_id: str
    location: str | None
    files: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Find:
    """An object or an unfinished upload as listed: whose it is by its key, and when the store says that it was begun.

    `prefix` is its attempt's, `place` its number in the page.
    """

    place: int
    query_id: str
    attempt: int
    prefix: str
    modified: datetime


# updated_at is when the query's latest attempt began, or when it ended: since then every earlier attempt is dead, and
# once it has ended, all are. A time in the future says that the clock was set back; then the age can't be told, and
# the token alone decides, which is safe. An unfinished upload is no result: the end of its query is enough.
# What this database knows nothing of is not its own to judge: it goes when a result would have expired anyway, by the
# store's clock and by ours.
JUDGE = """
WITH input AS (
    SELECT * FROM unnest(%(place)s::int[], %(query_id)s::uuid[], %(attempt)s::int[], %(prefix)s::text[],
                         %(modified)s::timestamptz[]) AS i(place, query_id, attempt, prefix, modified)
)
SELECT i.place
FROM input i
LEFT JOIN query_results q ON q.id = i.query_id
LEFT JOIN query_runs r ON r.query_id = i.query_id
LEFT JOIN deleted_ids d ON d.query_id = i.query_id
WHERE CASE
    WHEN q.id IS NULL AND d.query_id IS NULL
        THEN i.modified <= least(now(), %(store_now)s) - make_interval(secs => %(unknown_seconds)s)
    WHEN coalesce(q.updated_at, d.deleted_at) BETWEEN now() - make_interval(secs => %(grace_seconds)s) AND now()
        THEN false
    WHEN q.id IS NULL THEN true
    WHEN q.status IN ('Succeeded', 'Failed')
        THEN %(unfinished)s
             OR right(coalesce(q.output_location, r.files -> 0 ->> 'location', ''), length(i.prefix) + 1)
                <> '/' || i.prefix
    ELSE i.attempt < r.attempt
END
"""

# For good and at once: nobody can finish a query whose row is gone. `everything` is an org's whole prefix, else only
# queries that were deleted by name.
JUDGE_DELETED = """
SELECT i.place
FROM unnest(%(place)s::int[], %(query_id)s::uuid[]) AS i(place, query_id)
WHERE NOT EXISTS (SELECT FROM query_results q WHERE q.id = i.query_id)
  AND (%(everything)s OR EXISTS (SELECT FROM deleted_ids d WHERE d.query_id = i.query_id))
"""

# LIMIT is a literal, so that the planner knows it: for a parameter, a generic plan assumes a tenth of the rows.
READ_OUTLIVED = f"""
WITH old AS (
    SELECT query_id, files FROM query_runs
    WHERE deadline IS NULL AND queued_at <= now() - make_interval(secs => %(seconds)s)
    ORDER BY queued_at
    LIMIT {_BATCH}
)
SELECT q.id::text AS query_id, coalesce(q.output_location, old.files -> 0 ->> 'location') AS location, old.files
FROM old JOIN query_results q ON q.id = old.query_id
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The end of a query's story in the status topic: its key without a value."""

    query_id: str
    shard: int
    event_id: str
    headers: Jsonb


# In the order of every other batch: rows before leases, each by id.
LOCK_ROWS = "SELECT FROM query_runs WHERE query_id = ANY(%(query_ids)s::uuid[]) ORDER BY query_id FOR UPDATE"
LOCK_LEASES = "SELECT FROM query_leases WHERE query_id = ANY(%(query_ids)s::uuid[]) ORDER BY query_id FOR UPDATE"

REMEMBER = """
INSERT INTO deleted_ids (query_id)
SELECT query_id FROM unnest(%(query_ids)s::uuid[]) AS i(query_id) ORDER BY query_id
ON CONFLICT DO NOTHING
"""
# Of rows that have outlived their time only the young ones can be asked for again: where rows are kept for days.
REMEMBER_YOUNG = """
INSERT INTO deleted_ids (query_id)
SELECT q.id FROM query_results q
WHERE q.id = ANY(%(query_ids)s::uuid[]) AND q.created_at > now() - make_interval(days => %(days)s)
ORDER BY q.id
ON CONFLICT DO NOTHING
"""
# An admission looks for deleted ids and inserts in one statement, by one snapshot. One that took its snapshot before
# the ids were kept could insert after their rows are gone: so keeping them waits until none is under way, and those
# that come wait in turn, for milliseconds. If one hangs, we let go, so that the others don't hang with it.
LIMIT_WAITING = "SET LOCAL lock_timeout = '1s'"
LOCK_ADMISSIONS_OUT = "LOCK TABLE deleted_ids IN ACCESS EXCLUSIVE MODE"
_BETWEEN_WAITS_SECONDS = 0.5

# What waits for the relay is not told any more: each event becomes a tombstone. Its row stays, for rows leave by the
# relay alone: one that Kafka has and that is missing here looks to it like a database that was restored. What the relay
# is publishing at this moment has a lower position than the tombstone, and so comes before it.
UNTELL = """
UPDATE outbox SET payload = NULL WHERE query_id = ANY(%(query_ids)s::uuid[]) AND payload IS NOT NULL
"""
DELETE_CANCELLATIONS = "DELETE FROM query_cancellations WHERE query_id = ANY(%(query_ids)s::uuid[])"
DELETE_AUDIT = "DELETE FROM pii_access_log WHERE record_id = ANY(%(query_ids)s::uuid[])"
DELETE_ROWS = "DELETE FROM query_results WHERE id = ANY(%(query_ids)s::uuid[]) RETURNING id::text"

BURY = """
INSERT INTO outbox (shard, event_id, query_id, type, payload, headers)
SELECT shard, event_id, query_id, 'QueryStatusChanged', NULL, headers
FROM unnest(%(query_id)s::uuid[], %(shard)s::smallint[], %(event_id)s::uuid[], %(headers)s::jsonb[])
     AS i(query_id, shard, event_id, headers)
ORDER BY query_id
"""

# A redelivery can come for as long as the request topics keep a record, some 8 days; a replay of an old dead letter
# within 31 more. A note about a dead letter is of use while its record can be read again.
REMEMBERED_DAYS = 60
_NOTED_DAYS = 40

# In batches, so that no statement runs for long.
_FORGET = """
DELETE FROM {table} WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {table} WHERE {column} <= now() - make_interval(days => {days}) LIMIT %(limit)s
))
"""
FORGET_CANCELLATIONS = _FORGET.format(table="query_cancellations", column="created_at", days=REMEMBERED_DAYS)
FORGET_DELETED = _FORGET.format(table="deleted_ids", column="deleted_at", days=REMEMBERED_DAYS)
# Saved queries that were removed while results referred to them, once none does any more. No request can come to refer
# to one again, see db.data.saved_queries. Nothing is read of query_results while there are none.
FORGET_SAVED = """
DELETE FROM saved_queries WHERE id IN (
    SELECT saved_query_id FROM saved_query_removals
    EXCEPT
    SELECT q.saved_query_id FROM query_results q JOIN saved_query_removals r ON r.saved_query_id = q.saved_query_id
    WHERE EXISTS (SELECT FROM saved_query_removals)
)
"""
FORGET_DEAD_LETTERS = _FORGET.format(table="dead_letters", column="created_at", days=_NOTED_DAYS)


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose everything: an org's, or one user's in it."""

    org_id: str
    user_id: str | None = None


_IN_SCOPE = "{row}org_id = %(org_id)s::uuid AND (%(user_id)s::uuid IS NULL OR {row}user_id = %(user_id)s::uuid)"

READ_UNFINISHED = f"""
SELECT r.query_id::text FROM query_runs r JOIN query_results q ON q.id = r.query_id
WHERE r.deadline IS NOT NULL AND {_IN_SCOPE.format(row="q.")}
"""  # noqa: S608 - a text of ours

READ_QUERIES = f"""
SELECT q.id::text AS query_id, coalesce(q.output_location, r.files -> 0 ->> 'location') AS location,
       coalesce(r.files, '[]') AS files
FROM query_results q LEFT JOIN query_runs r ON r.query_id = q.id
WHERE {_IN_SCOPE.format(row="q.")}
ORDER BY q.created_at DESC
LIMIT %(limit)s
"""  # noqa: S608

# Other users' queries may have run a saved query of this scope; they keep their rows and lose the reference. The
# user's document gives query_results no index on it, so that this reads the whole table: it takes as long as it takes.
WITHOUT_LIMIT = "SET LOCAL statement_timeout = 0"
# A request that is being admitted holds a key-share lock on its saved query until its row is there to be seen.
LOCK_SAVED = f"""
SELECT s.id FROM saved_queries s WHERE {_IN_SCOPE.format(row="s.")} ORDER BY s.id FOR UPDATE
"""  # noqa: S608
RELEASE_SAVED = "UPDATE query_results SET saved_query_id = NULL WHERE saved_query_id = ANY(%(ids)s)"
DELETE_SAVED = "DELETE FROM saved_queries WHERE id = ANY(%(ids)s)"

DELETE_DATASETS = f"DELETE FROM datasets WHERE {_IN_SCOPE.format(row='')}"  # noqa: S608
# What others have granted to the scope.
DELETE_GRANTS = """
DELETE FROM dataset_grants g USING datasets d
WHERE d.id = g.dataset_id
  AND g.grantee = coalesce('user:' || %(user_id)s::uuid, 'org:' || %(org_id)s::uuid)
  AND (%(user_id)s::uuid IS NULL OR d.org_id = %(org_id)s::uuid)
"""
DELETE_LIMITS = "DELETE FROM org_limits WHERE org_id = %(org_id)s::uuid AND %(user_id)s::uuid IS NULL"
# One that is active stops at its next checkpoint, which finds no row.
DELETE_REPLAYS = f"DELETE FROM replays WHERE {_IN_SCOPE.format(row='')}"  # noqa: S608
DELETE_SCOPE_CANCELLATIONS = f"DELETE FROM query_cancellations WHERE {_IN_SCOPE.format(row='')}"  # noqa: S608
DELETE_SCOPE_AUDIT = f"""
DELETE FROM pii_access_log WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM pii_access_log WHERE {_IN_SCOPE.format(row="")} LIMIT %(limit)s
))
"""  # noqa: S608

_FORGET_BATCH = 10_000


@asynccontextmanager
async def opened_sweep(url: str) -> AsyncIterator[Connection]:
    """A connection of a sweep's own, each statement its own transaction. Raises `DatabaseUnavailable`."""
    with unavailable_told_apart():
        async with await psycopg.AsyncConnection.connect(
            conninfo(url, "retention"), autocommit=True, prepare_threshold=0
        ) as connection:
            await connection.execute(LIMIT_IDLENESS)
            yield connection


async def try_lock(connection: Connection) -> bool:
    """Take the right to sweep, if no other process has it; held for as long as the connection lives."""
    row: Any = await (await connection.execute(TRY_LOCK)).fetchone()
    return bool(row[0])


async def read_now(connection: Connection) -> datetime:
    """The database's time."""
    row: Any = await (await connection.execute(READ_NOW)).fetchone()
    now: datetime = row[0]
    return now


async def read_sweep(connection: Connection, bucket: str, fresh_seconds: float) -> tuple[str, bool]:
    """Behind which key the sweep of a bucket goes on, and whether one was finished in the last `fresh_seconds`."""
    cursor = await connection.execute(READ_SWEEP, {"bucket": bucket, "fresh_seconds": fresh_seconds})
    row = await cursor.fetchone()
    return ("", False) if row is None else (row[0], row[1])


async def write_sweep(connection: Connection, bucket: str, position: str, *, finished: bool = False) -> None:
    """Remember how far the sweep of a bucket has come."""
    await connection.execute(WRITE_SWEEP, {"bucket": bucket, "position": position, "finished": finished})


async def read_due(connection: Connection) -> list[DueResult]:
    """The results whose time has been over for longest, at most 500."""
    async with connection.cursor(row_factory=class_row(DueResult)) as cursor:
        await cursor.execute(READ_DUE, {"limit": _BATCH, "inline_file": Jsonb([INLINE_FILE])})
        return await cursor.fetchall()


async def expire_results(connection: Connection, expiries: Sequence[Expiry]) -> list[StoredResult]:
    """Let the rows point to nothing any more, and tell again what carried its result; what they pointed to.

    Leaves out what somebody else expires, or deletes, at this moment or has before.
    """
    async with connection.cursor(row_factory=class_row(StoredResult)) as cursor:
        await cursor.execute(EXPIRE, to_arrays(Expiry, expiries))
        return await cursor.fetchall()


async def judge(
    connection: Connection,
    finds: Sequence[Find],
    *,
    unfinished: bool,
    store_now: datetime | None,
    grace_seconds: float,
    unknown_seconds: float,
) -> set[int]:
    """The places of what may go. `unfinished` says that the finds are uploads; `store_now` is the store's own time."""
    limits = {
        "unfinished": unfinished,
        "store_now": store_now,
        "grace_seconds": grace_seconds,
        "unknown_seconds": unknown_seconds,
    }
    cursor = await connection.execute(JUDGE, to_arrays(Find, finds) | limits)
    return {row[0] for row in await cursor.fetchall()}


async def judge_deleted(connection: Connection, finds: Sequence[Find], *, everything: bool) -> set[int]:
    """The places of what belongs to queries that were deleted for good; with `everything`, to any without a row."""
    arrays = {"place": [find.place for find in finds], "query_id": [find.query_id for find in finds]}
    cursor = await connection.execute(JUDGE_DELETED, arrays | {"everything": everything})
    return {row[0] for row in await cursor.fetchall()}


async def read_outlived(connection: Connection, seconds: float) -> list[StoredResult]:
    """The oldest ended queries whose rows have been there for so long, at most 500, and what they still point to."""
    async with connection.cursor(row_factory=class_row(StoredResult)) as cursor:
        await cursor.execute(READ_OUTLIVED, {"seconds": seconds})
        return await cursor.fetchall()


async def remember_deleted(connection: Connection, query_ids: Sequence[str]) -> None:
    """Keep the ids. No admission makes their rows anew from now on, and none is about to.

    Waits for the admissions under way, which take milliseconds.
    """
    while True:
        try:
            async with connection.transaction():
                await connection.execute(LIMIT_WAITING)
                await connection.execute(LOCK_ADMISSIONS_OUT)
                await connection.execute(REMEMBER, {"query_ids": list(query_ids)})
        except psycopg.errors.LockNotAvailable:
            # New admissions have waited behind us: let them through before the next try.
            await asyncio.sleep(_BETWEEN_WAITS_SECONDS)
        else:
            return


async def delete_queries(
    connection: Connection, tombstones: Sequence[Tombstone], *, audit: bool
) -> tuple[int, int, int]:
    """Delete rows and all that hangs on them, in one transaction that also writes their tombstones.

    With `audit` the log entries of their reads go as well. Returns how many rows, log entries and cancellations went;
    what was gone before gets no second tombstone.
    """
    query_ids = [tombstone.query_id for tombstone in tombstones]
    keys = {"query_ids": query_ids}
    async with connection.transaction():
        # Each statement sees what was committed before the lock was had.
        await connection.execute(LOCK_ROWS, keys)
        await connection.execute(LOCK_LEASES, keys)
        await connection.execute(REMEMBER_YOUNG, keys | {"days": REMEMBERED_DAYS})
        await connection.execute(UNTELL, keys)
        cancellations = await connection.execute(DELETE_CANCELLATIONS, keys)
        entries = (await connection.execute(DELETE_AUDIT, keys)).rowcount if audit else 0
        gone = {row[0] for row in await (await connection.execute(DELETE_ROWS, keys)).fetchall()}
        buried = [tombstone for tombstone in tombstones if tombstone.query_id in gone]
        await connection.execute(BURY, to_arrays(Tombstone, buried))
    return len(gone), entries, cancellations.rowcount


async def forget_notes(connection: Connection) -> dict[str, int]:
    """Remove notes that nobody can need any more; how many, by their table."""
    statements: dict[str, LiteralString] = {
        "query_cancellations": FORGET_CANCELLATIONS,
        "deleted_ids": FORGET_DELETED,
        "dead_letters": FORGET_DEAD_LETTERS,
    }
    forgotten = {table: await _repeat(connection, statement) for table, statement in statements.items()}
    async with connection.transaction():
        await connection.execute(WITHOUT_LIMIT)
        forgotten["saved_queries"] = (await connection.execute(FORGET_SAVED)).rowcount
    return forgotten


async def read_unfinished(connection: Connection, scope: Scope) -> list[str]:
    """Queries of the scope that wait or run."""
    cursor = await connection.execute(READ_UNFINISHED, {"org_id": scope.org_id, "user_id": scope.user_id})
    return [row[0] for row in await cursor.fetchall()]


async def read_queries(connection: Connection, scope: Scope) -> list[StoredResult]:
    """The newest queries of the scope, at most 500, and what their rows point to."""
    keys = {"org_id": scope.org_id, "user_id": scope.user_id, "limit": _BATCH}
    async with connection.cursor(row_factory=class_row(StoredResult)) as cursor:
        await cursor.execute(READ_QUERIES, keys)
        return await cursor.fetchall()


async def delete_saved(connection: Connection, scope: Scope) -> int:
    """Delete the scope's saved queries; how many."""
    async with connection.transaction():
        await connection.execute(WITHOUT_LIMIT)
        locked = await connection.execute(LOCK_SAVED, {"org_id": scope.org_id, "user_id": scope.user_id})
        ids = [row[0] for row in await locked.fetchall()]
        if ids:
            await connection.execute(RELEASE_SAVED, {"ids": ids})
            await connection.execute(DELETE_SAVED, {"ids": ids})
    return len(ids)


async def delete_belongings(connection: Connection, scope: Scope) -> dict[str, int]:
    """Delete what the scope owns besides queries and saved queries; how many rows, by their table."""
    keys = {"org_id": scope.org_id, "user_id": scope.user_id}
    return {
        "datasets": (await connection.execute(DELETE_DATASETS, keys)).rowcount,
        "dataset_grants": (await connection.execute(DELETE_GRANTS, keys)).rowcount,
        "org_limits": (await connection.execute(DELETE_LIMITS, keys)).rowcount,
        "replays": (await connection.execute(DELETE_REPLAYS, keys)).rowcount,
        "query_cancellations": (await connection.execute(DELETE_SCOPE_CANCELLATIONS, keys)).rowcount,
        "pii_access_log": await _repeat(connection, DELETE_SCOPE_AUDIT, keys),
    }


async def _repeat(connection: Connection, statement: LiteralString, keys: dict[str, str | None] | None = None) -> int:
    """Run a statement that removes a batch until it finds nothing; how many rows went."""
    total = 0
    while True:
        cursor = await connection.execute(statement, {**(keys or {}), "limit": _FORGET_BATCH})
        total += cursor.rowcount
        if cursor.rowcount < _FORGET_BATCH:
            return total
