"""The DuckDB engine with its real children: results, limits, deadlines, crashes, and datasets on real servers."""

import asyncio
import csv
import io
import itertools
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import (
    EngineCrashed,
    EngineUnavailable,
    Execution,
    Output,
    QueryFailed,
    Read,
    Relation,
    RelationKind,
)
from queryd.events import Column, ErrorCode, OrgId, OutputFormat, QueryId
from service.embedded.object_store import ObjectStore
from tests.integration.outputs import read_output

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MIB = 1024 * 1024

# Legal, endless for our purposes, and stopped by an interrupt at once.
_ENDLESS = "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range < b.range * 2 + hash(a.range) % 3"
# One call that looks at no interrupt for many seconds.
_UNSTOPPABLE = "SELECT levenshtein(repeat('a', 200000), repeat('b', 200000))"

_Prepare = Callable[..., Execution]


@pytest.fixture
def prepare(tmp_path: Path) -> _Prepare:
    """Makes executions, each with a scratch directory of its own."""
    numbers = itertools.count(1)

    def make(
        sql: str,
        parameters: dict[str, Any] | None = None,
        output_format: OutputFormat = OutputFormat.JSON,
        relations: tuple[Relation, ...] = (),
        timeout_seconds: float = 60.0,
        **limits: Any,
    ) -> Execution:
        scratch = tmp_path / f"attempt-{next(numbers)}"
        scratch.mkdir()
        return Execution(
            QueryId(str(uuid.uuid4())),
            OrgId(str(uuid.UUID(int=7))),
            sql,
            parameters or {},
            relations,
            output_format,
            scratch,
            timeout_seconds,
            **limits,
        )

    return make


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def only_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DuckDBEngine]:
    """One child and no datasets, for all tests: what one of them does to the child must not harm the next."""
    scratch = tmp_path_factory.mktemp("scratch")
    made = DuckDBEngine(DuckDBSettings(512 * _MIB, 2, scratch, max_scratch_bytes=1024 * _MIB), 1)
    await made.start()
    yield made
    await made.close()
    assert list(scratch.iterdir()) == []


@pytest_asyncio.fixture(loop_scope="module")
async def engine(only_engine: DuckDBEngine, prepare: _Prepare) -> DuckDBEngine:
    """The engine with its child idle."""
    await only_engine.execute(prepare("SELECT 1"))
    return only_engine


async def _until_busy(engine: DuckDBEngine) -> None:
    while engine._idle:  # noqa: ASYNC110 - it takes a few steps of the event loop, and nothing tells of them
        await asyncio.sleep(0)


def _lines(output: Output) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_output(output).decode().splitlines()]


async def _failure(engine: DuckDBEngine, execution: Execution) -> QueryFailed:
    with pytest.raises(QueryFailed) as caught:
        await engine.execute(execution)
    assert list(execution.scratch.iterdir()) == []
    return caught.value


_TYPED = """
SELECT * FROM (VALUES
    (1, 1.50::DECIMAL(9, 2), TIMESTAMPTZ '2013-01-01 05:00:00+05', [1, NULL], {'a': 'x', 'b': NULL}, NULL, '',
     'naïve "quote", 日本語' || chr(10) || '🦆', DATE '2013-01-01', 170141183460469231731687303715884105::HUGEINT,
     true),
    (2, NULL, NULL, NULL, NULL, 'NULL', NULL, NULL, NULL, NULL, NULL)
) AS t(id, amount, moment, list, struct, nothing, empty, "naïve", day, huge, flag)
ORDER BY id
"""


