"""What the first gate lets through and what it refuses, on statements of our own."""

import time

import duckdb
import pytest

from engines.duckdb.gate import Gate
from engines.protocol import QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode, Parameter

GRANTED = tuple(
    Relation(name, RelationKind.PARQUET, "s3://lake/x.parquet", "1")
    for name in ("flights", "Tail Numbers", "ops.crews", "select")
)


@pytest.fixture(scope="module")
def judge() -> Gate:
    return Gate()


def _refusal(judge: Gate, sql: str, parameters: dict[str, Parameter] | None = None) -> QueryFailed:
    with pytest.raises(QueryFailed) as caught:
        judge.judge(sql, GRANTED, parameters or {})
    return caught.value


@pytest.mark.parametrize(
    ("sql", "references"),
    [
        ("SELECT 7 AS seven", set()),
        ("FROM flights", {"flights"}),
        ('SELECT * FROM FLIGHTS f JOIN "tail numbers" t USING (tail)', {"flights", "Tail Numbers"}),
        ('SELECT * FROM ops.crews, "OPS"."Crews" c2', {"ops.crews"}),
        ('SELECT * FROM "select"', {"select"}),
        ("WITH flights AS (SELECT * FROM flights WHERE late > 5) FROM flights", {"flights"}),
        ("WITH secret AS (SELECT 1 AS i), b AS (FROM secret) SELECT * FROM b, secret", set()),
        (
            "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t WHERE i < 9) SELECT sum(i) FROM t",
            set(),
        ),
        ("SELECT (SELECT max(late) FROM flights), EXISTS (FROM ops.crews)", {"flights", "ops.crews"}),
        ("SELECT x FROM range(10) t(x), unnest([1, 2]) u(y), json_each('{}') j", set()),
        ("SELECT [x * 2 FOR x IN [1, 2] IF x > 1], {'a': 1}, MAP {'k': 2}, [1, 2][1:1], ('a').upper()", set()),
        ("SELECT extract(year FROM d), trim(BOTH 'x' FROM s), d AT TIME ZONE 'UTC' FROM flights", {"flights"}),
        ("SELECT 1::DECIMAL(9, 2), 'a'::ENUM('a', 'b'), {'a': 1}::STRUCT(a BIGINT)", set()),
        ("FROM flights PIVOT (sum(late) FOR carrier IN ('AA', 'UA'))", {"flights"}),
        ("SELECT sum(late) OVER (PARTITION BY carrier ORDER BY d) FROM flights TABLESAMPLE 10%", {"flights"}),
        ("VALUES (1, 'a'), (2, 'b')", set()),
        ("SELECT 'read_text(''/etc/passwd''); DROP TABLE flights'", set()),
        ('SELECT late AS "read_csv", user FROM flights ORDER BY ALL', {"flights"}),
        ("(SELECT 1 UNION SELECT 2) ORDER BY 1", set()),
    ],
)
def test_one_select_over_granted_relations_passes(judge: Gate, sql: str, references: set[str]) -> None:
    assert judge.judge(sql, GRANTED, {}).references == references


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM crews",
        "SELECT * FROM main.flights",
        "SELECT * FROM memory.ops.crews",
        'SELECT * FROM "ops.crews"',
        "SELECT * FROM 's3://other/part.parquet'",
        "SELECT * FROM pg_tables",
        "SELECT * FROM information_schema.tables",
        "WITH crews AS (SELECT * FROM crews) SELECT 1",
        "WITH RECURSIVE crews AS (SELECT * FROM crews UNION ALL SELECT * FROM crews) SELECT 1",
        "WITH a AS (FROM b), b AS (SELECT 1) FROM a",
        "SELECT (WITH crews AS (SELECT 1) SELECT 1) FROM crews",
        "SELECT * REPLACE ((SELECT s FROM secret) AS late) FROM flights",
        "SELECT CASE WHEN EXISTS (FROM secret) THEN 1 END",
        "SELECT list_transform([1], lambda x: (SELECT s FROM secret))",
        "SELECT 1 ORDER BY (SELECT s FROM secret)",
        "SELECT 1 LIMIT (SELECT i FROM secret)",
        "SELECT sum(1) FILTER (WHERE (SELECT b FROM secret)) FROM flights",
        "SELECT * FROM range((SELECT i FROM secret))",
        "SELECT * FROM flights AT (VERSION => 1)",
        "SELECT * FROM read_json('/tmp/x')",
        "SELECT * FROM query('SELECT 1')",
        "SELECT read_blob('/tmp/x')",
        "SELECT main.upper('x')",
        "SELECT getenv('HOME')",
        "SELECT current_setting('threads')",
        "SELECT list_aggr([1], 'sum')",
        "SELECT sum(x) OVER () FROM (SELECT nextval('s') AS x)",
        "DESCRIBE flights",
        "FROM (SHOW TABLES)",
        "SUMMARIZE flights",
        "EXPLAIN SELECT 1",
        "PIVOT flights ON carrier USING sum(late)",
        "SELECT 1; SELECT 2",
        "CREATE TABLE t AS SELECT 1",
        "INSERT INTO flights VALUES (1)",
        "COPY flights TO '/tmp/x'",
        "ATTACH '/tmp/x.db'",
        "SET VARIABLE x = 1",
        "USE ops",
        "",
        " \n\t",
        "-- nothing",
        ";;",
        "SELECT 1\0",
        "SELECT '\ud800'",
        "SELECT " + "[" * 2_000,
        "SELECT " + "(" * 65 + "1" + ")" * 65,
        "SELECT " + "NOT " * 400 + "true",
        "SELECT " + " + ".join("1" * 400),
        "SELECT a" + ".b" * 500,
        "SELECT * FROM " + ", ".join(f"(SELECT {number}) t{number}" for number in range(70)),
        "SELECT '" + "x" * 140_000 + "'",
        "SELECT 1 -- " + "x" * 262_144,
        "SELECT * FROM range(10000000000)",
        "SELECT repeat('x', 2000000000::BIGINT)",
    ],
)
def test_anything_else_is_rejected(judge: Gate, sql: str) -> None:
    started = time.perf_counter()
    assert _refusal(judge, sql).code is ErrorCode.SQL_REJECTED
    # Two seconds would be a parser that hangs; what is refused takes milliseconds.
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "The SQL has a syntax error at line 1, column 1."),
        ("SELECT 'é',\n  1 + )", "The SQL has a syntax error at line 2, column 7."),
        ("SELECT 1 +", "The SQL has a syntax error at line 1, column 11."),
    ],
)
def test_a_syntax_error_tells_where_and_nothing_else(judge: Gate, sql: str, message: str) -> None:
    failure = _refusal(judge, sql)
    assert (failure.code, failure.message) == (ErrorCode.QUERY_ERROR, message)


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("SELECT 1", "SELECT 1"),
        ("SELECT 1;", "SELECT 1"),
        (";; SELECT 1 ; ; ", "SELECT 1 "),
        ("-- é\nSELECT ';' AS é; -- the end", "-- é\nSELECT ';' AS é"),
        ("SELECT 1 -- no end", "SELECT 1 -- no end"),
        ("SELECT 1 /* ; */ ;", "SELECT 1 /* ; */ "),
    ],
)
def test_a_judged_text_can_stand_between_brackets(judge: Gate, sql: str, text: str) -> None:
    judged = judge.judge(sql, (), {})
    assert (judged.text, judged.references, judged.reads) == (text, frozenset(), ())
    parsed = duckdb.extract_statements(f"COPY (\n{judged.text}\n) TO 'x'")
    assert [each.type for each in parsed] == [duckdb.StatementType.COPY]


