"""The outbox: events committed with the change that they tell of, waiting for the relay."""

import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db.connection import Connection

SHARDS = 64
# The shard of dead letters, which may have no query id. A relay of release 0.1 does not read this shard.
DEAD_LETTER_SHARD = 64
# A trigger on the table notifies this channel at every insert; a notification says only "look" and carries nothing.
CHANNEL = "queryd_outbox"


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An encoded event on its way into the outbox, in the transaction of the change that it tells of."""

    query_id: str
    sequence: int
    event_id: str
    type: str
    payload: bytes
    headers: Jsonb

    @property
    def shard(self) -> int:
        """Which relay publishes it: all of a query's events have the same shard."""
        return shard_of(self.query_id)


@dataclass(frozen=True, slots=True)
class WaitingEvent:
    """A row of the outbox as the relay reads it; `age_seconds` is as of the read.

    A status event has a `query_id`, which is its key, and headers as an object; a payload of None is a tombstone.
    A dead letter has a `topic`, a `key` and headers as a list of pairs in base64.
    """

    position: int
    event_id: str
    query_id: str | None
    payload: bytes | None
    headers: Any
    age_seconds: float = 0.0
    topic: str | None = None
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """The outbox's generation, and how many batches a relay has published and deleted; None: it has never deleted."""

    generation: str
    batches: int | None


def shard_of(query_id: str) -> int:
    """A query's shard, 0 to 63."""
    return zlib.crc32(uuid.UUID(query_id).bytes) % SHARDS


LISTEN = f"LISTEN {CHANNEL}"
# A relay that was stopped loses its connection after this, and with it the lock and the right to delete.
LIMIT_IDLENESS = "SET idle_session_timeout = '10s'"
DISCARD_PLANS = "DISCARD PLANS"

# Limit the bytes of a batch, since the relay holds it in memory. The first row may have any size.
READ_WAITING = """
SELECT position, event_id::text AS event_id, query_id::text AS query_id, payload, headers, topic, key,
       extract(epoch FROM clock_timestamp() - created_at)::float8 AS age_seconds
FROM (
    SELECT o.*, sum(o.bytes) OVER (ORDER BY o.position) - o.bytes AS before
    FROM (
        SELECT *, coalesce(octet_length(payload), 0)
                  -- The headers of a status event are ours and small, those of a dead letter are anybody's.
                  + CASE WHEN topic IS NULL THEN 0
                         ELSE coalesce(octet_length(key), 0) + octet_length(headers::text) END AS bytes
        FROM outbox WHERE shard = ANY(%(shards)s) ORDER BY position LIMIT %(limit)s
    ) AS o
) AS first
WHERE before = 0 OR before + bytes <= %(max_bytes)s
ORDER BY position
"""

# The oldest row has the lowest position, near enough: positions are drawn within milliseconds of `created_at`.
MEASURE_WAITING = """
SELECT (SELECT count(*) FROM (SELECT FROM outbox LIMIT %(limit)s) AS counted),
       coalesce((SELECT extract(epoch FROM clock_timestamp() - created_at)::float8 FROM outbox
                 ORDER BY position LIMIT 1), 0)
"""

READ_EVENT_IDS = "SELECT event_id::text FROM outbox WHERE position = ANY(%(positions)s)"

READ_PROGRESS = """
SELECT s.generation::text AS generation, b.batches
FROM outbox_state s LEFT JOIN relay_batches b ON b.relay = %(relay)s
"""

# One statement: the rows go and their batch is counted, or neither.
DELETE_PUBLISHED = """
WITH counted AS (
    INSERT INTO relay_batches (relay, batches) VALUES (%(relay)s, %(batches)s)
    ON CONFLICT (relay) DO UPDATE SET batches = excluded.batches
)
DELETE FROM outbox WHERE position = ANY(%(positions)s)
"""

# Two keys: ours, and the first of the shards. Session-level: the lock goes when its connection goes.
TRY_LOCK = "SELECT pg_try_advisory_lock(711, %(shard)s)"


async def read_waiting(
    connection: Connection, shards: Iterable[int], limit: int, max_bytes: int = 2**62
) -> list[WaitingEvent]:
    """Read the next events of the shards in order of position, at most `limit` events or `max_bytes` bytes."""
    async with connection.cursor(row_factory=class_row(WaitingEvent)) as cursor:
        await cursor.execute(READ_WAITING, {"shards": list(shards), "limit": limit, "max_bytes": max_bytes})
        return await cursor.fetchall()


async def measure_waiting(connection: Connection, limit: int = 100_000) -> tuple[int, float]:
    """How many events wait, counted up to `limit`, and the oldest one's age in seconds; 0 where none does."""
    row: Any = await (await connection.execute(MEASURE_WAITING, {"limit": limit})).fetchone()
    return row[0], row[1]


async def read_event_ids(connection: Connection, positions: Iterable[int]) -> list[str]:
    """The ids of the events that wait at these positions, in no order."""
    cursor = await connection.execute(READ_EVENT_IDS, {"positions": list(positions)})
    return [row[0] for row in await cursor.fetchall()]


async def delete_published(connection: Connection, relay: str, batches: int, positions: Iterable[int]) -> None:
    """Kafka has them, by the relay of that name, which has now published so many batches. Rows that have gone already
    are no error."""
    await connection.execute(DELETE_PUBLISHED, {"relay": relay, "batches": batches, "positions": list(positions)})


async def read_progress(connection: Connection, relay: str) -> Progress:
    """How far the relay of that name has come."""
    async with connection.cursor(row_factory=class_row(Progress)) as cursor:
        await cursor.execute(READ_PROGRESS, {"relay": relay})
        progress = await cursor.fetchone()
    assert progress is not None
    return progress


async def discard_plans(connection: Connection) -> None:
    """Have Postgres plan the connection's prepared statements again at their next use."""
    await connection.execute(DISCARD_PLANS)


async def limit_idleness(connection: Connection) -> None:
    """Let the server end this session when nothing is heard of it for 10 s."""
    await connection.execute(LIMIT_IDLENESS)


async def listen(connection: Connection) -> None:
    """Be notified of every write to the outbox."""
    await connection.execute(LISTEN)


async def try_lock(connection: Connection, shard: int) -> bool:
    """Take the lock of a set of shards, named by its first; held as long as the connection lives."""
    row: Any = await (await connection.execute(TRY_LOCK, {"shard": shard})).fetchone()
    return bool(row[0])
