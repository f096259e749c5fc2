"""Is a database as we need it? Asked by `queryd doctor`, and by every service at its start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from db.connection import conninfo, unavailable_told_apart

_DB = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables that a database must contain: those that identify it, and alembic's version table.

    `platform` are the tables that the platform creates, not `queryd db upgrade`.
    """

    name: str
    tables: tuple[str, ...]
    platform: tuple[str, ...] = ()

    @property
    def version_table(self) -> str:
        """The table in which alembic stores the version."""
        return f"queryd_{self.name}_version"

    def newest_version(self) -> int:
        """The schema version that this release needs: the number of its newest migration."""
        return max(int(path.name[1:5]) for path in (_DB / self.name / "versions").glob("v[0-9]*.py"))


DATA = Schema("data", ("query_results", "query_runs", "outbox", "dataset_grants"))
STATE = Schema("state", ("query_status", "consumer_offsets"), platform=("tasks",))

WRITABLE = "SELECT current_setting('transaction_read_only') = 'off'"
MISSING = "SELECT name FROM unnest(%(names)s::text[]) AS n(name) WHERE to_regclass(name) IS NULL ORDER BY name"


# The advice for a database that contains the other schema.
SWAPPED = (
    "it contains the tables of the other database: check whether QUERYD_DATA_URL and QUERYD_STATE_URL are swapped. "
    "Don't run `queryd db upgrade` until they are correct"
)


class SchemaMissing(Exception):
    """The database answers but does not contain queryd's tables; the message says what to do."""


async def require_schema(url: str, schema: Schema) -> None:
    """Raises `SchemaMissing`, and `DatabaseUnavailable` while nobody can say."""
    with unavailable_told_apart():
        problem = await find_problem(url, schema)
    if problem is not None:
        raise SchemaMissing(f"postgres {schema.name}: {problem}")


async def find_problem(url: str, schema: Schema) -> str | None:
    """Return what is wrong with a database's tables and what to do, or None. Raises psycopg's errors."""
    async with await psycopg.AsyncConnection.connect(conninfo(url, "start")) as connection:
        if await _has_other_schema(connection, schema):
            return SWAPPED
        missing = await _read_missing(connection, [*schema.tables, *schema.platform, schema.version_table])
        version = None if schema.version_table in missing else await _read_version(connection, schema)
    ours, platform = sorted(missing & {*schema.tables}), sorted(missing & {*schema.platform})
    advice = [f"tables are missing: {', '.join(ours)}; run `queryd db upgrade`"] if ours else []
    if platform:
        advice.append(
            f"the platform's tables are missing: {', '.join(platform)}; on a development machine run "
            "`queryd db platform`; in production the platform creates them"
        )
    newest = schema.newest_version()
    if not ours and (version or 0) < newest:
        advice.append(
            f"the schema's version is {version or 0}, but this release needs {newest}; run `queryd db upgrade`"
        )
    return "; ".join(advice) or None


async def has_other_schema(url: str, schema: Schema) -> bool:
    """True if the database contains the other schema and no table of this one. Raises psycopg's errors."""
    async with await psycopg.AsyncConnection.connect(conninfo(url, "start")) as connection:
        return await _has_other_schema(connection, schema)


async def _has_other_schema(connection: psycopg.AsyncConnection[Any], schema: Schema) -> bool:
    other = STATE if schema is DATA else DATA
    return await _read_missing(connection, [schema.version_table, other.version_table]) == {schema.version_table}


async def _read_missing(connection: psycopg.AsyncConnection[Any], names: list[str]) -> set[str]:
    return {row[0] for row in await (await connection.execute(MISSING, {"names": names})).fetchall()}


async def _read_version(connection: psycopg.AsyncConnection[Any], schema: Schema) -> int | None:
    statement = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier(schema.version_table))
    row = await (await connection.execute(statement)).fetchone()
    return None if row is None else int(row[0].removeprefix(schema.name))


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