def test_every_parameter_needs_exactly_one_value(judge: Gate) -> None:
    assert judge.judge("SELECT $a, $A, $b", (), {"a": 1, "B": None}).text
    assert _refusal(judge, "SELECT $carrier").message == "The SQL's parameter $carrier has no value."
    surplus = _refusal(judge, "SELECT 1", {"carrier": "x"})
    assert surplus.code is ErrorCode.QUERY_ERROR
    assert "$carrier" in surplus.message
    assert "secret" not in _refusal(judge, "SELECT 1", {"a secret; value": "x"}).message
    assert "case" in _refusal(judge, "SELECT $a", {"a": 1, "A": 2}).message


@pytest.mark.parametrize("value", ["\ud800", "a\udcff", "\udfff\ud800", "x" * 1000 + "\udbff"])
def test_a_parameter_with_half_of_a_surrogate_pair_is_refused_by_its_name(judge: Gate, value: str) -> None:
    refused = _refusal(judge, "SELECT $carrier, $other", {"other": "\N{GRINNING FACE}", "carrier": value})
    assert refused.code is ErrorCode.QUERY_ERROR
    assert refused.message == "The value of the parameter $carrier is not valid Unicode."
    # Nothing else of Unicode is refused.
    assert judge.judge("SELECT $carrier", (), {"carrier": "\N{GRINNING FACE}\uffff\0"}).text


