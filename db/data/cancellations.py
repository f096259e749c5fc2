"""Cancellations: who asked for which query to stop, and the queries that must."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from db.connection import Connection
from db.rows import to_arrays

# Told at the commit to every executor: the id of a query that was cancelled.
CHANNEL = "queryd_cancelled"


@dataclass(frozen=True, slots=True)
class NewCancellation:
    """Somebody of an org asks for a query to stop."""

    query_id: str
    org_id: str
    user_id: str | None
    reason: str | None


class CancelOutcome(StrEnum):
    """What became of a cancel. `EARLY`: its request is not known yet, and will be cancelled when it comes."""

    ACCEPTED = "accepted"
    EARLY = "early"
    FINISHED = "finished"
    OTHER_ORG = "other_org"


# Whoever locks the query's row first wins: a finish that waits for the lock sees `cancelled`, and a cancel that waits
# finds that there is no deadline any more. Ids are locked in order, as by every batch.
CANCEL = """
WITH input AS (
    SELECT DISTINCT ON (query_id, org_id) * FROM unnest(
        %(query_id)s::uuid[], %(org_id)s::uuid[], %(user_id)s::uuid[], %(reason)s::text[]
    ) AS i(query_id, org_id, user_id, reason)
    ORDER BY query_id, org_id
), locked AS (
    SELECT r.query_id FROM query_runs r JOIN query_results q ON q.id = r.query_id
    JOIN input i ON i.query_id = q.id AND i.org_id = q.org_id
    WHERE r.deadline IS NOT NULL
    ORDER BY r.query_id FOR UPDATE OF r
), marked AS (
    UPDATE query_runs r SET cancelled = true FROM locked
    WHERE r.query_id = locked.query_id AND r.deadline IS NOT NULL
    RETURNING r.query_id
), told AS (
    SELECT i.*, CASE WHEN marked.query_id IS NOT NULL THEN 'accepted'
                     WHEN q.id IS NULL THEN 'early'
                     WHEN q.org_id <> i.org_id THEN 'other_org'
                     ELSE 'finished' END AS outcome
    FROM input i LEFT JOIN query_results q ON q.id = i.query_id
    LEFT JOIN marked ON marked.query_id = i.query_id AND q.org_id = i.org_id
), kept AS (
    INSERT INTO query_cancellations (query_id, org_id, user_id, reason)
    SELECT query_id, org_id, user_id, reason FROM told WHERE outcome IN ('accepted', 'early')
    ON CONFLICT DO NOTHING
)
SELECT query_id::text, org_id::text, outcome,
       CASE WHEN outcome IN ('accepted', 'early') THEN pg_notify('queryd_cancelled', query_id::text) END
FROM told
"""

LISTEN = f"LISTEN {CHANNEL}"


async def cancel(
    connection: Connection, cancellations: Sequence[NewCancellation]
) -> dict[tuple[str, str], CancelOutcome]:
    """Note the cancellations and mark their queries, in one statement; what became of each, by query and org."""
    arrays: dict[str, Any] = to_arrays(NewCancellation, cancellations)
    rows = await (await connection.execute(CANCEL, arrays)).fetchall()
    return {(query_id, org_id): CancelOutcome(outcome) for query_id, org_id, outcome, _ in rows}


async def hear_cancelled(connection: Connection) -> AsyncGenerator[str, None]:
    """Ids of queries as they are cancelled, from now on and without end."""
    await connection.execute(LISTEN)
    async for notification in connection.notifies():
        yield notification.payload
