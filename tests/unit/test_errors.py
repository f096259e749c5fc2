"""DuckDB's exceptions as ours: codes, positions and details."""

import json

import duckdb
import pytest

from engines.duckdb.errors import MAX_DETAIL_BYTES, Placed, translate
from engines.protocol import EngineUnavailable, QueryFailed
from queryd.events import ErrorCode

_SQL = "SELECT 'é',\n  a FROM t"
# Eleven bytes of ours stand before it.
_PLACED = Placed(_SQL, _SQL, 11)
_COLUMN = 11 + len("SELECT 'é',\n  ".encode())


def _error(kind: type[Exception], message: str, **facts: str) -> Exception:
    """An exception as DuckDB raises it with `errors_as_json`."""
    return kind(f"Some Error: {json.dumps({'exception_message': message} | facts)}")


def _failed(error: Exception, placed: Placed | None = None, confidential: tuple[str, ...] = ()) -> QueryFailed:
    ours = translate(error, placed, confidential)
    assert isinstance(ours, QueryFailed)
    return ours


def test_a_position_counts_characters_of_the_authors_text() -> None:
    assert _PLACED.locate(_COLUMN) == (2, 3)
    assert _PLACED.locate(11) == (1, 1)
    assert Placed(f";; {_SQL}", _SQL, 11).locate(11) == (1, 4)


@pytest.mark.parametrize("position", [0, 10, 11 + len(_SQL.encode()), 10_000])
def test_a_position_in_text_of_ours_is_none(position: int) -> None:
    assert _PLACED.locate(position) is None


def test_a_text_that_stands_there_twice_is_not_found_for_certain() -> None:
    assert Placed("; -- SELECT 1\nSELECT 1", "SELECT 1", 0).locate(7) is None


def test_a_message_tells_the_place_and_nothing_of_the_text() -> None:
    failure = _failed(_error(duckdb.BinderException, 'column "hunter2"', position=str(_COLUMN)), _PLACED)
    assert failure.code is ErrorCode.QUERY_ERROR
    assert failure.message.endswith(" Look at line 2, column 3.")
    assert "hunter2" not in failure.message
    assert failure.detail == 'Some Error: column "hunter2"'


@pytest.mark.parametrize(
    ("error", "sql"),
    [
        (_error(duckdb.BinderException, "no position"), _SQL),
        # The parser counts characters, and a table that is missing is missing in a view of ours.
        (_error(duckdb.ParserException, "in characters", position=str(_COLUMN)), _SQL),
        (_error(duckdb.CatalogException, "no table", position=str(_COLUMN), type="Table"), _SQL),
        (_error(duckdb.ConversionException, "in a macro", position="20"), "SELECT 1, List_Sum ([1]) FROM t"),
    ],
)
def test_a_place_that_is_not_certain_is_not_told(error: Exception, sql: str) -> None:
    assert "Look at" not in _failed(error, Placed(sql, sql, 11)).message


def test_a_detail_is_cut_and_holds_nothing_confidential() -> None:
    text = "s3://bucket/private/part.parquet says " + "é" * 20_000
    detail = _failed(_error(duckdb.InvalidInputException, text), _PLACED, ("s3://bucket/private/",)).detail
    assert detail is not None
    assert "bucket" not in detail
    assert "part.parquet" in detail
    assert MAX_DETAIL_BYTES - 4 < len(detail.encode()) <= MAX_DETAIL_BYTES


def test_a_value_that_sounds_like_storage_is_the_querys_own_fault() -> None:
    value = "server closed the connection unexpectedly"
    assert _failed(_error(duckdb.ConversionException, f"could not convert '{value}'")).code is ErrorCode.QUERY_ERROR
    assert isinstance(translate(_error(duckdb.IOException, value)), EngineUnavailable)


def test_a_refusal_for_the_clocks_sake_is_an_outage() -> None:
    # As DuckDB 1.5.5 has it.
    text = "HTTP GET error reading 's3://b/x' (HTTP 403 Forbidden)\n\nRequestTimeTooSkewed: The difference …"
    assert isinstance(translate(_error(duckdb.HTTPException, text)), EngineUnavailable)
    assert _failed(_error(duckdb.HTTPException, text.partition("\n")[0])).code is ErrorCode.ENGINE_UNAVAILABLE


def test_what_storage_says_has_no_detail() -> None:
    for text in ("HTTP 403 on http://store/key?signature", "No files found that match s3://bucket/x"):
        assert _failed(_error(duckdb.IOException, text)).detail is None