def test_the_column_that_a_call_stands_behind_counts_as_its_first_argument(judge: Gate) -> None:
    """`name.lpad(2000000000, 'x')` is `lpad(name, 2000000000, 'x')`."""
    for call in ("name.repeat(2000000000)", "t.name.rpad(2000000000, 'x')", "name.list_resize(2000000000)"):
        refused = _refusal(judge, f"SELECT {call} FROM (SELECT 'x' AS name) t")
        assert "makes more than" in refused.message
    assert judge.judge("SELECT name.repeat(20) FROM (SELECT 'x' AS name)", (), {}).text


def test_a_refusal_never_quotes_the_sql(judge: Gate) -> None:
    for sql in ("SELECT * FROM hunter2", "SELECT hunter2(", "SELECT read_text('hunter2')", "DROP TABLE hunter2"):
        assert "hunter2" not in _refusal(judge, sql).message


def test_a_denied_relation_is_denied_before_anything_runs_and_is_not_named(judge: Gate) -> None:
    denied = frozenset({"flights"})
    with pytest.raises(QueryFailed) as caught:
        judge.judge("SELECT 1 FROM (SELECT * FROM FLIGHTS)", GRANTED, {}, denied)
    assert caught.value.code is ErrorCode.ACCESS_DENIED
    assert "flights" not in caught.value.message.lower()
    # A CTE of that name is another thing, and what may not run at all is refused as ever.
    assert judge.judge("WITH flights AS (SELECT 1) FROM flights", GRANTED, {}, denied).references == frozenset()
    with pytest.raises(QueryFailed) as refused:
        judge.judge("SELECT * FROM flights, hunter2", GRANTED, {}, denied)
    assert refused.value.code is ErrorCode.SQL_REJECTED


def test_inspection_takes_any_relation_for_granted_and_nothing_else(judge: Gate) -> None:
    inspected = judge.inspect("WITH a AS (FROM b) SELECT $x, $y FROM a JOIN Sales.Shops USING (id) WHERE k = $X")
    assert inspected.relations == {"b", "Sales.Shops"}
    assert inspected.parameters == {"x", "y"}
    for sql in ("SELECT read_text('x')", "DROP TABLE b", "FROM a.b.c", 'FROM "s3://x/y.parquet"', "SELECT 1 +"):
        with pytest.raises(QueryFailed):
            judge.inspect(sql)


def test_a_parameter_is_looked_at_where_it_multiplies(judge: Gate) -> None:
    assert judge.judge("FROM range($n)", (), {"n": 1_000}).text
    for value in (10**12, "1000000000000", 1e12):
        assert _refusal(judge, "FROM range($n * 2)", {"n": value}).code is ErrorCode.SQL_REJECTED


def test_a_relation_in_a_schema_called_recurring_counts_as_read_where_a_cte_recurs(judge: Gate) -> None:
    granted = (Relation("recurring.t", RelationKind.PARQUET, "s3://lake/x.parquet", "1", frozenset({"b"})),)
    sql = (
        "WITH RECURSIVE t(a, b) USING KEY (a) AS"
        " (SELECT 1, 1 UNION SELECT r.a, r.b + 1 FROM recurring.t r WHERE r.b < 3) FROM t"
    )
    judged = judge.judge(sql, granted, {})
    assert judged.references == {"recurring.t"}
    assert [read.relation for read in judged.reads] == ["recurring.t"]
    assert judge.inspect(sql).relations == frozenset()


def test_deep_statements_are_judged_or_refused_and_never_an_exception(judge: Gate) -> None:
    personal = (Relation("people", RelationKind.PARQUET, "s3://lake/x.parquet", "1", frozenset({"name"})),)
    for word in ("UNION ALL", "EXCEPT"):
        judge.judge(f" {word} ".join(["SELECT 1"] * 399), personal, {})
    deep = "SELECT * FROM " + "(SELECT * FROM " * 60 + "people" + ")" * 60
    assert judge.judge(deep, personal, {}).references == {"people"}
