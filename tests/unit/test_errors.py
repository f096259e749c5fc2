"""DuckDB's exceptions as ours: codes, positions and details."""

import json
from collections.abc import Collection

import duckdb
import pytest

from engines.duckdb.errors import MAX_DETAIL_BYTES, Placed, translate
from engines.protocol import EngineUnavailable, Outage, QueryFailed, RelationKind
from queryd.events import ErrorCode

_SQL = "SELECT 'é',\n  a FROM t"
# Eleven bytes of ours stand before it.
_PLACED = Placed(_SQL, _SQL, 11)
_COLUMN = 11 + len("SELECT 'é',\n  ".encode())


def _error(kind: type[Exception], message: str, **facts: str) -> Exception:
    """An exception as DuckDB raises it with `errors_as_json`."""
    return kind(f"Some Error: {json.dumps({'exception_message': message} | facts)}")


def _failed(error: Exception, placed: Placed | None = _PLACED, confidential: tuple[str, ...] = ()) -> QueryFailed:
    ours = translate(error, placed, confidential).ours
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


def test_a_detail_is_cut_and_holds_no_address_and_nothing_confidential() -> None:
    text = "key-id s3://bucket/private/part.parquet __queryd_datasets.public.shops says " + "é" * 20_000
    detail = _failed(_error(duckdb.InvalidInputException, text), _PLACED, ("key-id",)).detail
    assert detail is not None
    assert detail.startswith("Some Error: … … … says é")
    assert MAX_DETAIL_BYTES - 4 < len(detail.encode()) <= MAX_DETAIL_BYTES


@pytest.mark.parametrize("hidden", ["s3://bucket/private/part.parquet", "__queryd_datasets.public.shops", "AKIAKEY"])
def test_texts_that_the_author_wrote_stay_so_that_no_guess_is_confirmed(hidden: str) -> None:
    error = _error(duckdb.ConversionException, f"can't convert '{hidden}'")
    for placed in (Placed(f"SELECT '{hidden}'::INT", "SELECT 1", 0), Placed("SELECT $p", "SELECT $p", 0, (hidden,))):
        assert _failed(error, placed, ("AKIAKEY",)).detail == f"Some Error: can't convert '{hidden}'"


def test_an_address_that_was_computed_is_hidden_whether_it_is_right_or_not() -> None:
    placed = Placed("SELECT ('s3://' || 'x')::INT", "SELECT 1", 0)
    for guess in ("s3://bucket/private/", "s3://wrong/guess/", "__queryd_datasets.public.guess"):
        assert _failed(_error(duckdb.ConversionException, f"'{guess}'"), placed).detail == "Some Error: '…'"


def test_a_value_that_sounds_like_storage_is_the_querys_own_fault() -> None:
    for text in ("server closed the connection unexpectedly", "x error for HTTP GET to 'y'", "No magic bytes found"):
        for kind in (duckdb.ConversionException, duckdb.InvalidInputException, duckdb.IOException):
            meaning = translate(_error(kind, f"could not convert '{text}'"), _PLACED)
            assert isinstance(meaning.ours, QueryFailed)
            assert meaning.ours.message != "A file of the dataset can't be read."


def test_a_refusal_for_the_clocks_sake_is_an_outage() -> None:
    # As DuckDB 1.5.5 has it.
    text = "HTTP GET error reading 's3://b/x' (HTTP 403 Forbidden)\n\nRequestTimeTooSkewed: The difference …"
    assert _outage(_error(duckdb.HTTPException, text)) is Outage.CLOCKS
    assert _failed(_error(duckdb.HTTPException, text.partition("\n")[0])).code is ErrorCode.ENGINE_UNAVAILABLE


def _outage(error: Exception, kinds: Collection[RelationKind] = frozenset(RelationKind)) -> Outage | None:
    ours = translate(error, _PLACED, kinds=kinds).ours
    return ours.outage if isinstance(ours, EngineUnavailable) else None


_AWAY = _error(duckdb.IOException, "Could not connect to server error for HTTP HEAD to 'http://s/b'")
_CLOSED = _error(
    duckdb.IOException, 'Unable to connect to Postgres at "x": connection to server failed: Connection refused'
)


def test_only_a_storage_that_the_statement_reads_can_cause_an_outage() -> None:
    parquet, postgres = frozenset({RelationKind.PARQUET}), frozenset({RelationKind.POSTGRES})
    assert _outage(_AWAY, parquet) is Outage.STORE
    assert _outage(_CLOSED, postgres) is Outage.POSTGRES
    for error, kinds in ((_AWAY, postgres), (_CLOSED, parquet), (_AWAY, frozenset()), (_CLOSED, frozenset())):
        meaning = translate(error, _PLACED, kinds=kinds)
        assert isinstance(meaning.ours, QueryFailed)
        assert (meaning.ours.code, meaning.known) == (ErrorCode.INTERNAL, False)


