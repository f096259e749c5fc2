"""The audit of personal data: who has read which dataset, written before the result is released."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from db.connection import DataPool, statement
from db.rows import to_arrays


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One dataset that a query has read, and one of its columns; None where the column can't be told."""

    dataset: str
    column_name: str | None


class AuditRefused(Exception):
    """The database does not take the entries, and will not take them if asked again. The sentence holds no data."""


# Only for the attempt that holds the query: what was deleted for good leaves no entry behind. The lock keeps a deletion
# from passing between this and the commit. A retry of the same read adds nothing.
INSERT_READS = """
WITH held AS (
    SELECT r.query_id FROM query_runs r
    WHERE r.query_id = %(query_id)s AND r.token = %(token)s AND r.deadline IS NOT NULL
    FOR KEY SHARE
)
INSERT INTO pii_access_log (org_id, user_id, task_id, dataset, column_name, record_id)
SELECT q.org_id, CASE WHEN q.task_id IS NULL THEN q.user_id END, q.task_id, i.dataset, i.column_name, q.id
FROM held JOIN query_results q ON q.id = held.query_id,
     unnest(%(dataset)s::text[], %(column_name)s::text[]) AS i(dataset, column_name)
ON CONFLICT (record_id, dataset, column_name) DO NOTHING
"""


async def insert_reads(pool: DataPool, query_id: str, token: str, entries: Sequence[AuditEntry]) -> None:
    """Record what the attempt with that token has read; raises `DatabaseUnavailable` and `AuditRefused`.

    The principal is the query's task, else its user. Where the attempt does not hold its query any more nothing is
    written: then its result can't be released either.
    """
    arguments: dict[str, Any] = {"query_id": query_id, "token": token} | to_arrays(AuditEntry, entries)
    async with statement(pool) as connection:
        try:
            await connection.execute(INSERT_READS, arguments)
        except (psycopg.OperationalError, psycopg.InterfaceError):
            # The connection's or the server's state, which `statement` tells apart.
            raise
        except psycopg.Error as error:
            raise AuditRefused(f"{type(error).__name__} {error.sqlstate or ''}".rstrip()) from None
