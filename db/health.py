"""Is a database as we need it? Asked by `queryd doctor`, and by every service at its start."""

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from db.connection import conninfo, unavailable_told_apart

DATA_TABLES = ("query_results", "query_runs", "outbox", "dataset_grants")
STATE_TABLES = ("query_status", "consumer_offsets", "tasks")

WRITABLE = "SELECT current_setting('transaction_read_only') = 'off'"
MISSING = "SELECT name FROM unnest(%(names)s::text[]) AS n(name) WHERE to_regclass(name) IS NULL ORDER BY name"


def read_missing_tables(connection: psycopg.Connection[Any], tables: Sequence[str]) -> list[str]:
    """Which of the tables are not there."""
    return [row[0] for row in connection.execute(MISSING, {"names": list(tables)}).fetchall()]


class SchemaMissing(Exception):
    """The database is there and our tables are not: run `queryd db upgrade`."""


async def require_tables(url: str, tables: Sequence[str]) -> None:
    """Raises `SchemaMissing`, and `DatabaseUnavailable` while nobody can say."""
    with unavailable_told_apart():
        async with await psycopg.AsyncConnection.connect(conninfo(url, "start")) as connection:
            cursor = await connection.execute(MISSING, {"names": list(tables)})
            missing = [row[0] for row in await cursor.fetchall()]
    if missing:
        raise SchemaMissing(f"tables are missing: {', '.join(missing)}; run `queryd db upgrade`")


async def is_writable(url: str) -> bool:
    """True when the server answers and takes writes: one that has failed over leaves a replica behind. Never raises for
    a server that is away; one that hangs is the caller's to give up on."""
    try:
        async with await psycopg.AsyncConnection.connect(conninfo(url, "readiness"), autocommit=True) as connection:
            row: Any = await (await connection.execute(WRITABLE)).fetchone()
    except psycopg.Error:
        return False
    return bool(row[0])


def same_server(one: str, other: str) -> bool:
    """True when two libpq URIs name the same host and port."""

    def place(url: str) -> tuple[Any, Any]:
        parts = conninfo_to_dict(url)
        return parts.get("host"), parts.get("port", "5432")

    return place(one) == place(other)
