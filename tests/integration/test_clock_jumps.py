"""One clock is an hour off, the database's or a worker's: no query dies of it, and none lives on because of it."""

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import pytest

from consumers.executor.lease_monitor import LeaseMonitor
from consumers.executor.query import Query
from consumers.executor.reaper import Reaper
from db.clock import elapsed
from db.connection import DataPool
from db.data import admission, attempts, runs
from db.data.attempts import Renewal, renew
from db.data.runs import RunState
from db.migrations.upgrade import upgrade_data
from service.embedded.postgres import Postgres
from tests.faults.cluster import install_clock, shift_database_clock
from tests.integration.queries import Worker, is_over, make_record, make_request, new_id, opened_pool, read_row

_HOUR = 3600.0
# More than a query of these tests may wait, and less than a clock jumps.
_OLD_SECONDS = 660.0

# Sets a clock that many seconds ahead.
Shift = Callable[[float], None]


@pytest.fixture
def url(postgres_server: Postgres) -> Iterator[str]:
    """A Postgres data whose clock can be set."""
    name = f"clock_{uuid.uuid4().hex}"
    postgres_server.create_database(name)
    url = postgres_server.url(name)
    install_clock(url)
    upgrade_data(url)
    yield url
    postgres_server.drop_database(name)


@pytest.fixture
async def workers(url: str) -> AsyncIterator[tuple[Worker, Worker]]:
    """Two processes."""
    async with AsyncExitStack() as stack:
        pools = [await stack.enter_async_context(opened_pool(url)) for _ in range(2)]
        yield Worker(pools[0]), Worker(pools[1])


@pytest.fixture(params=["database", "workers"])
def shift(request: pytest.FixtureRequest, url: str, monkeypatch: pytest.MonkeyPatch) -> Shift:
    """One of the clocks that judge times."""
    if request.param == "database":
        return lambda seconds: shift_database_clock(url, seconds)

    def shift_workers(seconds: float) -> None:
        class Shifted(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) + timedelta(seconds=seconds)

        for module in (admission, attempts, runs):
            monkeypatch.setattr(module, "datetime", Shifted)

    return shift_workers


_JUMPS = pytest.mark.parametrize("jump", [_HOUR, -_HOUR])


async def _reap(worker: Worker) -> int:
    return await Reaper(worker.pool, worker.clock, worker.transitions, 15.0).reap(is_over)


async def _age(pool: DataPool, query: Query) -> None:
    """Let more time pass than the query may wait, or run."""
    async with pool.connection() as connection:
        await connection.execute(
            "UPDATE query_runs SET queued_at = queued_at - %(by)s, deadline = deadline - %(by)s"
            " WHERE query_id = %(id)s",
            {"by": timedelta(seconds=_OLD_SECONDS), "id": query.facts.query_id},
        )


async def _code(worker: Worker, query: Query) -> str | None:
    row = await read_row(worker.pool, query.facts.query_id)
    assert row is not None
    return row.error_code


@_JUMPS
async def test_a_jump_ends_neither_a_waiting_nor_a_running_query(
    workers: tuple[Worker, Worker], shift: Shift, jump: float
) -> None:
    worker, other = workers
    waiting, running = await worker.admit_new(), await worker.admit_new()
    state = await worker.start(running.facts)
    shift(jump)
    assert [await _reap(each) for each in workers] == [0, 0]
    refused = await other.claim(running.facts, state, new_id())
    assert refused is not None and refused.token == state.token
    await other.start(waiting.facts)
    done = await worker.finish(running.facts, state)
    assert done is not None and done.status == "Succeeded"


@_JUMPS
@pytest.mark.parametrize("stamped", [True, False])
async def test_what_was_written_by_a_wrong_clock_lives_on_when_that_is_put_right(
    workers: tuple[Worker, Worker], shift: Shift, jump: float, stamped: bool
) -> None:
    worker, other = workers
    shift(jump)
    record = replace(make_record(make_request()), appended_by_broker=stamped)
    [waiting] = await worker.admit(record)
    assert isinstance(waiting, Query)
    running = await worker.admit_new()
    state = await worker.start(running.facts)
    shift(0.0)
    assert not (await other.read(running.facts.query_id)).late
    assert [await _reap(each) for each in workers] == [0, 0]
    await other.start(waiting.facts)
    done = await worker.finish(running.facts, state)
    assert done is not None and done.status == "Succeeded"


