"""The embedded stack's database of datasets: made by us, read by a role that can only read."""

from collections.abc import Sequence
from typing import LiteralString

import psycopg
from psycopg import sql

READER = "queryd_reader"


def prepare_datasets_database(url: str, password: str) -> None:
    """Let `queryd_reader` read every table of schema `public`, now and later; `url` is a libpq URI of its owner."""
    role = sql.Identifier(READER)
    with psycopg.connect(url, autocommit=True) as connection:
        known = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (READER,)).fetchone()
        verb = sql.SQL("ALTER ROLE" if known is not None else "CREATE ROLE")
        for statement in (
            sql.SQL("{} {} LOGIN PASSWORD {}").format(verb, role, sql.Literal(password)),
            sql.SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(role),
            sql.SQL("REVOKE CREATE ON SCHEMA public FROM PUBLIC"),
            sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(role),
            sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(role),
            sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {}").format(role),
        ):
            connection.execute(statement)


def load_csv(url: str, table: str, columns: Sequence[tuple[str, LiteralString]], body: bytes, *, null: str) -> None:
    """Make a table anew, of (name, type) columns, and fill it from a CSV file with a header."""
    described = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in columns
    )
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(table)))
        cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(sql.Identifier(table), described))
        statement = sql.SQL("COPY {} FROM STDIN (FORMAT csv, HEADER, NULL {})").format(
            sql.Identifier(table), sql.Literal(null)
        )
        with cursor.copy(statement) as copy:
            copy.write(body)
