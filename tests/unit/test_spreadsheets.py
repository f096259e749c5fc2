"""A copy of a CSV result in which a spreadsheet finds no formula."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.duckdb.export import export
from engines.duckdb.watch import Limits
from queryd.events import OutputFormat
from queryd.spreadsheets import write_for_spreadsheet
from tests.result_values.case import open_database
from tests.unit.samples import QUICK


def _copy(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    target = io.BytesIO()
    write_for_spreadsheet(io.BytesIO(text.getvalue().encode()), target)
    body = target.getvalue()
    assert body.startswith(b"\xef\xbb\xbf")
    return list(csv.reader(io.StringIO(body.decode("utf-8-sig"), newline="")))


@pytest.mark.parametrize(
    "field",
    ['=HYPERLINK("http://x","y")', "=1+1", "+1+1", "-1-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "-", "+c|'x'!A0"],
)  # fmt: skip
def test_a_field_that_would_be_a_formula_gets_an_apostrophe(field: str) -> None:
    assert _copy([["name"], [field]]) == [["name"], [f"'{field}"]]
    assert _copy([[field, "b"]]) == [[f"'{field}", "b"]]


@pytest.mark.parametrize(
    "field",
    ["-5", "+5", "-1.5e-300", "-.5", "-inf", "007", "a=b", "2026-11-30", "", "it's", "a\r\nb", 'say "=x"', "1-1"],
)
def test_everything_else_stays_as_it_is(field: str) -> None:
    assert _copy([["name", "other"], [field, "é🦆"]]) == [["name", "other"], [field, "é🦆"]]


@QUICK
@given(rows=st.lists(st.lists(st.text(max_size=9), min_size=2, max_size=2), min_size=1))
def test_no_field_of_a_copy_begins_as_a_formula_does(rows: list[list[str]]) -> None:
    rows = [[field.encode("utf-8", "ignore").decode() for field in row] for row in rows]
    copied = _copy(rows)
    for before, after in zip(rows, copied, strict=True):
        for field, shown in zip(before, after, strict=True):
            assert shown in (field, f"'{field}")
            assert not shown.lstrip().startswith(("=", "@"))


def test_a_result_with_a_long_field_is_copied_whole(tmp_path: Path) -> None:
    with open_database() as connection:
        sql = "SELECT '=' || repeat('x', 300000) AS long, -5 AS \"=n\", NULL AS none UNION ALL SELECT 'a', 2, 3"
        export(connection, sql, {}, tmp_path / "r", OutputFormat.CSV, max_rows=None, limits=Limits(None, None))
    target = io.BytesIO()
    with (tmp_path / "r").open("rb") as source:
        write_for_spreadsheet(source, target)
    [names, first, second] = csv.reader(io.StringIO(target.getvalue().decode("utf-8-sig"), newline=""))
    assert names == ["long", "'=n", "none"]
    assert first == ["'=" + "x" * 300_000, "-5", ""]
    assert second == ["a", "2", "3"]
