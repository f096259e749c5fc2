"""The content of two results: what makes them the same, and what different."""

import math
import random
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from producers.replay import content
from producers.replay.cells import name_type, write_rows
from producers.replay.content import Difference, find_differences, merge_neighbours, read_content, round_float
from producers.replay.rows import Rows, open_rows
from queryd.events import Column, OutputFormat
from tests.unit.samples import QUICK

Row = dict[str, Any]

_SAME: tuple[Difference, ...] = ()
_VALUES = (Difference.VALUES,)

_SCHEMA = pa.schema(
    [
        ("count", pa.int64()),
        ("mean", pa.float64()),
        ("ratio", pa.float32()),
        ("name", pa.string()),
        ("raw", pa.binary()),
        ("price", pa.decimal128(18, 3)),
        ("day", pa.date32()),
        ("moment", pa.timestamp("us", "UTC")),
        ("series", pa.list_(pa.float64())),
        ("part", pa.struct([("label", pa.string()), ("share", pa.float64())])),
        ("shares", pa.map_(pa.string(), pa.float64())),
    ]
)
_TEXTS = st.text(st.characters(codec="utf-8"), max_size=4)
_FLOATS = st.none() | st.floats()
_CELLS: dict[str, st.SearchStrategy[Any]] = {
    "count": st.integers(-(2**63), 2**63 - 1),
    "mean": st.floats(),
    "ratio": st.floats(width=32),
    "name": _TEXTS,
    "raw": st.binary(max_size=4),
    "price": st.decimals(-999_999_999_999, 999_999_999_999, places=3),
    "day": st.dates(),
    "moment": st.datetimes(timezones=st.just(UTC)),
    "series": st.lists(_FLOATS, max_size=3),
    "part": st.fixed_dictionaries({"label": st.none() | _TEXTS, "share": _FLOATS}),
    "shares": st.dictionaries(_TEXTS, _FLOATS, max_size=2).map(lambda shares: list(shares.items())),
}
_ROWS = st.lists(st.fixed_dictionaries({name: st.none() | cells for name, cells in _CELLS.items()}), max_size=8)


def _open_table(table: pa.Table, **options: Any) -> Rows:
    file = BytesIO()
    parquet.write_table(table, file, **options)
    return open_rows(file, OutputFormat.PARQUET, ())


def _open_list(rows: list[Row], schema: pa.Schema = _SCHEMA) -> Rows:
    return _open_table(pa.Table.from_pylist(rows, schema))


def _open_floats(*floats: float | None) -> Rows:
    return _open_table(pa.table({"x": pa.array(floats, pa.float64())}))


def _open_text(output_format: OutputFormat, text: str, *types: str) -> Rows:
    columns = [Column(f"column_{number}", type_) for number, type_ in enumerate(types, 1)]
    return open_rows(BytesIO(text.encode()), output_format, columns)


def _scale(value: float, digit: int, by: int = 1) -> float:
    """The value with its so-and-so-many-th significant digit changed."""
    exponent = math.floor(math.log10(abs(value)))
    return value + math.copysign(by * 10.0 ** (exponent - digit + 1), value)


@QUICK
@given(rows=_ROWS, seed=st.integers())
def test_the_order_of_rows_and_the_layout_of_the_file_do_not_matter(rows: list[Row], seed: int) -> None:
    shuffled = random.Random(seed).sample(rows, len(rows))
    before = _open_list(rows)
    after = _open_table(pa.Table.from_pylist(shuffled, _SCHEMA), row_group_size=2, compression="zstd")
    assert read_content(before).checksum == read_content(after).checksum
    assert find_differences(before, after) == _SAME


_CHANGES: dict[str, Callable[[Any], Any]] = {
    "count": lambda count: 7 if count is None else count ^ 1,
    "mean": lambda mean: _scale(mean, 10) if mean and 1e-300 < abs(mean) < 1e300 else 1.5,
    "name": lambda name: f"{name}x",
    "raw": lambda raw: (raw or b"") + b"\0",
    "price": lambda price: (price or Decimal("0.000")) + Decimal("0.001"),
    "day": lambda day: None if day else datetime(2026, 1, 1, tzinfo=UTC).date(),
    "moment": lambda moment: moment.replace(microsecond=moment.microsecond ^ 1) if moment else datetime.now(UTC),
    "series": lambda series: [*(series or []), None],
    "part": lambda part: {"label": "a", "share": 1.5} if part is None else None,
    "shares": lambda shares: [*(shares or []), ("more than four", 0.5)],
}


