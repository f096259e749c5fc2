"""Postgres datasets whose columns DuckDB's scanner reads otherwise than Postgres has them, or not at all."""

import io
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq
import pytest

from access.visibility import InvalidRegistration
from db.data.datasets import NewDataset
from db.datasets_server import READER, prepare_datasets_database
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Execution, Looked, QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode, OrgId, OutputFormat, QueryId
from service.embedded.postgres import Postgres
from service.looking import Looker, check_looked
from tests.integration.outputs import read_output

_MIB = 1024 * 1024


class Database:
    """A database of datasets, and an engine that reads it."""

    def __init__(self, url: str, engine: DuckDBEngine, scratch: Path) -> None:
        self._url = url
        self._engine = engine
        self._scratch = scratch
        self._org = OrgId(str(uuid.uuid4()))

    def run(self, *statements: str) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    async def look(self, table: str = "t") -> Looked:
        dataset = NewDataset(self._org, None, "d", "postgres", f"public.{table}", "org", [])
        looked = await Looker(self._engine).look(dataset)
        check_looked(looked, dataset.location)
        return looked

    async def ask(self, sql: str, table: str = "t") -> list[dict[str, Any]]:
        scratch = self._scratch / str(uuid.uuid4())
        scratch.mkdir()
        execution = Execution(
            query_id=QueryId(str(uuid.uuid4())),
            org_id=self._org,
            sql=sql,
            parameters={},
            relations=(Relation("d", RelationKind.POSTGRES, f"public.{table}", "1"),),
            output_format=OutputFormat.PARQUET,
            scratch=scratch,
            timeout_seconds=60.0,
        )
        output = await self._engine.execute(execution)
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(read_output(output))).to_pylist()
        return rows

    async def fail(self, sql: str, table: str = "t") -> str:
        with pytest.raises(QueryFailed) as caught:
            await self.ask(sql, table)
        assert caught.value.code is ErrorCode.QUERY_ERROR
        return caught.value.message


@pytest.fixture
def urls(postgres_server: Postgres) -> Iterator[tuple[str, str]]:
    """The owner's and the reader's."""
    name, password = f"datasets_{uuid.uuid4().hex}", uuid.uuid4().hex
    postgres_server.create_database(name)
    url = postgres_server.url(name)
    prepare_datasets_database(url, password)
    yield url, re.sub(r"//[^@]+@", f"//{READER}:{password}@", url)
    postgres_server.drop_database(name)


@pytest.fixture
async def database(urls: tuple[str, str], tmp_path: Path) -> AsyncIterator[Database]:
    engine = DuckDBEngine(DuckDBSettings(512 * _MIB, 2, tmp_path / "engine", postgres_url=urls[1]), 1)
    await engine.start()
    yield Database(urls[0], engine, tmp_path)
    await engine.close()


async def test_a_numeric_is_read_exactly(database: Database) -> None:
    database.run(
        "CREATE TABLE t (id int, m numeric(10,2), w numeric(38,10), z numeric(3,3))",
        "INSERT INTO t VALUES (1, 1.5, 1234567890123456789012345678.0123456789, 0.125), (2, NULL, NULL, NULL)",
    )
    assert await database.ask("FROM d WHERE m = 1.5") == [
        {"id": 1, "m": Decimal("1.5"), "w": Decimal("1234567890123456789012345678.0123456789"), "z": Decimal("0.125")}
    ]
    # Each row once, whatever finds NaN.
    assert await database.ask("SELECT count(*) AS n, count(m) AS m FROM d") == [{"n": 2, "m": 1}]
    assert "numeric(10,2); a NaN is an error" in [column.how for column in (await database.look()).columns]


@pytest.mark.parametrize(
    "declared", ["numeric", "numeric(50,2)", "numeric(5,-2)", "numeric(3,5)", "numeric(10,2)[]", "bare", "bare[]"]
)
async def test_a_numeric_that_no_decimal_holds_is_refused_by_name(database: Database, declared: str) -> None:
    database.run(
        "CREATE DOMAIN bare AS numeric", f"CREATE TABLE t (id int, price {declared})", "INSERT INTO t VALUES (1)"
    )
    with pytest.raises(InvalidRegistration, match=r"column price is .*(exactly|does not fit|read)"):
        await database.look()
    # Whoever asks for the other columns of a dataset that was never looked at has them.
    assert await database.ask("SELECT id FROM d") == [{"id": 1}]
    assert "column price is" in await database.fail("SELECT price FROM d")


@pytest.mark.parametrize("declared", ["numeric(10,2)", "money2"])
@pytest.mark.parametrize(
    "sql", ["SELECT m FROM d", "SELECT sum(m) AS s FROM d", "FROM d ORDER BY id", "FROM d LIMIT 1"]
)
async def test_a_nan_is_an_error_of_its_column(database: Database, declared: str, sql: str) -> None:
    database.run(
        "CREATE DOMAIN money2 AS numeric(10,2)",
        f"CREATE TABLE t (id int, m {declared}, other numeric(5,0))",
        "INSERT INTO t VALUES (1, 'NaN', 1)",
    )
    assert await database.fail(sql) == "The dataset's column m holds NaN, which DECIMAL can't store."
    database.run("INSERT INTO t VALUES (2, 1.5, 1)")
    # Rows that a filter leaves out are nobody's error.
    assert await database.ask("SELECT m FROM d WHERE id = 2") == [{"m": Decimal("1.5")}]


