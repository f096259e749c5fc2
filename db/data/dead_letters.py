"""Which records were dead letters: so that a record that is read again after a crash does not become two."""

from collections.abc import Sequence
from dataclasses import dataclass

from db.connection import Connection
from db.rows import to_arrays


@dataclass(frozen=True, slots=True)
class Origin:
    """A record's coordinates. The topic's id tells a topic from one of the same name in another cluster."""

    topic_id: str
    partition: int
    record_offset: int


# sent_at NULL: somebody set out to write the dead letter and may have died before or after the broker had it.
INTEND = """
INSERT INTO dead_letters (topic_id, partition, record_offset)
SELECT * FROM unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[])
ORDER BY 1, 2, 3
ON CONFLICT DO NOTHING
RETURNING topic_id, partition, record_offset
"""

READ_UNSENT = """
SELECT d.topic_id, d.partition, d.record_offset
FROM dead_letters d
JOIN unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[])
     AS i(topic_id, partition, record_offset) USING (topic_id, partition, record_offset)
WHERE d.sent_at IS NULL
"""

MARK_SENT = """
UPDATE dead_letters d SET sent_at = now()
FROM unnest(%(topic_id)s::text[], %(partition)s::int[], %(record_offset)s::bigint[])
     AS i(topic_id, partition, record_offset)
WHERE (d.topic_id, d.partition, d.record_offset) = (i.topic_id, i.partition, i.record_offset)
"""


async def intend(connection: Connection, origins: Sequence[Origin]) -> tuple[set[Origin], set[Origin]]:
    """Set out to write dead letters: those that nobody has tried yet, and those that may have been written or not.

    The rest were written.
    """
    arrays = to_arrays(Origin, origins)
    fresh = {Origin(*row) for row in await (await connection.execute(INTEND, arrays)).fetchall()}
    unsent = {Origin(*row) for row in await (await connection.execute(READ_UNSENT, arrays)).fetchall()}
    return fresh, unsent - fresh


async def mark_sent(connection: Connection, origins: Sequence[Origin]) -> None:
    """The broker has acknowledged them."""
    await connection.execute(MARK_SENT, to_arrays(Origin, origins))