async def test_parquet_keeps_types(engine: DuckDBEngine, prepare: _Prepare) -> None:
    output = await engine.execute(prepare(_TYPED, output_format=OutputFormat.PARQUET))
    table = pq.read_table(io.BytesIO(read_output(output)))
    assert output.rows == table.num_rows == 2
    assert output.bytes == len(read_output(output))
    assert pq.ParquetFile(io.BytesIO(read_output(output))).metadata.row_group(0).column(0).compression == "ZSTD"
    assert table.schema.field("amount").type == pa.decimal128(9, 2)
    assert table.schema.field("moment").type == pa.timestamp("us", tz="UTC")
    assert table.schema.field("huge").type == pa.decimal128(38, 0)
    first, second = table.to_pylist()
    assert first == {
        "id": 1,
        "amount": Decimal("1.50"),
        "moment": datetime(2013, 1, 1, tzinfo=UTC),
        "list": [1, None],
        "struct": {"a": "x", "b": None},
        "nothing": None,
        "empty": "",
        "naïve": 'naïve "quote", 日本語\n🦆',
        "day": date(2013, 1, 1),
        "huge": Decimal(170141183460469231731687303715884105),
        "flag": True,
    }
    assert second["nothing"] == "NULL"
    assert second["empty"] is None
    assert Column("amount", "DECIMAL(9,2)") in output.columns
    assert Column("moment", "TIMESTAMP WITH TIME ZONE") in output.columns
    assert Column("huge", "HUGEINT") in output.columns


async def test_csv_is_rfc_4180_and_tells_null_from_empty(engine: DuckDBEngine, prepare: _Prepare) -> None:
    output = await engine.execute(prepare(_TYPED, output_format=OutputFormat.CSV))
    text = read_output(output).decode("utf-8")
    header, first, second = csv.reader(io.StringIO(text, newline=""))
    assert header[:3] == ["id", "amount", "moment"]
    assert header[7] == "naïve"
    assert first[1:3] == ["1.50", "2013-01-01 00:00:00+00"]
    assert first[7] == 'naïve "quote", 日本語\n🦆'
    assert text.endswith("\r\n")
    assert text.count("\r\n") == 3
    assert ',,"",' in text
    assert second[5] == "NULL"


async def test_json_is_one_object_a_line(engine: DuckDBEngine, prepare: _Prepare) -> None:
    output = await engine.execute(prepare(_TYPED))
    first, second = _lines(output)
    assert first["struct"] == {"a": "x", "b": None}
    assert first["list"] == [1, None]
    assert first["huge"] == 170141183460469231731687303715884105
    assert first["moment"] == "2013-01-01 00:00:00+00"
    assert (first["nothing"], first["empty"]) == (None, "")
    assert second["nothing"] == "NULL"


async def test_json_says_what_is_not_a_number(engine: DuckDBEngine, prepare: _Prepare) -> None:
    sql = """
    SELECT 'nan'::DOUBLE AS a, [1.5::DOUBLE, 'inf'] AS b, {'x': '-inf'::FLOAT, 'y': [{'z': 'nan'::DOUBLE}]} AS c,
           MAP {'k': 'nan'::DOUBLE} AS d, NULL::DOUBLE AS e, NULL::DOUBLE[] AS f, NULL::STRUCT(x DOUBLE) AS g, 0.5 AS h
    """
    output = await engine.execute(prepare(sql))
    assert _lines(output) == [
        {
            "a": "nan",
            "b": [1.5, "inf"],
            "c": {"x": "-inf", "y": [{"z": "nan"}]},
            "d": {"k": "nan"},
            "e": None,
            "f": None,
            "g": None,
            "h": 0.5,
        }
    ]


@pytest.mark.parametrize("output_format", OutputFormat)
async def test_rows_keep_the_order_of_the_sql(
    engine: DuckDBEngine, prepare: _Prepare, output_format: OutputFormat
) -> None:
    sql = "SELECT range * 7919 % 300007 AS k, range::HUGEINT AS v FROM range(300007) ORDER BY k DESC"
    output = await engine.execute(prepare(sql, output_format=output_format, max_rows=1_000_000))
    if output_format is OutputFormat.PARQUET:
        keys = pq.read_table(io.BytesIO(read_output(output)))["k"].to_pylist()
    elif output_format is OutputFormat.CSV:
        keys = [int(row["k"]) for row in csv.DictReader(io.StringIO(read_output(output).decode(), newline=""))]
    else:
        keys = [row["k"] for row in _lines(output)]
    assert keys == list(range(300006, -1, -1))


async def test_names_that_occur_twice_are_made_unique(engine: DuckDBEngine, prepare: _Prepare) -> None:
    output = await engine.execute(prepare("SELECT 1 AS a, 2 AS A, 3 AS a_1, 4 AS a"))
    assert _lines(output) == [{"a": 1, "A_2": 2, "a_1": 3, "a_3": 4}]


