"""Queries and their repetitions, compared by what the database knows of them and by their real objects."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from consumers.executor.endings import Failure, Result, Success, fail, succeed
from queryd.events import Column, ErrorCode, OutputFormat, ResultFile
from queryd.results import ResultReader
from replay.compare import compare
from replay.comparison import Comparison, Verdict
from replay.result_difference import Difference
from results.location import file_name
from service.embedded.object_store import ObjectStore
from tests.integration.queries import new_id
from tests.integration.retention_place import Attempt, Place, aws_variables, opened_place

_WEEK = timedelta(days=7)
# Nothing that a test waits for in vain may take longer.
_NO_PATIENCE = 0.3
_LONG_SECONDS = 60.0

_SUMS = (
    "SELECT i % 500 AS shop, sum(i * 0.1::DOUBLE) AS amount, max('é' || i) AS name FROM range({}) t(i) GROUP BY shop"
)
_CSV = b"shop,amount\r\n1,0.30000000000000004\r\n2,\r\n"
_COLUMNS = (Column("shop", "INTEGER"), Column("amount", "DOUBLE"))


@pytest.fixture
async def place(
    data_url: str, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    for name, value in aws_variables(object_store).items():
        monkeypatch.setenv(name, value)
    async with opened_place(data_url, object_store, tmp_path) as opened:
        yield opened


def _export(folder: Path, query: str, threads: int) -> bytes:
    """A query's result as an engine of so many threads writes it."""
    file = folder / "result.parquet"
    with duckdb.connect(config={"threads": threads}) as engine:
        engine.execute(f"COPY ({query}) TO '{file}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 2048)")
    return file.read_bytes()


async def _announce(
    place: Place,
    body: bytes,
    output_format: OutputFormat = OutputFormat.PARQUET,
    *,
    inline: bool = False,
    retention: timedelta = _WEEK,
    duration_ms: int = 5,
    **changes: Any,
) -> Attempt:
    """A query that has succeeded with this file; its `key` is the object's, unless the result is inline."""
    attempt = await place.start(output_format=output_format, **changes)
    key = attempt.prefix + file_name(output_format)
    file = ResultFile(key, len(body), rows=1, etag="etag", sha256=hashlib.sha256(body).hexdigest())
    if not inline:
        place.s3.put_object(Bucket=place.bucket, Key=key, Body=body)
    success = Success(
        result=Result.in_event(body, rows=1)
        if inline
        else Result.stored(f"s3://{place.bucket}/{attempt.prefix}", file),
        columns=() if output_format is OutputFormat.PARQUET else _COLUMNS,
        bytes_scanned=None,
        duration_ms=duration_ms,
        queued_ms=1,
        engine="duckdb",
        retention=retention,
    )
    state = attempt.state
    assert state.token is not None
    ended = await place.worker.end(succeed(attempt.facts, state, success, now=state.read_at, token=state.token))
    assert ended is not None
    return attempt


async def _fail(place: Place, code: ErrorCode, attempt: Attempt | None = None) -> str:
    attempt = attempt or await place.start()
    state = attempt.state
    failure = fail(attempt.facts, state, Failure(code, "it failed"), now=state.read_at, token=state.token)
    assert await place.worker.end(failure) is not None
    return attempt.query_id


async def _compare(place: Place, *pairs: tuple[str, str], patience: float = _NO_PATIENCE) -> Comparison:
    return await compare(place.pool, ResultReader(), pairs, patience=patience)


async def _compare_two(place: Place, original: str, new: str) -> tuple[Verdict, tuple[Difference, ...]]:
    [judged] = (await _compare(place, (original, new))).judged
    assert (judged.original, judged.new) == (original, new)
    return judged.verdict, judged.differences


