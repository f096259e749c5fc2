"""The database's wall clock jumps an hour: no query dies of it, and none lives on because of it."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from consumers.executor import admission, timekeeping
from consumers.executor.admission import Admitted
from consumers.executor.leases import Lease, Leases
from consumers.executor.reaper import Reaper
from consumers.executor.timekeeping import find_time, watching
from db import clock
from db.clock import READ_CLOCK, DatabaseClock
from db.connection import Connection, DatabaseUnavailable, DataPool
from db.migrations.upgrade import upgrade_data
from queryd.events import Mode, Topic
from queryd.topics import TopicIdentity
from service import wiring
from service.embedded.postgres import Postgres
from service.settings import Settings
from tests.faults.cluster import install_clock, shift_database_clock
from tests.integration.queries import Worker, is_over, make_record, make_request, opened_pool, read_row, read_story
from tests.integration.records import until

_HOUR = 3600.0
_JUMPS = (_HOUR, -_HOUR)

# More time passes than a query of these tests may wait or run, and than a lease of theirs lasts.
_PASS_DEADLINE = "UPDATE query_runs SET deadline = deadline - interval '660 s' WHERE query_id = %s"
_WAITING_CORRECTION = (
    "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%UPDATE steady_clock%'"
)
_PASS_LEASE = "UPDATE query_leases SET expires_at = expires_at - interval '660 s' WHERE query_id = %s"


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
    """Two processes that have seen the clock before it jumps."""
    async with AsyncExitStack() as stack:
        pools = [await stack.enter_async_context(opened_pool(url)) for _ in range(2)]
        workers = Worker(pools[0]), Worker(pools[1])
        for worker in workers:
            await worker.transitions.read([])
        yield workers


class _CountedClock(DatabaseClock):
    """Tells how often it was compared with the database's."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self._looked = asyncio.Condition()

    async def check(self, connection: Connection) -> None:
        await super().check(connection)
        async with self._looked:
            self.looks += 1
            self._looked.notify_all()

    async def reach(self, looks: int) -> None:
        """Return once there have been so many looks."""
        async with self._looked:
            await self._looked.wait_for(lambda: self.looks >= looks)


async def _jump(url: str, seconds: float) -> None:
    await asyncio.to_thread(shift_database_clock, url, seconds)


async def _reap(worker: Worker) -> int:
    return await Reaper(worker.pool, worker.clock, worker.transitions, 15.0).reap(is_over)


async def _change(pool: DataPool, statement: str, query_id: str) -> None:
    async with pool.connection() as connection:
        await connection.execute(statement.encode(), [query_id])


@pytest.mark.parametrize("jump", _JUMPS)
async def test_a_jump_kills_neither_a_waiting_nor_a_running_query(
    url: str, workers: tuple[Worker, Worker], jump: float
) -> None:
    worker, other = workers
    waiting, running = await worker.admit_new(), await worker.admit_new()
    await worker.start(running.facts)
    await _jump(url, jump)
    assert [await _reap(each) for each in workers] == [0, 0]
    for each in workers:
        assert not (await each.read(waiting.facts.query_id)).overdue
        state = await each.read(running.facts.query_id)
        assert state.lease_alive
        taken = await other.claim(running.facts, state, str(uuid.uuid4()))
        assert taken is not None and taken.token == state.token
    assert await read_story(worker.pool, waiting.facts.query_id) == [(1, "Queued", 0)]
    assert await read_story(worker.pool, running.facts.query_id) == [(1, "Queued", 0), (2, "Running", 1)]
    # The one that waited can still be taken, and the one that runs can end.
    await other.start(waiting.facts)


@pytest.mark.parametrize("jump", _JUMPS)
async def test_a_jump_keeps_no_query_beyond_its_time(url: str, workers: tuple[Worker, Worker], jump: float) -> None:
    worker, _ = workers
    waiting, left = await worker.admit_new(), await worker.admit_new()
    await worker.start(left.facts)
    await _jump(url, jump)
    for each in workers:
        await each.transitions.read([])
    # 600 s pass, which is all that either may take.
    for query_id in (waiting.facts.query_id, left.facts.query_id):
        await _change(
            worker.pool, "UPDATE query_runs SET deadline = deadline - interval '660 s' WHERE query_id = %s", query_id
        )
        await _change(
            worker.pool,
            "UPDATE query_leases SET expires_at = expires_at - interval '660 s' WHERE query_id = %s",
            query_id,
        )
    assert not (await worker.read(left.facts.query_id)).lease_alive
    assert await _reap(worker) == 2
    rows = [await read_row(worker.pool, query.facts.query_id) for query in (waiting, left)]
    assert [row and row.error_code for row in rows] == ["QUEUE_TIMEOUT", "QUERY_TIMEOUT"]