async def test_events_learn_no_sql_from_column_names(engine: DuckDBEngine, prepare: _Prepare) -> None:
    sql = """SELECT count(*), sum(x), x AS "two words", 'hunter2', x + 42, 'a'::ENUM('a', 'hunter2') AS e,
             {'field x': 'hunter2'} AS s, lower('hunter2') FROM (SELECT 1 AS x) GROUP BY x"""
    output = await engine.execute(prepare(sql, output_format=OutputFormat.PARQUET))
    names = ["count_star()", "sum(x)", "two words", "column_4", "column_5", "e", "s", "column_8"]
    assert [column.name for column in output.columns] == names
    assert "hunter2" not in repr(output.columns)
    assert "'hunter2'" in pq.read_schema(io.BytesIO(read_output(output))).names


@pytest.mark.parametrize("sql", ["SELECT 1 AS a;", "SELECT 1 AS a -- ) TO 'x'", "/* ( */ SELECT 1 AS a /* ) */ ; -- ;"])
async def test_comments_and_semicolons_change_nothing(engine: DuckDBEngine, prepare: _Prepare, sql: str) -> None:
    assert _lines(await engine.execute(prepare(sql))) == [{"a": 1}]


async def test_parameters_are_bound_with_their_types(engine: DuckDBEngine, prepare: _Prepare) -> None:
    sql = "SELECT typeof($i) AS i, typeof($f) AS f, typeof($b) AS b, $s AS s, $n IS NULL AS n, $big AS big"
    values = {"i": 1, "f": 1.0, "b": True, "s": "'; DROP TABLE x; --", "n": None, "big": 2**62}
    assert _lines(await engine.execute(prepare(sql, values))) == [
        {"i": "INTEGER", "f": "DOUBLE", "b": "BOOLEAN", "s": values["s"], "n": True, "big": 2**62}
    ]


async def test_parameters_may_stand_in_limits_and_subqueries(engine: DuckDBEngine, prepare: _Prepare) -> None:
    sql = "SELECT * FROM (SELECT range AS r FROM range(10) WHERE range > $least) ORDER BY r LIMIT $n"
    output = await engine.execute(prepare(sql, {"least": 3, "n": 2}, max_rows=5))
    assert _lines(output) == [{"r": 4}, {"r": 5}]


@pytest.mark.parametrize(
    ("sql", "code"),
    [
        ("SELEC 1", ErrorCode.QUERY_ERROR),
        ("SELECT hunter2 FROM range(3)", ErrorCode.QUERY_ERROR),
        ("SELECT 'hunter2'::INTEGER", ErrorCode.QUERY_ERROR),
        ("SELECT hunter2(1)", ErrorCode.SQL_REJECTED),
        ("SELECT (SELECT range FROM range(2))", ErrorCode.QUERY_ERROR),
        ("SELECT 9223372036854775807 + range FROM range(2)", ErrorCode.QUERY_ERROR),
        ("SELECT $hunter2_missing", ErrorCode.QUERY_ERROR),
        ("SELECT * FROM hunter2", ErrorCode.SQL_REJECTED),
        ("COPY (SELECT 1) TO '/tmp/hunter2'", ErrorCode.SQL_REJECTED),
    ],
)
async def test_a_querys_own_error_quotes_nothing(
    engine: DuckDBEngine, prepare: _Prepare, sql: str, code: ErrorCode
) -> None:
    failure = await _failure(engine, prepare(sql))
    assert failure.code is code
    assert "hunter2" not in failure.message.replace("$hunter2_missing", "")
    assert failure.message.endswith(".")


@pytest.mark.parametrize(
    ("sql", "where"),
    [
        ("SELECT 1,\n  2,\n  nowhere\nFROM range(3)", (3, 3)),
        ("SELECT 'é🦆', nowhere FROM range(3)", (1, 14)),
        (";; \n SELECT nowhere FROM range(3) ;", (2, 9)),
        ("SELECT 1, upper(1, 2, 3)", (1, 11)),
        ("SELECT 170141183460469231731687303715884105727::HUGEINT AS h, 'x'::INTEGER", (1, 66)),
    ],
)
async def test_an_error_tells_where_to_look_in_what_its_author_wrote(
    engine: DuckDBEngine, prepare: _Prepare, sql: str, where: tuple[int, int]
) -> None:
    for limits in ({}, {"max_rows": 5}):
        failure = await _failure(engine, prepare(sql, output_format=OutputFormat.PARQUET, **limits))
        assert failure.code is ErrorCode.QUERY_ERROR
        assert failure.message.endswith(f" Look at line {where[0]}, column {where[1]}.")


