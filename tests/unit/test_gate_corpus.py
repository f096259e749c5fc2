"""The verdicts of two corpora: the one that the gate was built by, and siblings of its statements."""

import time
from pathlib import Path

import duckdb
import pytest

from engines.duckdb.gate import Gate
from engines.duckdb.gate.judge import as_it_runs
from engines.protocol import QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode
from tests.sql_fixture import GRANTED, make_fixture
from tests.sql_statements import Statement, read_statements
from tests.sql_trees import read_tree, runs_as_judged

RELATIONS = tuple(Relation(name, RelationKind.PARQUET, "s3://lake/x.parquet", "1") for name in GRANTED)


@pytest.fixture(scope="module")
def judge() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def instance() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:", config={"python_enable_replacements": "false"})
    make_fixture(connection)
    return connection


@pytest.mark.parametrize("statement", read_statements(), ids=lambda statement: statement.id)
def test_every_verdict_is_right_and_what_is_allowed_runs(
    judge: Gate, instance: duckdb.DuckDBPyConnection, statement: Statement, tmp_path: Path
) -> None:
    started = time.process_time()
    try:
        judged = judge.judge(statement.sql, RELATIONS, {})
    except QueryFailed as refusal:
        assert not statement.allowed, refusal.message
        assert refusal.code in (ErrorCode.SQL_REJECTED, ErrorCode.QUERY_ERROR)
        # Two seconds of CPU would be a parser that hangs; what is refused takes milliseconds.
        assert time.process_time() - started < 2.0
        return
    assert statement.allowed
    assert runs_as_judged(instance, read_tree(instance, as_it_runs(judged.text))["node"], judged.text)
    # As the engine runs it: between brackets, on lines of its own.
    written = tmp_path / "result.csv"
    instance.execute(f"COPY (\n{judged.text}\n) TO '{written}' (FORMAT csv)")
    assert written.exists()
