"""Attempts: claim, renew, finish, hand back. Every write carries the attempt's token; where it matches no row, nothing
happens. A batch may hold two wishes for one query (a slot's and the reaper's, say): one of them is granted.

A batch's ids are sorted and locked in order, so that two workers' batches can't deadlock; a claim skips what another
worker has locked. The change and its event are one statement: an event's position is drawn after its query's row lock.

A deadline is set by the later and judged by the earlier of two clocks, the database's and this worker's, so that one
wrong clock ends no query too early. A lease is dead if `renewal` is the number that an observer has seen for a whole
lease, see `consumers.executor.lease_monitor`. `query_leases.expires_at` is for executors of the release before.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb

from db.connection import Connection
from db.rows import to_arrays


@dataclass(frozen=True, slots=True)
class Claim:
    """Take a query for a new attempt. `sequence` is the state that the claimer has seen; the event is about the next.

    `stale_lease_version` is the number of renewals of a dead lease that the claim takes over. `limited` says that the
    org is known to have a limit of running queries; what holds is what the database says.
    """

    query_id: str
    org_id: str
    sequence: int
    token: str
    worker: str
    engine: str
    stale_lease_version: int | None
    lease_seconds: float
    run_seconds: float
    shard: int
    event_id: str
    payload: bytes
    headers: Jsonb
    limited: bool


# The limit of running queries is the org's as it stands now, and what counts is a lease, dead or alive: a dead one's
# query is taken over in its place. An org that has such a limit is counted only by who holds its lock, see
# `db.data.limits`; who first comes in the batch gets the last places.
CLAIM = """
WITH input AS (
    SELECT DISTINCT ON (query_id) * FROM unnest(
        %(query_id)s::uuid[], %(org_id)s::uuid[], %(sequence)s::int[], %(token)s::uuid[], %(worker)s::text[],
        %(engine)s::text[], %(stale_lease_version)s::bigint[], %(lease_seconds)s::float8[], %(run_seconds)s::float8[],
        %(shard)s::smallint[], %(event_id)s::uuid[], %(payload)s::bytea[], %(headers)s::jsonb[]
    ) WITH ORDINALITY
      AS i(query_id, org_id, sequence, token, worker, engine, stale_lease_version, lease_seconds, run_seconds, shard,
           event_id, payload, headers, wish)
    ORDER BY query_id, sequence DESC
), locked AS (
    SELECT r.query_id
    FROM query_runs r JOIN input i USING (query_id)
    -- The deadline of a Running query was that of an attempt that nobody holds any more: the next has its own.
    WHERE r.sequence = i.sequence AND NOT r.cancelled
      AND (r.deadline > least(now(), %(worker_now)s) OR r.attempt > 0 AND r.deadline IS NOT NULL)
      AND NOT EXISTS (SELECT FROM query_cancellations c
                      JOIN query_results q ON q.id = c.query_id AND q.org_id = c.org_id
                      WHERE c.query_id = r.query_id)
    ORDER BY r.query_id
    FOR UPDATE OF r SKIP LOCKED
), free AS (
    SELECT i.query_id, i.org_id, l.query_id IS NOT NULL AS left_behind,
           row_number() OVER (PARTITION BY i.org_id, l.query_id IS NULL ORDER BY i.wish) AS rank
    FROM locked JOIN input i USING (query_id)
    LEFT JOIN query_leases l USING (query_id)
    -- The sequence changes with each claim, so that a later lease is not taken for the dead one.
    WHERE l.query_id IS NULL OR l.renewal = i.stale_lease_version
), limited AS MATERIALIZED (
    SELECT o.org_id, o.org_id = ANY(%(locked_org_ids)s::uuid[]) AS counted,
           coalesce(own.running_queries, %(running_queries)s::int) - (
               SELECT count(*) FROM query_runs r JOIN query_leases USING (query_id)
               WHERE r.org_id = o.org_id AND r.deadline IS NOT NULL AND r.attempt > 0
           ) AS places
    FROM (SELECT DISTINCT f.org_id FROM free f) AS o LEFT JOIN org_limits own ON own.org_id = o.org_id
    WHERE coalesce(own.running_queries, %(running_queries)s::int) IS NOT NULL
), judged AS (
    SELECT f.query_id, f.org_id, f.left_behind,
           -- A takeover takes no further place; it needs the lock all the same, for its lease may be given up just now.
           l.org_id IS NULL OR l.counted AND (f.left_behind OR f.rank <= l.places) AS granted
    FROM free f LEFT JOIN limited l ON l.org_id = f.org_id
), moved AS (
    UPDATE query_runs r
    SET sequence = r.sequence + 1, attempt = r.attempt + 1, token = i.token, engine = i.engine,
        -- An executor of the release before has left it out.
        org_id = i.org_id,
        crashes = r.crashes + judged.left_behind::int,
        started_at = coalesce(r.started_at, now()),
        deadline = greatest(now(), %(worker_now)s) + make_interval(secs => i.run_seconds), last_event = i.payload
    FROM input i JOIN judged USING (query_id)
    WHERE r.query_id = i.query_id AND judged.granted
    RETURNING r.query_id, r.token
), results AS (
    UPDATE query_results q SET status = 'Running', updated_at = now() FROM moved WHERE q.id = moved.query_id
), leased AS (
    INSERT INTO query_leases AS l (query_id, token, worker, renewal, expires_at)
    SELECT i.query_id, i.token, i.worker, 0, now() + make_interval(secs => i.lease_seconds)
    FROM input i JOIN moved USING (query_id)
    ON CONFLICT (query_id) DO UPDATE
    SET token = excluded.token, worker = excluded.worker, renewal = l.renewal + 1, expires_at = excluded.expires_at
), told AS (
    INSERT INTO outbox (shard, event_id, query_id, type, payload, headers)
    SELECT i.shard, i.event_id, i.query_id, 'QueryStatusChanged', i.payload, i.headers
    FROM input i JOIN moved USING (query_id)
    ORDER BY i.query_id
)
SELECT query_id::text, org_id::text, NULL FROM judged WHERE NOT granted
UNION ALL
SELECT query_id::text, NULL, token::text FROM moved
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Bring a query to its terminal status.

    With a `token` it is the attempt's own finish. Without, it ends a query that no live lease holds (never claimed, or
    left behind); `stale_lease_version` as for a claim.
    """

    query_id: str
    sequence: int
    token: str | None
    stale_lease_version: int | None
    status: str
    output_location: str | None = None
    row_count: int | None = None
    result_bytes: int | None = None
    duration_ms: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    files: Jsonb
    retention_seconds: float | None = None
    shard: int
    event_id: str
    payload: bytes
    headers: Jsonb


END = """
WITH input AS (
    SELECT * FROM unnest(
        %(query_id)s::uuid[], %(sequence)s::int[], %(token)s::uuid[], %(stale_lease_version)s::bigint[],
        %(status)s::text[], %(output_location)s::text[], %(row_count)s::bigint[], %(result_bytes)s::bigint[],
        %(duration_ms)s::int[], %(error_code)s::text[], %(error_message)s::text[], %(files)s::jsonb[],
        %(retention_seconds)s::float8[], %(shard)s::smallint[], %(event_id)s::uuid[], %(payload)s::bytea[],
        %(headers)s::jsonb[]
    ) WITH ORDINALITY
      AS i(query_id, sequence, token, stale_lease_version, status, output_location, row_count, result_bytes,
           duration_ms, error_code, error_message, files, retention_seconds, shard, event_id, payload, headers, wish)
), locked AS (
    SELECT r.query_id
    FROM query_runs r
    WHERE r.query_id IN (SELECT i.query_id FROM input i) AND r.deadline IS NOT NULL
    ORDER BY r.query_id
    FOR UPDATE OF r
), allowed AS (
    SELECT DISTINCT ON (i.query_id) i.*
    FROM locked JOIN input i USING (query_id) JOIN query_runs r USING (query_id)
    LEFT JOIN query_leases l USING (query_id)
    WHERE r.sequence = i.sequence
      AND CASE WHEN i.token IS NOT NULL THEN r.token = i.token
               ELSE l.query_id IS NULL OR l.renewal = i.stale_lease_version END
    ORDER BY i.query_id, i.token IS NULL, i.wish
), moved AS (
    UPDATE query_runs r
    SET sequence = r.sequence + 1, deadline = NULL, ended_at = now(), files = i.files, last_event = i.payload,
        expires_at = now() + make_interval(secs => i.retention_seconds)
    FROM allowed i
    -- The cancel that locked the row first is seen here, for the row is read again after the wait for its lock.
    -- One that came so early that it did not see the row is found where it was noted.
    WHERE r.query_id = i.query_id AND r.sequence = i.sequence
      AND (i.status <> 'Succeeded'
           OR NOT r.cancelled AND NOT EXISTS (SELECT FROM query_cancellations c
                                              JOIN query_results q ON q.id = c.query_id AND q.org_id = c.org_id
                                              WHERE c.query_id = r.query_id))
    RETURNING r.query_id, i.token, r.topic, r.ended_at - r.queued_at AS total
), results AS (
    UPDATE query_results q
    SET status = i.status, output_location = i.output_location, row_count = i.row_count, bytes = i.result_bytes,
        duration_ms = i.duration_ms, error_code = i.error_code, error_message = i.error_message, updated_at = now()
    FROM allowed i JOIN moved USING (query_id)
    WHERE q.id = i.query_id
), released AS (
    DELETE FROM query_leases l USING moved WHERE l.query_id = moved.query_id
), told AS (
    INSERT INTO outbox (shard, event_id, query_id, type, payload, headers)
    SELECT i.shard, i.event_id, i.query_id, 'QueryStatusChanged', i.payload, i.headers
    FROM allowed i JOIN moved USING (query_id)
    ORDER BY i.query_id
)
SELECT query_id::text, token::text, topic, total FROM moved
"""


@dataclass(frozen=True, slots=True)
class Renewal:
    """Keep an attempt's lease alive."""

    query_id: str
    token: str
    lease_seconds: float


