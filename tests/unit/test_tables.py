"""A result's file as a table: the event's types, whatever the text looks like."""

import datetime
import io
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from queryd import arrow_types, column_types
from queryd.errors import ResultUnreadable
from queryd.events import Column, OutputFormat
from queryd.tables import open_batches
from tests.unit.samples import make_status

# As the engine writes them.
_WRITTEN = {
    OutputFormat.CSV: r"FORMAT csv, HEADER, NULLSTR '', NEW_LINE '\r\n'",
    OutputFormat.JSON: "FORMAT json",
    OutputFormat.PARQUET: "FORMAT parquet",
}
_ROWS = r"""
SELECT * FROM (VALUES
    (1, 2.0::DOUBLE, 'NULL', DATE '2026-01-02', TIMESTAMP '2026-01-02 03:04:05.5', true, 1.50::DECIMAL(9,2),
     TIMESTAMPTZ '2026-01-02 03:04:05+00', 12345678901234567890::UBIGINT, '2026-01-02', E'two\nlines'),
    (NULL, NULL, 'nan', NULL, NULL, NULL, NULL, NULL, NULL, NULL, ''),
    (3, 2.5, '', NULL, NULL, false, -1, NULL, 0, '007', NULL)
) AS t("1 + 1", d, s, day, moment, yes, price, instant, large, code, text)
"""
_INSTANT = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
_FIRST = {
    "1 + 1": 1,
    "d": 2.0,
    "s": "NULL",
    "day": datetime.date(2026, 1, 2),
    "moment": datetime.datetime(2026, 1, 2, 3, 4, 5, 500_000),
    "yes": True,
    "price": Decimal("1.50"),
    "instant": _INSTANT,
    "large": 12_345_678_901_234_567_890,
    "code": "2026-01-02",
    "text": "two\nlines",
}


def _write(folder: Path, sql: str, output_format: OutputFormat) -> tuple[bytes, tuple[Column, ...]]:
    """The file of a query, and its columns as an event says them: a name that is SQL is another there."""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        described = connection.execute(f"DESCRIBE {sql}").fetchall()
        connection.execute(f"COPY ({sql}) TO '{folder / 'result'}' ({_WRITTEN[output_format]})")
    columns = tuple(
        Column(f"column_{place}" if name == "1 + 1" else name, type_)
        for place, (name, type_, *_) in enumerate(described, start=1)
    )
    return (folder / "result").read_bytes(), columns


def _read(body: bytes, columns: Sequence[Column], output_format: OutputFormat) -> pa.Table:
    event = make_status(output_format=output_format, columns=tuple(columns))
    table = open_batches(io.BytesIO(body), event).read_all()
    # What a large result goes through.
    with SpooledTemporaryFile(max_size=1) as spooled:
        spooled.write(body)
        spooled.seek(0)
        assert open_batches(spooled, event).read_all().equals(table)
    return table


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_every_format_gives_the_same_table(tmp_path: Path, output_format: OutputFormat) -> None:
    table = _read(*_write(tmp_path, _ROWS, output_format), output_format)
    rows = table.to_pylist()
    assert list(rows[0]) == list(_FIRST)
    assert rows[0] == _FIRST
    nothing: dict[str, Any] = dict.fromkeys(_FIRST)
    assert rows[1] == nothing | {"s": "nan", "text": ""}
    assert rows[2] == nothing | {
        "1 + 1": 3, "d": 2.5, "s": "", "yes": False, "price": Decimal("-1.00"), "large": 0, "code": "007",
    }  # fmt: skip


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_a_result_without_rows_has_its_columns(tmp_path: Path, output_format: OutputFormat) -> None:
    table = _read(*_write(tmp_path, "SELECT 1 AS one, 'x' AS x WHERE false", output_format), output_format)
    assert (table.num_rows, table.schema.names, table.schema.types) == (0, ["one", "x"], [pa.int32(), pa.string()])


def test_an_empty_line_is_a_null_of_a_csv_of_one_column(tmp_path: Path) -> None:
    body, columns = _write(tmp_path, "SELECT * FROM (VALUES (1), (NULL), (3), (NULL)) AS t(x)", OutputFormat.CSV)
    assert _read(body, columns, OutputFormat.CSV)["x"].to_pylist() == [1, None, 3, None]


def test_lists_and_structs_are_text_in_csv_and_themselves_in_json(tmp_path: Path) -> None:
    sql = "SELECT [1, 2] AS l, {'a': 'b'} AS s, TIME '10:00:00' AS t"
    [row] = _read(*_write(tmp_path, sql, OutputFormat.CSV), OutputFormat.CSV).to_pylist()
    assert row == {"l": "[1, 2]", "s": "{'a': b}", "t": "10:00:00"}
    [row] = _read(*_write(tmp_path, sql, OutputFormat.JSON), OutputFormat.JSON).to_pylist()
    assert row == {"l": [1, 2], "s": {"a": "b"}, "t": "10:00:00"}


_NESTED = """
SELECT * FROM (VALUES
    (NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (['2020-01-01', NULL, '7'], {'day': '2020-01-01', 'a, "b)': [DATE '2020-01-01']}, [[1], NULL, []], [1.50, 2],
     [TIME '24:00:00'], {'at': TIMESTAMPTZ '2020-01-01 00:00:00+00', 'more': [{'n': 1}]},
     340282366920938463463374607431768211455)
) AS t(texts, parts, deep, prices, times, moments, large)
"""
_NESTED_AS = """
SELECT texts::VARCHAR[] AS texts, parts::STRUCT("day" VARCHAR, "a, ""b)" DATE[]) AS parts, deep::INTEGER[][] AS deep,
    prices::DECIMAL(5,2)[2] AS prices, times::TIME[] AS times,
    moments::STRUCT("at" TIMESTAMPTZ, more STRUCT(n TINYINT)[]) AS moments, large::UHUGEINT AS large{}
FROM ({})
"""
_NESTED_ROW = {
    "texts": ["2020-01-01", None, "7"],
    "parts": {"day": "2020-01-01", 'a, "b)': [datetime.date(2020, 1, 1)]},
    "deep": [[1], None, []],
    "prices": [Decimal("1.50"), Decimal("2.00")],
    "times": ["24:00:00"],
    "moments": {"at": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "more": [{"n": 1}]},
    "large": Decimal(2**128 - 1),
}