@QUICK
@given(rows=_ROWS.filter(len), column=st.sampled_from(sorted(_CHANGES)), data=st.data())
def test_one_changed_value_is_a_difference(rows: list[Row], column: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(rows) - 1))
    changed = [*rows]
    changed[place] = rows[place] | {column: _CHANGES[column](rows[place][column])}
    assert find_differences(_open_list(rows), _open_list(changed)) == _VALUES


# Where a power of ten and its neighbours are exact enough for digits to be counted.
_USUAL = st.floats(1e-200, 1e200) | st.floats(-1e200, -1e-200)


@QUICK
@given(floats=st.lists(_USUAL, min_size=1, max_size=20), by=st.integers(0, 9))
def test_floats_that_differ_in_the_14th_digit_are_the_same(floats: list[float], by: int) -> None:
    noisy = [_scale(value, 14, by) for value in floats]
    assert find_differences(_open_floats(*floats), _open_floats(*noisy)) == _SAME


@QUICK
@given(value=_USUAL, others=st.lists(_USUAL, max_size=5), digit=st.integers(2, 11))
def test_floats_that_differ_in_a_digit_before_the_12th_are_different(
    value: float, others: list[float], digit: int
) -> None:
    changed = _scale(value, digit)
    assert find_differences(_open_floats(value, *others), _open_floats(changed, *others)) == _VALUES


@pytest.mark.parametrize(
    "type_",
    [pa.list_(pa.float64()), pa.list_(pa.list_(pa.float64())), pa.list_(pa.float64(), 1), pa.large_list(pa.float64())],
)
def test_floats_in_lists_are_rounded(type_: pa.DataType) -> None:
    def nest(value: float) -> Any:
        return [[value]] if pa.types.is_list(type_) and pa.types.is_list(type_.value_type) else [value]

    schema = pa.schema([("x", type_)])
    before = _open_list([{"x": nest(0.1 + 0.2)}, {"x": None}], schema)
    assert find_differences(before, _open_list([{"x": None}, {"x": nest(0.3)}], schema)) == _SAME
    assert find_differences(before, _open_list([{"x": None}, {"x": nest(0.3000000001)}], schema)) == _VALUES


def test_floats_in_structs_and_maps_are_rounded() -> None:
    def open_one(value: float) -> Rows:
        return _open_list([{"part": {"label": "a", "share": value}, "shares": [("a", value)]}])

    assert find_differences(open_one(0.1 + 0.2), open_one(0.3)) == _SAME
    assert find_differences(open_one(0.1 + 0.2), open_one(0.3000000001)) == _VALUES


def test_both_zeros_are_one_and_so_are_all_that_are_not_numbers() -> None:
    assert find_differences(_open_floats(0.0, math.nan, None), _open_floats(None, -math.nan, -0.0)) == _SAME


@pytest.mark.parametrize("other", [0.0, math.inf, -math.inf, 1.0, None])
def test_not_a_number_is_like_nothing_else(other: float | None) -> None:
    assert find_differences(_open_floats(math.nan), _open_floats(other)) == _VALUES


def test_infinity_is_not_the_largest_number() -> None:
    assert find_differences(_open_floats(math.inf), _open_floats(1.7976931348623157e308)) == _VALUES


def test_a_tiny_number_is_not_zero() -> None:
    assert find_differences(_open_floats(5e-324, 1e-13), _open_floats(0.0, 1e-13)) == _VALUES


def test_a_decimal_is_never_rounded() -> None:
    schema = pa.schema([("price", pa.decimal128(38, 3))])
    before = _open_list([{"price": Decimal("12345678901234567890.123")}], schema)
    assert find_differences(before, _open_list([{"price": Decimal("12345678901234567890.124")}], schema)) == _VALUES


