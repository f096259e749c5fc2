"""Which records were dead letters: so that a record that is read again after a crash does not become two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from db.connection import Connection
from db.rows import to_arrays


@dataclass(frozen=True, slots=True)
class Origin:
    """A record's coordinates. The topic's id tells a topic from one of the same name in another cluster."""

    topic_id: str
    partition: int
    record_offset: int


# sent_at NULL: `writer` set out to write the dead letter and may have died before or after the broker had it.
INTEND = """
INSERT INTO dead_letters (topic_id, partition, record_offset, writer)
SELECT i.topic_id, i.partition, i.record_offset, %(writer)s
FROM unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[])
     AS i(topic_id, partition, record_offset)
ORDER BY 1, 2, 3
ON CONFLICT DO NOTHING
RETURNING topic_id, partition, record_offset
"""

READ_UNSENT = """
SELECT d.topic_id, d.partition, d.record_offset, d.writer
FROM dead_letters d
JOIN unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[])
     AS i(topic_id, partition, record_offset) USING (topic_id, partition, record_offset)
WHERE d.sent_at IS NULL
"""

# In the order of INTEND, so that two that take the same can't deadlock.
TAKE = """
WITH locked AS (
    SELECT d.topic_id, d.partition, d.record_offset
    FROM dead_letters d
    JOIN unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[], %(from)s::text[])
         AS i(topic_id, partition, record_offset, writer) USING (topic_id, partition, record_offset, writer)
    WHERE d.sent_at IS NULL
    ORDER BY 1, 2, 3
    FOR UPDATE OF d
)
UPDATE dead_letters d SET writer = %(writer)s
FROM locked l
WHERE (d.topic_id, d.partition, d.record_offset) = (l.topic_id, l.partition, l.record_offset)
RETURNING d.topic_id, d.partition, d.record_offset
"""

MARK_SENT = """
UPDATE dead_letters d SET sent_at = now()
FROM unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[])
     AS i(topic_id, partition, record_offset)
WHERE (d.topic_id, d.partition, d.record_offset) = (i.topic_id, i.partition, i.record_offset)
"""


async def intend(
    connection: Connection, origins: Sequence[Origin], writer: str
) -> tuple[set[Origin], dict[Origin, str]]:
    """Set out to write dead letters: those that nobody has tried yet, and those that may have been written or not, each
    with its writer.

    The rest were written.
    """
    arrays = to_arrays(Origin, origins)
    cursor = await connection.execute(INTEND, arrays | {"writer": writer})
    fresh = {Origin(*row) for row in await cursor.fetchall()}
    unsent = {Origin(*row[:3]): row[3] for row in await (await connection.execute(READ_UNSENT, arrays)).fetchall()}
    return fresh, {origin: whose for origin, whose in unsent.items() if origin not in fresh}


async def take(connection: Connection, unsure: Mapping[Origin, str], writer: str) -> set[Origin]:
    """Take dead letters over from the writers that have been found; those that were still theirs and not written."""
    arrays = to_arrays(Origin, list(unsure)) | {"from": list(unsure.values()), "writer": writer}
    return {Origin(*row) for row in await (await connection.execute(TAKE, arrays)).fetchall()}


async def mark_sent(connection: Connection, origins: Sequence[Origin]) -> None:
    """The broker has acknowledged them."""
    await connection.execute(MARK_SENT, to_arrays(Origin, origins))
