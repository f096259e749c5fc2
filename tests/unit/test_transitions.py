"""The batcher: idle an item goes at once, busy items share a batch, and one bad row stands alone in the end."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import psycopg
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from consumers.executor.spacing import Spacing
from consumers.executor.transitions import Batcher, RowRefused, run_batch
from db.connection import DatabaseUnavailable
from telemetry.events import LogEvent
from tests.unit.samples import QUICK

Run = Callable[[Sequence[int]], Awaitable[Sequence[int]]]

# A batch of the batcher; items beyond it make the next one.
_BATCH = 500


class Database:
    """Stands in for a transaction: doubles each item, refuses the bad ones, and waits while its gate is shut."""

    def __init__(
        self, *, bad: frozenset[int] = frozenset(), away: int = 0, error: type[Exception] | None = None
    ) -> None:
        self.batches: list[list[int]] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self._bad = bad
        self._away = away
        self._error = error or psycopg.DataError

    async def run(self, items: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(items))
        self.begun.set()
        await self.gate.wait()
        if self._away:
            self._away -= 1
            raise DatabaseUnavailable("away")
        if self._bad.intersection(items):
            raise self._error("canary4711")
        return [item * 2 for item in items]


async def test_an_idle_item_goes_at_once() -> None:
    database = Database()
    batcher = Batcher(database.run)
    assert await batcher.submit(1) == 2
    assert await batcher.submit(2) == 4
    assert database.batches == [[1], [2]]


async def test_what_falls_due_in_one_turn_shares_a_batch_in_order() -> None:
    database = Database()
    batcher = Batcher(database.run)
    assert await asyncio.gather(*(batcher.submit(item) for item in range(10))) == [item * 2 for item in range(10)]
    assert database.batches == [list(range(10))]


async def test_what_falls_due_while_a_batch_is_under_way_goes_together_next() -> None:
    database = Database()
    database.gate.clear()
    batcher = Batcher(database.run)
    first = asyncio.create_task(batcher.submit(0))
    await database.begun.wait()
    later = [asyncio.create_task(batcher.submit(item)) for item in range(1, 6)]
    await asyncio.sleep(0)
    assert database.batches == [[0]]
    database.gate.set()
    assert await asyncio.gather(first, *later) == [0, 2, 4, 6, 8, 10]
    assert database.batches == [[0], [1, 2, 3, 4, 5]]


async def test_batches_that_keep_apart_share_more_and_an_idle_item_still_goes_at_once() -> None:
    database = Database()
    batcher = Batcher(database.run, Spacing(0.3))
    assert await asyncio.wait_for(batcher.submit(1), 0.2) == 2
    second = asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0.05)
    assert (await batcher.submit(3), await second) == (6, 4)
    assert database.batches == [[1], [2, 3]]


async def test_a_batch_is_bounded() -> None:
    database = Database()
    batcher = Batcher(database.run)
    count = 2 * _BATCH + 1
    assert await asyncio.gather(*(batcher.submit(item) for item in range(count))) == [item * 2 for item in range(count)]
    assert [len(batch) for batch in database.batches] == [_BATCH, _BATCH, 1]


@pytest.mark.parametrize("error", [psycopg.DataError, psycopg.errors.NumericValueOutOfRange, psycopg.IntegrityError])
async def test_one_bad_row_never_fails_its_batch(error: type[Exception]) -> None:
    batcher = Batcher(Database(bad=frozenset({37}), error=error).run)
    answers = await asyncio.gather(*(batcher.submit(item) for item in range(100)), return_exceptions=True)
    assert isinstance(answers[37], RowRefused)
    assert [answer for place, answer in enumerate(answers) if place != 37] == [
        item * 2 for item in range(100) if item != 37
    ]


@QUICK
@given(count=st.integers(1, 40), bad=st.frozensets(st.integers(0, 39)))
def test_bisecting_finds_exactly_the_bad_rows(count: int, bad: frozenset[int]) -> None:
    async def run() -> None:
        answers = await run_batch(Database(bad=bad).run, range(count))
        assert [isinstance(answer, RowRefused) for answer in answers] == [item in bad for item in range(count)]
        assert [answer for answer in answers if not isinstance(answer, RowRefused)] == [
            item * 2 for item in range(count) if item not in bad
        ]

    asyncio.run(run())


async def test_a_refused_row_is_logged_without_its_value() -> None:
    with structlog.testing.capture_logs() as lines, pytest.raises(RowRefused) as refused:
        await Batcher(Database(bad=frozenset({1})).run).submit(1)
    assert [line["event"] for line in lines] == [LogEvent.ROW_REFUSED]
    assert "canary4711" not in repr(lines) + repr(refused.value)


async def test_a_database_that_is_away_is_waited_for_and_told_of_once() -> None:
    database = Database(away=2)
    with structlog.testing.capture_logs() as lines:
        assert await Batcher(database.run).submit(21) == 42
    assert database.batches == [[21]] * 3
    ours = [line["event"] for line in lines if isinstance(line["event"], LogEvent)]
    assert ours == [LogEvent.DEPENDENCY_UNAVAILABLE, LogEvent.DEPENDENCY_AVAILABLE]


async def test_a_bug_reaches_whoever_submitted_and_the_batcher_works_on() -> None:
    database = Database(bad=frozenset({1}), error=RuntimeError)
    batcher = Batcher(database.run)
    answers = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)
    assert [type(answer) for answer in answers] == [RuntimeError, RuntimeError]
    assert await batcher.submit(3) == 6


async def test_who_no_longer_waits_does_not_disturb_the_others() -> None:
    database = Database()
    database.gate.clear()
    batcher = Batcher(database.run)
    gone = asyncio.create_task(batcher.submit(1))
    stays = asyncio.create_task(batcher.submit(2))
    await database.begun.wait()
    gone.cancel()
    database.gate.set()
    assert await stays == 4
    assert gone.cancelled()
    assert await batcher.submit(3) == 6


async def test_starts_under_load_come_in_groups() -> None:
    spacing = Spacing(0.2)
    started: dict[int, float] = {}

    async def start(number: int, after: float) -> None:
        await asyncio.sleep(after)
        await spacing.wait()
        started[number] = time.monotonic()

    await asyncio.gather(start(0, 0), start(1, 0.05), start(2, 0.15), start(3, 0.25))
    assert abs(started[2] - started[1]) < 0.1 < started[1] - started[0]
    assert started[3] - started[2] > 0.1