# A lease that is renewed late and that nobody has taken is simply renewed: its attempt is still the live one.
RENEW = """
WITH input AS (
    SELECT * FROM unnest(%(query_id)s::uuid[], %(token)s::uuid[], %(lease_seconds)s::float8[])
        AS i(query_id, token, lease_seconds)
), locked AS (
    SELECT l.query_id FROM query_leases l JOIN input i ON i.query_id = l.query_id AND i.token = l.token
    ORDER BY l.query_id FOR UPDATE OF l
)
UPDATE query_leases l
SET renewal = l.renewal + 1, expires_at = now() + make_interval(secs => i.lease_seconds)
FROM input i JOIN locked USING (query_id)
WHERE l.query_id = i.query_id
RETURNING l.query_id::text,
    EXISTS (SELECT FROM query_cancellations c JOIN query_results q ON q.id = c.query_id AND q.org_id = c.org_id
            WHERE c.query_id = l.query_id)
"""


@dataclass(frozen=True, slots=True)
class HandBack:
    """Give an attempt up so that another may start at once; `crashed` when it was the attempt's own doing.

    `queue_seconds` is for an attempt that has not started: how long its query may wait in the queue, from the broker's
    append on. None leaves its deadline.
    """

    query_id: str
    token: str
    crashed: bool
    queue_seconds: float | None = None


