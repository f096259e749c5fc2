"""Queries and their repetitions: wait until the repetitions have ended, then judge each pair by its content."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import duckdb

from db.connection import DataPool, statement
from db.data.last_events import read_last_events_of
from db.data.runs import CanonicalRow, read_canonical
from db.retrying import until_available
from queryd.codec import decode_status
from queryd.errors import ResultDamaged, ResultExpired, ResultUnreadable
from queryd.events import OutputFormat, QueryStatusChanged, Status
from queryd.results import ResultReader
from queryd.tables import open_batches
from replay.comparison import Comparison, Judged, Verdict
from replay.refused import ReplayRefused
from replay.result_difference import Difference, ResultRows, find_differences

# (original query_id, new query_id)
Pair = tuple[str, str]
_Thing = TypeVar("_Thing")

# Of ids in one statement, like other statements of ours.
_BATCH = 500
# Two events each, of half a megabyte at most.
_PAIRS = 50
# Results that are read at the same time: one is on its way while the other is digested, and Python digests one.
_READERS = 2
# What has just ended is seen soon; a queue that takes minutes is not asked about without end.
_FIRST_SECONDS = 0.2
_LONGEST_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Known:
    """A query that has ended."""

    row: CanonicalRow
    event: QueryStatusChanged

    @property
    def outcome(self) -> str:
        return self.event.error_code or self.event.status

    @property
    def has_result(self) -> bool:
        return self.event.inline_result is not None or self.row.output_location is not None


async def compare(
    pool: DataPool,
    reader: ResultReader,
    pairs: Iterable[Pair],
    *,
    patience: float,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Comparison:
    """Compare each original with its repetition, once both have ended.

    Waits while anything ends, and gives up when nothing has for `patience` seconds: what has not ended by then is
    `unfinished`. `on_progress` receives how many of how many queries have ended, then of pairs judged.
    Raises `DatabaseUnavailable` when the database is away for as long, `ReplayRefused`, and botocore's errors if the
    store can't be read.
    """
    wanted = list(pairs)
    ended = await _wait_until_ended(pool, wanted, patience, on_progress)
    judged: list[Judged] = []
    reading = asyncio.Semaphore(_READERS)
    for batch in _cut(wanted, _PAIRS):
        known = await _read_known(pool, [query_id for pair in batch for query_id in pair], patience)
        judged += await asyncio.gather(*(_judge(reader, reading, pair, known, ended) for pair in batch))
        on_progress(len(judged), len(wanted))
    return Comparison(tuple(judged))


async def _wait_until_ended(
    pool: DataPool, pairs: Sequence[Pair], patience: float, on_progress: Callable[[int, int], None]
) -> frozenset[str]:
    """The ids of queries that have ended, and of originals that don't exist. Waits while anything ends."""
    clock = asyncio.get_running_loop().time
    everything = {query_id for pair in pairs for query_id in pair}
    known = await _read_rows(pool, {original for original, _ in pairs}, patience)
    pending = {new for _, new in pairs} | known.keys()
    last_end, pause = clock(), _FIRST_SECONDS
    while pending:
        rows = await _read_rows(pool, pending, patience)
        if ended := {query_id for query_id, row in rows.items() if _has_ended(row)}:
            pending -= ended
            last_end, pause = clock(), _FIRST_SECONDS
        on_progress(len(everything) - len(pending), len(everything))
        left = last_end + patience - clock()
        if not pending or left <= 0:
            break
        # The database sends no notification when a query ends.
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_SECONDS)
    return frozenset(everything - pending)


def _has_ended(row: CanonicalRow) -> bool:
    return Status(row.status).terminal


async def _read_rows(pool: DataPool, query_ids: Iterable[str], patience: float) -> dict[str, CanonicalRow]:
    found: dict[str, CanonicalRow] = {}
    for batch in _cut(query_ids, _BATCH):

        async def read(batch: Sequence[str] = batch) -> dict[str, CanonicalRow]:
            async with statement(pool) as connection:
                return await read_canonical(connection, batch)

        found |= await until_available(read, "postgres data", give_up_after=patience)
    return found


