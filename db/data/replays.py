"""`replays`: who re-drove what, why, and how far it has come.

A process that works on a replay holds an advisory lock on the connection by which it writes here: another one learns
so that it is under way, and a process that has lost its connection can't go on.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db.connection import Connection


class ReplayStatus(StrEnum):
    """Where a replay stands. The first two keep others from its scope."""

    ACTIVE = "Active"
    CANCELLING = "Cancelling"
    CANCELLED = "Cancelled"
    DONE = "Done"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Replay:
    """A row of `replays`. `plan`, `checkpoint` and `counts` are its kind's own. Filters stand in the plan as they were
    given; a patch's values don't, for they may be SQL."""

    id: str
    kind: str
    scope: str
    status: str
    actor: str
    reason: str
    plan: dict[str, Any]
    checkpoint: dict[str, Any]
    counts: dict[str, Any]
    created_at: datetime
    updated_at: datetime


_COLUMNS = "id::text AS id, kind, scope, status, actor, reason, plan, checkpoint, counts, created_at, updated_at"

INSERT = """
INSERT INTO replays (id, kind, scope, status, actor, reason, plan, org_id, user_id)
VALUES (%(id)s, %(kind)s, %(scope)s, 'Active', %(actor)s, %(reason)s, %(plan)s, %(org_id)s, %(user_id)s)
ON CONFLICT DO NOTHING
"""

READ_ACTIVE = f"""
SELECT {_COLUMNS} FROM replays WHERE scope = %(scope)s AND status IN ('Active', 'Cancelling')
"""  # noqa: S608

READ = f"SELECT {_COLUMNS} FROM replays WHERE id = %(id)s"  # noqa: S608

LIST = f"SELECT {_COLUMNS} FROM replays ORDER BY created_at DESC LIMIT %(limit)s"  # noqa: S608

WRITE_CHECKPOINT = """
UPDATE replays SET checkpoint = %(checkpoint)s, counts = %(counts)s, updated_at = now()
WHERE id = %(id)s AND status IN ('Active', 'Cancelling')
RETURNING status
"""

END = """
UPDATE replays SET status = %(status)s, counts = %(counts)s, updated_at = now()
WHERE id = %(id)s AND status IN ('Active', 'Cancelling')
"""

# Two keys: a number space of ours beside the relay's and the sweep's.
TRY_HOLD = "SELECT pg_try_advisory_lock(715, hashtext(%(id)s))"
LET_GO = "SELECT pg_advisory_unlock(715, hashtext(%(id)s))"

CANCEL = """
UPDATE replays SET status = %(status)s, updated_at = now()
WHERE id = %(id)s AND status IN ('Active', 'Cancelling')
RETURNING status
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the database knows of a query id. `status` is None where the query was deleted for good."""

    query_id: str
    status: str | None
    error_code: str | None
    fingerprint: bytes | None


READ_STANDINGS = """
SELECT q.id::text AS query_id, q.status, q.error_code, r.fingerprint
FROM query_results q LEFT JOIN query_runs r ON r.query_id = q.id
WHERE q.id = ANY(%(query_ids)s::uuid[])
UNION ALL
SELECT d.query_id::text, NULL, NULL, NULL FROM deleted_ids d WHERE d.query_id = ANY(%(query_ids)s::uuid[])
"""

# While the rows are held nothing new can happen to their queries: no next event, no deletion, no tombstone.
HOLD_LAST_EVENTS = """
SELECT r.query_id::text, r.last_event FROM query_runs r
WHERE r.query_id = ANY(%(query_ids)s::uuid[]) AND r.deadline IS NULL
ORDER BY r.query_id
FOR SHARE OF r
"""


async def read_standings(connection: Connection, query_ids: Collection[str]) -> dict[str, Standing]:
    """What is known of the queries, by id; one that nobody has asked for is left out."""
    async with connection.cursor(row_factory=class_row(Standing)) as cursor:
        await cursor.execute(READ_STANDINGS, {"query_ids": list(query_ids)})
        return {standing.query_id: standing for standing in await cursor.fetchall()}


async def hold_last_events(connection: Connection, query_ids: Collection[str]) -> dict[str, bytes]:
    """The last event of each of the finished queries, held until the transaction ends."""
    cursor = await connection.execute(HOLD_LAST_EVENTS, {"query_ids": list(query_ids)})
    return {query_id: bytes(event) for query_id, event in await cursor.fetchall() if event is not None}


async def check_hold(connection: Connection) -> None:
    """Raises psycopg's error where the connection's transaction is over, and with it what it held."""
    await connection.execute("SELECT")


async def begin(
    connection: Connection,
    *,
    replay_id: str,
    kind: str,
    scope: str,
    actor: str,
    reason: str,
    plan: Mapping[str, Any],
    org_id: str | None = None,
    user_id: str | None = None,
) -> bool:
    """Write a new replay's row. False, and nothing, where its id was used or another one is active on the scope."""
    values = {"id": replay_id, "kind": kind, "scope": scope, "actor": actor, "reason": reason}
    values_of_scope = {"plan": Jsonb(dict(plan)), "org_id": org_id, "user_id": user_id}
    return (await connection.execute(INSERT, values | values_of_scope)).rowcount == 1