@pytest.mark.slow
async def test_the_changed_ones_are_found_and_no_other(place: Place, tmp_path: Path) -> None:
    one, two = _export(tmp_path, _SUMS.format(20_000), 1), _export(tmp_path, _SUMS.format(20_000), 2)
    originals = [(await _announce(place, one, duration_ms=10)).query_id for _ in range(60)]
    changed = {
        7: _SUMS.replace("'é'", "'è'").format(20_000),
        31: _SUMS.format(20_001),
        58: f"SELECT shop::BIGINT AS shop_id, amount, name FROM ({_SUMS.format(20_000)}) WHERE shop > 0",
    }
    bodies = [_export(tmp_path, changed[number], 2) if number in changed else two for number in range(60)]
    news = [(await _announce(place, body, duration_ms=20)).query_id for body in bodies]

    comparison = await _compare(place, *zip(originals, news, strict=True))
    assert one != two
    assert {number: judged.differences for number, judged in enumerate(comparison.judged) if judged.differences} == {
        7: (Difference.VALUES,),
        31: (Difference.VALUES,),
        58: (Difference.SCHEMA, Difference.ROWS),
    }
    assert comparison.counts == {
        Verdict.SAME: 57,
        Verdict.DIFFERENT: 3,
        Verdict.GONE: 0,
        Verdict.UNFINISHED: 0,
    }
    before, after = comparison.durations
    assert (before.count, before.total_ms, after.total_ms) == (60, 600, 1200)


async def test_the_same_bytes_are_not_read(place: Place) -> None:
    original, new = [await _announce(place, b"no Parquet at all") for _ in range(2)]
    assert await _compare_two(place, original.query_id, new.query_id) == (Verdict.SAME, ())


@pytest.mark.parametrize("changed", [False, True])
async def test_text_is_compared_wherever_it_lies(place: Place, changed: bool) -> None:
    """In an object, and in an event."""
    body = _CSV.replace(b"2,\r\n", b"3,\r\n") if changed else b"shop,amount\r\n2,\r\n1,0.3\r\n"
    original = await _announce(place, _CSV, OutputFormat.CSV)
    new = await _announce(place, body, OutputFormat.CSV, inline=True)
    expected = (Verdict.DIFFERENT, (Difference.VALUES,)) if changed else (Verdict.SAME, ())
    assert await _compare_two(place, original.query_id, new.query_id) == expected


async def test_json_is_compared(place: Place) -> None:
    original = await _announce(place, b'{"shop":1,"amount":0.3}\n', OutputFormat.JSON)
    new = await _announce(place, b'{"shop":1,"amount":0.30000000000000004}\n', OutputFormat.JSON, inline=True)
    assert await _compare_two(place, original.query_id, new.query_id) == (Verdict.SAME, ())


async def test_another_format_is_a_difference(place: Place) -> None:
    original = await _announce(place, _CSV, OutputFormat.CSV)
    new = await _announce(place, b"", OutputFormat.JSON)
    assert await _compare_two(place, original.query_id, new.query_id) == (Verdict.DIFFERENT, (Difference.FORMAT,))


async def test_another_text_is_told_beside_what_it_has_changed(place: Place) -> None:
    original = await _announce(place, _CSV, OutputFormat.CSV)
    same = await _announce(place, _CSV, OutputFormat.CSV, sql="SELECT 2")
    other = await _announce(place, b"shop,amount\r\n", OutputFormat.CSV, sql="SELECT 2")
    assert await _compare_two(place, original.query_id, same.query_id) == (Verdict.SAME, ())
    assert await _compare_two(place, original.query_id, other.query_id) == (
        Verdict.DIFFERENT,
        (Difference.ROWS, Difference.SQL),
    )


async def test_failures_are_the_same_if_their_codes_are(place: Place) -> None:
    succeeded = (await _announce(place, _CSV, OutputFormat.CSV)).query_id
    failed = [await _fail(place, code) for code in (ErrorCode.QUERY_ERROR, ErrorCode.QUERY_ERROR, ErrorCode.INTERNAL)]
    comparison = await _compare(
        place, (failed[0], failed[1]), (failed[0], failed[2]), (succeeded, failed[0]), (failed[0], succeeded)
    )
    assert [(judged.verdict, judged.differences) for judged in comparison.judged] == [
        (Verdict.SAME, ()),
        (Verdict.DIFFERENT, (Difference.ERROR_CODE,)),
        (Verdict.DIFFERENT, (Difference.STATUS,)),
        (Verdict.DIFFERENT, (Difference.STATUS,)),
    ]
    assert comparison.judged[2].original_outcome == "Succeeded"
    assert comparison.judged[2].new_outcome == "QUERY_ERROR"
    assert comparison.durations[0].count == 0


