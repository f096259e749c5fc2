"""Cancel: before its request, queued, running, storing, finished; by the right org and by another."""

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from consumers.cancellations import Cancellations
from consumers.dead_letters import DeadLetters
from consumers.executor.cancel_news import follow_cancellations
from consumers.executor.leases import Lease, Leases, Stop
from consumers.executor.query import Query
from consumers.executor.reaper import Reaper
from db.connection import DataPool, statement
from db.data.cancellations import CANCEL, CancelOutcome, NewCancellation, cancel
from db.migrations.upgrade import upgrade_data
from db.rows import to_arrays
from queryd.codec import encode
from queryd.events import OrgId, QueryCancelRequested, QueryId, Topic
from queryd.topics import read_topic_identity
from tests.integration.queries import (
    Worker,
    is_over,
    make_failure,
    make_record,
    make_request,
    new_id,
    opened_pool,
    read_row,
    read_story,
)
from tests.integration.records import prepare_topics, until, write
from tests.servers.kafka import Kafka

_QUEUED = (1, "Queued", 0)
_RUNNING = (2, "Running", 1)
_READ_NOTED = "SELECT org_id::text, reason FROM query_cancellations WHERE query_id = %s"
# The embedded broker lets a member wait for half of its session timeout before it may begin.
_SESSION = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 500}


@pytest.fixture
async def pools(data_url: str) -> AsyncIterator[tuple[DataPool, DataPool]]:
    upgrade_data(data_url)
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(opened_pool(data_url)),
            await stack.enter_async_context(opened_pool(data_url)),
        )


@pytest.fixture
def worker(pools: tuple[DataPool, DataPool]) -> Worker:
    return Worker(pools[0])


def _ask(query_id: str, org_id: str) -> NewCancellation:
    return NewCancellation(query_id, org_id, user_id=None, reason="not needed any more")


async def _cancel(worker: Worker, query_id: str, org_id: str) -> CancelOutcome:
    async with statement(worker.pool) as connection:
        outcomes = await cancel(connection, [_ask(query_id, org_id)])
    return outcomes[query_id, org_id]


def _reaper(worker: Worker) -> Reaper:
    return Reaper(worker.pool, worker.clock, worker.transitions, 15.0)


async def _code(worker: Worker, query_id: str) -> tuple[str, str | None]:
    row = await read_row(worker.pool, query_id)
    assert row is not None
    return row.status, row.error_code


# What becomes of a cancel.


async def test_a_queued_query_is_ended_and_its_story_says_so(worker: Worker) -> None:
    query = await worker.admit_new()
    assert await _cancel(worker, query.facts.query_id, query.facts.org_id) is CancelOutcome.ACCEPTED
    await _reaper(worker).reap(is_over)
    assert await _code(worker, query.facts.query_id) == ("Failed", "QUERY_CANCELLED")
    assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, (2, "Failed", 0)]


async def test_a_cancel_before_its_request_waits_for_it(worker: Worker) -> None:
    request = make_request()
    assert await _cancel(worker, request.query_id, request.org_id) is CancelOutcome.EARLY
    [verdict] = await worker.admit(make_record(request))
    assert isinstance(verdict, Query)
    assert verdict.state.cancelled
    assert (await worker.read(request.query_id)).cancelled
    await _reaper(worker).reap(is_over)
    assert await _code(worker, request.query_id) == ("Failed", "QUERY_CANCELLED")


async def test_a_running_query_cannot_succeed_any_more_and_ends_cancelled(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    assert await _cancel(worker, query.facts.query_id, query.facts.org_id) is CancelOutcome.ACCEPTED
    # While its lease lives nobody else may end it.
    assert await _reaper(worker).reap(is_over) == 0
    state = await worker.finish(query.facts, running)
    assert state is not None
    assert (state.status, state.cancelled, state.sequence) == ("Running", True, running.sequence)
    await worker.end(make_failure(query.facts, running, token=running.token))
    assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, _RUNNING, (3, "Failed", 1)]


async def test_a_query_that_its_worker_left_behind_is_ended(worker: Worker) -> None:
    query = await worker.admit_new()
    await worker.hand_back(await worker.start(query.facts))
    assert await _cancel(worker, query.facts.query_id, query.facts.org_id) is CancelOutcome.ACCEPTED
    assert await _reaper(worker).reap(is_over) == 1
    assert await _code(worker, query.facts.query_id) == ("Failed", "QUERY_CANCELLED")