async def read_active(connection: Connection, scope: str) -> Replay | None:
    """The replay that is active on a scope."""
    async with connection.cursor(row_factory=class_row(Replay)) as cursor:
        await cursor.execute(READ_ACTIVE, {"scope": scope})
        return await cursor.fetchone()


async def read_replay(connection: Connection, replay_id: str) -> Replay | None:
    """One replay."""
    async with connection.cursor(row_factory=class_row(Replay)) as cursor:
        await cursor.execute(READ, {"id": replay_id})
        return await cursor.fetchone()


async def list_replays(connection: Connection, limit: int) -> list[Replay]:
    """The newest replays."""
    async with connection.cursor(row_factory=class_row(Replay)) as cursor:
        await cursor.execute(LIST, {"limit": limit})
        return await cursor.fetchall()


async def try_hold(connection: Connection, replay_id: str) -> bool:
    """Take the right to work on a replay, if no other process has it; held for as long as the connection lives."""
    row: Any = await (await connection.execute(TRY_HOLD, {"id": replay_id})).fetchone()
    return bool(row[0])


async def write_checkpoint(
    connection: Connection, replay_id: str, checkpoint: Mapping[str, Any], counts: Mapping[str, Any]
) -> ReplayStatus | None:
    """Remember how far it has come; its status, by which a cancel is heard. None where it has ended, or was deleted."""
    values = {"id": replay_id, "checkpoint": Jsonb(dict(checkpoint)), "counts": Jsonb(dict(counts))}
    row = await (await connection.execute(WRITE_CHECKPOINT, values)).fetchone()
    return None if row is None else ReplayStatus(row[0])


async def end_replay(connection: Connection, replay_id: str, status: ReplayStatus, counts: Mapping[str, Any]) -> None:
    """Bring it to its end, with the counts as they are then."""
    await connection.execute(END, {"id": replay_id, "status": status.value, "counts": Jsonb(dict(counts))})


async def cancel_replay(connection: Connection, replay_id: str) -> ReplayStatus | None:
    """Ask for its end: at once where no process works on it, else at that one's next checkpoint. None where it has
    ended before, or where there is none."""
    alone = await try_hold(connection, replay_id)
    status = ReplayStatus.CANCELLED if alone else ReplayStatus.CANCELLING
    row = await (await connection.execute(CANCEL, {"id": replay_id, "status": status.value})).fetchone()
    if alone:
        await connection.execute(LET_GO, {"id": replay_id})
    return None if row is None else ReplayStatus(row[0])
