"""How a query ends: row and event say the same, and the event always fits."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.executor.endings import Failure, Result, Success, fail, overdue_failure, succeed
from db.data.attempts import Ending
from db.data.outbox import shard_of
from queryd.codec import MAX_EVENT_BYTES, decode_status
from queryd.events import (
    MAX_INLINE_BYTES,
    Column,
    ErrorCode,
    OutputFormat,
    QueryStatusChanged,
    ResultFile,
    Status,
    event_id,
)
from tests.unit.samples import NOW, ORG_ID, QUERY_ID, QUICK, TRACEPARENT, make_facts, make_state

TOKEN = "7d785322-a380-412b-8bec-39b59596e66d"
RUNNING = make_state(status="Running", sequence=4, attempt=2)
FACTS = make_facts(output_format=OutputFormat.PARQUET, user_id=ORG_ID, task_id=QUERY_ID)
FILE = ResultFile("results/o/q/2-7d785322/result.csv", 1_234, 56, "etag", "ab" * 32)


STORED = Result.stored("s3://bucket/results/o/q/2-7d785322/", FILE)


def _success(columns: tuple[Column, ...], result: Result) -> Success:
    return Success(
        result=result,
        columns=columns,
        bytes_scanned=99,
        duration_ms=321,
        queued_ms=12,
        engine="duckdb 1.5.5",
        retention=timedelta(days=7),
    )


def _succeed(
    columns: tuple[Column, ...] = (Column("n", "BIGINT"),),
    result: Result = STORED,
    output_format: OutputFormat = OutputFormat.PARQUET,
) -> Ending:
    facts = replace(FACTS, output_format=output_format)
    return succeed(facts, RUNNING, _success(columns, result), now=NOW, token=TOKEN)


def _assert_agree(ending: Ending, event: QueryStatusChanged) -> None:
    """What a subscriber is told is what the row says."""
    assert event.query_id == ending.query_id
    assert event.sequence == ending.sequence + 1
    assert event.event_id == ending.event_id == event_id(event.query_id, event.sequence)
    assert event.status == ending.status
    assert event.output_location == ending.output_location
    assert (event.row_count, event.bytes, event.duration_ms) == (
        ending.row_count,
        ending.result_bytes,
        ending.duration_ms,
    )
    assert (event.error_code, event.error_message) == (ending.error_code, ending.error_message)
    files: list[dict[str, Any]] = ending.files.obj
    if event.inline_result is None:
        assert [ResultFile(**file) for file in files] == list(event.files)
    else:
        assert (files, event.files) == ([{"inline": True}], ())
    kept = None if ending.retention_seconds is None else NOW + timedelta(seconds=ending.retention_seconds)
    assert event.expires_at == kept
    assert ending.shard == shard_of(event.query_id)
    headers: dict[str, str] = ending.headers.obj
    assert (headers["ce_id"], headers["ce_subject"]) == (event.event_id, event.query_id)
    assert headers["traceparent"][:35] == TRACEPARENT[:35]


def test_row_and_event_of_a_success_agree() -> None:
    ending = _succeed()
    event = decode_status(ending.payload)
    _assert_agree(ending, event)
    assert (event.status, event.previous_status, event.attempt) == (Status.SUCCEEDED, Status.RUNNING, 2)
    assert (event.files, event.columns) == ((FILE,), (Column("n", "BIGINT"),))
    assert (event.bytes_scanned, event.queued_ms, event.engine) == (99, 12, "duckdb 1.5.5")
    assert (event.user_id, event.task_id, event.output_format) == (ORG_ID, QUERY_ID, OutputFormat.PARQUET)
    assert (ending.token, ending.stale_lease_version) == (TOKEN, None)
    assert event.error_code is None


@pytest.mark.parametrize("body", [b"n\r\n7\r\n", b""])
def test_row_and_event_of_an_inline_result_agree(body: bytes) -> None:
    ending = _succeed(result=Result.in_event(body, rows=1))
    event = decode_status(ending.payload)
    _assert_agree(ending, event)
    assert (event.inline_result, event.output_location, event.row_count, event.bytes) == (body, None, 1, len(body))
    assert event.expires_at is not None
    assert ending.output_location is None
    if body:
        assert body.decode() not in repr(ending.files.obj) + repr(_success((), Result.in_event(body, rows=1)))


@pytest.mark.parametrize("code", ErrorCode)
def test_row_and_event_of_a_failure_agree(code: ErrorCode) -> None:
    ending = fail(FACTS, RUNNING, Failure(code, "a sentence"), now=NOW, token=TOKEN, duration_ms=5, engine="duckdb")
    event = decode_status(ending.payload)
    _assert_agree(ending, event)
    assert (event.status, event.previous_status, event.attempt) == (Status.FAILED, Status.RUNNING, 2)
    assert (event.error_code, event.error_message, event.duration_ms) == (code, "a sentence", 5)
    assert (event.files, event.output_location, event.row_count, event.expires_at) == ((), None, None, None)


def test_a_query_that_nobody_holds_ends_without_a_token() -> None:
    queued = make_state(status="Queued", sequence=1)
    ending = fail(FACTS, queued, overdue_failure(Status.QUEUED), now=NOW, stale_lease_version=7)
    event = decode_status(ending.payload)
    _assert_agree(ending, event)
    assert (ending.token, ending.stale_lease_version, ending.sequence) == (None, 7, 1)
    assert (event.previous_status, event.attempt, event.error_code) == (Status.QUEUED, 0, ErrorCode.QUEUE_TIMEOUT)


def test_a_query_whose_time_is_over_says_where_it_waited() -> None:
    assert overdue_failure(Status.QUEUED).code is ErrorCode.QUEUE_TIMEOUT
    assert overdue_failure(Status.RUNNING).code is ErrorCode.QUERY_TIMEOUT


@pytest.mark.parametrize(
    ("output_format", "told"), [(OutputFormat.PARQUET, 200), (OutputFormat.CSV, 2_500), (OutputFormat.JSON, 2_500)]
)
def test_an_event_lists_every_column_of_csv_and_json(output_format: OutputFormat, told: int) -> None:
    columns = tuple(Column(f"c{number}", "DECIMAL(38,10)") for number in range(2_500))
    event = decode_status(_succeed(columns, output_format=output_format).payload)
    assert event.columns == columns[:told]


def test_all_that_an_engine_lets_a_file_of_text_have_fits_into_an_event_beside_an_inline_result() -> None:
    result = Result.in_event(bytes(MAX_INLINE_BYTES), rows=1)
    for columns in ((Column("c", "INTEGER"),) * (256 * 1024 // 8), (Column("n" * 128 * 1024, "T" * 128 * 1024),)):
        payload = _succeed(columns, result, output_format=OutputFormat.JSON).payload
        assert len(payload) < MAX_EVENT_BYTES
        assert decode_status(payload).columns == columns


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (Column("n" * 128, "DECIMAL(18,3)"), Column("n" * 128, "DECIMAL(18,3)")),
        (Column("n" * 129, "DECIMAL(18,3)"), Column("column_1", "DECIMAL(18,3)")),
        (Column("s", "STRUCT(" + "a INTEGER, " * 200 + "b INTEGER)[]"), Column("s", "STRUCT")),
        (Column("e", "MAP(ENUM, INTEGER)[]"), Column("e", "MAP(ENUM, INTEGER)[]")),
        (Column("l", "INTEGER" + "[]" * 3_000), Column("l", ("INTEGER" + "[]" * 3_000)[:1_000] + "…")),
        (Column("", ""), Column("", "")),
    ],
)
def test_a_long_column_is_cut_to_what_still_says_something(given: Column, told: Column) -> None:
    assert decode_status(_succeed((given,)).payload).columns == (told,)


@QUICK
@given(name=st.text('abc_ "', max_size=400), kind=st.text("ABC(),", max_size=4_000))
def test_two_hundred_columns_always_fit_into_an_event(name: str, kind: str) -> None:
    column = Column(name, kind + "(")
    assert len(_succeed((column,) * 200).payload) < MAX_EVENT_BYTES


def test_two_hundred_columns_with_names_of_any_script_fit_into_an_event() -> None:
    column = Column("🦆" * 128, "STRUCT(" + "a INTEGER, " * 80 + "b INTEGER)")
    payload = _succeed((column,) * 200).payload
    assert len(payload) < MAX_EVENT_BYTES
    assert decode_status(payload).columns == (column,) * 200


def test_an_inline_result_fits_beside_the_longest_columns() -> None:
    # So that no event is ever too large, and none has to become an object after all.
    column = Column("🦆" * 128, "L" * 1_001)
    payload = _succeed((column,) * 200, Result.in_event(bytes(MAX_INLINE_BYTES), rows=1)).payload
    assert len(payload) < MAX_EVENT_BYTES * 3 // 4
    told = decode_status(payload)
    assert told.columns == (Column(column.name, "L" * 1_000 + "…"),) * 200
    assert told.inline_result == bytes(MAX_INLINE_BYTES)
