"""Statements whose results were once wrong, as the client reads them."""

import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from engines.duckdb.export import export
from engines.duckdb.watch import Limits
from engines.protocol import QueryFailed
from queryd.events import ErrorCode, OutputFormat
from queryd.tables import open_batches
from tests.result_values.case import open_database
from tests.unit.samples import make_status

_PARQUET, _CSV, _JSON = OutputFormat.PARQUET, OutputFormat.CSV, OutputFormat.JSON
_BIG = 9007199254740993


def _write(folder: Path, expression: str, output_format: OutputFormat) -> tuple[bytes, Any]:
    """The file's bytes and what the client reads from it: the only value of the only column, as Arrow has it."""
    target = folder / "result"
    with open_database() as connection:
        exported = export(
            connection, f"SELECT {expression} AS x", {}, target, output_format, max_rows=9, limits=Limits(None, None)
        )
    body = target.read_bytes()
    event = make_status(output_format=output_format, columns=exported.columns)
    return body, open_batches(io.BytesIO(body), event).read_all()["x"]


@pytest.mark.parametrize(
    ("expression", "formats", "value"),
    [
        ("INTERVAL '-1 day'", OutputFormat, "-1 day"),
        ("TIMESTAMP '2024-01-01 10:00' - TIMESTAMP '2024-01-01 12:00'", OutputFormat, "-02:00:00"),
        ("age(DATE '2020-01-01', DATE '2021-01-01')", OutputFormat, "-1 year"),
        ("to_seconds(5000000)", OutputFormat, "1388:53:20"),
        ("to_microseconds(1)", OutputFormat, "00:00:00.000001"),
        ("[{'late by': INTERVAL '-1 month'}]", [_PARQUET, _JSON], [{"late by": "-1 month"}]),
        ("{'Total Amount': sum(9007199254740993)}", [_PARQUET, _JSON], {"Total Amount": Decimal(_BIG)}),
        ("[{'value': 9007199254740993::HUGEINT}]", [_PARQUET, _JSON], [{"value": Decimal(_BIG)}]),
        ("{'HUGEINT': 1}", [_PARQUET, _JSON], {"HUGEINT": 1}),
        ("{'group': MAP {'HUGEINT[]': 1::UHUGEINT}}", [_PARQUET, _JSON], {"group": [("HUGEINT[]", Decimal(1))]}),
        ("'12:00:00+02'::TIMETZ", OutputFormat, "12:00:00+02"),
        ("'{\"a\":12345678901234567890123.5,\"b\":1.10}'::JSON", OutputFormat,
         '{"a":12345678901234567890123.5,"b":1.10}'),
        ("170141183460469231731687303715884105727", [_CSV, _JSON], Decimal(2**127 - 1)),
        ("340282366920938463463374607431768211455::UHUGEINT", [_CSV, _JSON], Decimal(2**128 - 1)),
        ("json_object('rate', 0/0)", [_JSON], '{"rate":"NaN"}'),
        ("union_value(a := 'nan'::DOUBLE)::UNION(a VARCHAR)", [_PARQUET, _JSON], {"tag": "a", "a": "nan"}),
        ("row(1, 2)", [_PARQUET, _JSON], {"field_1": 1, "field_2": 2}),
        ("0.5::DECIMAL(16,16)", OutputFormat, Decimal("0.5")),
        ("{'lat': 1.5::DOUBLE, 'lon': 2}", [_PARQUET, _JSON], {"lat": 1.5, "lon": 2}),
        ("['b'::ENUM('a', 'b')]", [_PARQUET, _JSON], ["b"]),
        ("MAP {'b'::ENUM('a', 'b'): 1}", [_PARQUET, _JSON], [("b", 1)]),
        ("MAP {['a']: 1}", [_PARQUET, _JSON], [(["a"], 1)]),
        ("TIME '24:00:00'", [_CSV, _JSON], "24:00:00"),
        ("'a\\x00b'::BLOB", OutputFormat, b"a\0b"),
        ("chr(0) || 'a' || chr(31)", OutputFormat, "\0a\x1f"),
        ("{'e': [1, 2], 's': 'a, b'}", [_CSV], '{"e":[1,2],"s":"a, b"}'),
    ],
)  # fmt: skip
def test_a_value_is_what_the_sql_says(tmp_path: Path, expression: str, formats: list[OutputFormat], value: Any) -> None:
    for output_format in formats:
        body, column = _write(tmp_path, expression, output_format)
        assert column.to_pylist() == [value]
        if output_format is _JSON:
            json.loads(body, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("expression", "number"),
    [
        ("DATE 'infinity'", 2**31 - 1),
        ("DATE '0044-03-15 (BC)'", -735160),
        ("DATE '10000-01-01'", 2932897),
        ("TIMESTAMP '-infinity'", -(2**63 - 1)),
        ("TIMESTAMP '10000-01-01 00:00:00.000001'", 2932897 * 86_400_000_000 + 1),
        ("TIMESTAMPTZ '0044-03-15 (BC) 00:00:00+00'", -735160 * 86_400_000_000),
    ],
)
@pytest.mark.parametrize("output_format", OutputFormat)
def test_a_moment_beyond_pythons_is_its_number(
    tmp_path: Path, expression: str, number: int, output_format: OutputFormat
) -> None:
    _, column = _write(tmp_path, expression, output_format)
    assert pc.cast(column, "int32" if "DATE" in expression else "int64").to_pylist() == [number]


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("170141183460469231731687303715884105727", "more than 38 digits: cast to VARCHAR"),
        ("{'a b': [1::HUGEINT, 99999999999999999999999999999999999999::HUGEINT + 1]}", "more than 38 digits"),
        ("[MAP {1: 340282366920938463463374607431768211455::UHUGEINT}]", "more than 38 digits: cast to VARCHAR"),
        ("TIME '24:00:00'", "24:00:00, which Parquet doesn't have: cast to VARCHAR"),
        ("[{'at': TIME '24:00:00'}]", "24:00:00, which Parquet doesn't have"),
    ],
)
def test_a_value_that_parquet_can_not_store_is_refused_with_the_cast(
    tmp_path: Path, expression: str, sentence: str
) -> None:
    with pytest.raises(QueryFailed, match=sentence) as refused:
        _write(tmp_path, expression, _PARQUET)
    assert refused.value.code is ErrorCode.QUERY_ERROR


@pytest.mark.parametrize("output_format", [_CSV, _JSON])
def test_the_last_of_many_columns_has_its_type(tmp_path: Path, output_format: OutputFormat) -> None:
    many = ", ".join(f"{number} AS c{number}" for number in range(249))
    _, column = _write(tmp_path, f"1 AS first, {many}, '00249'", output_format)
    assert column.to_pylist() == ["00249"]
    _, column = _write(tmp_path, f"1 AS first, {many}, DATE '2026-11-30'", output_format)
    assert str(column.type) == "date32[day]"