async def test_an_error_inside_a_macro_tells_no_position(engine: DuckDBEngine, prepare: _Prepare) -> None:
    """DuckDB counts in the macro's own text then, which is nowhere in the statement."""
    failure = await _failure(engine, prepare("SELECT 1, 2, list_sum('a') AS s"))
    assert failure.code is ErrorCode.QUERY_ERROR
    assert "Look at" not in failure.message


async def test_the_detail_is_duckdbs_own_text_for_the_author_alone(engine: DuckDBEngine, prepare: _Prepare) -> None:
    failure = await _failure(engine, prepare("SELECT 'hunter2'::INTEGER AS a"))
    assert failure.detail == "Conversion Error: Could not convert string 'hunter2' to INT32"
    assert "hunter2" not in f"{failure!r} {failure} {failure.args}"
    long = await _failure(engine, prepare(f"SELECT '{'é' * 50_000}'::INTEGER AS a"))
    assert long.detail is not None
    assert 15 * 1024 < len(long.detail.encode()) <= 16 * 1024


async def test_a_statement_is_inspected_without_being_run(engine: DuckDBEngine) -> None:
    sql = "WITH o AS (SELECT * FROM orders WHERE id > $least) SELECT * FROM o JOIN finance.invoices i USING (id)"
    inspected = await engine.inspect(sql)
    assert inspected.relations == {"orders", "finance.invoices"}
    assert inspected.parameters == {"least"}
    for bad, code in (("SELEC 1", ErrorCode.QUERY_ERROR), ("DROP TABLE orders", ErrorCode.SQL_REJECTED)):
        with pytest.raises(QueryFailed) as caught:
            await engine.inspect(bad)
        assert caught.value.code is code


async def test_what_may_not_be_read_now_is_denied_before_anything_runs(engine: DuckDBEngine, prepare: _Prepare) -> None:
    execution = replace(prepare("SELECT * FROM people"), denied=frozenset({"people"}))
    assert (await _failure(engine, execution)).code is ErrorCode.ACCESS_DENIED
    # What is neither granted nor denied is rejected as what does not exist is.
    assert (await _failure(engine, prepare("SELECT * FROM people"))).code is ErrorCode.SQL_REJECTED


async def test_a_result_over_a_limit_leaves_nothing(engine: DuckDBEngine, prepare: _Prepare) -> None:
    many = "SELECT hash(range) AS h FROM range(100000)"
    assert (await _failure(engine, prepare(many, max_rows=99_999))).code is ErrorCode.RESULT_TOO_LARGE
    assert (await _failure(engine, prepare(many, max_bytes=10_000))).code is ErrorCode.RESULT_TOO_LARGE
    assert (await engine.execute(prepare(many, max_rows=100_000, max_bytes=10_000_000))).rows == 100_000


async def test_scratch_is_bounded_for_results_and_for_spilling(tmp_path: Path, prepare: _Prepare) -> None:
    settings = DuckDBSettings(512 * _MIB, 2, tmp_path / "scratch", max_scratch_bytes=1 * _MIB)
    engine = DuckDBEngine(settings, 1)
    await engine.start()
    try:
        execution = prepare("SELECT hash(range) AS h FROM range(1000000)", output_format=OutputFormat.CSV)
        assert (await _failure(engine, execution)).code is ErrorCode.RESULT_TOO_LARGE
        assert _lines(await engine.execute(prepare("SELECT 1 AS a"))) == [{"a": 1}]
        spilling = prepare("SELECT hash(range) AS h, repeat('x', 900) || range AS s FROM range(1000000) ORDER BY h")
        assert (await _failure(engine, spilling)).code is ErrorCode.MEMORY_LIMIT_EXCEEDED
    finally:
        await engine.close()