async def test_a_clock_that_is_ahead_keeps_no_query_beyond_its_time(
    workers: tuple[Worker, Worker], shift: Shift
) -> None:
    worker, _ = workers
    waiting, left = await worker.admit_new(), await worker.admit_new()
    await worker.hand_back(await worker.start(left.facts))
    for query in (waiting, left):
        await _age(worker.pool, query)
    shift(_HOUR)
    assert await _reap(worker) == 2
    assert [await _code(worker, query) for query in (waiting, left)] == ["QUEUE_TIMEOUT", "QUERY_TIMEOUT"]


async def test_a_clock_that_is_behind_lets_a_query_wait_until_it_is_put_right(
    workers: tuple[Worker, Worker], shift: Shift
) -> None:
    worker, _ = workers
    waiting = await worker.admit_new()
    await _age(worker.pool, waiting)
    shift(-_HOUR)
    assert await _reap(worker) == 0
    shift(0.0)
    assert await _reap(worker) == 1
    assert await _code(worker, waiting) == "QUEUE_TIMEOUT"


@_JUMPS
async def test_a_records_age_is_the_brokers_whatever_clock_is_wrong_at_its_admission(
    workers: tuple[Worker, Worker], shift: Shift, jump: float
) -> None:
    worker, _ = workers
    old_ms = round((datetime.now(UTC).timestamp() - _OLD_SECONDS) * 1000)
    shift(jump)
    old = replace(make_record(make_request()), timestamp_ms=old_ms)
    [is_old] = await worker.admit(old)
    is_new = await worker.admit_new()
    assert isinstance(is_old, Query)
    # It waits for longer where the clock is behind.
    assert (is_old.state.overdue, is_new.state.overdue) == (jump > 0, False)
    shift(0.0)
    assert [(await worker.read(each.facts.query_id)).overdue for each in (is_old, is_new)] == [True, False]


@_JUMPS
async def test_a_broker_that_is_wrong_delays_no_end_for_ever(workers: tuple[Worker, Worker], jump: float) -> None:
    """Its stamps are all that there is: an hour behind, requests come too late; an hour ahead, they are new."""
    worker, _ = workers
    stamp_ms = round((datetime.now(UTC).timestamp() + jump) * 1000)
    [query] = await worker.admit(replace(make_record(make_request()), timestamp_ms=stamp_ms))
    assert isinstance(query, Query)
    assert query.state.overdue == (jump < 0)
    await _age(worker.pool, query)
    assert await _reap(worker) == 1


@_JUMPS
async def test_a_jump_neither_kills_a_lease_that_is_renewed_nor_saves_one_that_is_not(
    workers: tuple[Worker, Worker], shift: Shift, jump: float
) -> None:
    worker, other = workers
    query = await worker.admit_new()
    state = await worker.start(query.facts)
    # A lease is dead as soon as it is seen twice with the same number.
    monitor = LeaseMonitor(0.0)

    async def is_dead() -> bool:
        asked_at = elapsed()
        seen = await other.read(query.facts.query_id)
        return query.facts.query_id in monitor.observe([seen], asked_at)

    assert not await is_dead()
    for shifted in (jump, 0.0, jump):
        shift(shifted)
        await _renew(worker, state)
        assert not await is_dead()
    shift(0.0)
    assert await is_dead()
    assert (await other.take_over(query.facts)).attempt == 2


async def _renew(worker: Worker, state: RunState) -> None:
    assert state.token is not None
    async with worker.pool.connection() as connection:
        assert await renew(connection, [Renewal(state.query_id, state.token, 15.0)]) == {state.query_id: False}
