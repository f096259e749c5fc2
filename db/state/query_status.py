"""`query_status` and the platform's `tasks`, moved by status events, and the offsets that move with them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from db.connection import Connection
from db.rows import to_arrays


@dataclass(frozen=True, slots=True)
class QueryStatusRow:
    """A query as of one of its events."""

    query_id: str
    org_id: str
    user_id: str | None
    task_id: str | None
    mode: str
    status: str
    sequence: int
    attempt: int
    row_count: int | None
    bytes: int | None
    error_code: str | None
    error_message: str | None
    output_location: str | None
    occurred_at: datetime


# An event that comes twice, or late, has a sequence that was seen, and changes nothing.
UPSERT = """
INSERT INTO query_status AS s (query_id, org_id, user_id, task_id, mode, status, sequence, attempt, row_count, bytes,
                               error_code, error_message, output_location, occurred_at)
SELECT * FROM unnest(
    %(query_id)s::uuid[], %(org_id)s::uuid[], %(user_id)s::uuid[], %(task_id)s::uuid[], %(mode)s::text[],
    %(status)s::text[], %(sequence)s::int[], %(attempt)s::int[], %(row_count)s::bigint[], %(bytes)s::bigint[],
    %(error_code)s::text[], %(error_message)s::text[], %(output_location)s::text[], %(occurred_at)s::timestamptz[]
) AS i(query_id, org_id, user_id, task_id, mode, status, sequence, attempt, row_count, bytes, error_code,
       error_message, output_location, occurred_at)
ORDER BY query_id
ON CONFLICT (query_id) DO UPDATE
SET status = excluded.status, sequence = excluded.sequence, attempt = excluded.attempt,
    row_count = excluded.row_count, bytes = excluded.bytes, error_code = excluded.error_code,
    error_message = excluded.error_message, output_location = excluded.output_location,
    occurred_at = excluded.occurred_at, updated_at = now()
WHERE s.sequence < excluded.sequence
"""

DELETE = "DELETE FROM query_status WHERE query_id = ANY(%(query_ids)s::uuid[])"

# Queued → Running → Completed | Failed | Canceled, never out of a terminal state, and never back to Queued.
MOVE_TASKS = """
WITH input AS (
    SELECT DISTINCT ON (task_id, org_id) task_id, org_id,
           CASE WHEN status = 'Succeeded' THEN 'Completed'
                WHEN status = 'Failed' AND error_code = 'QUERY_CANCELLED' THEN 'Canceled'
                ELSE status END AS status
    FROM unnest(%(task_id)s::uuid[], %(org_id)s::uuid[], %(status)s::text[], %(error_code)s::text[],
                %(occurred_at)s::timestamptz[]) AS i(task_id, org_id, status, error_code, occurred_at)
    WHERE task_id IS NOT NULL AND status <> 'Queued'
    ORDER BY task_id, org_id, occurred_at DESC
), locked AS (
    SELECT t.id FROM tasks t JOIN input i ON i.task_id = t.id AND i.org_id = t.org_id
    WHERE t.status IN ('Queued', 'Running') AND t.status <> i.status
    ORDER BY t.id FOR UPDATE OF t
)
UPDATE tasks t SET status = i.status, updated_at = now()
FROM input i JOIN locked ON locked.id = i.task_id
WHERE t.id = locked.id AND t.org_id = i.org_id
"""

READ_OFFSETS = """
SELECT partition, next_offset FROM consumer_offsets WHERE cluster_id = %(cluster_id)s AND topic_id = %(topic_id)s
"""

# In the order in which they are written, so that two members can't wait for each other.
HOLD_OFFSETS = """
SELECT partition, next_offset FROM consumer_offsets
WHERE cluster_id = %(cluster_id)s AND topic_id = %(topic_id)s AND partition = ANY(%(partitions)s::int[])
ORDER BY partition
FOR UPDATE
"""

WRITE_OFFSETS = """
INSERT INTO consumer_offsets (cluster_id, topic_id, partition, next_offset)
SELECT %(cluster_id)s, %(topic_id)s, i.partition, i.next_offset
FROM unnest(%(partitions)s::int[], %(next_offsets)s::bigint[]) AS i(partition, next_offset)
ORDER BY i.partition
ON CONFLICT (cluster_id, topic_id, partition)
DO UPDATE SET next_offset = excluded.next_offset, updated_at = now()
WHERE consumer_offsets.next_offset < excluded.next_offset
"""


async def upsert_statuses(connection: Connection, rows: Sequence[QueryStatusRow]) -> None:
    """Write the rows that are newer than what stands; at most one row a query."""
    await connection.execute(UPSERT, to_arrays(QueryStatusRow, rows))


async def delete_statuses(connection: Connection, query_ids: Sequence[str]) -> None:
    """The queries were deleted for good."""
    await connection.execute(DELETE, {"query_ids": list(query_ids)})


async def move_tasks(connection: Connection, rows: Sequence[QueryStatusRow]) -> None:
    """Move the tasks that the queries ran for; a task that is not there is the platform's affair."""
    arrays: dict[str, Any] = to_arrays(QueryStatusRow, rows)
    await connection.execute(MOVE_TASKS, arrays)


async def read_offsets(connection: Connection, cluster_id: str, topic_id: str) -> dict[int, int]:
    """The next offset to read for each partition that was read before."""
    cursor = await connection.execute(READ_OFFSETS, {"cluster_id": cluster_id, "topic_id": topic_id})
    return dict(await cursor.fetchall())


async def hold_offsets(
    connection: Connection, cluster_id: str, topic_id: str, partitions: Collection[int]
) -> dict[int, int]:
    """The same of these partitions, which nobody else moves until the transaction ends."""
    keys = {"cluster_id": cluster_id, "topic_id": topic_id, "partitions": list(partitions)}
    return dict(await (await connection.execute(HOLD_OFFSETS, keys)).fetchall())


async def write_offsets(connection: Connection, cluster_id: str, topic_id: str, ends: dict[int, int]) -> None:
    """Remember how far was read, in the transaction of the rows."""
    await connection.execute(
        WRITE_OFFSETS,
        {
            "cluster_id": cluster_id,
            "topic_id": topic_id,
            "partitions": list(ends.keys()),
            "next_offsets": list(ends.values()),
        },
    )