async def test_the_deadline_interrupts_and_the_child_goes_on(engine: DuckDBEngine, prepare: _Prepare) -> None:
    [child] = engine._all
    assert (await _failure(engine, prepare(_ENDLESS, timeout_seconds=0.5))).code is ErrorCode.QUERY_TIMEOUT
    assert _lines(await engine.execute(prepare("SELECT 1 AS a"))) == [{"a": 1}]
    assert engine._all == {child}


@pytest.mark.slow
async def test_a_child_that_does_not_stop_is_killed_and_replaced(engine: DuckDBEngine, prepare: _Prepare) -> None:
    [child] = engine._all
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert (await _failure(engine, prepare(_UNSTOPPABLE, timeout_seconds=0.5))).code is ErrorCode.QUERY_TIMEOUT
    # Half a second of its own, one of grace; the rest is for a busy machine.
    assert loop.time() - started < 5.0
    assert _lines(await engine.execute(prepare("SELECT 1 AS a"))) == [{"a": 1}]
    assert child not in engine._all


@pytest.mark.slow
@pytest.mark.parametrize("sql", [_ENDLESS, _UNSTOPPABLE])
async def test_a_cancelled_query_stops_at_once(engine: DuckDBEngine, prepare: _Prepare, sql: str) -> None:
    execution = prepare(sql)
    running = asyncio.create_task(engine.execute(execution))
    await _until_busy(engine)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    # The one child is free again, or another stands in for it.
    assert _lines(await engine.execute(prepare("SELECT 1 AS a"))) == [{"a": 1}]
    assert list(execution.scratch.iterdir()) == []


async def test_a_killed_child_costs_one_query(engine: DuckDBEngine, prepare: _Prepare) -> None:
    [child] = engine._all
    running = asyncio.create_task(engine.execute(prepare(_ENDLESS)))
    await _until_busy(engine)
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.raises(EngineCrashed):
        await running
    assert _lines(await engine.execute(prepare("SELECT 1 AS a"))) == [{"a": 1}]


async def test_a_child_that_dies_idle_costs_nothing(engine: DuckDBEngine, prepare: _Prepare) -> None:
    [child] = engine._all
    os.kill(child.process.pid, signal.SIGKILL)
    await child.process.wait()
    assert _lines(await engine.execute(prepare("SELECT 1 AS a"))) == [{"a": 1}]


@pytest.mark.slow
async def test_memory_stays_bounded_and_the_child_is_replaced(engine: DuckDBEngine, prepare: _Prepare) -> None:
    [child] = engine._all
    for sql in (
        "SELECT len(list(repeat('x', 100) || a.range)) FROM range(10000000) a",
        "WITH RECURSIVE t(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM t) SELECT max(length(s)) FROM t",
    ):
        assert (await _failure(engine, prepare(sql))).code is ErrorCode.MEMORY_LIMIT_EXCEEDED
    assert child not in engine._all
    assert _lines(await engine.execute(prepare("SELECT 1 AS a"))) == [{"a": 1}]


@pytest.mark.slow
async def test_a_sort_larger_than_memory_spills(engine: DuckDBEngine, prepare: _Prepare) -> None:
    sql = "SELECT h FROM (SELECT hash(range) AS h, repeat('x', 900) || range AS s FROM range(1000000)) ORDER BY h, s"
    output = await engine.execute(prepare(sql, output_format=OutputFormat.PARQUET))
    hashes = pq.read_table(io.BytesIO(read_output(output)), columns=["h"])["h"].to_numpy()
    assert len(hashes) == 1_000_000
    assert (hashes[:-1] <= hashes[1:]).all()


async def test_waiting_for_a_child_counts_towards_the_time_limit(engine: DuckDBEngine, prepare: _Prepare) -> None:
    first = asyncio.create_task(engine.execute(prepare(_ENDLESS, timeout_seconds=30.0)))
    await _until_busy(engine)
    assert (await _failure(engine, prepare("SELECT 1", timeout_seconds=0.2))).code is ErrorCode.QUERY_TIMEOUT
    first.cancel()
    await asyncio.wait({first})


async def test_closing_ends_what_runs(tmp_path: Path, prepare: _Prepare) -> None:
    engine = DuckDBEngine(DuckDBSettings(512 * _MIB, 2, tmp_path / "scratch"), 1)
    await engine.start()
    running = asyncio.create_task(engine.execute(prepare(_ENDLESS)))
    await _until_busy(engine)
    await engine.close()
    with pytest.raises(EngineCrashed):
        await running
    with pytest.raises(EngineUnavailable):
        await engine.execute(prepare("SELECT 1"))


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


