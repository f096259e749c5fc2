"""What happens now, for whoever watches: lanes, rates, and the queries themselves. Reads only, each by index, so that a
look costs a few milliseconds whatever the tables hold. No SQL of anybody's is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg.rows import class_row

from db.connection import Connection

# Of more waiting queries the first so many to be due are counted, which takes a tenth of a second.
MOST_COUNTED = 100_000
# A rate is a mean of so many seconds: long enough to be read, short enough to be news.
RATE_SECONDS = 10

READ_WAITING = """
SELECT waiting.topic, count(*) AS waiting, extract(epoch FROM max(waiting.waited))::float8 AS oldest_seconds
FROM (
    SELECT r.topic, now() - r.queued_at AS waited FROM query_runs r
    WHERE r.deadline IS NOT NULL AND r.attempt = 0 __SCOPE__
    ORDER BY r.deadline
    LIMIT %(most)s
) AS waiting
GROUP BY waiting.topic
"""

# By their leases, which are few. A query that was handed back waits for its next attempt without one.
READ_RUNNING = """
SELECT r.topic, count(*) FROM query_leases l JOIN query_runs r ON r.query_id = l.query_id
WHERE true __SCOPE__
GROUP BY r.topic
"""

READ_ENDED = f"""
SELECT r.topic, count(*) AS ended, count(*) FILTER (WHERE q.status = 'Failed') AS failed
FROM query_runs r JOIN query_results q ON q.id = r.query_id
WHERE r.ended_at > now() - make_interval(secs => {RATE_SECONDS}) AND r.ended_at <= now() __SCOPE__
GROUP BY r.topic
"""  # noqa: S608

_SEEN = """
SELECT q.id::text AS query_id, q.org_id::text AS org_id, q.mode, q.status, q.error_code,
       extract(epoch FROM now() - r.queued_at)::float8 AS age_seconds,
       coalesce(q.duration_ms / 1000.0,
                extract(epoch FROM coalesce(r.ended_at, CASE WHEN r.deadline IS NOT NULL THEN now() END)
                                   - r.started_at))::float8 AS run_seconds
FROM seen JOIN query_runs r ON r.query_id = seen.query_id JOIN query_results q ON q.id = seen.query_id
"""

# What runs, by its leases, those of longest standing first; then what has ended, the latest first.
READ_SEEN = f"""
WITH running AS (
    SELECT l.query_id, r.started_at FROM query_leases l JOIN query_runs r ON r.query_id = l.query_id
    ORDER BY r.started_at
    LIMIT %(limit)s
), ended AS (
    SELECT r.query_id, r.ended_at FROM query_runs r WHERE r.ended_at IS NOT NULL
    ORDER BY r.ended_at DESC
    LIMIT %(limit)s
), seen AS (
    SELECT query_id, started_at, NULL::timestamptz AS ended_at FROM running
    UNION ALL
    SELECT query_id, NULL, ended_at FROM ended
)
{_SEEN}
ORDER BY seen.started_at NULLS LAST, seen.ended_at DESC
LIMIT %(limit)s
"""  # noqa: S608 - texts of ours

# An org's are found by the canonical table's own index: the newest first, whatever their status.
READ_SEEN_OF_ORG = f"""
WITH seen AS (
    SELECT id AS query_id, created_at FROM query_results WHERE org_id = %(org_id)s::uuid
    ORDER BY created_at DESC
    LIMIT %(limit)s
)
{_SEEN}
ORDER BY seen.created_at DESC
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Waiting:
    """What has never been started of a lane, by its topic; `oldest_seconds` is how long the first of it has waited."""

    topic: str
    waiting: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """How many of a lane's queries have ended in the last 10 s, and how many of those have failed."""

    topic: str
    ended: int
    failed: int


@dataclass(frozen=True, slots=True)
class SeenQuery:
    """A query as it stands. Its age counts from the broker's append, `run_seconds` from its first start, None if it has
    never run."""

    query_id: str
    org_id: str
    mode: str
    status: str
    error_code: str | None
    age_seconds: float
    run_seconds: float | None


@dataclass(frozen=True, slots=True)
class Activity:
    """All of it at one moment. `running` is how many run of a lane, by its topic."""

    waiting: Sequence[Waiting]
    running: Mapping[str, int]
    ended: Sequence[Ended]
    seen: Sequence[SeenQuery]

    @property
    def counted_all(self) -> bool:
        """False when more queries wait than were counted, of any lane."""
        return sum(each.waiting for each in self.waiting) < MOST_COUNTED


async def read_activity(connection: Connection, org_id: str | None, limit: int) -> Activity:
    """What happens now, of one org or of all, with at most `limit` queries."""
    keys = {"org_id": org_id, "most": MOST_COUNTED, "limit": limit}
    async with connection.cursor(row_factory=class_row(Waiting)) as cursor:
        waiting = await (await cursor.execute(_narrow(READ_WAITING, org_id), keys)).fetchall()
    running: dict[str, int] = dict(await (await connection.execute(_narrow(READ_RUNNING, org_id), keys)).fetchall())
    async with connection.cursor(row_factory=class_row(Ended)) as cursor:
        ended = await (await cursor.execute(_narrow(READ_ENDED, org_id), keys)).fetchall()
    async with connection.cursor(row_factory=class_row(SeenQuery)) as cursor:
        text = READ_SEEN if org_id is None else READ_SEEN_OF_ORG
        seen = await (await cursor.execute(_narrow(text, org_id), keys)).fetchall()
    return Activity(waiting, running, ended, seen)


def _narrow(statement: LiteralString, org_id: str | None) -> LiteralString:
    """The statement about one org's queries, or about all; planned apart, as each has an index of its own."""
    scope: LiteralString = "" if org_id is None else "AND r.org_id = %(org_id)s::uuid"
    return statement.replace("__SCOPE__", scope)
