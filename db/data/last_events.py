"""Each query's last event as its row keeps it, for whoever has to tell the whole of it again."""

from collections.abc import Sequence
from typing import Any, Final

from db.connection import Connection

# `generation` names this very database: one that was made anew has another.
COUNT = """
SELECT generation::text, (SELECT count(*) FROM query_runs) FROM outbox_state
"""

# Of some 500 bytes each, and 64 KiB at most where a result is inline: 32 MB.
PAGE: Final = 500

# The conditions and the order are those of the primary key: no page reads the pages before it. `ORDER BY query_id`
# would sort by the selected text.
READ = f"""
SELECT query_id::text, last_event FROM query_runs
WHERE query_id >= coalesce(%(after)s::uuid, '00000000-0000-0000-0000-000000000000')
  AND query_id IS DISTINCT FROM %(after)s::uuid
ORDER BY query_runs.query_id
LIMIT {PAGE}
"""  # noqa: S608

READ_OF = "SELECT query_id::text, last_event FROM query_runs WHERE query_id = ANY(%(query_ids)s::uuid[])"


async def count_queries(connection: Connection) -> tuple[str, int]:
    """The database's generation, and how many queries it knows."""
    row: Any = await (await connection.execute(COUNT)).fetchone()
    return row[0], row[1]


async def read_last_events(connection: Connection, after: str | None) -> list[tuple[str, bytes]]:
    """The next `PAGE` queries behind the id `after`, in order of their ids, with their last events.

    The event of a query without one is empty.
    """
    cursor = await connection.execute(READ, {"after": after})
    return [(query_id, bytes(event or b"")) for query_id, event in await cursor.fetchall()]


async def read_last_events_of(connection: Connection, query_ids: Sequence[str]) -> dict[str, bytes]:
    """The last events of those of the queries that exist, by id; empty bytes for none."""
    cursor = await connection.execute(READ_OF, {"query_ids": list(query_ids)})
    return {query_id: bytes(event or b"") for query_id, event in await cursor.fetchall()}