async def test_what_a_dead_pool_left_is_swept_and_what_a_live_one_uses_is_not(tmp_path: Path) -> None:
    (tmp_path / "child-left" / "spill").mkdir(parents=True)
    first, second = (DuckDBEngine(DuckDBSettings(512 * _MIB, 2, tmp_path), 1) for _ in range(2))
    await first.start()
    in_use = _names(tmp_path)
    assert len(in_use) == 1
    assert "child-left" not in in_use
    await second.start()
    assert in_use < _names(tmp_path)
    await second.close()
    assert _names(tmp_path) == in_use
    await first.close()


class _Datasets:
    """Flights in S3, carriers in Postgres, and what is granted of them."""

    def __init__(self, store: ObjectStore, postgres_url: str, tmp_path: Path) -> None:
        self.folder = f"datasets/{uuid.uuid4()}"
        self._store = store
        self._s3 = boto3.client(
            "s3",
            endpoint_url=store.endpoint_url,
            region_name=store.region,
            aws_access_key_id=store.writer.access_key,
            aws_secret_access_key=store.writer.secret_key,
        )
        for month in (1, 2):
            table = pa.table({"id": range(month * 100, month * 100 + 50), "carrier": ["AA", "UA"] * 25})
            path = tmp_path / "part.parquet"
            pq.write_table(table, path)
            self._s3.upload_file(str(path), store.bucket, f"{self.folder}/flights/month={month}/part.parquet")
        with psycopg.connect(postgres_url) as connection:
            connection.execute("CREATE TABLE carriers (code text PRIMARY KEY, name text)")
            connection.execute("INSERT INTO carriers VALUES ('AA', 'American'), ('UA', 'United')")
            connection.execute("CREATE TABLE payroll AS SELECT 'hunter2' AS s")

    def parquet(self, name: str, location: str) -> Relation:
        return Relation(name, RelationKind.PARQUET, f"s3://{self._store.bucket}/{self.folder}/{location}", "1")

    @property
    def flights(self) -> Relation:
        return self.parquet("flights", "flights/")

    @property
    def carriers(self) -> Relation:
        return Relation("ref.carriers", RelationKind.POSTGRES, "public.carriers", "1")

    def settings(self, scratch: Path, postgres_url: str | None, endpoint_url: str | None = None) -> DuckDBSettings:
        return DuckDBSettings(
            512 * _MIB,
            2,
            scratch,
            endpoint_url=endpoint_url or self._store.endpoint_url,
            region=self._store.region,
            access_key=self._store.reader.access_key,
            secret_key=self._store.reader.secret_key,
            postgres_url=postgres_url,
        )


@pytest.fixture
def datasets(object_store: ObjectStore, postgres_url: str, tmp_path: Path) -> _Datasets:
    return _Datasets(object_store, postgres_url, tmp_path)


@pytest_asyncio.fixture(loop_scope="module")
async def reading(datasets: _Datasets, postgres_url: str, tmp_path: Path) -> AsyncIterator[DuckDBEngine]:
    """One child that can reach the datasets."""
    made = DuckDBEngine(datasets.settings(tmp_path / "scratch", postgres_url), 1)
    await made.start()
    yield made
    await made.close()


async def test_hot_and_cold_data_in_one_query(reading: DuckDBEngine, datasets: _Datasets, prepare: _Prepare) -> None:
    sql = """SELECT c.name, f.month, count(*) AS n FROM flights f JOIN ref.carriers c ON c.code = f.carrier
             WHERE f.id >= $least GROUP BY ALL ORDER BY ALL"""
    relations = (datasets.flights, datasets.carriers)
    for _ in range(2):
        output = await reading.execute(prepare(sql, {"least": 110}, relations=relations))
        assert _lines(output) == [
            {"name": "American", "month": 1, "n": 20},
            {"name": "American", "month": 2, "n": 25},
            {"name": "United", "month": 1, "n": 20},
            {"name": "United", "month": 2, "n": 25},
        ]


