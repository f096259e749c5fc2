"""Two results are the same or different by their content, whatever bytes they were written as."""

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

from queryd.errors import ResultUnreadable
from queryd.events import Column, OutputFormat
from queryd.tables import open_batches
from replay.result_difference import Difference, ResultRows, find_differences
from tests.unit.samples import QUICK, make_status

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


def _open_table(table: pa.Table, **options: Any) -> ResultRows:
    file = BytesIO()
    parquet.write_table(table, file, **options)
    return _open_file(OutputFormat.PARQUET, file.getvalue())


def _open_list(rows: list[Row], schema: pa.Schema = _SCHEMA) -> ResultRows:
    return _open_table(pa.Table.from_pylist(rows, schema))


def _open_floats(*floats: float | None) -> ResultRows:
    return _open_table(pa.table({"x": pa.array(floats, pa.float64())}))


def _open_text(output_format: OutputFormat, text: str, *types: str) -> ResultRows:
    return _open_file(output_format, text.encode(), *types)


def _open_file(output_format: OutputFormat, body: bytes, *types: str) -> ResultRows:
    columns = tuple(Column(f"column_{number}", type_) for number, type_ in enumerate(types, 1))
    event = make_status(output_format=output_format, columns=columns)
    return ResultRows([open_batches(BytesIO(body), event)], columns)


def _scale(value: float, digit: int, by: int = 1) -> float:
    """The value with its so-and-so-many-th significant digit changed."""
    exponent = math.floor(math.log10(abs(value)))
    return value + math.copysign(by * 10.0 ** (exponent - digit + 1), value)


@pytest.mark.slow
@QUICK
@given(rows=_ROWS, seed=st.integers())
def test_the_order_of_rows_and_the_layout_of_the_file_do_not_matter(rows: list[Row], seed: int) -> None:
    shuffled = random.Random(seed).sample(rows, len(rows))
    before = _open_list(rows)
    after = _open_table(pa.Table.from_pylist(shuffled, _SCHEMA), row_group_size=2, compression="zstd")
    assert find_differences(before, after) == _SAME


_CHANGES: dict[str, Callable[[Any], Any]] = {
    "count": lambda count: 7 if count is None else count ^ 1,
    "mean": lambda mean: _scale(mean, 10) if mean and 1 < abs(mean) < 1e300 else 1.5,
    "name": lambda name: f"{name}x",
    "raw": lambda raw: (raw or b"") + b"\0",
    "price": lambda price: (price or Decimal("0.000")) + Decimal("0.001"),
    "day": lambda day: None if day else datetime(2026, 1, 1, tzinfo=UTC).date(),
    "moment": lambda moment: moment.replace(microsecond=moment.microsecond ^ 1) if moment else datetime.now(UTC),
    "series": lambda series: [*(series or []), None],
    "part": lambda part: {"label": "a", "share": 1.5} if part is None else None,
    "shares": lambda shares: [*(shares or []), ("more than four", 0.5)],
}


@pytest.mark.slow
@QUICK
@given(rows=_ROWS.filter(len), column=st.sampled_from(sorted(_CHANGES)), data=st.data())
def test_one_changed_value_is_a_difference(rows: list[Row], column: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(rows) - 1))
    changed = [*rows]
    changed[place] = rows[place] | {column: _CHANGES[column](rows[place][column])}
    assert find_differences(_open_list(rows), _open_list(changed)) == _VALUES


# Where all 12 digits are above the absolute tolerance, and a power of ten is exact enough for digits to be counted.
_USUAL = st.floats(0.1, 1e200) | st.floats(-1e200, -0.1)


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
    before = [{"x": nest(0.1 + 0.2)}, {"x": None}]
    assert find_differences(_open_list(before, schema), _open_list([{"x": None}, {"x": nest(0.3)}], schema)) == _SAME
    changed = [{"x": None}, {"x": nest(0.3000000001)}]
    assert find_differences(_open_list(before, schema), _open_list(changed, schema)) == _VALUES


def test_floats_in_structs_and_maps_are_rounded() -> None:
    def open_one(value: float) -> ResultRows:
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


@pytest.mark.parametrize(("value", "expected"), [(1e-12, _SAME), (-1e-12, _SAME), (1.1e-12, _VALUES), (5e-11, _VALUES)])
def test_what_cancellation_leaves_of_a_sum_is_zero_up_to_the_absolute_tolerance(
    value: float, expected: tuple[Difference, ...]
) -> None:
    assert find_differences(_open_floats(value, 1e6), _open_floats(0.0, 1e6)) == expected


def test_small_floats_that_differ_within_the_tolerance_keep_their_rows_apart() -> None:
    schema = pa.schema([("key", pa.string()), ("x", pa.float64())])
    before = [{"key": "a", "x": 1e-13}, {"key": "b", "x": 5.0}]
    assert (
        find_differences(_open_list(before, schema), _open_list([{"key": "a", "x": 0.0}, before[1]], schema)) == _SAME
    )
    swapped = [{"key": "b", "x": 1e-13}, {"key": "a", "x": 5.0}]
    assert find_differences(_open_list(before, schema), _open_list(swapped, schema)) == _VALUES


def test_a_decimal_is_never_rounded() -> None:
    schema = pa.schema([("price", pa.decimal128(38, 3))])
    before, after = ([{"price": Decimal(f"12345678901234567890.{fraction}")}] for fraction in (123, 124))
    assert find_differences(_open_list(before, schema), _open_list(after, schema)) == _VALUES


