"""Saved queries: the only place of ours where SQL text stands, for its author put it there."""

from dataclasses import dataclass, field
from datetime import datetime

from psycopg.rows import class_row

from db.connection import Connection


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


INSERT = """
INSERT INTO saved_queries (org_id, user_id, name, query, visibility)
VALUES (%(org_id)s, %(user_id)s, %(name)s, %(query)s, %(visibility)s)
RETURNING id::text, org_id::text, user_id::text, name, query, visibility, created_at, updated_at
"""

LIST = """
SELECT id::text, org_id::text, user_id::text, name, query, visibility, created_at, updated_at FROM saved_queries
WHERE %(org_id)s::uuid IS NULL OR org_id = %(org_id)s::uuid
ORDER BY org_id, name, created_at
"""


async def insert_saved(
    connection: Connection, *, org_id: str, user_id: str, name: str, query: str, visibility: str
) -> SavedQuery:
    """Save a query."""
    async with connection.cursor(row_factory=class_row(SavedQuery)) as cursor:
        await cursor.execute(
            INSERT, {"org_id": org_id, "user_id": user_id, "name": name, "query": query, "visibility": visibility}
        )
        stored = await cursor.fetchone()
        assert stored is not None
        return stored


async def list_saved(connection: Connection, org_id: str | None) -> list[SavedQuery]:
    """All saved queries, or one org's."""
    async with connection.cursor(row_factory=class_row(SavedQuery)) as cursor:
        await cursor.execute(LIST, {"org_id": org_id})
        return await cursor.fetchall()