async def test_reads_of_personal_data_are_told_also_of_a_statement_that_fails(
    reading: DuckDBEngine, datasets: _Datasets, prepare: _Prepare
) -> None:
    people = replace(datasets.carriers, pii_columns=frozenset({"name"}))
    told = {Read("ref.carriers", frozenset({"name"}))}
    succeeding = prepare("SELECT name FROM ref.carriers", relations=(people,))
    await reading.execute(succeeding)
    assert succeeding.reads == told
    failing = prepare("SELECT name::INTEGER AS n FROM ref.carriers", relations=(people,))
    failure = await _failure(reading, failing)
    assert failing.reads == told
    assert failure.detail is not None
    assert "American" in failure.detail


async def test_the_detail_tells_nothing_of_where_a_dataset_lies(
    reading: DuckDBEngine, datasets: _Datasets, prepare: _Prepare
) -> None:
    sql = "SELECT (SELECT id FROM flights) AS a, carrier::INTEGER AS c FROM flights"
    failure = await _failure(reading, prepare(sql, relations=(datasets.flights, datasets.carriers)))
    assert failure.detail is not None
    assert "datasets/" not in failure.detail
    gone = await _failure(reading, prepare("FROM gone", relations=(datasets.parquet("gone", "gone.parquet"),)))
    assert gone.detail is None


@pytest.mark.parametrize("location", ["flights/month=1/part.parquet", "flights/month=1/*.parquet", "flights/month=1/"])
async def test_a_location_is_a_file_a_pattern_or_a_folder(
    reading: DuckDBEngine, datasets: _Datasets, prepare: _Prepare, location: str
) -> None:
    relation = datasets.parquet("Jan Flights", location)
    output = await reading.execute(prepare('SELECT count(*) AS n FROM "Jan Flights"', relations=(relation,)))
    assert _lines(output) == [{"n": 50}]


async def test_a_dataset_that_is_not_read_may_be_out_of_reach(
    datasets: _Datasets, tmp_path: Path, prepare: _Prepare
) -> None:
    # Nobody listens on port 9.
    lost = DuckDBEngine(datasets.settings(tmp_path / "scratch", "postgresql://nobody@127.0.0.1:9/nothing"), 1)
    await lost.start()
    try:
        relations = (datasets.flights, datasets.carriers, datasets.parquet("gone", "gone.parquet"))
        output = await lost.execute(prepare("SELECT count(*) AS n FROM flights", relations=relations))
        assert _lines(output) == [{"n": 100}]
        with pytest.raises(EngineUnavailable, match="Postgres can't be reached"):
            await lost.execute(prepare("FROM ref.carriers", relations=relations))
        missing = await _failure(lost, prepare("FROM gone", relations=relations))
        assert missing.message == "The dataset's files are missing."
    finally:
        await lost.close()


async def test_an_object_store_that_is_down_is_unavailable(
    datasets: _Datasets, postgres_url: str, tmp_path: Path, prepare: _Prepare
) -> None:
    settings = datasets.settings(tmp_path / "scratch", postgres_url, "http://127.0.0.1:9")
    lost = DuckDBEngine(settings, 1)
    await lost.start()
    try:
        relations = (datasets.flights, datasets.carriers)
        with pytest.raises(EngineUnavailable):
            await lost.execute(prepare("FROM flights", relations=relations))
        assert len(_lines(await lost.execute(prepare("FROM ref.carriers", relations=relations)))) == 2
    finally:
        await lost.close()


async def test_a_postgres_that_cut_its_connections_is_asked_again(
    reading: DuckDBEngine, datasets: _Datasets, postgres_url: str, prepare: _Prepare
) -> None:
    relations = (datasets.carriers,)
    assert len(_lines(await reading.execute(prepare("FROM ref.carriers", relations=relations)))) == 2
    with psycopg.connect(postgres_url) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert len(_lines(await reading.execute(prepare("FROM ref.carriers", relations=relations)))) == 2