def test_a_row_that_is_there_twice_counts_twice() -> None:
    """A sum and not XOR, in which two would be none."""
    one, other = _open_floats(1.0, 1.0, 2.0), _open_floats(1.0, 2.0, 2.0)
    assert find_differences(one, other) == _VALUES
    assert find_differences(_open_floats(1.0, 1.0), _open_floats(2.0, 2.0)) == _VALUES


def test_a_row_more_is_a_difference_of_rows_alone() -> None:
    assert find_differences(_open_floats(1.0), _open_floats(1.0, 1.0)) == (Difference.ROWS,)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (pa.table({"x": [1]}), pa.table({"x": [1.0]})),
        (pa.table({"x": [1]}), pa.table({"y": [1]})),
        (pa.table({"x": [1], "y": [2]}), pa.table({"y": [2], "x": [1]})),
        (pa.table({"x": [datetime(2026, 1, 1, tzinfo=UTC)]}), pa.table({"x": [datetime(2026, 1, 1)]})),
    ],
)
def test_another_name_type_or_order_of_columns_is_another_schema(before: pa.Table, after: pa.Table) -> None:
    assert find_differences(_open_table(before), _open_table(after)) == (Difference.SCHEMA,)


def test_how_values_lie_in_memory_is_no_schema() -> None:
    plain = pa.table({"x": pa.array(["a", None]), "y": pa.array([["b"], None])})
    other = pa.table(
        {
            "x": pa.array(["a", None], pa.large_string()).dictionary_encode(),
            "y": pa.array([["b"], None], pa.large_list(pa.string_view())),
        }
    )
    assert [name_type(field.type) for field in plain.schema] == [name_type(field.type) for field in other.schema]
    [[ours], [theirs]] = plain.to_batches(), other.to_batches()
    assert write_rows(ours, repr) == write_rows(theirs, repr)


def test_cells_do_not_run_into_each_other() -> None:
    schema = pa.schema([("a", pa.string()), ("b", pa.string())])
    rows = [{"a": "1:x", "b": ""}, {"a": "", "b": "1:x"}, {"a": "~", "b": None}, {"a": None, "b": "~"}]
    [batch] = pa.Table.from_pylist(rows, schema).to_batches()
    assert len(set(write_rows(batch, repr))) == len(rows)


def test_a_null_an_empty_list_and_a_list_of_a_null_are_three_things() -> None:
    [batch] = pa.table({"x": pa.array([None, [], [None]], pa.list_(pa.int8()))}).to_batches()
    assert len(set(write_rows(batch, repr))) == 3


def test_a_part_of_an_array_is_only_that_part() -> None:
    """Arrow's slices share their children with the whole."""
    rows = [{"series": [float(number)], "part": None, "shares": [("a", 1.0)]} for number in range(5)]
    [whole] = pa.Table.from_pylist(rows, _SCHEMA).to_batches()
    assert write_rows(whole.slice(3), repr) == write_rows(whole, repr)[3:]


def test_noise_at_rounding_boundaries_is_no_difference() -> None:
    """One in some thousand noisy values stands so near to a boundary that rounding alone would tell it apart."""
    draw = random.Random(5)
    keys = [f"k{number}" for number in range(20_000)]
    means = [draw.random() for _ in keys]
    noisy = [mean * (1 + draw.choice((-4e-16, 0, 4e-16))) for mean in means]
    assert {*map(round_float, means)} != {*map(round_float, noisy)}
    before, after = pa.table({"key": keys, "mean": means}), pa.table({"key": keys[::-1], "mean": noisy[::-1]})
    assert find_differences(_open_table(before), _open_table(after)) == _SAME
    # Of two rows that change places in one column alone, every value is still there.
    keys[:2] = keys[1::-1]
    swapped = pa.table({"key": keys, "mean": noisy})
    assert find_differences(_open_table(before), _open_table(swapped)) == _VALUES


def test_what_is_too_large_for_a_second_look_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    boundary = 1.000000000005
    before, after = _open_floats(boundary * (1 - 2e-16)), _open_floats(boundary * (1 + 2e-16))
    assert find_differences(before, after) == _SAME
    monkeypatch.setattr(content, "_MOST_BYTES", 1)
    assert find_differences(before, after) == _VALUES


