"""What the attached Postgres holds beside a granted table stays hidden from a real child's statements.

The canary is the value of an enum, and the name of a table and a column, of a schema that nobody was granted.
"""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Execution, QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode, OrgId, OutputFormat, Parameter, QueryId
from tests.integration.outputs import read_output

_CANARY = "topsecret1f7a"
_SHOPS = Relation("shops", RelationKind.POSTGRES, "public.shops", "1")
_HIDDEN = '"__queryd_datasets.other.hidden"'


@pytest_asyncio.fixture
async def engine(postgres_url: str, tmp_path: Path) -> AsyncIterator[DuckDBEngine]:
    """One child, connected to a Postgres that holds more than was granted."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE shops AS SELECT 1 AS id, 'Ålesund' AS name")
        connection.execute("CREATE SCHEMA other")
        connection.execute(f"CREATE TYPE other.hidden AS ENUM ('{_CANARY}')")
        connection.execute(f"CREATE TABLE other.hidden_table ({_CANARY}_column other.hidden, name text)")
        connection.execute(f"CREATE TABLE other.{_CANARY}_table (id int)")
        connection.execute(f"CREATE TABLE {_CANARY}_shops (id int)")
    made = DuckDBEngine(DuckDBSettings(512 * 1024 * 1024, 1, tmp_path / "engine", postgres_url=postgres_url), 1)
    await made.start()
    yield made
    await made.close()


async def _outcome(engine: DuckDBEngine, scratch: Path, sql: str, parameters: dict[str, Parameter]) -> str:
    """All that the author gets: the file and its columns, or the code, the sentence and the detail."""
    folder = scratch / str(uuid.uuid4())
    folder.mkdir()
    org = OrgId(str(uuid.UUID(int=7)))
    execution = Execution(
        QueryId(str(uuid.uuid4())), org, sql, parameters, (_SHOPS,), OutputFormat.CSV, folder, timeout_seconds=60.0
    )
    try:
        output = await engine.execute(execution)
    except QueryFailed as failure:
        return f"{failure.code} {failure.message} {failure.detail}"
    return f"{read_output(output).decode()} {output.columns}"


# Statements with their parameters, some refused by the gate, some that fail, some that run.
_LOOKING: tuple[tuple[str, dict[str, Parameter]], ...] = (
    (f"SELECT enum_range(from_json('0', '{_HIDDEN}')) FROM shops LIMIT 1", {}),
    ("SELECT enum_range(from_json_strict('0', $p)) FROM shops LIMIT 1", {"p": _HIDDEN}),
    ("SELECT typeof(json_transform('0', concat('\"__queryd_', $p))) FROM shops", {"p": 'datasets.other.hidden"'}),
    ("SELECT json_transform_strict('{}', '\"__queryd_datasets.other.hidden_table\"') FROM shops", {}),
    ("SELECT name.from_json('\"hidden\"') FROM shops", {}),
    ('SELECT NULL::"__queryd_datasets".other.hidden FROM shops', {}),
    ('SELECT NULL::"__queryd_datasets.other.hidden" FROM shops', {}),
    ("SELECT * FROM shops, __queryd_datasets.other.hidden_table", {}),
    ('SELECT * FROM shops, "__queryd_datasets.other.hidden_table"', {}),
    ("SELECT __queryd_datasets.other.hidden_table.name FROM shops", {}),
    ("SELECT nam FROM shops", {}),
    ("SELECT topsecre FROM shops", {}),
    ("SELECT name COLLATE topsecret FROM shops", {}),
    ("SELECT name COLLATE \"__queryd_datasets.other.hidden\" FROM shops", {}),
    ("SELECT st_setcrs('POINT(1 1)'::GEOMETRY, $p) FROM shops", {"p": "__queryd_datasets.other.hidden"}),
    ("SELECT timezone($p, now()) FROM shops", {"p": "__queryd_datasets.other.hidden"}),
    ("SELECT COLUMNS('topsecret.*') FROM shops", {}),
    ("SELECT shops.upper(), \"__queryd_datasets\".upper() FROM shops", {}),
    ("SELECT name FROM shops WHERE name = $p", {"p": f"' UNION SELECT '{_CANARY[:9]}' || '1f7a' --"}),
    ("SELECT name FROM shops WHERE name = $p", {"p": "\\' OR true --"}),
)  # fmt: skip


@pytest.mark.slow
async def test_nothing_that_was_not_granted_shows_in_a_result_or_an_error(engine: DuckDBEngine, tmp_path: Path) -> None:
    for sql, parameters in _LOOKING:
        outcome = await _outcome(engine, tmp_path, sql, parameters)
        assert _CANARY not in outcome, sql
        assert "Ålesund" not in outcome or " OR " not in str(parameters), sql
        assert ErrorCode.INTERNAL not in outcome, sql


async def test_the_constants_of_the_session_are_the_same_with_postgres_attached(
    engine: DuckDBEngine, tmp_path: Path
) -> None:
    sql = "SELECT typeof(1), current_user IS NOT NULL, user, current_role, session_user, current_user FROM shops"
    outcome = await _outcome(engine, tmp_path, sql, {})
    assert "INTEGER,true,duckdb,duckdb,duckdb,duckdb" in outcome


async def test_half_of_a_surrogate_pair_as_a_parameter_ends_the_query_and_not_the_child(
    engine: DuckDBEngine, tmp_path: Path
) -> None:
    for value in ("\ud800", "x\udfff"):
        outcome = await _outcome(engine, tmp_path, "SELECT $p AS p FROM shops", {"p": value})
        assert outcome.startswith("QUERY_ERROR The value of the parameter $p is not valid Unicode.")
    assert "Ålesund" in await _outcome(engine, tmp_path, "SELECT name FROM shops", {})


async def test_sql_that_crashes_duckdb_is_refused(engine: DuckDBEngine, tmp_path: Path) -> None:
    for sql in (
        "SELECT reservoir_quantile(1, 0.5, 2147483647) FROM shops",
        "SELECT st_setcrs('a', 'a'::ENUM('a')) FROM shops",
        "SELECT lead(id, -9223372036854775808) OVER () FROM shops",
        "SELECT icu_sort_key(name, 'de@collation=/x') FROM shops",
        "SELECT name.lpad(2000000000, 'x') FROM shops",
    ):
        assert (await _outcome(engine, tmp_path, sql, {})).startswith(ErrorCode.SQL_REJECTED), sql