def test_a_row_that_is_there_twice_counts_twice() -> None:
    assert find_differences(_open_floats(1.0, 1.0, 2.0), _open_floats(1.0, 2.0, 2.0)) == _VALUES
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
    assert find_differences(_open_table(plain), _open_table(other)) == _SAME


def test_a_null_an_empty_list_and_a_list_of_a_null_are_three_things() -> None:
    schema = pa.schema([("x", pa.list_(pa.int8()))])
    values: list[Any] = [None, [], [None]]
    for one in values:
        for other in values:
            expected = _SAME if one is other else _VALUES
            assert find_differences(_open_list([{"x": one}], schema), _open_list([{"x": other}], schema)) == expected


def test_noise_at_rounding_boundaries_is_no_difference() -> None:
    """One in some thousand noisy values stands so near to a boundary that rounding alone would tell it apart."""
    draw = random.Random(5)
    keys = [f"k{number}" for number in range(20_000)]
    means = [draw.random() for _ in keys]
    noisy = [mean * (1 + draw.choice((-4e-16, 0, 4e-16))) for mean in means]
    assert {f"{mean:.11e}" for mean in means} != {f"{mean:.11e}" for mean in noisy}
    before, after = pa.table({"key": keys, "mean": means}), pa.table({"key": keys[::-1], "mean": noisy[::-1]})
    assert find_differences(_open_table(before), _open_table(after)) == _SAME
    # Two rows exchange their values in one column.
    keys[:2] = keys[1::-1]
    swapped = pa.table({"key": keys, "mean": noisy})
    assert find_differences(_open_table(before), _open_table(swapped)) == _VALUES


def test_csv_keeps_null_and_the_empty_string_apart() -> None:
    def compare(text: str) -> tuple[Difference, ...]:
        before = 'a,b\r\n"",0.30000000000000004\r\n,nan\r\n"x\r\ny",inf\r\n'
        types = ("VARCHAR", "DOUBLE")
        return find_differences(*(_open_text(OutputFormat.CSV, each, *types) for each in (before, text)))

    assert compare('a,b\r\n"x\r\ny",inf\r\n,nan\r\n"",0.3\r\n') == _SAME
    assert compare('a,b\r\n,0.3\r\n"",nan\r\n"x\r\ny",inf\r\n') == _VALUES


def test_csv_of_one_column_has_a_row_for_each_null() -> None:
    before, after = (_open_text(OutputFormat.CSV, text, "VARCHAR") for text in ("a\r\n\r\n\r\n", "a\r\n\r\n"))
    assert find_differences(before, after) == (Difference.ROWS,)


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

    def compare(text: str) -> tuple[Difference, ...]:
        return find_differences(*(_open_text(OutputFormat.JSON, each, type_) for each in (one + other, text)))

    assert compare(other + one.replace("00000004", "")) == _SAME
    assert compare(other + one.replace('"0.3"', '"0.4"')) == _VALUES
    assert compare(one) == (Difference.ROWS,)


@pytest.mark.parametrize("output_format", [OutputFormat.CSV, OutputFormat.JSON])
def test_whole_numbers_of_39_digits_are_compared_exactly(output_format: OutputFormat) -> None:
    file = "a\r\n{}\r\n" if output_format is OutputFormat.CSV else '{{"a":{}}}\n'
    number = 2**127 - 1
    before, same, other = (
        _open_text(output_format, file.format(each), "HUGEINT") for each in (number, number, number - 1)
    )
    again = _open_text(output_format, file.format(number), "HUGEINT")
    assert find_differences(before, same) == _SAME
    assert find_differences(again, other) == _VALUES


def test_the_parts_of_one_result_have_the_same_columns() -> None:
    tables = (pa.table({"x": [1]}), pa.table({"y": [1]}))
    with pytest.raises(ResultUnreadable):
        ResultRows([table.to_reader() for table in tables])
    two = ResultRows([table.to_reader() for table in (tables[0], tables[0])])
    assert find_differences(two, _open_table(pa.table({"x": [1, 1]}))) == _SAME


def test_another_type_told_by_the_event_is_another_schema() -> None:
    before, after = (_open_text(OutputFormat.CSV, "a\r\n1\r\n", type_) for type_ in ("INTEGER", "BIGINT"))
    assert find_differences(before, after) == (Difference.SCHEMA,)


@pytest.mark.parametrize(
    ("output_format", "file"),
    [
        (OutputFormat.CSV, "a,b\r\n1\r\n"),
        (OutputFormat.CSV, "a,b\r\n1,many\r\n"),
        (OutputFormat.JSON, '{"a":1,"b":\n'),
        (OutputFormat.JSON, "[1,2]\n"),
    ],
)
def test_a_file_that_is_no_table_is_damaged(output_format: OutputFormat, file: str) -> None:
    try:
        broken, other = (_open_text(output_format, file, "BIGINT", "DOUBLE") for _ in range(2))
    except ResultUnreadable:
        return
    assert find_differences(broken, other) == (Difference.DAMAGED,)


def test_a_damaged_page_is_damaged_and_no_error() -> None:
    file = BytesIO()
    parquet.write_table(pa.table({"x": list(range(10_000))}), file, compression="zstd", use_dictionary=False)
    body = bytearray(file.getvalue())
    body[4:40] = bytes(36)
    broken = _open_file(OutputFormat.PARQUET, bytes(body))
    assert find_differences(broken, _open_file(OutputFormat.PARQUET, file.getvalue())) == (Difference.DAMAGED,)
