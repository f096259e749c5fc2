"""Admission: one statement stores a batch of requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from psycopg.types.json import Jsonb

from db.connection import Connection
from db.data.outbox import NewEvent
from db.data.runs import RunState
from db.data.saved_queries import THERE
from db.data.visibility import visible
from db.rows import to_arrays


@dataclass(frozen=True, slots=True)
class NewQuery:
    """A query to be admitted: `Queued`, or at once `Failed` when it can never run.

    `appended_at` is the broker's own time of the append in seconds since the epoch, None if the broker does not stamp
    records; `queue_seconds` is how long the query may wait from then on.
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
    error_code: str | None
    error_message: str | None
    fingerprint: bytes
    topic: str
    partition: int
    record_offset: int
    traceparent: str
    sequence: int
    appended_at: float | None
    queue_seconds: float
    last_event: bytes


# A known id changes nothing, whoever sends it again: `new` has only the rows that this statement made.
# `queued_at` is the broker's append time, but no later than now on the later of two clocks, the database's and this
# worker's; without an append time it is now.
INSERT_QUERIES = """
WITH input AS (
    SELECT i.*, least(to_timestamp(i.appended_at), greatest(now(), %(worker_now)s)) AS queued_at,
           EXISTS (SELECT FROM query_cancellations c
                   WHERE c.query_id = i.query_id AND c.org_id = i.org_id) AS cancelled
    FROM unnest(
        %(query_id)s::uuid[], %(org_id)s::uuid[], %(user_id)s::uuid[], %(mode)s::text[], %(status)s::text[],
        %(sql_hash)s::text[], %(saved_query_id)s::uuid[], %(task_id)s::uuid[], %(output_format)s::text[],
        %(error_code)s::text[], %(error_message)s::text[], %(fingerprint)s::bytea[], %(topic)s::text[],
        %(partition)s::int[], %(record_offset)s::bigint[], %(traceparent)s::text[], %(sequence)s::int[],
        %(appended_at)s::float8[], %(queue_seconds)s::float8[],
        %(last_event)s::bytea[]
    ) AS i(query_id, org_id, user_id, mode, status, sql_hash, saved_query_id, task_id, output_format, error_code,
           error_message, fingerprint, topic, partition, record_offset, traceparent, sequence,
           appended_at, queue_seconds, last_event)
    WHERE NOT EXISTS (SELECT FROM deleted_ids d WHERE d.query_id = i.query_id)
    ORDER BY i.query_id
), new AS (
    INSERT INTO query_results (id, org_id, user_id, mode, status, sql_hash, saved_query_id, task_id, output_format,
                               error_code, error_message)
    SELECT query_id, org_id, user_id, mode, status, sql_hash, saved_query_id, task_id, output_format,
           error_code, error_message
    FROM input
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), runs AS (
    INSERT INTO query_runs (query_id, org_id, fingerprint, topic, partition, record_offset, traceparent, sequence,
                            queued_at, deadline, ended_at, cancelled, last_event)
    SELECT i.query_id, i.org_id, i.fingerprint, i.topic, i.partition, i.record_offset, i.traceparent, i.sequence,
           i.queued_at,
           CASE WHEN i.status = 'Queued' THEN i.queued_at + make_interval(secs => i.queue_seconds) END,
           CASE WHEN i.status <> 'Queued' THEN now() END,
           i.cancelled, i.last_event
    FROM input i JOIN new ON new.id = i.query_id
    RETURNING query_id, queued_at, deadline, cancelled
), events AS (
    INSERT INTO outbox (shard, event_id, query_id, type, payload, headers)
    SELECT e.shard, e.event_id, e.query_id, e.type, e.payload, e.headers
    FROM unnest(
        %(event_shard)s::smallint[], %(event_id)s::uuid[], %(event_query_id)s::uuid[], %(event_sequence)s::int[],
        %(event_type)s::text[], %(event_payload)s::bytea[], %(event_headers)s::jsonb[]
    ) AS e(shard, event_id, query_id, sequence, type, payload, headers)
    JOIN new ON new.id = e.query_id
    ORDER BY e.query_id, e.sequence
)
SELECT query_id::text, queued_at, coalesce(deadline <= least(now(), %(worker_now)s), false), cancelled,
       clock_timestamp()
FROM runs
"""

# Which saved queries the callers may run, and their text. One that is not visible is simply not there. The key-share
# lock keeps a row from being removed before the result that refers to it is committed.
RESOLVE_SAVED = f"""
SELECT i.place, s.query
FROM jsonb_to_recordset(%(lookups)s::jsonb)
     AS i(place int, saved_query_id uuid, org_id uuid, user_id uuid, roles text[])
JOIN saved_queries s ON s.id = i.saved_query_id
WHERE {THERE} AND {visible("s", org_id="i.org_id", user_id="i.user_id", roles="i.roles")}
FOR KEY SHARE OF s
"""  # noqa: S608 - a text of ours


@dataclass(frozen=True, slots=True)
class SavedLookup:
    """Who wants to run which saved query; `place` is the request's in its batch, for ids may come twice in one."""

    place: int
    saved_query_id: str
    org_id: str
    user_id: str | None
    roles: tuple[str, ...]


async def insert_queries(
    connection: Connection, queries: Sequence[NewQuery], events: Sequence[NewEvent]
) -> dict[str, RunState]:
    """Insert the queries that do not exist yet, each with its events; returns the states of those inserted, by id."""
    arrays: dict[str, Any] = to_arrays(NewQuery, queries) | {"worker_now": datetime.now(UTC)}
    arrays |= {
        f"event_{name}".replace("event_event_", "event_"): values
        for name, values in to_arrays(NewEvent, events).items()
    }
    arrays["event_shard"] = [event.shard for event in events]
    rows = await (await connection.execute(INSERT_QUERIES, arrays)).fetchall()
    by_id = {query.query_id: query for query in queries}
    return {query_id: _to_state(by_id[query_id], *answer) for query_id, *answer in rows}


def _to_state(query: NewQuery, queued_at: datetime, late: bool, cancelled: bool, read_at: datetime) -> RunState:
    """The state of a query that has just been inserted."""
    return RunState(
        query_id=query.query_id,
        org_id=query.org_id,
        user_id=query.user_id,
        mode=query.mode,
        status=query.status,
        sql_hash=query.sql_hash,
        saved_query_id=query.saved_query_id,
        task_id=query.task_id,
        output_format=query.output_format,
        fingerprint=query.fingerprint,
        topic=query.topic,
        partition=query.partition,
        record_offset=query.record_offset,
        traceparent=query.traceparent,
        sequence=query.sequence,
        attempt=0,
        crashes=0,
        token=None,
        queued_at=queued_at,
        started_at=None,
        late=late,
        cancelled=cancelled,
        lease_token=None,
        lease_renewal=None,
        read_at=read_at,
    )


async def resolve_saved(connection: Connection, lookups: Sequence[SavedLookup]) -> dict[int, str]:
    """The SQL of the saved queries that are visible to their callers, by the request's place in its batch."""
    if not lookups:
        return {}
    wanted = [
        {
            "place": lookup.place,
            "saved_query_id": lookup.saved_query_id,
            "org_id": lookup.org_id,
            "user_id": lookup.user_id,
            "roles": list(lookup.roles),
        }
        for lookup in lookups
    ]
    cursor = await connection.execute(RESOLVE_SAVED, {"lookups": Jsonb(wanted)})
    return dict(await cursor.fetchall())