# No event: the query stays Running until its next attempt says so.
HAND_BACK = """
WITH input AS (
    SELECT * FROM unnest(%(query_id)s::uuid[], %(token)s::uuid[], %(crashed)s::boolean[], %(queue_seconds)s::float8[])
        AS i(query_id, token, crashed, queue_seconds)
), locked AS (
    SELECT r.query_id FROM query_runs r JOIN input i ON i.query_id = r.query_id AND i.token = r.token
    WHERE r.deadline IS NOT NULL
    ORDER BY r.query_id FOR UPDATE OF r
), given AS (
    UPDATE query_runs r
    SET token = NULL, crashes = r.crashes + i.crashed::int,
        deadline = greatest(r.deadline, r.queued_at + make_interval(secs => i.queue_seconds))
    FROM input i JOIN locked USING (query_id)
    WHERE r.query_id = i.query_id
    RETURNING r.query_id
)
DELETE FROM query_leases l USING given WHERE l.query_id = given.query_id
"""


@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    """The result of a batch of claims.

    `claimed` has the tokens of the new attempts. `refused` maps the id of each refused query to its org: the org has
    reached its limit, or it has a limit and was not locked. A query in neither was not claimable; read its state.
    """

    claimed: set[str]
    refused: dict[str, str]


async def claim(
    connection: Connection,
    claims: Sequence[Claim],
    *,
    running_queries: int | None = None,
    locked_org_ids: Collection[str] = (),
) -> ClaimAnswer:
    """Claim the queries that can be claimed.

    `running_queries` is the limit of orgs that have none of their own; `locked_org_ids` are the orgs whose running
    queries may be counted.
    """
    arrays: dict[str, Any] = to_arrays(Claim, claims) | {"worker_now": datetime.now(UTC)}
    arrays |= {"running_queries": running_queries, "locked_org_ids": list(locked_org_ids)}
    rows = await (await connection.execute(CLAIM, arrays)).fetchall()
    return ClaimAnswer(
        {token for _, _, token in rows if token is not None},
        {query_id: org_id for query_id, org_id, token in rows if token is None},
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """A query that a statement has ended: the ending's token, its request's topic, and the time since it was queued."""

    token: str | None
    topic: str
    total: timedelta


async def end(connection: Connection, endings: Sequence[Ending]) -> dict[str, Ended]:
    """End the queries that may be ended; returns those that this statement has ended, by id."""
    rows = await (await connection.execute(END, to_arrays(Ending, endings))).fetchall()
    return {query_id: Ended(token, topic, total) for query_id, token, topic, total in rows}


async def renew(connection: Connection, renewals: Sequence[Renewal]) -> dict[str, bool]:
    """The queries whose lease is still ours, each with whether its cancellation was asked for."""
    return dict(await (await connection.execute(RENEW, to_arrays(Renewal, renewals))).fetchall())


async def hand_back(connection: Connection, hand_backs: Sequence[HandBack]) -> None:
    """Give attempts up."""
    await connection.execute(HAND_BACK, to_arrays(HandBack, hand_backs))