async def test_a_finished_query_stays_as_it_is(worker: Worker) -> None:
    query = await worker.admit_new()
    await worker.finish(query.facts, await worker.start(query.facts))
    before = await read_row(worker.pool, query.facts.query_id)
    assert await _cancel(worker, query.facts.query_id, query.facts.org_id) is CancelOutcome.FINISHED
    await _reaper(worker).reap(is_over)
    assert await read_row(worker.pool, query.facts.query_id) == before
    assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, _RUNNING, (3, "Succeeded", 1)]


async def test_another_orgs_cancel_does_nothing(worker: Worker) -> None:
    query = await worker.admit_new()
    assert await _cancel(worker, query.facts.query_id, new_id()) is CancelOutcome.OTHER_ORG
    assert not (await worker.read(query.facts.query_id)).cancelled
    running = await worker.start(query.facts)
    await worker.finish(query.facts, running)
    assert await _code(worker, query.facts.query_id) == ("Succeeded", None)


async def test_another_orgs_cancel_before_the_request_does_nothing(worker: Worker) -> None:
    request = make_request()
    assert await _cancel(worker, request.query_id, new_id()) is CancelOutcome.EARLY
    await worker.admit(make_record(request))
    assert not (await worker.read(request.query_id)).cancelled


async def test_a_batch_answers_for_each(worker: Worker) -> None:
    queries = [await worker.admit_new() for _ in range(3)]
    await worker.finish(queries[1].facts, await worker.start(queries[1].facts))
    stranger, early = new_id(), new_id()
    asked = [_ask(query.facts.query_id, query.facts.org_id) for query in queries]
    asked += [replace(asked[0], org_id=stranger), _ask(early, stranger), asked[0]]
    async with statement(worker.pool) as connection:
        outcomes = await cancel(connection, asked)
    assert [outcomes[each.query_id, each.org_id].value for each in asked] == [
        "accepted",
        "finished",
        "accepted",
        "other_org",
        "early",
        "accepted",
    ]


# Whoever locks the row first wins.


async def test_a_finish_that_waits_for_a_cancel_does_not_succeed(worker: Worker, data_url: str) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    async with await psycopg.AsyncConnection.connect(data_url) as cancelling:
        await cancelling.execute(
            CANCEL.encode(), to_arrays(NewCancellation, [_ask(query.facts.query_id, query.facts.org_id)])
        )
        finishing = asyncio.create_task(worker.finish(query.facts, running))
        await _wait_for_lock(data_url)
        await cancelling.commit()
    state = await finishing
    assert state is not None
    assert (state.status, state.cancelled) == ("Running", True)
    assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, _RUNNING]


async def test_a_cancel_that_waits_for_a_finish_comes_too_late(worker: Worker, data_url: str) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    async with await psycopg.AsyncConnection.connect(data_url) as blocking:
        # Both wait for the row, the finish first.
        await blocking.execute("SELECT FROM query_runs WHERE query_id = %s FOR UPDATE", [query.facts.query_id])
        finishing = asyncio.create_task(worker.finish(query.facts, running))
        await _wait_for_lock(data_url)
        cancelling = asyncio.create_task(_cancel(worker, query.facts.query_id, query.facts.org_id))
        await _wait_for_lock(data_url, 2)
    assert await cancelling is CancelOutcome.FINISHED
    state = await finishing
    assert state is not None
    assert state.status == "Succeeded"


async def test_an_early_cancel_that_commits_after_the_claim_still_wins(worker: Worker, data_url: str) -> None:
    blocker, request = await worker.admit_new(), make_request()
    asked = [_ask(blocker.facts.query_id, blocker.facts.org_id), _ask(request.query_id, request.org_id)]

    async def ask() -> dict[tuple[str, str], CancelOutcome]:
        async with statement(worker.pool) as connection:
            return await cancel(connection, asked)

    async with await psycopg.AsyncConnection.connect(data_url) as blocking:
        # The batch of cancels waits for another query's row, and sees nothing of what is admitted meanwhile.
        await blocking.execute("SELECT FROM query_runs WHERE query_id = %s FOR UPDATE", [blocker.facts.query_id])
        asking = asyncio.create_task(ask())
        await _wait_for_lock(data_url)
        [query] = await worker.admit(make_record(request))
        assert isinstance(query, Query)
        running = await worker.start(query.facts)
    assert (await asking)[request.query_id, request.org_id] is CancelOutcome.EARLY
    state = await worker.finish(query.facts, running)
    assert state is not None
    assert (state.status, state.cancelled) == ("Running", True)


