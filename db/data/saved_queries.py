"""Saved queries: the only place of ours where SQL text stands, for its author put it there.

One that was removed while results refer to it keeps its row, without its text: it is private and empty, and no
statement here finds it. That is a condition on the row itself, for a statement that has waited for the removal reads
the row again, and another table as it was before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from psycopg.rows import class_row

from db.connection import Connection
from db.data.visibility import visible


@dataclass(frozen=True, slots=True)
class SavedQuery:
    """A row of `saved_queries`."""

    id: str
    org_id: str
    user_id: str
    name: str
    query: str = field(repr=False)
    visibility: str
    created_at: datetime
    updated_at: datetime


_COLUMNS = "s.id::text, s.org_id::text, s.user_id::text, s.name, s.query, s.visibility, s.created_at, s.updated_at"
THERE = "s.query <> ''"

INSERT = f"""
INSERT INTO saved_queries AS s (org_id, user_id, name, query, visibility)
VALUES (%(org_id)s, %(user_id)s, %(name)s, %(query)s, %(visibility)s)
RETURNING {_COLUMNS}
"""  # noqa: S608 - a text of ours

LIST = f"""
SELECT {_COLUMNS} FROM saved_queries s
WHERE {THERE} AND (%(org_id)s::uuid IS NULL OR s.org_id = %(org_id)s::uuid)
ORDER BY s.org_id, s.name, s.created_at
"""  # noqa: S608

LIST_VISIBLE = f"""
SELECT {_COLUMNS} FROM saved_queries s
WHERE {THERE} AND {visible("s")}
ORDER BY s.org_id, s.name, s.created_at
"""  # noqa: S608

FIND = f"SELECT {_COLUMNS} FROM saved_queries s WHERE {THERE} AND s.id = %(id)s::uuid"  # noqa: S608

# The user's document has no trigger on its table, so that every statement which changes a row tells its time.
UPDATE = f"""
UPDATE saved_queries s
SET name = coalesce(%(name)s::text, s.name), query = coalesce(%(query)s::text, s.query),
    visibility = coalesce(%(visibility)s::text, s.visibility), updated_at = now()
WHERE {THERE} AND s.id = %(id)s::uuid
RETURNING {_COLUMNS}
"""  # noqa: S608

# An admission holds a key-share lock on the saved query until its row is there to be seen. Once these have waited for
# that and are committed, no new row can refer to it.
LOCK = f"{FIND} FOR UPDATE"
EMPTY = """
WITH removal AS (INSERT INTO saved_query_removals (saved_query_id) VALUES (%(id)s::uuid))
UPDATE saved_queries SET query = '', visibility = 'private', updated_at = now() WHERE id = %(id)s::uuid
"""
# The user's document gives query_results no index on it, so that this reads the whole table: it takes as long as it
# takes, and nobody waits for it.
WITHOUT_LIMIT = "SET LOCAL statement_timeout = 0"
DELETE_UNUSED = """
DELETE FROM saved_queries s
WHERE s.id = %(id)s::uuid AND NOT EXISTS (SELECT FROM query_results q WHERE q.saved_query_id = %(id)s::uuid)
"""


async def insert_saved(
    connection: Connection, *, org_id: str, user_id: str, name: str, query: str, visibility: str
) -> SavedQuery:
    """Save a query."""
    values = {"org_id": org_id, "user_id": user_id, "name": name, "query": query, "visibility": visibility}
    stored = await _fetch(connection, INSERT, values)
    assert stored is not None
    return stored


async def list_saved(connection: Connection, org_id: str | None) -> list[SavedQuery]:
    """All saved queries, or one org's."""
    return await _fetch_all(connection, LIST, {"org_id": org_id})


async def list_visible(
    connection: Connection, org_id: str, user_id: str | None, roles: Sequence[str]
) -> list[SavedQuery]:
    """What the caller may run."""
    return await _fetch_all(connection, LIST_VISIBLE, {"org_id": org_id, "user_id": user_id, "roles": list(roles)})


async def find_saved(connection: Connection, saved_query_id: str) -> SavedQuery | None:
    """One saved query."""
    return await _fetch(connection, FIND, {"id": saved_query_id})


async def update_saved(
    connection: Connection, saved_query_id: str, *, name: str | None, query: str | None, visibility: str | None
) -> SavedQuery | None:
    """Change what is not None; the saved query as it then is, or None if there is none."""
    values = {"id": saved_query_id, "name": name, "query": query, "visibility": visibility}
    return await _fetch(connection, UPDATE, values)


async def empty_saved(connection: Connection, saved_query_id: str) -> SavedQuery | None:
    """Take the text out, so that nobody sees or runs it any more, in the caller's transaction; what it was."""
    was = await _fetch(connection, LOCK, {"id": saved_query_id})
    if was is not None:
        await connection.execute(EMPTY, {"id": saved_query_id})
    return was


async def delete_unused(connection: Connection, saved_query_id: str) -> bool:
    """Delete an emptied one unless results refer to it, in the caller's transaction; whether it is gone."""
    await connection.execute(WITHOUT_LIMIT)
    return (await connection.execute(DELETE_UNUSED, {"id": saved_query_id})).rowcount > 0


async def _fetch(connection: Connection, statement: str, values: dict[str, Any]) -> SavedQuery | None:
    async with connection.cursor(row_factory=class_row(SavedQuery)) as cursor:
        await cursor.execute(statement, values)
        return await cursor.fetchone()


async def _fetch_all(connection: Connection, statement: str, values: dict[str, Any]) -> list[SavedQuery]:
    async with connection.cursor(row_factory=class_row(SavedQuery)) as cursor:
        await cursor.execute(statement, values)
        return await cursor.fetchall()