async def test_a_postgres_table_that_was_made_anew_is_read_as_it_is_now(
    reading: DuckDBEngine, datasets: _Datasets, postgres_url: str, prepare: _Prepare
) -> None:
    relations = (datasets.carriers,)
    sql = "SELECT code, name FROM ref.carriers ORDER BY ALL LIMIT 1"
    assert _lines(await reading.execute(prepare(sql, relations=relations))) == [{"code": "AA", "name": "American"}]
    with psycopg.connect(postgres_url) as connection:
        connection.execute("DROP TABLE carriers")
        connection.execute("CREATE TABLE carriers (name int, code int)")
        connection.execute("INSERT INTO carriers VALUES (1, 2)")
    assert _lines(await reading.execute(prepare(sql, relations=relations))) == [{"code": 2, "name": 1}]


async def test_a_postgres_view_that_raises_is_no_outage_and_its_place_is_not_told(
    reading: DuckDBEngine, postgres_url: str, prepare: _Prepare
) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE VIEW hidden_place AS SELECT 1 / (length(code) - 2) AS x, code FROM carriers")
    relations = (Relation("d", RelationKind.POSTGRES, "public.hidden_place", "1"),)
    for sql in ("SELECT x FROM d", "SELECT code FROM d WHERE code = chr(0)"):
        failure = await _failure(reading, prepare(sql, relations=relations))
        assert failure.code is ErrorCode.QUERY_ERROR
        assert "hidden_place" not in f"{failure.message} {failure.detail}"


@pytest.mark.parametrize("output_format", OutputFormat)
async def test_structs_without_names_and_strings_as_names_are_written(
    engine: DuckDBEngine, prepare: _Prepare, output_format: OutputFormat
) -> None:
    sql = "SELECT (sum(i), count(*)) AS pair, row(1::HUGEINT, 2::DOUBLE) AS other FROM range(3) t(i)"
    assert (await engine.execute(prepare(sql, output_format=output_format))).rows == 1
    pivot = "PIVOT (SELECT 'Ottilie Zwicky' AS name, 1 AS x) ON name IN ('Ottilie Zwicky') USING sum(x)"
    output = await engine.execute(prepare(pivot, output_format=output_format))
    assert "Ottilie" not in str(output.columns)


async def test_a_changed_grant_is_another_instance(
    reading: DuckDBEngine, datasets: _Datasets, prepare: _Prepare
) -> None:
    first = datasets.parquet("flights", "flights/month=1/")
    second = Relation("flights", first.kind, first.location.replace("month=1", "month=2"), "2")
    sql = "SELECT min(id) AS least FROM flights"
    assert _lines(await reading.execute(prepare(sql, relations=(first,)))) == [{"least": 100}]
    assert _lines(await reading.execute(prepare(sql, relations=(second,)))) == [{"least": 200}]
    assert (await _failure(reading, prepare(sql))).code is ErrorCode.SQL_REJECTED


async def test_the_runtime_reaches_nothing_that_was_not_granted(
    datasets: _Datasets, postgres_url: str, tmp_path: Path
) -> None:
    """The second layer, asked directly: what the gate would refuse does no harm either."""
    import duckdb  # noqa: PLC0415 - only here is DuckDB used without a child

    from engines.duckdb.instance import Instance  # noqa: PLC0415

    for folder in ("out", "secrets"):
        (tmp_path / folder).mkdir()
    (tmp_path / "private.csv").write_text("s\nhunter2\n")
    settings = datasets.settings(tmp_path / "scratch", postgres_url)
    instance = Instance(settings, tmp_path, frozenset({datasets.flights}), frozenset({RelationKind.PARQUET}))
    bucket = datasets.flights.location.rpartition("/datasets/")[0]
    try:
        for sql in (
            f"FROM read_csv('{tmp_path}/private.csv')",
            f"COPY (SELECT 1) TO '{tmp_path}/written.csv'",
            f"FROM read_parquet('{bucket}/results/*.parquet')",
            f"COPY (SELECT 1) TO '{datasets.flights.location}new.parquet'",
            f"ATTACH '{postgres_url}' AS other (TYPE postgres)",
            "FROM read_csv('http://127.0.0.1:9/x.csv')",
            "LOAD postgres_scanner",
            "INSTALL spatial",
            "SET memory_limit = '1TB'",
            "SET enable_external_access = true",
        ):
            with pytest.raises(duckdb.Error):
                instance.connection.execute(sql).fetchall()
    finally:
        instance.close()
    assert not (tmp_path / "written.csv").exists()