async def _wait_for_lock(url: str, waiting: int = 1) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection, asyncio.timeout(30):
        while True:
            cursor = await connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if await cursor.fetchone() == (waiting,):
                return
            await asyncio.sleep(0.01)


# News.


@asynccontextmanager
async def _listening(worker: Worker, leases: Leases) -> AsyncIterator[None]:
    task = asyncio.create_task(follow_cancellations(worker.pool, leases, _reaper(worker)))

    async def listens() -> bool:
        async with statement(worker.pool) as connection:
            cursor = await connection.execute(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() AND query = 'LISTEN queryd_cancelled'"
            )
            return await cursor.fetchone() is not None

    await until(listens, task)
    yield
    task.cancel()


async def test_a_query_that_runs_here_is_told_at_once(worker: Worker) -> None:
    query = await worker.admit_new()
    state = await worker.start(query.facts)
    assert state.token is not None
    leases = Leases(worker.pool, lease_seconds=600.0, renew_seconds=600.0)
    lease = Lease(query.facts.query_id, state.token)
    async with _listening(worker, leases):
        leases.add(lease)
        await _cancel(worker, query.facts.query_id, query.facts.org_id)
        async with asyncio.timeout(30):
            assert await lease.stopped is Stop.CANCELLED


async def test_a_query_that_waits_is_ended_without_waiting_for_the_reapers_next_look(worker: Worker) -> None:
    query = await worker.admit_new()
    leases = Leases(worker.pool, lease_seconds=600.0, renew_seconds=600.0)

    async def ended() -> bool:
        return await _code(worker, query.facts.query_id) == ("Failed", "QUERY_CANCELLED")

    async with _listening(worker, leases):
        await _cancel(worker, query.facts.query_id, query.facts.org_id)
        await until(ended)


# The consumer.


@asynccontextmanager
async def _consuming(worker: Worker, kafka: dict[str, Any]) -> AsyncIterator["asyncio.Task[None]"]:
    topics = {Topic.CANCELLATIONS.value: await asyncio.to_thread(read_topic_identity, kafka, Topic.CANCELLATIONS)}
    letters = DeadLetters(worker.pool, topics)
    config = kafka | _SESSION | {"group.id": new_id()}
    cancellations = Cancellations(worker.pool, config, letters)
    task = asyncio.create_task(cancellations.run())
    yield task
    cancellations.stop()
    async with asyncio.timeout(60):
        await task


def _event(query_id: str, org_id: str, **changes: Any) -> bytes:
    return encode(QueryCancelRequested(QueryId(query_id), OrgId(org_id), **changes))


async def _read_letter(worker: Worker, value: bytes) -> Any:
    """The headers of the dead letter with that value; None without one."""
    async with worker.pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT headers FROM outbox WHERE type = 'DeadLetter' AND payload = %s", [value]
        )
        row = await cursor.fetchone()
    return None if row is None else row[0]


async def test_cancel_events_are_noted_and_bad_ones_are_dead_letters(worker: Worker, kafka: Kafka) -> None:
    config = prepare_topics(kafka)
    query = await worker.admit_new()
    mine, org = query.facts.query_id, query.facts.org_id
    bad = new_id().encode()
    offset = write(config, Topic.CANCELLATIONS, new_id(), bad)
    write(config, Topic.CANCELLATIONS, mine, _event(mine, org, user_id=new_id(), reason="too\0 slow"))

    async def noted() -> bool:
        return (await worker.read(mine)).cancelled

    async with _consuming(worker, config) as task:
        await until(noted, task)

        async def dead_lettered() -> bool:
            return await _read_letter(worker, bad) is not None

        await until(dead_lettered, task)
    written = await _read_letter(worker, bad)
    assert written is not None
    headers = {b64decode(name).decode(): None if value is None else b64decode(value) for name, value in written}
    assert headers["queryd_dead_code"] == b"UNDECODABLE"
    assert headers["queryd_dead_topic"] == Topic.CANCELLATIONS.value.encode()
    assert headers["queryd_dead_offset"] == str(offset).encode()
    async with worker.pool.connection() as connection:
        cursor = await connection.execute(_READ_NOTED, [mine])
        assert await cursor.fetchall() == [(org, "too slow")]