@QUICK
@given(floats=st.lists(st.floats(), max_size=20))
def test_neighbours_are_merged_alike_whatever_their_sign(floats: list[float]) -> None:
    merge = merge_neighbours(floats)
    mirrored = merge_neighbours([-value for value in floats])
    assert [[merge(a) == merge(b) for a in floats] for b in floats] == [
        [mirrored(-a) == mirrored(-b) for a in floats] for b in floats
    ]


def test_csv_keeps_null_and_the_empty_string_apart() -> None:
    types = ("VARCHAR", "DOUBLE")
    before = _open_text(OutputFormat.CSV, 'a,b\r\n"",0.30000000000000004\r\n,nan\r\n"x\r\ny",inf\r\n', *types)
    shuffled = _open_text(OutputFormat.CSV, 'a,b\r\n"x\r\ny",inf\r\n,nan\r\n"",0.3\r\n', *types)
    swapped = _open_text(OutputFormat.CSV, 'a,b\r\n,0.3\r\n"",nan\r\n"x\r\ny",inf\r\n', *types)
    assert read_content(before).row_count == 3
    assert find_differences(before, shuffled) == _SAME
    assert find_differences(before, swapped) == _VALUES


def test_csv_of_one_column_has_a_row_for_each_null() -> None:
    assert read_content(_open_text(OutputFormat.CSV, "a\r\n\r\n\r\nNULL\r\n", "VARCHAR")).row_count == 3
    assert read_content(_open_text(OutputFormat.CSV, "a\r\n", "VARCHAR")).row_count == 0


@pytest.mark.parametrize(
    ("output_format", "file"),
    [(OutputFormat.CSV, "a\r\n{}\r\n"), (OutputFormat.JSON, '{{"a":{}}}\n')],
)
def test_a_column_of_text_is_rounded_only_if_the_event_says_that_it_has_floats(
    output_format: OutputFormat, file: str
) -> None:
    long, short = file.format("12345678901.234"), file.format("12345678901.2341")

    def compare(type_: str) -> tuple[Difference, ...]:
        return find_differences(_open_text(output_format, long, type_), _open_text(output_format, short, type_))

    assert compare("DOUBLE") == _SAME
    assert compare("DECIMAL(18,4)") == _VALUES


def test_json_is_rounded_at_any_depth_and_its_order_of_rows_does_not_matter() -> None:
    type_ = "STRUCT(a DOUBLE[], b VARCHAR)"
    one, other = '{"s":{"a":[0.30000000000000004,null,1],"b":"0.3"}}\n', '{"s":null}\n'
    before = _open_text(OutputFormat.JSON, one + other, type_)
    assert find_differences(before, _open_text(OutputFormat.JSON, other + one.replace("00000004", ""), type_)) == _SAME
    assert (
        find_differences(before, _open_text(OutputFormat.JSON, other + one.replace('"0.3"', "0.3"), type_)) == _VALUES
    )
    assert find_differences(before, _open_text(OutputFormat.JSON, "", type_)) == (Difference.ROWS,)


def test_another_type_told_by_the_event_is_another_schema() -> None:
    before, after = (_open_text(OutputFormat.CSV, "a\r\n1\r\n", type_) for type_ in ("INTEGER", "BIGINT"))
    assert find_differences(before, after) == (Difference.SCHEMA,)


@pytest.mark.parametrize(
    ("output_format", "file"),
    [
        (OutputFormat.PARQUET, "PAR1 and no footer"),
        (OutputFormat.CSV, ""),
        (OutputFormat.CSV, "a,b\r\n1\r\n"),
        (OutputFormat.CSV, "a,b\r\n1,many\r\n"),
        (OutputFormat.JSON, '{"a":1,"b":\n'),
        (OutputFormat.JSON, '{"a":1,"b":NaN}\n'),
        (OutputFormat.JSON, "[1,2]\n"),
    ],
)
def test_a_broken_file_is_a_value_error(output_format: OutputFormat, file: str) -> None:
    with pytest.raises(ValueError):
        read_content(_open_text(output_format, file, "BIGINT", "DOUBLE"))
