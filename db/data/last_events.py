"""Each query's last event as its row keeps it, for whoever has to tell the whole of it again."""

from collections.abc import Sequence
from typing import Any

from db.connection import Connection

# `generation` names this very database: one that was made anew has another.
COUNT = """
SELECT generation::text, (SELECT count(*) FROM query_runs) FROM outbox_state
"""

READ = """
SELECT query_id::text, last_event FROM query_runs
WHERE %(after)s::uuid IS NULL OR query_id > %(after)s::uuid
ORDER BY query_id
LIMIT %(limit)s
"""

READ_OF = "SELECT query_id::text, last_event FROM query_runs WHERE query_id = ANY(%(query_ids)s::uuid[])"


async def count_queries(connection: Connection) -> tuple[str, int]:
    """The database's generation, and how many queries it knows."""
    row: Any = await (await connection.execute(COUNT)).fetchone()
    return row[0], row[1]


async def read_last_events(connection: Connection, after: str | None, limit: int) -> list[tuple[str, bytes]]:
    """The next queries behind the id `after`, in order of their ids, with their last events; empty bytes for none."""
    cursor = await connection.execute(READ, {"after": after, "limit": limit})
    return [(query_id, bytes(event or b"")) for query_id, event in await cursor.fetchall()]


async def read_last_events_of(connection: Connection, query_ids: Sequence[str]) -> dict[str, bytes]:
    """The last events of those of the queries that exist, by id; empty bytes for none."""
    cursor = await connection.execute(READ_OF, {"query_ids": list(query_ids)})
    return {query_id: bytes(event or b"") for query_id, event in await cursor.fetchall()}