async def test_a_domain_is_read_as_its_base_type(database: Database) -> None:
    database.run(
        "CREATE DOMAIN money2 AS numeric(10,2)",
        "CREATE DOMAIN positive AS int CHECK (VALUE > 0)",
        "CREATE DOMAIN more AS positive",
        "CREATE DOMAIN day AS date",
        "CREATE DOMAIN flag AS boolean",
        "CREATE DOMAIN word AS text",
        "CREATE TABLE t (m money2, p positive, q more, d day, f flag, w word)",
        "INSERT INTO t VALUES (1.5, 2, 3, '2024-01-02', true, 'x'), (2.5, 3, 4, NULL, false, 'y')",
    )
    types = [column.type for column in (await database.look()).columns]
    assert types == ["DECIMAL(10,2)", "INTEGER", "INTEGER", "DATE", "BOOLEAN", "VARCHAR"]
    assert await database.ask("SELECT sum(m) AS m, sum(p)::INT AS p, max(q) AS q FROM d WHERE q > 1 AND w >= 'x'") == [
        {"m": Decimal(4), "p": 5, "q": 4}
    ]
    assert await database.ask("SELECT year(d) AS y FROM d WHERE f") == [{"y": 2024}]


@pytest.mark.parametrize("declared", ["json", "jsonb", "inet", "money", "int4range", "bit(3)"])
async def test_a_column_that_is_text_only_in_duckdb_is_compared_by_duckdb(database: Database, declared: str) -> None:
    value = {"json": "{}", "jsonb": "{}", "inet": "1.2.3.4", "money": "1.5", "int4range": "[1,3)", "bit(3)": "101"}
    database.run(f"CREATE TABLE t (j {declared})", f"INSERT INTO t VALUES ('{value[declared]}')")
    [row] = await database.ask("SELECT j FROM d")
    assert await database.ask(f"SELECT count(*) AS n FROM d WHERE j = '{row['j']}'") == [{"n": 1}]
    # No text of that type at all.
    assert await database.ask("SELECT count(*) AS n FROM d WHERE j = '<none>'") == [{"n": 0}]
    assert await database.ask("SELECT count(*) AS n FROM d WHERE j IS NULL") == [{"n": 0}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("CREATE TABLE t AS SELECT 1 AS id, ROW(1, '1.2.3.4')::pair AS bad", "column bad .*pair.* can't be read"),
        ("CREATE VIEW t AS SELECT 1 AS id, '{{1,2},{3,4}}'::int[][] AS bad", "column bad .* several dimensions"),
        ("CREATE VIEW t AS SELECT 1 AS id, 1 / (length('') - 0) AS bad", "column bad .* division by zero"),
        ("CREATE VIEW t AS SELECT 1 AS id, 'x'::text::int AS bad", "column bad .* invalid input syntax"),
    ],
    ids=["composite", "dimensions", "division", "cast"],
)
async def test_a_column_that_cannot_be_read_is_named_when_added(database: Database, made: str, reason: str) -> None:
    database.run("CREATE TYPE pair AS (a int, b inet)", made)
    with pytest.raises(InvalidRegistration, match=reason) as caught:
        await database.look()
    assert "column id" not in str(caught.value)


async def test_the_error_names_a_column_of_arrays_with_several_dimensions(database: Database) -> None:
    database.run("CREATE TABLE t (a int[])", "INSERT INTO t VALUES ('{1}'), ('{{1,2},{3,4}}')")
    assert "arrays with several dimensions" in await database.fail("FROM d")


async def test_names_that_differ_in_case_only_are_refused(database: Database) -> None:
    database.run('CREATE TABLE t ("Id" int, id int)', "INSERT INTO t VALUES (1, 2)")
    assert "columns Id and id differ only in case" in await database.fail("SELECT id FROM d")
    with pytest.raises(InvalidRegistration, match="columns Id and id differ only in case"):
        await database.look()


async def test_a_recreated_table_is_read_with_its_new_types(database: Database) -> None:
    for declared, value, read in (("int", "1", 1), ("text", "x", "x"), ("numeric(5,1)", "1.5", Decimal("1.5"))):
        database.run("DROP TABLE IF EXISTS t", f"CREATE TABLE t (v {declared})", f"INSERT INTO t VALUES ('{value}')")
        assert await database.ask("FROM d") == [{"v": read}]
    database.run("CREATE TYPE mood AS ENUM ('ok')", "DROP TABLE t", "CREATE TABLE t AS SELECT 'ok'::mood AS v")
    assert await database.ask("FROM d WHERE v = 'ok'") == [{"v": "ok"}]
    database.run("ALTER TYPE mood ADD VALUE 'sad'", "INSERT INTO t VALUES ('sad')")
    assert len(await database.ask("FROM d")) == 2
