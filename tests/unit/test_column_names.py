"""An event has the names of a result's file and whole types, but no values."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from engines.duckdb.columns import Naming
from engines.duckdb.export import Exported, export
from engines.duckdb.gate import Gate
from engines.duckdb.watch import Limits
from engines.protocol import QueryFailed, Relation, RelationKind
from queryd.column_types import parse_type
from queryd.events import Column, ErrorCode, OutputFormat
from tests.result_values.case import open_database

_CUSTOMERS = Relation("customers", RelationKind.PARQUET, "s3://bucket/customers/", "1")
_SOURCES = {"id", "name", "amount", "Street Name", "order-id", "place", "key", "e-mail"}
_VIEW = """
CREATE VIEW customers AS SELECT 1 AS id, 'Ottilie' AS name, 2 AS amount, 'Main' AS "Street Name", 3 AS "order-id",
    {'key': 1, 'e-mail': 'x'} AS place
"""


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with open_database() as connection:
        connection.execute(_VIEW)
        yield connection


class _Exporter:
    """Judges and exports as a child does."""

    def __init__(self, gate: Gate, database: duckdb.DuckDBPyConnection, folder: Path) -> None:
        self._gate = gate
        self._database = database
        self.target = folder / "result"

    def export(self, sql: str, output_format: OutputFormat = OutputFormat.PARQUET, **parameters: Any) -> Exported:
        judged = self._gate.judge(sql, [_CUSTOMERS], parameters)
        texts = tuple(map(str, parameters.values()))
        naming = Naming(judged.names, judged.has_pivot, texts, partial(frozenset, _SOURCES))
        limits = Limits(None, None)
        return export(
            self._database,
            judged.text,
            parameters,
            self.target,
            output_format,
            max_rows=None,
            limits=limits,
            naming=naming,
        )

    def names(self, sql: str, **parameters: Any) -> list[str]:
        return [column.name for column in self.export(sql, **parameters).columns]


@pytest.fixture
def exporter(gate: Gate, database: duckdb.DuckDBPyConnection, tmp_path: Path) -> _Exporter:
    return _Exporter(gate, database, tmp_path)


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("SELECT * FROM (SELECT 1 AS id, 'x' AS name) a JOIN (SELECT 2 AS id, 'y' AS name) b ON true",
         ["id", "name", "id_1", "name_1"]),
        ('SELECT 1 AS "Revenue ($)", 2 AS "order-id", 3 AS "Revenue ($)"',
         ["Revenue ($)", "order-id", "Revenue ($)_1"]),
        ("SELECT 'lat' AS lat, 'x' AS \"it's\"", ["lat", "it's"]),
        ("SELECT * FROM customers", ["id", "name", "amount", "Street Name", "order-id", "place"]),
        ('SELECT "order-id", place.* FROM customers', ["order-id", "key", "e-mail"]),
        ('SELECT * RENAME (id AS "an id") FROM customers',
         ["an id", "name", "amount", "Street Name", "order-id", "place"]),
        ('WITH t("odd one!") AS (SELECT 1) SELECT * FROM t', ["odd one!"]),
        ('SELECT * FROM (VALUES (1, 2)) AS t("(1)", b)', ["(1)", "b"]),
        ('FROM (SELECT 1 AS a, 2 AS b) UNPIVOT ("the value" FOR "its name" IN (a, b))', ["its name", "the value"]),
        (f'SELECT 1 AS "{"n" * 300}"', ["n" * 300]),
        ("SELECT count(*), sum(amount) FROM customers", ["count_star()", "sum(amount)"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_empty", [False, True])
def test_an_event_has_the_files_names_with_rows_and_without(
    exporter: _Exporter, sql: str, names: list[str], is_empty: bool
) -> None:
    if is_empty:
        sql = f"SELECT * FROM ({sql}) AS t WHERE false"
    for output_format in OutputFormat:
        assert [column.name for column in exporter.export(sql, output_format).columns] == names
        if output_format is OutputFormat.PARQUET:
            assert pq.read_schema(exporter.target).names == names


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("SELECT 'hunter2', upper('hunter2'), amount + 42, 42 FROM customers", 4),
        ("SELECT CASE name WHEN 'hunter2' THEN 1 END, name || 'hunter2' FROM customers", 2),
    ],
)
def test_a_piece_of_sql_is_no_name_in_an_event(exporter: _Exporter, sql: str, names: int) -> None:
    assert exporter.names(sql) == [f"column_{number}" for number in range(1, names + 1)]


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("PIVOT customers ON name IN ('Ottilie', 'name 1') USING sum(amount) GROUP BY id",
         ["id", "column_2", "column_3"]),
        ("PIVOT customers ON id IN (1, 4711) USING sum(amount) GROUP BY name", ["name", "column_2", "column_3"]),
        ("PIVOT customers ON name IN (Ottilie, hunter2) USING sum(amount) GROUP BY id",
         ["id", "column_2", "column_3"]),
        ("PIVOT customers ON name IN ('Ottilie') USING sum(amount) AS total, max(amount) AS most GROUP BY id",
         ["id", "column_2", "column_3"]),
        ("SELECT * FROM customers PIVOT (sum(amount) FOR name IN ('Ottilie') GROUP BY id)", ["id", "column_2"]),
        ("WITH p AS (PIVOT customers ON name IN ('Ottilie') USING sum(amount) GROUP BY id) SELECT *, 1 AS mine FROM p",
         ["id", "column_2", "mine"]),
        ("SELECT p.* FROM (PIVOT customers ON name IN ('Ottilie', true) USING count(*) GROUP BY id) p",
         ["id", "column_2", "column_3"]),
    ],
)  # fmt: skip
def test_an_event_has_no_name_that_pivot_makes_from_values(exporter: _Exporter, sql: str, names: list[str]) -> None:
    for output_format in OutputFormat:
        told = exporter.export(sql, output_format).columns
        assert [column.name for column in told] == names
        if output_format is OutputFormat.PARQUET:
            # The file has the values, which is what they are for.
            assert not any(name.startswith("column_") for name in pq.read_schema(exporter.target).names)


def test_a_parameters_text_is_no_name_and_no_part_of_a_type_in_an_event(exporter: _Exporter) -> None:
    sql = "SELECT regexp_extract('ab', '(.)(.)', ['first', $p]) AS parts"
    try:
        [told] = exporter.export(sql, p="hunter2").columns
    except QueryFailed as refused:
        assert refused.code is ErrorCode.SQL_REJECTED
        return
    assert [name for name, _ in parse_type(told.type).parts] == ["first", "field_2"]
    [*names] = exporter.names(f"SELECT parts.* FROM ({sql})", p="hunter2")
    assert names == ["first", "column_2"]
    # A dataset's own column is a name, whatever the parameter is.
    assert exporter.names("SELECT * FROM customers WHERE name = $p", p="order-id")[4] == "order-id"


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("{'lat': 1.5::DOUBLE, 'lon': 2}", "STRUCT(lat DOUBLE, lon INTEGER)"),
        ("{'lat': 'lat', 'Total Amount': 'lat'}", 'STRUCT(lat VARCHAR, "Total Amount" VARCHAR)'),
        ("['a'::ENUM('a', 'b, c')]", "ENUM[]"),
        ("MAP {'a'::ENUM('a'): ['x'::ENUM('x', 'y')]}", "MAP(ENUM, ENUM[])"),
        ("{'e x': ['a'::ENUM('a')], 'n': 1.5}", 'STRUCT("e x" ENUM[], n DECIMAL(2,1))'),
        ("array_value('a'::ENUM('a'))", "ENUM[1]"),
        ("union_value(e := 'a'::ENUM('a'))", "UNION(e ENUM)"),
        ("(1, 'a'::ENUM('a'))", "STRUCT(INTEGER, ENUM)"),
    ],
)
def test_an_event_has_the_whole_type_except_an_enums_values(exporter: _Exporter, expression: str, told: str) -> None:
    for output_format in OutputFormat:
        [column] = exporter.export(f"SELECT {expression} AS x WHERE 'lat' <> 'lon'", output_format).columns
        assert column == Column("x", told)
        parse_type(column.type)


def test_a_field_of_a_dataset_is_public_even_if_a_parameter_has_its_name(exporter: _Exporter) -> None:
    [column] = exporter.export("SELECT place FROM customers WHERE 'key' <> 'e-mail'", OutputFormat.JSON).columns
    assert column.type == 'STRUCT("key" INTEGER, "e-mail" VARCHAR)'


def test_types_too_large_for_an_event_are_refused_for_csv_and_json(exporter: _Exporter) -> None:
    listed = ", ".join(f'1 AS "{"n" * 200}{number}"' for number in range(900))
    wide = f"SELECT a.*, a.* FROM (SELECT {listed}) a"
    with pytest.raises(QueryFailed, match="256 KiB") as refused:
        exporter.export(wide, OutputFormat.JSON)
    assert refused.value.code is ErrorCode.RESULT_TOO_LARGE
    assert len(exporter.export(wide).columns) == 1_800
