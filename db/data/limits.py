"""Limits of orgs: what an org has of its own, and the counts that hold two of them across all workers.

A count is exact because whoever counts holds the org's advisory lock until what it adds is committed: what was added
before is in the next statement's snapshot. Only orgs that have such a limit in force are locked.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from psycopg.rows import class_row

from db.connection import Connection

# A worker that stands still in the middle of its transaction holds its orgs' locks: the server ends such a session
# after this time, which is a hundred times what lies between two statements of ours. Our usual 30 s would keep all
# other workers from admitting or starting these orgs' queries for as long.
_IDLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """An org's row: None is the installation's default. Seconds, bytes, rows."""

    org_id: str
    weight: int
    running_queries: int | None
    queued_queries: int | None
    timeout_seconds: int | None
    bytes_scanned: int | None
    result_bytes: int | None
    result_rows: int | None


_COLUMNS = """
org_id::text, weight, running_queries, queued_queries, timeout_seconds, bytes_scanned, result_bytes, result_rows
"""

READ_OWN = f"""
SELECT {_COLUMNS}
FROM org_limits
WHERE org_id = ANY(%(org_ids)s::uuid[])
"""  # noqa: S608 — a text of ours

LIST_OWN = f"""
SELECT {_COLUMNS}
FROM org_limits
ORDER BY org_id
"""  # noqa: S608

# Only the columns that are named change.
CHANGE_OWN = f"""
INSERT INTO org_limits AS l (org_id, weight, running_queries, queued_queries, timeout_seconds, bytes_scanned,
                             result_bytes, result_rows)
VALUES (%(org_id)s, coalesce(%(weight)s::int, 1), %(running_queries)s, %(queued_queries)s, %(timeout_seconds)s,
        %(bytes_scanned)s, %(result_bytes)s, %(result_rows)s)
ON CONFLICT (org_id) DO UPDATE
SET weight = CASE WHEN 'weight' = ANY(%(named)s::text[]) THEN excluded.weight ELSE l.weight END,
    running_queries = CASE WHEN 'running_queries' = ANY(%(named)s::text[])
                           THEN excluded.running_queries ELSE l.running_queries END,
    queued_queries = CASE WHEN 'queued_queries' = ANY(%(named)s::text[])
                          THEN excluded.queued_queries ELSE l.queued_queries END,
    timeout_seconds = CASE WHEN 'timeout_seconds' = ANY(%(named)s::text[])
                           THEN excluded.timeout_seconds ELSE l.timeout_seconds END,
    bytes_scanned = CASE WHEN 'bytes_scanned' = ANY(%(named)s::text[])
                         THEN excluded.bytes_scanned ELSE l.bytes_scanned END,
    result_bytes = CASE WHEN 'result_bytes' = ANY(%(named)s::text[])
                        THEN excluded.result_bytes ELSE l.result_bytes END,
    result_rows = CASE WHEN 'result_rows' = ANY(%(named)s::text[])
                       THEN excluded.result_rows ELSE l.result_rows END
RETURNING {_COLUMNS}
"""  # noqa: S608

RESET_OWN = "DELETE FROM org_limits WHERE org_id = %(org_id)s"

# Two orgs may share a key, so the keys are what is sorted: two workers then never wait for each other.
LOCK_QUEUES = """
SELECT set_config('idle_in_transaction_session_timeout', %(idle)s, true), pg_advisory_xact_lock(713, key)
FROM (SELECT DISTINCT hashtext(org_id) AS key FROM unnest(%(org_ids)s::text[]) AS o(org_id) ORDER BY key) AS keys
"""

# Never waits: a slot has other orgs' queries to run. An org that somebody else counts just now is not in the answer.
TRY_LOCK_RUNNING = """
SELECT org_id
FROM unnest(%(org_ids)s::text[]) AS o(org_id)
WHERE set_config('idle_in_transaction_session_timeout', %(idle)s, true) IS NOT NULL
  AND pg_try_advisory_xact_lock(714, hashtext(org_id))