@pytest.mark.parametrize("with_map", [False, True])
def test_the_parts_of_nested_columns_have_the_events_types_in_json(tmp_path: Path, with_map: bool) -> None:
    sql = _NESTED_AS.format(", MAP {2: DATE '2020-01-01', 1: NULL} AS m" if with_map else "", _NESTED)
    table = _read(*_write(tmp_path, sql, OutputFormat.JSON), OutputFormat.JSON)
    entries = {"m": [(2, datetime.date(2020, 1, 1)), (1, None)]} if with_map else {}
    nothing: dict[str, Any] = dict.fromkeys(_NESTED_ROW)
    assert table.to_pylist() == [nothing | entries, _NESTED_ROW | entries]
    assert table.schema.field("moments").type == pa.struct(
        [("at", pa.timestamp("us", "UTC")), ("more", pa.list_(pa.struct([("n", pa.int8())])))]
    )
    if with_map:
        assert table.schema.field("m").type == pa.map_(pa.int32(), pa.date32())


def test_maps_keep_their_values_digits_and_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queryd.tables._LINES_BYTES", 100)
    sql = """SELECT i, MAP {'k': 0.1::DOUBLE} AS m, MAP {true: 12345678901234567.89::DECIMAL(19,2)} AS d,
        [MAP {'x, y': i::VARCHAR}] AS l, []::STRUCT(n INTEGER)[] AS e, i % 2 = 0 AS even, '007' AS code,
        TIME '10:00:00' AS t FROM range(20) AS r(i)"""
    rows = _read(*_write(tmp_path, sql, OutputFormat.JSON), OutputFormat.JSON).to_pylist()
    assert len(rows) == 20
    assert rows[9] == {
        "i": 9, "m": [("k", 0.1)], "d": [(True, Decimal("12345678901234567.89"))], "l": [[("x, y", "9")]], "e": [],
        "even": False, "code": "007", "t": "10:00:00",
    }  # fmt: skip


@pytest.mark.parametrize(
    "expression",
    [
        "row(1, 'x')",
        "MAP {['a']: 1}",
        "MAP {{'a': 1}: 1}",
    ],
)
def test_what_json_does_not_tell_is_said_to_be_unreadable_and_never_guessed(tmp_path: Path, expression: str) -> None:
    with pytest.raises(ResultUnreadable, match="ask for parquet"):
        _read(*_write(tmp_path, f"SELECT 1 AS n, {expression} AS x", OutputFormat.JSON), OutputFormat.JSON)


@pytest.mark.parametrize(
    "described",
    ["STRUCT…", "STRUCT", "MAP(", "UNION", "ENUM[", "VARCHAR]", "[]", "ODD[]", "VARCHAR" + "[]" * 999],
)
def test_a_nested_type_that_the_event_cuts_short_is_not_guessed(described: str) -> None:
    with pytest.raises(ResultUnreadable, match="ask for parquet"):
        _read(b'{"x":["2020-01-01"]}\n', [Column("x", described)], OutputFormat.JSON)


def test_columns_that_the_event_does_not_list_are_not_guessed() -> None:
    """Events of old releases list at most 200 columns."""
    told = [Column("known", "VARCHAR")]
    table = _read(b"known,unknown\r\n1,00249\r\n", told, OutputFormat.CSV)
    assert table.to_pylist() == [{"known": "1", "unknown": "00249"}]
    with pytest.raises(ResultUnreadable, match="more columns than its event lists"):
        _read(b'{"known":"1","unknown":2}\n', told, OutputFormat.JSON)


def test_a_large_csv_is_read_in_pieces() -> None:
    rows = 4_000_000
    body = io.BytesIO(b"n\r\n" + b"1234567\r\n" * rows)
    event = make_status(output_format=OutputFormat.CSV, columns=(Column("n", "INTEGER"),))
    sizes = [batch.num_rows for batch in open_batches(body, event)]
    assert sum(sizes) == rows
    assert len(sizes) > 1


@pytest.mark.parametrize(
    ("body", "output_format"),
    [
        (b"x\r\n1\r\na secret\r\n", OutputFormat.CSV),
        (b"x\r\n" + b"1\r\n" * 6_000_000 + b"a secret\r\n", OutputFormat.CSV),
        (b'{"x":1.0}\n{"x":"a secret"}\n', OutputFormat.JSON),
    ],
    ids=["csv", "csv, in a later block", "json"],
)
def test_a_file_that_is_no_table_of_its_types_is_said_to_be_without_quoting_it(
    body: bytes, output_format: OutputFormat
) -> None:
    event = make_status(output_format=output_format, columns=(Column("x", "DOUBLE"),))
    with pytest.raises(ResultUnreadable, match="ask for parquet") as unreadable:
        open_batches(io.BytesIO(body), event).read_all()
    assert "secret" not in str(unreadable.value)
    assert unreadable.value.__suppress_context__


def test_every_type_without_parts_has_an_arrow_type() -> None:
    assert arrow_types._SCALARS.keys() == column_types._SCALARS