@pytest.mark.parametrize("kind", [duckdb.IOException, duckdb.Error, duckdb.FatalException, duckdb.InternalException])
def test_an_unknown_error_is_no_outage_and_leaves_no_trust_in_the_process(kind: type[Exception]) -> None:
    meaning = translate(_error(kind, "something new"), _PLACED)
    assert isinstance(meaning.ours, QueryFailed)
    assert not meaning.known
    assert not translate(_error(duckdb.InvalidInputException, "double free or corruption"), _PLACED).known


@pytest.mark.parametrize(
    "error",
    [
        _error(duckdb.ParserException, "syntax error"),
        _error(duckdb.BinderException, "no such column"),
        _error(duckdb.ConversionException, "anything"),
        _error(duckdb.InvalidInputException, "missing ): ("),
        _error(duckdb.InvalidInputException, "More than one row returned by a subquery used as an expression"),
        _error(duckdb.IOException, "Parquet files do not support negative intervals"),
    ],
)
def test_a_known_mistake_leaves_the_process_in_trust(error: Exception) -> None:
    meaning = translate(error, _PLACED)
    assert isinstance(meaning.ours, QueryFailed)
    assert (meaning.ours.code, meaning.known) == (ErrorCode.QUERY_ERROR, True)


def test_an_internal_error_that_a_statement_causes_is_its_authors() -> None:
    failure = _failed(_error(duckdb.InternalException, "Attempted to dereference shared_ptr that is NULL!"))
    assert (failure.code, failure.detail is not None) == (ErrorCode.QUERY_ERROR, True)


def test_a_text_of_duckdb_that_is_no_unicode_is_read_all_the_same() -> None:
    with duckdb.connect() as connection:
        connection.execute("SET errors_as_json = true")
        with pytest.raises((UnicodeDecodeError, duckdb.InvalidInputException)) as caught:
            connection.execute("SELECT unhex('ä')")
    failure = _failed(caught.value, Placed("SELECT unhex('ä')", "SELECT unhex('ä')", 0))
    assert failure.code is ErrorCode.QUERY_ERROR
    if not isinstance(caught.value, UnicodeDecodeError):
        # Python 3.11.2 loses the text.
        assert str(caught.value) == ""
        return
    assert failure.message == "A function or a subquery got a value that it can't use."
    assert failure.detail is not None
    assert "hex digit" in failure.detail


def test_a_statement_of_ours_that_fails_does_not_blame_the_sql() -> None:
    for kind in (duckdb.CatalogException, duckdb.BinderException, duckdb.InvalidInputException):
        assert "SQL" not in _failed(_error(kind, "Table with name t does not exist!"), None).message


def test_what_storage_says_has_no_detail() -> None:
    for kind, text in (
        (duckdb.HTTPException, "HTTP GET error on 'http://store/key?signature' (HTTP 403)"),
        (duckdb.IOException, "No files found that match s3://bucket/x"),
        (duckdb.IOException, 'Failed to prepare COPY "COPY (SELECT a FROM hidden.place)": ERROR:  division by zero'),
    ):
        assert _failed(_error(kind, text)).detail is None


def test_an_authors_text_never_blames_the_files_of_a_dataset() -> None:
    for words in ("column count mismatch: expected", "x - schema mismatch in glob: column", "Out of buffer"):
        sql = f"SELECT '{words}'::INT"
        with duckdb.connect() as connection, pytest.raises(duckdb.Error) as caught:
            connection.execute(sql)
        meaning = translate(caught.value, Placed(sql, sql, 0))
        assert isinstance(meaning.ours, QueryFailed)
        assert meaning.ours.message.startswith("A value can't be converted")
        assert words in (meaning.ours.detail or "")
    for text in (
        'Failed to read file "s3://b/2.parquet": schema mismatch in glob: column "a" was read',
        'Failed to read file(s) "s3://b/2.parquet" - column count mismatch: expected 2 columns but found 1',
    ):
        meaning = translate(duckdb.InvalidInputException(text), Placed("SELECT 1", "SELECT 1", 0))
        assert isinstance(meaning.ours, QueryFailed)
        assert meaning.ours.message == "The dataset's files have different columns."


@pytest.mark.parametrize("sql", ["SELECT lpad('a', 5, '')", "SELECT rpad('a', 5, '')", "SELECT url_decode('%ff')"])
def test_a_mistake_in_a_functions_argument_does_not_taint_the_child(sql: str) -> None:
    with duckdb.connect() as connection, pytest.raises(duckdb.Error) as caught:
        connection.execute("SET errors_as_json = true").execute(sql).fetchall()
    assert translate(caught.value, Placed(sql, sql, 0)).known


@pytest.mark.parametrize("placed", [None, _PLACED], ids=["queryd's statement", "the author's"])
def test_a_commit_that_postgres_does_not_answer_is_an_outage(placed: Placed | None) -> None:
    # As DuckDB 1.5.5 reports it if the server ends while a read is committed.
    text = 'Failed to commit: Failed to execute query "COMMIT": server closed the connection unexpectedly'
    meaning = translate(_error(duckdb.TransactionException, text), placed)
    assert isinstance(meaning.ours, EngineUnavailable)
    assert meaning.ours.outage is Outage.POSTGRES