@pytest.mark.parametrize("inline", [False, True])
async def test_an_expired_result_is_gone(place: Place, inline: bool) -> None:
    original = await _announce(place, _CSV, OutputFormat.CSV, inline=inline, retention=-_WEEK)
    new = await _announce(place, _CSV + b"3,1\r\n", OutputFormat.CSV)
    await place.sweep()
    assert await _compare_two(place, original.query_id, new.query_id) == (Verdict.GONE, ())


async def test_what_expires_while_it_is_compared_is_gone(place: Place) -> None:
    """The object has gone since the row was read."""
    original = await _announce(place, _CSV, OutputFormat.CSV, retention=-_WEEK)
    new = await _announce(place, _CSV + b"3,1\r\n", OutputFormat.CSV)
    place.s3.delete_object(Bucket=place.bucket, Key=original.prefix + file_name(OutputFormat.CSV))
    assert await _compare_two(place, original.query_id, new.query_id) == (Verdict.GONE, ())


@pytest.mark.parametrize("body", [None, b"other bytes", b"x" * len(_CSV)])
async def test_an_object_that_is_not_what_its_event_says_is_damaged(place: Place, body: bytes | None) -> None:
    original = await _announce(place, _CSV, OutputFormat.CSV)
    new = await _announce(place, _CSV + b"3,1\r\n", OutputFormat.CSV)
    key = new.prefix + file_name(OutputFormat.CSV)
    if body is None:
        place.s3.delete_object(Bucket=place.bucket, Key=key)
    else:
        place.s3.put_object(Bucket=place.bucket, Key=key, Body=body)
    assert await _compare_two(place, original.query_id, new.query_id) == (Verdict.DIFFERENT, (Difference.DAMAGED,))


async def test_a_whole_file_that_nobody_can_read_is_damaged(place: Place) -> None:
    original, new = [await _announce(place, body) for body in (b"no Parquet", b"no Parquet either")]
    assert await _compare_two(place, original.query_id, new.query_id) == (Verdict.DIFFERENT, (Difference.DAMAGED,))


async def test_an_original_without_a_row_is_gone_and_not_waited_for(place: Place) -> None:
    new = (await _announce(place, _CSV, OutputFormat.CSV)).query_id
    comparison = await _compare(place, (new_id(), new), patience=_LONG_SECONDS)
    assert [judged.verdict for judged in comparison.judged] == [Verdict.GONE]


async def test_what_does_not_end_is_unfinished(place: Place) -> None:
    ended = (await _announce(place, _CSV, OutputFormat.CSV)).query_id
    running = (await place.start()).query_id
    comparison = await _compare(place, (ended, running), (running, ended), (ended, new_id()), (ended, ended))
    assert [judged.verdict for judged in comparison.judged] == [Verdict.UNFINISHED] * 3 + [Verdict.SAME]


async def test_it_waits_for_what_ends_and_is_told_of_it(place: Place) -> None:
    original = await _fail(place, ErrorCode.QUERY_ERROR)
    running = [await place.start(), await place.start()]
    told: list[tuple[int, int]] = []
    heard = asyncio.Event()

    def hear(done: int, everything: int) -> None:
        told.append((done, everything))
        heard.set()

    pairs = [(original, attempt.query_id) for attempt in running]
    comparing = asyncio.create_task(
        compare(place.pool, ResultReader(), pairs, patience=_LONG_SECONDS, on_progress=hear)
    )
    for attempt in running:
        await heard.wait()
        await _fail(place, ErrorCode.QUERY_ERROR, attempt)
        heard.clear()
    comparison = await comparing
    assert comparison.all_same
    assert told[0] == (1, 3)
    assert (3, 3) in told
    assert told[-1] == (2, 2)


async def test_what_is_told_of_a_comparison_holds_no_value(place: Place) -> None:
    original = await _announce(place, _CSV, OutputFormat.CSV)
    new = await _announce(place, _CSV.replace(b"0.3", b"0.7"), OutputFormat.CSV)
    comparison = await _compare(place, (original.query_id, new.query_id))
    told = comparison.to_text() + str(comparison.to_json()) + str(comparison)
    assert "values" in told
    assert "000004" not in told