"""

# A known id, a deleted one and one that was cancelled before it came take no place in the queue. No more is counted
# than the limit has room for.
FIND_SURPLUS = """
WITH input AS (
    SELECT * FROM unnest(%(query_id)s::uuid[], %(org_id)s::uuid[]) WITH ORDINALITY AS i(query_id, org_id, place)
), newcomers AS (
    SELECT i.query_id, i.org_id, row_number() OVER (PARTITION BY i.org_id ORDER BY i.place) AS rank
    FROM input i
    WHERE NOT EXISTS (SELECT FROM query_results q WHERE q.id = i.query_id)
      AND NOT EXISTS (SELECT FROM deleted_ids d WHERE d.query_id = i.query_id)
      AND NOT EXISTS (SELECT FROM query_cancellations c WHERE c.query_id = i.query_id AND c.org_id = i.org_id)
), room AS MATERIALIZED (
    SELECT o.org_id, o.most - (
        SELECT count(*) FROM (
            SELECT FROM query_runs r
            WHERE r.org_id = o.org_id AND r.deadline IS NOT NULL AND r.attempt = 0 AND NOT r.cancelled
            LIMIT o.most
        ) AS waiting
    ) AS places
    FROM unnest(%(limited_org)s::uuid[], %(most)s::int[]) AS o(org_id, most)
)
SELECT n.query_id::text FROM newcomers n JOIN room USING (org_id) WHERE n.rank > room.places
"""


async def read_own_limits(connection: Connection, org_ids: Collection[str]) -> dict[str, OwnLimits]:
    """The rows of those orgs that have one."""
    async with connection.cursor(row_factory=class_row(OwnLimits)) as cursor:
        await cursor.execute(READ_OWN, {"org_ids": list(org_ids)})
        return {own.org_id: own for own in await cursor.fetchall()}


async def list_own_limits(connection: Connection) -> list[OwnLimits]:
    """All rows, by org."""
    async with connection.cursor(row_factory=class_row(OwnLimits)) as cursor:
        await cursor.execute(LIST_OWN)
        return await cursor.fetchall()


async def change_own_limits(connection: Connection, org_id: str, changes: Mapping[str, int | None]) -> OwnLimits:
    """Set what `changes` names by column and leave the rest; what then stands. None is the default again."""
    unnamed: dict[str, int | None] = dict.fromkeys(OwnLimits.__dataclass_fields__.keys() - {"org_id"})
    values = {"org_id": org_id, "named": list(changes), **unnamed, **changes}
    async with connection.cursor(row_factory=class_row(OwnLimits)) as cursor:
        await cursor.execute(CHANGE_OWN, values)
        stored = await cursor.fetchone()
        assert stored is not None
        return stored


async def reset_own_limits(connection: Connection, org_id: str) -> bool:
    """Forget the org's row; False where there was none."""
    return (await connection.execute(RESET_OWN, {"org_id": org_id})).rowcount > 0


async def find_surplus(connection: Connection, wanted: Sequence[tuple[str, str]], most: Mapping[str, int]) -> set[str]:
    """Which of the queries, ids with their orgs in order of arrival, would exceed what may wait.

    `most` has the limit of each of these orgs. Their queues are locked until the transaction ends, so that the answer
    holds for what it inserts.
    """
    await connection.execute(LOCK_QUEUES, {"org_ids": list(most), "idle": _idle()})
    keys = {
        "query_id": [query_id for query_id, _ in wanted],
        "org_id": [org_id for _, org_id in wanted],
        "limited_org": list(most),
        "most": list(most.values()),
    }
    return {row[0] for row in await (await connection.execute(FIND_SURPLUS, keys)).fetchall()}


async def try_lock_running(connection: Connection, org_ids: Collection[str]) -> set[str]:
    """Those orgs whose running queries nobody else can count until the transaction ends."""
    cursor = await connection.execute(TRY_LOCK_RUNNING, {"org_ids": list(org_ids), "idle": _idle()})
    return {row[0] for row in await cursor.fetchall()}


def _idle() -> str:
    return f"{_IDLE_SECONDS * 1000:.0f}ms"