async def _read_known(pool: DataPool, query_ids: Sequence[str], patience: float) -> dict[str, _Known]:
    async def read() -> dict[str, bytes]:
        async with statement(pool) as connection:
            return await read_last_events_of(connection, query_ids)

    rows = await _read_rows(pool, query_ids, patience)
    events = await until_available(read, "postgres data", give_up_after=patience)
    # What was deleted in between has a row here and no event.
    return {
        query_id: _Known(row, decode_status(events[query_id]))
        for query_id, row in rows.items()
        if events.get(query_id) and _has_ended(row)
    }


async def _judge(
    reader: ResultReader, reading: asyncio.Semaphore, pair: Pair, known: dict[str, _Known], ended: frozenset[str]
) -> Judged:
    original, new = pair
    before, after = known.get(original), known.get(new)
    verdict = Verdict.GONE if ended.issuperset(pair) else Verdict.UNFINISHED
    differences: tuple[Difference, ...] = ()
    if before and after:
        verdict, differences = await _judge_ended(reader, reading, before, after)
    return Judged(
        original,
        new,
        verdict,
        differences,
        original_outcome=before.outcome if before else None,
        new_outcome=after.outcome if after else None,
        original_ms=before.event.duration_ms if before else None,
        new_ms=after.event.duration_ms if after else None,
    )


async def _judge_ended(
    reader: ResultReader, reading: asyncio.Semaphore, before: _Known, after: _Known
) -> tuple[Verdict, tuple[Difference, ...]]:
    if before.outcome != after.outcome:
        return Verdict.DIFFERENT, _explain(before, after, _differ_in_outcome(before, after))
    if before.event.status is Status.FAILED:
        return Verdict.SAME, ()
    if not (before.has_result and after.has_result):
        return Verdict.GONE, ()
    try:
        async with reading:
            found = await asyncio.to_thread(compare_results, reader, before.event, after.event)
    except ResultExpired:
        return Verdict.GONE, ()
    except duckdb.Error as error:
        # Its text may quote a value.
        raise ReplayRefused(
            f"DuckDB can't compare the results of {before.event.query_id} and {after.event.query_id}: "
            f"{type(error).__name__}. Free memory and space for temporary files, then compare again"
        ) from error
    return Verdict.DIFFERENT if found else Verdict.SAME, _explain(before, after, found)


def _differ_in_outcome(before: _Known, after: _Known) -> tuple[Difference, ...]:
    return (Difference.STATUS if before.event.status is not after.event.status else Difference.ERROR_CODE,)


def _explain(before: _Known, after: _Known, found: tuple[Difference, ...]) -> tuple[Difference, ...]:
    """What was found, and beside it whether another text was run."""
    return (*found, Difference.SQL) if found and before.event.sql_hash != after.event.sql_hash else found


def compare_results(
    reader: ResultReader, before: QueryStatusChanged, after: QueryStatusChanged
) -> tuple[Difference, ...]:
    """What differs between the results that two `Succeeded` events announce; empty if their content is the same.

    Files with the same SHA-256 are the same and not read. Raises `ResultExpired`, and botocore's errors where the store
    can't be read.
    """
    if before.output_format is not after.output_format:
        return (Difference.FORMAT,)
    if _is_same_file(before, after):
        return ()
    with ExitStack() as opened:
        try:
            return find_differences(_open(reader, before, opened), _open(reader, after, opened))
        # An intact file that can't be read as its format was damaged by an engine.
        except (ResultDamaged, ResultUnreadable):
            return (Difference.DAMAGED,)


def _is_same_file(before: QueryStatusChanged, after: QueryStatusChanged) -> bool:
    if before.output_format is not OutputFormat.PARQUET and before.columns != after.columns:
        # The types of the same text.
        return False
    if before.inline_result is not None or after.inline_result is not None:
        return before.inline_result == after.inline_result
    hashes = [[file.sha256 for file in event.files] for event in (before, after)]
    return None not in hashes[0] and hashes[0] == hashes[1]


def _open(reader: ResultReader, event: QueryStatusChanged, opened: ExitStack) -> ResultRows:
    parts = [open_batches(opened.enter_context(file), event) for file in reader.open_files(event)]
    # A Parquet file contains its types.
    return ResultRows(parts, () if event.output_format is OutputFormat.PARQUET else event.columns)


def _cut(things: Iterable[_Thing], size: int) -> Iterator[list[_Thing]]:
    rest = iter(things)
    while batch := list(islice(rest, size)):
        yield batch