@pytest.mark.parametrize("jump", _JUMPS)
async def test_a_lease_is_renewed_on_the_steady_clock(url: str, workers: tuple[Worker, Worker], jump: float) -> None:
    worker, other = workers
    query = await worker.admit_new()
    state = await worker.start(query.facts)
    assert state.token is not None
    leases = Leases(worker.pool, worker.clock, lease_seconds=30.0, renew_seconds=0.05)
    leases.add(Lease(query.facts.query_id, state.token))
    await _jump(url, jump)
    renewing = asyncio.create_task(leases.renew_for_ever())

    async def renewed() -> bool:
        return (await other.read(query.facts.query_id)).lease_renewal not in (None, state.lease_renewal)

    await until(renewed, renewing)
    renewing.cancel()
    assert (await other.read(query.facts.query_id)).lease_alive
    await _change(worker.pool, _PASS_LEASE, query.facts.query_id)
    assert not (await other.read(query.facts.query_id)).lease_alive


@pytest.mark.parametrize("jump", _JUMPS)
async def test_what_is_written_before_the_jump_is_noticed_is_counted_right(
    url: str, workers: tuple[Worker, Worker], jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, other = workers

    async def notice_nothing(_connection: object) -> None:
        """The jump comes after this check."""

    with monkeypatch.context() as patch:
        patch.setattr(worker.clock, "check", notice_nothing)
        await _jump(url, jump)
        waiting, running = await worker.admit_new(), await worker.admit_new()
        await worker.start(running.facts)
    for each in workers:
        assert not (await each.read(waiting.facts.query_id)).overdue
        assert (await each.read(running.facts.query_id)).lease_alive
    await _change(worker.pool, _PASS_LEASE, running.facts.query_id)
    await _change(worker.pool, _PASS_DEADLINE, waiting.facts.query_id)
    assert (await other.read(waiting.facts.query_id)).overdue
    assert not (await other.read(running.facts.query_id)).lease_alive


async def test_what_many_see_is_corrected_once(url: str, workers: tuple[Worker, Worker]) -> None:
    await _jump(url, _HOUR)
    await asyncio.gather(*(each.transitions.read([]) for each in workers for _ in range(5)))
    assert _read_skew(url) == pytest.approx(_HOUR, abs=2.0)
    await _jump(url, 0.0)
    await asyncio.gather(*(each.transitions.read([]) for each in workers for _ in range(5)))
    assert _read_skew(url) == pytest.approx(0.0, abs=2.0)


@pytest.mark.parametrize("jump", _JUMPS)
async def test_of_two_who_disagree_the_elder_is_right(url: str, workers: tuple[Worker, Worker], jump: float) -> None:
    elder, other = workers
    await _jump(url, jump)
    await elder.transitions.read([])
    # The clock is put right, and a newcomer looks for the first time before anybody has noticed.
    await _jump(url, 0.0)
    newcomer = Worker(other.pool)
    await newcomer.transitions.read([])
    for each in (elder, newcomer, elder, newcomer, other):
        await each.transitions.read([])
    assert _read_skew(url) == pytest.approx(0.0, abs=2.0)
    told = [each.clock.steady_now() for each in (elder, newcomer, other)]
    assert max(told) - min(told) < timedelta(seconds=2)


@pytest.mark.parametrize("jump", _JUMPS)
async def test_what_a_newcomer_corrects_wrongly_the_elder_puts_right(
    url: str, workers: tuple[Worker, Worker], jump: float
) -> None:
    elder, other = workers
    await _jump(url, jump)
    newcomer = Worker(other.pool)
    await newcomer.transitions.read([])
    # To the newcomer the wrong time is the true one: it corrects first.
    await _jump(url, 0.0)
    await newcomer.transitions.read([])
    for each in (elder, newcomer, elder, newcomer):
        await each.transitions.read([])
    assert _read_skew(url) == pytest.approx(0.0, abs=2.0)
    told = [each.clock.steady_now() for each in (elder, newcomer)]
    assert max(told) - min(told) < timedelta(seconds=2)


@pytest.mark.parametrize("first", [0, 1])
async def test_a_correction_stands_although_the_admission_that_made_it_fails(
    url: str, workers: tuple[Worker, Worker], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await workers[0].admit_new()
    await _jump(url, _HOUR)

    async def lose_connection(connection: Connection, *_: object) -> None:
        await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with monkeypatch.context() as patch:
        patch.setattr(admission, "insert_queries", lose_connection)
        with pytest.raises(DatabaseUnavailable):
            await workers[first].admit(make_record(make_request()))
    for each in (workers[first], workers[1 - first], workers[first]):
        await each.transitions.read([])
        assert await _reap(each) == 0
    assert _read_skew(url) == pytest.approx(_HOUR, abs=2.0)
    assert await read_story(workers[0].pool, waiting.facts.query_id) == [(1, "Queued", 0)]


async def test_a_correction_that_breaks_is_made_again(url: str, workers: tuple[Worker, Worker]) -> None:
    worker, other = workers
    waiting = await worker.admit_new()
    await _jump(url, _HOUR)
    async with (
        await psycopg.AsyncConnection.connect(url) as holder,
        await psycopg.AsyncConnection.connect(url, autocommit=True) as killer,
    ):
        await holder.execute("SELECT FROM steady_clock FOR UPDATE")
        correcting = asyncio.create_task(worker.transitions.read([]))

        async def waits() -> bool:
            return await (await killer.execute(_WAITING_CORRECTION)).fetchone() is not None

        await until(waits)
        await killer.execute(f"SELECT pg_terminate_backend(pid) FROM ({_WAITING_CORRECTION}) AS found".encode())
        with pytest.raises(DatabaseUnavailable):
            await correcting
    for each in (worker, other, worker, other):
        await each.transitions.read([])
        assert await _reap(each) == 0
    assert _read_skew(url) == pytest.approx(_HOUR, abs=2.0)
    assert await read_story(worker.pool, waiting.facts.query_id) == [(1, "Queued", 0)]


async def test_a_machine_that_slept_does_not_fight_the_others(
    url: str, workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept, awake = workers
    asleep = {id(slept): 700.0}
    real, asking = clock.elapsed, [id(awake)]
    # The own clocks of a virtual machine may stand still while it is paused: to it, the database's has jumped.
    monkeypatch.setattr(clock, "elapsed", lambda: real() - asleep.get(asking[0], 0.0))

    async def look(who: Worker) -> float:
        asking[0] = id(who)
        await who.transitions.read([])
        return _read_skew(url)

    skews = [await look(who) for who in (slept, awake) * 4]
    assert len(set(skews[2:])) == 1
    # Who has slept counts as all others do, and what it begins is not over for them.
    asking[0] = id(slept)
    query = await slept.admit_new()
    asking[0] = id(awake)
    assert not (await awake.read(query.facts.query_id)).late


async def test_who_comes_after_a_jump_counts_as_the_others_do(url: str, workers: tuple[Worker, Worker]) -> None:
    worker, other = workers
    await _jump(url, _HOUR)
    await worker.transitions.read([])
    newcomer = Worker(other.pool)
    query = await newcomer.admit_new()
    assert abs(query.state.queued_at - worker.clock.steady_now()) < timedelta(seconds=5)
    assert not (await worker.read(query.facts.query_id)).overdue


@pytest.mark.parametrize("database", [0.0, _HOUR])
async def test_a_process_that_starts_with_a_wrong_clock_takes_no_request_for_old(
    url: str, workers: tuple[Worker, Worker], database: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, other = workers
    await _jump(url, database)
    await worker.transitions.read([])
    newcomer = Worker(other.pool)
    # All that it knows before the database has told it the time.
    newcomer.clock.tell(datetime.now(UTC) + timedelta(seconds=_HOUR))
    record = make_record(make_request())
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + _HOUR)
    [query] = await newcomer.admit(record)
    assert isinstance(query, Admitted)
    assert not query.state.overdue
    assert abs(query.state.queued_at - worker.clock.steady_now()) < timedelta(seconds=5)


@pytest.mark.parametrize("jump", _JUMPS)
async def test_a_newcomer_counts_nothing_while_the_time_is_in_doubt(
    url: str, workers: tuple[Worker, Worker], jump: float
) -> None:
    elder, other = workers
    await _jump(url, jump)
    newcomer = Worker(other.pool, clock=(counted := _CountedClock()))
    finding = asyncio.create_task(find_time(newcomer.pool, newcomer.clock))
    await counted.reach(2)
    assert not finding.done()
    # Whoever has watched for longer was stopped, or kept from the database, and is back.
    await elder.transitions.read([])
    await finding
    query = await newcomer.admit_new()
    assert not (await elder.read(query.facts.query_id)).overdue
    assert abs(query.state.queued_at - elder.clock.steady_now()) < timedelta(seconds=5)


async def test_a_newcomer_that_nobody_corrects_goes_on(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await _jump(url, _HOUR)
    monkeypatch.setattr(clock, "_SETTLED_SECONDS", 1.0)
    async with opened_pool(url) as pool:
        alone = _CountedClock()
        await find_time(pool, alone)
    assert alone.looks >= 2


async def test_a_newcomer_that_agrees_begins_at_once(url: str) -> None:
    async with opened_pool(url) as pool:
        newcomer = _CountedClock()
        await find_time(pool, newcomer)
    assert newcomer.looks == 1


@pytest.mark.parametrize("stalled", [True, False])
async def test_who_was_held_up_at_its_first_look_overrules_nobody_who_knows(
    url: str, workers: tuple[Worker, Worker], stalled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_up, knowing = Worker(workers[1].pool), Worker(workers[0].pool)
    read_row, asked, goes_on = clock._read_row, asyncio.Event(), asyncio.Event()

    async def hold_up(connection: Connection, statement: LiteralString) -> Any:
        if not stalled:
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        answer = await read_row(connection, statement)
        asked.set()
        await goes_on.wait()
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(clock, "_read_row", hold_up)
        looking = asyncio.create_task(held_up.transitions.read([]))
        await asyncio.wait({looking, asyncio.create_task(asked.wait())}, return_when=asyncio.FIRST_COMPLETED)
    # Now comes one that sees the time before the jump.
    waiting = await knowing.admit_new()
    await _jump(url, _HOUR)
    goes_on.set()
    await asyncio.wait({looking})
    assert isinstance(looking.exception(), DatabaseUnavailable) is not stalled
    for each in (held_up, knowing, held_up, knowing):
        await each.transitions.read([])
    assert _read_skew(url) == pytest.approx(_HOUR, abs=2.0)
    assert not (await knowing.read(waiting.facts.query_id)).overdue


async def test_an_old_correction_holds_a_newcomer_up_for_seconds_only(
    url: str, workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database's clock was an hour behind and has been set right: the steady time stays behind for good."""
    await _jump(url, _HOUR)
    await workers[0].transitions.read([])
    monkeypatch.setattr(timekeeping, "_CORRECTED_SECONDS", 0.5)
    counted = _CountedClock()
    counted_at = clock.elapsed()
    # What is wrong for these databases is right for this process: an hour ahead.
    monkeypatch.setattr(timekeeping, "_is_near", lambda told: told - datetime.now(UTC) > timedelta(minutes=30))
    await find_time(workers[1].pool, counted)
    assert counted.looks >= 2
    assert clock.elapsed() - counted_at < clock._SETTLED_SECONDS


async def test_the_watch_ends_with_its_context_and_tells_what_it_met(url: str) -> None:
    def find_watch() -> "list[asyncio.Task[Any]]":
        return [task for task in asyncio.all_tasks() if task.get_name() == "clock"]

    async with opened_pool(url) as pool:
        counted = _CountedClock()
        async with watching(pool, counted):
            await counted.reach(2)
        assert not find_watch()
        with pytest.raises(psycopg.errors.UndefinedTable):
            async with watching(pool, counted), pool.connection() as connection:
                await connection.execute("DROP TABLE steady_clock")
                await connection.commit()
                await asyncio.wait(find_watch())


@asynccontextmanager
async def _starting_executor(url: str, scratch: Path, missing: Topic) -> AsyncIterator[asyncio.Event]:
    """An executor starts and finds one topic missing; the event tells when it waits for it."""
    waits = asyncio.Event()

    async def wait_for_topic(_config: object, topic: str) -> TopicIdentity:
        if topic == missing:
            waits.set()
            await asyncio.Event().wait()
        return TopicIdentity("cluster", topic)

    settings = Settings(kafka_bootstrap="-", data_url=url, state_url=url, results_url="s3://results", scratch=scratch)
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(wiring, "wait_for_topic", wait_for_topic)
        starting = asyncio.create_task(wiring.make_executor(settings, stack))
        # Whatever a start that failed has met is told, not waited for.
        starting.add_done_callback(lambda _: waits.set())
        yield waits
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting


@pytest.mark.parametrize("missing", [Mode.INTERACTIVE.topic, Topic.CANCELLATIONS])
async def test_an_executor_that_waits_for_kafka_sees_a_jump(url: str, tmp_path: Path, missing: Topic) -> None:
    async with _starting_executor(url, tmp_path, missing) as waits:
        await waits.wait()
        await _jump(url, _HOUR)

        async def corrected() -> bool:
            return await asyncio.to_thread(_read_skew, url) == pytest.approx(_HOUR, abs=2.0)

        await until(corrected)


async def test_an_executor_begins_nothing_while_the_time_is_in_doubt(
    url: str, workers: tuple[Worker, Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _jump(url, -_HOUR)
    counted = _CountedClock()
    monkeypatch.setattr(wiring, "DatabaseClock", lambda: counted)
    async with _starting_executor(url, tmp_path, Mode.INTERACTIVE.topic) as waits:
        await counted.reach(2)
        assert not waits.is_set()
        await workers[0].transitions.read([])
        await waits.wait()


def _read_skew(url: str) -> float:
    with psycopg.connect(url) as connection:
        row = connection.execute(READ_CLOCK.encode()).fetchone()
    assert row is not None
    skew: timedelta = row[1]
    return skew.total_seconds()
