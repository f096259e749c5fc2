"""Insert dead letters into the outbox, once per record's origin."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.types.json import Jsonb

from db.connection import Connection
from db.data.outbox import DEAD_LETTER_SHARD
from db.rows import to_arrays
from queryd.events import Topic


@dataclass(frozen=True, slots=True)
class NewDeadLetter:
    """A record to publish as a dead letter, and its origin.

    The topic's id distinguishes topics with the same name in different clusters. `headers` are a list of pairs: a
    name and a value or null, in base64.
    """

    topic_id: str
    partition: int
    record_offset: int
    event_id: str
    key: bytes | None
    payload: bytes | None
    headers: Jsonb


# Release 0.1 published dead letters itself. It left a row without sent_at if it stopped before the broker's answer.
# That dead letter may be missing in Kafka, so write it again.
INSERT_DEAD_LETTERS = """
WITH input AS (
    SELECT * FROM unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[], %(event_id)s::uuid[],
                         %(key)s::bytea[], %(payload)s::bytea[], %(headers)s::jsonb[])
        AS i(topic_id, partition, record_offset, event_id, key, payload, headers)
), noted AS (
    INSERT INTO dead_letters AS d (topic_id, partition, record_offset, sent_at)
    SELECT i.topic_id, i.partition, i.record_offset, now() FROM input i
    ORDER BY 1, 2, 3
    ON CONFLICT (topic_id, partition, record_offset) DO UPDATE SET sent_at = excluded.sent_at WHERE d.sent_at IS NULL
    RETURNING d.topic_id, d.partition, d.record_offset
)
INSERT INTO outbox (shard, event_id, type, topic, key, payload, headers)
SELECT %(shard)s, i.event_id, 'DeadLetter', %(topic)s, i.key, i.payload, i.headers
FROM input i JOIN noted USING (topic_id, partition, record_offset)
ORDER BY i.topic_id, i.partition, i.record_offset
RETURNING event_id::text
"""


async def insert_dead_letters(connection: Connection, letters: Sequence[NewDeadLetter]) -> set[str]:
    """Insert dead letters into the outbox; returns the event ids of the new ones."""
    arguments = to_arrays(NewDeadLetter, letters) | {"shard": DEAD_LETTER_SHARD, "topic": Topic.DEAD_LETTERS.value}
    return {row[0] for row in await (await connection.execute(INSERT_DEAD_LETTERS, arguments)).fetchall()}
