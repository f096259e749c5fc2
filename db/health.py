"""What `queryd doctor` asks a database."""

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

MISSING = "SELECT name FROM unnest(%(names)s::text[]) AS n(name) WHERE to_regclass(name) IS NULL ORDER BY name"


def read_missing_tables(connection: psycopg.Connection[Any], tables: Sequence[str]) -> list[str]:
    """Which of the tables are not there."""
    return [row[0] for row in connection.execute(MISSING, {"names": list(tables)}).fetchall()]


def same_server(one: str, other: str) -> bool:
    """True when two libpq URIs name the same host and port."""

    def place(url: str) -> tuple[Any, Any]:
        parts = conninfo_to_dict(url)
        return parts.get("host"), parts.get("port", "5432")

    return place(one) == place(other)
