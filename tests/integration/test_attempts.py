"""Admission and attempts on a real Postgres: one live attempt a query, and one event for each step."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from typing import Any

import psycopg
import pytest

from consumers.executor.admission import Done, Refused, Verdict, admit
from consumers.executor.attempt import find_failure
from consumers.executor.endings import fail, overdue_failure
from consumers.executor.query import Query
from consumers.executor.reaper import Reaper
from consumers.executor.status_event import QueryFacts
from consumers.executor.transitions import EndResult, RowRefused, run_batch
from consumers.executor.watch import Watch
from db.clock import elapsed
from db.connection import DataPool
from db.data.attempts import Renewal, claim, renew
from db.data.datasets import Caller
from db.data.outbox import shard_of
from db.data.runs import RunState, read_overdue
from db.data.saved_queries import insert_saved
from db.migrations.upgrade import upgrade_data
from queryd.dead_letters import DeadCode
from queryd.events import ErrorCode, Mode, QueryRequested, Status, event_id
from service.embedded.postgres import Postgres
from tests.integration.queries import (
    RULES,
    Worker,
    ask_to_cancel,
    is_over,
    make_claim,
    make_failure,
    make_record,
    make_request,
    make_success,
    new_id,
    opened_pool,
    pass_deadline,
    read_events,
    read_legible,
    read_row,
    read_story,
)

_HASH_OF_NOTHING = hashlib.sha256(b"").hexdigest()
# Longer than any statement of ours takes, even on a busy machine: what would wait for a lock hangs until then.
_STATEMENT_SECONDS = 20.0

_QUEUED = (1, "Queued", 0)


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> Iterator[str]:
    """One migrated data database for all of these tests: making one takes longer than most of them."""
    name = f"attempts_{uuid.uuid4().hex}"
    postgres_server.create_database(name)
    url = postgres_server.url(name)
    upgrade_data(url)
    yield url
    postgres_server.drop_database(name)


@pytest.fixture
async def pools(database: str) -> AsyncIterator[tuple[DataPool, DataPool]]:
    """Two processes' connections to the data database, which is empty again."""
    with psycopg.connect(database) as connection:
        connection.execute("TRUNCATE query_results, saved_queries, query_cancellations, deleted_ids, outbox CASCADE")
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(opened_pool(database)),
            await stack.enter_async_context(opened_pool(database)),
        )


@pytest.fixture
def pool(pools: tuple[DataPool, DataPool]) -> DataPool:
    return pools[0]


@pytest.fixture
def worker(pools: tuple[DataPool, DataPool]) -> Worker:
    return Worker(pools[0])


@pytest.fixture
def other(pools: tuple[DataPool, DataPool]) -> Worker:
    """Another process, with connections of its own."""
    return Worker(pools[1])


# Claims.


async def test_a_claim_is_exclusive(worker: Worker, other: Worker) -> None:
    queries = [await worker.admit_new() for _ in range(10)]
    ours, theirs = ([new_id() for _ in queries] for _ in range(2))
    answers = await asyncio.gather(
        *(worker.claim(query.facts, query.state, token) for query, token in zip(queries, ours, strict=True)),
        *(other.claim(query.facts, query.state, token) for query, token in zip(queries, theirs, strict=True)),
    )
    claimants = zip(queries, ours, theirs, answers[: len(queries)], answers[len(queries) :], strict=True)
    for query, our_token, their_token, our_answer, their_answer in claimants:
        state = await worker.read(query.facts.query_id)
        assert state.token in (our_token, their_token)
        assert (state.status, state.sequence, state.attempt, state.crashes) == ("Running", 2, 1, 0)
        # Who has won learns it. Who has not, because the row was locked, may have read the state before.
        winner, loser = (our_answer, their_answer) if state.token == our_token else (their_answer, our_answer)
        assert winner is not None
        assert loser is not None
        assert winner.token == state.token
        assert loser.token in (None, state.token)
        assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, (2, "Running", 1)]


async def test_a_claim_does_not_wait_for_another_workers_claim(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    token = new_id()
    async with worker.pool.connection() as connection:
        await claim(connection, [make_claim(query.facts, query.state, token)])
        # Not committed yet.
        async with asyncio.timeout(_STATEMENT_SECONDS):
            seen = await other.claim(query.facts, query.state, new_id())
        assert seen is not None
        assert (seen.status, seen.token) == ("Queued", None)
    assert (await worker.read(query.facts.query_id)).token == token
    assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, (2, "Running", 1)]


async def test_a_claim_of_a_state_that_is_history_does_nothing(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    late = await worker.claim(query.facts, query.state, new_id(), running.lease_renewal)
    assert late is not None
    assert (late.token, late.attempt) == (running.token, 1)
    assert len(await read_story(worker.pool, query.facts.query_id)) == 2


async def test_a_live_lease_protects_its_attempt(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    refused = await other.claim(query.facts, running, new_id())
    assert refused is not None
    assert (refused.token, refused.attempt) == (running.token, 1)
    assert len(await read_story(worker.pool, query.facts.query_id)) == 2


async def test_a_dead_lease_protects_nothing(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    taken = await other.take_over(query.facts)
    assert taken.token != running.token
    assert (taken.attempt, taken.crashes) == (2, 1)
    assert (await read_story(worker.pool, query.facts.query_id))[-1] == (3, "Running", 2)


@pytest.mark.parametrize("shift", ["-1 hour", "1 hour"])
async def test_no_wall_clock_takes_a_lease_or_saves_it(worker: Worker, other: Worker, shift: str) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    async with worker.pool.connection() as connection:
        await connection.execute("UPDATE query_leases SET expires_at = expires_at + %s::interval", [shift])
    refused = await other.claim(query.facts, running, new_id())
    assert refused is not None and refused.token == running.token
    refused = await other.end(make_failure(query.facts, running))
    assert refused is not None and refused.status == "Running"
    assert (await other.take_over(query.facts)).attempt == 2


async def test_a_lease_that_was_handed_back_and_claimed_again_is_not_the_one_that_was_observed(
    worker: Worker, other: Worker
) -> None:
    query = await worker.admit_new()
    observed = await worker.start(query.facts)
    await worker.hand_back(observed)
    live = await worker.start(query.facts)
    # The number of renewals begins anew.
    assert live.lease_renewal == observed.lease_renewal
    refused = await other.claim(query.facts, observed, new_id(), stale_lease_version=observed.lease_renewal)
    assert refused is not None and refused.token == live.token
    ending = make_failure(query.facts, observed, stale_lease_version=observed.lease_renewal)
    refused = await other.end(ending)
    assert refused is not None and (refused.status, refused.token) == ("Running", live.token)


async def test_a_renewal_that_has_moved_since_protects_its_attempt(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    await _renew(worker, running)
    refused = await other.claim(query.facts, running, new_id(), stale_lease_version=running.lease_renewal)
    assert refused is not None
    assert (refused.token, refused.attempt) == (running.token, 1)


async def test_a_takeover_does_not_repeat_a_renewal_number(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    taken = await other.take_over(query.facts)
    assert running.lease_renewal is not None
    assert taken.lease_renewal is not None
    assert taken.lease_renewal > running.lease_renewal


async def test_a_cancelled_query_is_not_claimed(worker: Worker) -> None:
    query = await worker.admit_new()
    await ask_to_cancel(worker.pool, query.facts.query_id, query.facts.org_id)
    refused = await worker.claim(query.facts, query.state, new_id())
    assert refused is not None
    assert (refused.status, refused.token, refused.cancelled) == ("Queued", None, True)
    assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED]


async def test_a_cancel_before_its_request_wins_too(worker: Worker) -> None:
    request = make_request()
    await ask_to_cancel(worker.pool, request.query_id, request.org_id)
    [verdict] = await worker.admit(make_record(request))
    assert isinstance(verdict, Query)
    assert verdict.state.cancelled
    refused = await worker.claim(verdict.facts, verdict.state, new_id())
    assert refused is not None
    assert refused.token is None


async def test_another_orgs_cancel_stops_nothing(worker: Worker) -> None:
    query = await worker.admit_new()
    await ask_to_cancel(worker.pool, query.facts.query_id, new_id())
    assert not (await worker.start(query.facts)).cancelled


async def test_a_query_that_its_worker_left_behind_past_its_deadline_has_a_next_attempt(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    await pass_deadline(worker.pool, query.facts.query_id)
    token = new_id()
    taken = await worker.claim(query.facts, running, token, running.lease_renewal)
    assert taken is not None
    assert (taken.status, taken.attempt, taken.token, taken.crashes) == ("Running", 2, token, 1)


async def test_an_overdue_query_is_not_claimed(worker: Worker) -> None:
    query = await worker.admit_new()
    await pass_deadline(worker.pool, query.facts.query_id)
    refused = await worker.claim(query.facts, query.state, new_id())
    assert refused is not None
    assert (refused.status, refused.overdue) == ("Queued", True)


# Finishing.


async def test_a_finish_writes_the_row_and_frees_the_lease(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    ending = make_success(query.facts, running)
    done = await worker.end(ending)
    assert done is not None
    assert (done.status, done.sequence, done.token, done.lease_token) == ("Succeeded", 3, running.token, None)
    row = await read_row(worker.pool, query.facts.query_id)
    assert row is not None
    assert (row.output_location, row.row_count, row.bytes) == (ending.output_location, 1, 100)
    event = (await read_events(worker.pool, query.facts.query_id))[-1].event
    assert (event.output_location, event.row_count, event.bytes) == (row.output_location, row.row_count, row.bytes)


async def test_a_finish_is_idempotent_by_reading_back(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    ending = make_success(query.facts, running)
    first = await worker.end(ending)
    row = await read_row(worker.pool, query.facts.query_id)
    again = await worker.end(ending)
    assert first is not None
    assert again is not None
    # Our own token on a terminal row: the first answer was lost, not the fence.
    assert (again.status, again.sequence, again.token) == ("Succeeded", ending.sequence + 1, ending.token)
    assert await read_row(worker.pool, query.facts.query_id) == row
    assert len(await read_story(worker.pool, query.facts.query_id)) == 3


async def test_a_stale_attempt_cannot_finish(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    stale = await worker.start(query.facts)
    live = await other.take_over(query.facts)
    # By what it remembers, and by what it could read.
    for state in (stale, replace(live, token=stale.token)):
        answer = await worker.finish(query.facts, state)
        assert answer is not None
        assert (answer.status, answer.token, answer.attempt) == ("Running", live.token, 2)
    done = await other.finish(query.facts, live)
    assert done is not None
    assert done.status == "Succeeded"
    late = await worker.finish(query.facts, stale)
    assert late is not None
    assert late.token == live.token
    story = [_QUEUED, (2, "Running", 1), (3, "Running", 2), (4, "Succeeded", 2)]
    assert await read_story(worker.pool, query.facts.query_id) == story


async def test_a_stale_attempt_can_neither_renew_nor_hand_back(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    stale = await worker.start(query.facts)
    live = await other.take_over(query.facts)
    assert await _renew(worker, stale) == {}
    await worker.hand_back(stale, crashed=True)
    state = await worker.read(query.facts.query_id)
    assert (state.token, state.crashes, state.lease_token, state.lease_renewal) == (
        live.token,
        live.crashes,
        live.token,
        live.lease_renewal,
    )


async def test_of_two_ends_at_once_one_counts(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    taking = make_failure(query.facts, running, stale_lease_version=running.lease_renewal)
    await asyncio.gather(worker.finish(query.facts, running), other.end(taking))
    row = await read_row(worker.pool, query.facts.query_id)
    story = await read_story(worker.pool, query.facts.query_id)
    assert row is not None
    assert story == [_QUEUED, (2, "Running", 1), (3, row.status, 1)]
    assert (row.output_location is None) == (row.status == "Failed")


async def test_an_end_without_a_token_is_refused_while_a_lease_lives(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    refused = await other.end(make_failure(query.facts, running))
    assert refused is not None
    assert (refused.status, refused.sequence) == ("Running", 2)
    # The lease has moved on since it was seen to stand still.
    await _renew(worker, running)
    ending = make_failure(query.facts, running, stale_lease_version=running.lease_renewal)
    refused = await other.end(ending)
    assert refused is not None
    assert refused.status == "Running"
    assert len(await read_story(worker.pool, query.facts.query_id)) == 2


@pytest.mark.parametrize("how", ["stood still", "handed back", "never claimed"])
async def test_an_end_without_a_token_ends_what_nobody_holds(worker: Worker, other: Worker, how: str) -> None:
    query = await worker.admit_new()
    stale_lease_version = None
    match how:
        case "stood still":
            stale_lease_version = (await worker.start(query.facts)).lease_renewal
        case "handed back":
            await worker.hand_back(await worker.start(query.facts))
    state = await other.read(query.facts.query_id)
    ended = await other.end(make_failure(query.facts, state, stale_lease_version=stale_lease_version))
    assert ended is not None
    assert (ended.status, ended.sequence, ended.lease_token) == ("Failed", state.sequence + 1, None)


async def test_a_terminal_query_stays_as_it_is(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    done = await worker.finish(query.facts, running)
    assert done is not None
    row = await read_row(worker.pool, query.facts.query_id)
    claimed = await worker.claim(query.facts, done, new_id())
    assert claimed is not None
    assert claimed.token == running.token
    await worker.hand_back(done, crashed=True)
    await worker.end(make_failure(query.facts, done))
    await worker.end(make_failure(query.facts, done, token=done.token))
    state = await worker.read(query.facts.query_id)
    assert (state.token, state.crashes, state.sequence) == (done.token, 0, 3)
    assert await read_row(worker.pool, query.facts.query_id) == row
    assert len(await read_story(worker.pool, query.facts.query_id)) == 3


# Renewing, handing back, counting crashes.


async def test_a_renewal_answers_for_ours_only_and_tells_of_cancellations(worker: Worker, other: Worker) -> None:
    kept, cancelled, lost, finished = [await worker.admit_new() for _ in range(4)]
    states = {query.facts.query_id: await worker.start(query.facts) for query in (kept, cancelled, lost, finished)}
    await ask_to_cancel(worker.pool, cancelled.facts.query_id, cancelled.facts.org_id)
    # Another org's cancel of the query that is kept.
    await ask_to_cancel(worker.pool, kept.facts.query_id, new_id())
    await other.take_over(lost.facts)
    await worker.finish(finished.facts, states[finished.facts.query_id])
    assert await _renew(worker, *states.values()) == {kept.facts.query_id: False, cancelled.facts.query_id: True}
    before, after = states[kept.facts.query_id], await worker.read(kept.facts.query_id)
    assert before.lease_renewal is not None
    assert after.lease_renewal == before.lease_renewal + 1


async def test_a_hand_back_emits_nothing_and_lets_the_next_attempt_start_at_once(worker: Worker, other: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    given = await worker.hand_back(running)
    assert given is not None
    assert (given.status, given.token, given.lease_token, given.sequence) == ("Running", None, None, 2)
    assert len(await read_story(worker.pool, query.facts.query_id)) == 2
    taken = await other.start(query.facts)
    assert (taken.attempt, taken.sequence, taken.crashes) == (2, 3, 0)
    assert taken.started_at == running.started_at


async def test_only_crashes_and_dead_leases_count_as_crashes(worker: Worker) -> None:
    query = await worker.admit_new()
    crashes = []

    async def start_and(crashed: bool | None) -> None:
        # Without a lease the same claim is a common one.
        running = await worker.take_over(query.facts)
        crashes.append(running.crashes)
        if crashed is not None:
            await worker.hand_back(running, crashed=crashed)

    for crashed in (False, True, False, None, False, True):
        await start_and(crashed)
    last = await worker.start(query.facts)
    assert [*crashes, last.crashes] == [0, 0, 1, 1, 2, 2, 3]
    done = await worker.finish(query.facts, last)
    assert done is not None
    assert done.crashes == 3


# Events.


async def test_every_step_writes_one_event_and_their_positions_rise_with_the_sequence(
    worker: Worker, other: Worker
) -> None:
    async def live(query: Query) -> None:
        first = await worker.start(query.facts)
        await worker.hand_back(first)
        await other.start(query.facts)
        third = await worker.take_over(query.facts)
        await worker.finish(query.facts, third)

    queries = [await worker.admit_new() for _ in range(8)]
    await asyncio.gather(*(live(query) for query in queries))
    for query in queries:
        stored = await read_events(worker.pool, query.facts.query_id)
        events = [item.event for item in stored]
        # In order of position.
        assert [(event.sequence, event.status.value, event.attempt) for event in events] == [
            _QUEUED,
            (2, "Running", 1),
            (3, "Running", 2),
            (4, "Running", 3),
            (5, "Succeeded", 3),
        ]
        assert [event.previous_status for event in events] == [None, *(event.status for event in events[:-1])]
        ids = [event_id(query.facts.query_id, sequence) for sequence in range(1, 6)]
        assert [item.event_id for item in stored] == ids
        assert [item.headers["ce_id"] for item in stored] == ids
        assert {item.headers["ce_subject"] for item in stored} == {query.facts.query_id}
        # One trace from the first event to the last, each with a span of its own.
        assert len({item.headers["traceparent"][:35] for item in stored}) == 1
        assert len({item.headers["traceparent"] for item in stored}) == 5
        assert await _read_shards(worker.pool, query.facts.query_id) == {shard_of(query.facts.query_id)}


async def test_a_batch_with_one_bad_row_fails_only_that_row(worker: Worker) -> None:
    queries = [await worker.admit_new() for _ in range(7)]
    bad = queries[3].facts.query_id
    claims = [
        # Postgres stores no NUL in a text.
        make_claim(query.facts, query.state, new_id(), worker="\0" if query.facts.query_id == bad else "worker")
        for query in queries
    ]
    answers = await worker.transitions.claim([(claim, Caller(claim.org_id, None, ())) for claim in claims])
    assert [answer is None for answer in answers] == [query.facts.query_id == bad for query in queries]
    states = await worker.transitions.read([query.facts.query_id for query in queries])
    assert {state.query_id: state.status for state in states.values()} == {
        query.facts.query_id: "Queued" if query.facts.query_id == bad else "Running" for query in queries
    }
    running = [query for query in queries if query.facts.query_id != bad]
    endings = [make_success(query.facts, states[query.facts.query_id]) for query in running]
    # More rows than a BIGINT counts.
    endings[0] = replace(endings[0], row_count=2**63)
    ended = await asyncio.gather(*map(worker.transitions.end, endings))
    assert ended == [EndResult.NOT_OURS] + [EndResult.ENDED] * (len(running) - 1)
    left = await worker.transitions.read([query.facts.query_id for query in running])
    assert [left[query.facts.query_id].status for query in running] == ["Running"] + ["Succeeded"] * (len(running) - 1)
    for query in running[1:]:
        assert len(await read_story(worker.pool, query.facts.query_id)) == 3


# The reaper.


async def test_the_reaper_ends_overdue_queries_that_nobody_holds_and_nothing_else(worker: Worker) -> None:
    names = ("waits", "overdue", "runs", "runs too long", "left", "left too long", "given back too long", "done")
    queries = {name: await worker.admit_new() for name in names}
    ids = {name: query.facts.query_id for name, query in queries.items()}
    running = {name: await worker.start(queries[name].facts) for name in names[2:]}
    await worker.hand_back(running["given back too long"])
    # An attempt that is alive ends itself.
    for name in ("overdue", "runs too long", "left too long", "given back too long"):
        await pass_deadline(worker.pool, ids[name])
    await worker.finish(queries["done"].facts, running["done"])
    rows = {name: await read_row(worker.pool, query_id) for name, query_id in ids.items()}
    stories = {name: await read_story(worker.pool, query_id) for name, query_id in ids.items()}

    # A lease is dead as soon as it is seen twice with the same number.
    reaper = Reaper(worker.pool, worker.clock, worker.transitions, lease_seconds=0.0)
    assert await reaper.reap(is_over) == 2
    await _renew(worker, running["runs too long"])
    assert await reaper.reap(is_over) == 1

    reaped = {
        "overdue": (2, "QUEUE_TIMEOUT", 0),
        "left too long": (3, "QUERY_TIMEOUT", 1),
        "given back too long": (3, "QUERY_TIMEOUT", 1),
    }
    for name, query_id in ids.items():
        row, story = await read_row(worker.pool, query_id), await read_story(worker.pool, query_id)
        if name not in reaped:
            assert (row, story) == (rows[name], stories[name]), name
            continue
        sequence, code, attempt = reaped[name]
        assert row is not None
        assert (row.status, row.error_code) == ("Failed", code)
        assert story == [*stories[name], (sequence, "Failed", attempt)]
        event = (await read_events(worker.pool, query_id))[-1].event
        assert (event.error_code, event.error_message) == (code, row.error_message)
        assert (await worker.read(query_id)).lease_token is None
    await _renew(worker, running["runs too long"])
    assert await reaper.reap(is_over) == 0


async def test_what_was_left_behind_waits_for_its_record_while_that_may_come(worker: Worker) -> None:
    query = await worker.admit_new()
    await worker.start(query.facts)
    await pass_deadline(worker.pool, query.facts.query_id)
    record = query.record
    asked: list[tuple[str, int, int]] = []

    def still_comes(topic: str, partition: int, offset: int) -> bool:
        asked.append((topic, partition, offset))
        return False

    reaper = Reaper(worker.pool, worker.clock, worker.transitions, lease_seconds=0.0)
    # An hour has passed since its deadline, in the test's helper: what waits for longer is forsaken.
    await _change_deadline(worker.pool, query.facts.query_id, "+ interval '10 min'")
    assert await reaper.reap(still_comes) == 0
    assert asked == [(record.topic, record.partition, record.offset)]
    await _change_deadline(worker.pool, query.facts.query_id, "- interval '1 hour'")
    assert [await reaper.reap(still_comes) for _ in range(2)] == [0, 1]
    assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, (2, "Running", 1), (3, "Failed", 1)]


@pytest.mark.slow
async def test_a_backlog_of_overdue_queries_hides_neither_cancelled_ones_nor_those_with_a_dead_lease(
    worker: Worker,
) -> None:
    left_behind, cancelled = await worker.admit_new(), await worker.admit_new()
    await worker.start(left_behind.facts)
    await pass_deadline(worker.pool, left_behind.facts.query_id)
    await worker.admit(*(make_record(make_request()) for _ in range(1_001)))
    async with worker.pool.connection() as connection:
        await connection.execute(
            "UPDATE query_runs SET deadline = now() - interval '2 hours' WHERE attempt = 0 AND query_id <> %s",
            [cancelled.facts.query_id],
        )
        await connection.execute(
            "UPDATE query_runs SET cancelled = true WHERE query_id = %s", [cancelled.facts.query_id]
        )
        found = {each.query_id for each in await read_overdue(connection, grace=0.0, forsaken=0.0)}
    assert len(found) == 1_002
    assert {left_behind.facts.query_id, cancelled.facts.query_id} < found


async def _change_deadline(pool: DataPool, query_id: str, by: str) -> None:
    async with pool.connection() as connection:
        await connection.execute(
            f"UPDATE query_runs SET deadline = deadline {by} WHERE query_id = %s".encode(), [query_id]
        )


async def test_reapers_of_two_processes_end_a_query_once(worker: Worker, other: Worker) -> None:
    queries = [await worker.admit_new() for _ in range(10)]
    for query in queries:
        await pass_deadline(worker.pool, query.facts.query_id)
    await asyncio.gather(*(Reaper(who.pool, who.clock, who.transitions, 15.0).reap(is_over) for who in (worker, other)))
    for query in queries:
        assert await read_story(worker.pool, query.facts.query_id) == [_QUEUED, (2, "Failed", 0)]


async def test_the_reapers_event_tells_the_same_as_the_admissions(worker: Worker) -> None:
    query = await worker.admit_new(mode=Mode.BATCH, task_id=new_id())
    await pass_deadline(worker.pool, query.facts.query_id)
    await Reaper(worker.pool, worker.clock, worker.transitions, 15.0).reap(is_over)
    first, last = [stored.event for stored in await read_events(worker.pool, query.facts.query_id)]
    same = ("org_id", "user_id", "task_id", "mode", "sql_hash", "output_format", "saved_query_id")
    assert [getattr(first, name) for name in same] == [getattr(last, name) for name in same]


# Admission.


async def test_an_admitted_query_is_a_row_and_an_event(worker: Worker) -> None:
    request = make_request(mode=Mode.BATCH, task_id=new_id(), sql="SELECT 'ä'")
    record = make_record(request)
    [verdict] = await worker.admit(record)
    assert isinstance(verdict, Query)
    assert (verdict.sql, verdict.record, verdict.request) == (request.sql, record, request)
    state = verdict.state
    assert (state.status, state.sequence, state.attempt, state.token) == ("Queued", 1, 0, None)
    assert (state.topic, state.partition, state.record_offset) == (record.topic, record.partition, record.offset)
    row = await read_row(worker.pool, request.query_id)
    assert row is not None
    digest = hashlib.sha256("SELECT 'ä'".encode()).hexdigest()
    expected = (request.org_id, request.user_id, request.task_id, "batch", "Queued", digest, "parquet")
    assert (
        row.org_id,
        row.user_id,
        row.task_id,
        row.mode,
        row.status,
        row.sql_hash,
        row.output_format,
    ) == expected
    [stored] = await read_events(worker.pool, request.query_id)
    event = stored.event
    assert event.output_format is not None
    assert (
        event.org_id,
        event.user_id,
        event.task_id,
        event.mode.value,
        event.status.value,
        event.sql_hash,
        event.output_format.value,
    ) == expected


async def test_no_table_of_ours_holds_the_sql_or_a_parameter(worker: Worker) -> None:
    request = make_request(sql="SELECT 'a secret text', $name", parameters={"name": "a secret value"})
    [verdict] = await worker.admit(make_record(request))
    assert isinstance(verdict, Query)
    running = await worker.start(verdict.facts)
    await worker.finish(verdict.facts, running)
    dumped = await _dump(worker.pool)
    assert request.query_id in dumped
    assert "secret" not in dumped
    assert b"secret".hex() not in dumped


async def test_the_same_record_again_is_the_same_query(worker: Worker) -> None:
    record = make_record(make_request())
    first = await worker.admit(record)
    again = await worker.admit(record)
    assert [type(verdict) for verdict in (*first, *again)] == [Query, Query]
    assert await _count(worker.pool, "query_results") == 1
    assert await read_story(worker.pool, _id_of(first)) == [_QUEUED]


async def test_the_same_request_at_another_offset_is_done_at_once(worker: Worker) -> None:
    request = make_request()
    await worker.admit(make_record(request))
    # An honest retry was asked for at another time.
    later = replace(request, requested_at=worker.clock.now())
    assert await worker.admit(make_record(later)) == [Done()]
    assert await _count(worker.pool, "query_results") == 1
    assert await read_story(worker.pool, request.query_id) == [_QUEUED]


async def test_the_same_request_twice_in_one_batch_is_one_query(worker: Worker) -> None:
    request = make_request()
    verdicts = await worker.admit(make_record(request), make_record(make_request()), make_record(request))
    assert [type(verdict) for verdict in verdicts] == [Query, Query, Done]
    assert await read_story(worker.pool, request.query_id) == [_QUEUED]


async def test_two_workers_that_admit_the_same_batch_make_each_row_once(worker: Worker, other: Worker) -> None:
    records = [make_record(make_request()) for _ in range(20)]
    ours, theirs = await asyncio.gather(worker.admit(*records), other.admit(*reversed(records)))
    assert {type(verdict) for verdict in (*ours, *theirs)} == {Query}
    assert await _count(worker.pool, "query_results") == len(records)
    assert await _count(worker.pool, "outbox") == len(records)


async def test_the_record_of_a_finished_query_is_done(worker: Worker) -> None:
    record = make_record(make_request())
    [verdict] = await worker.admit(record)
    assert isinstance(verdict, Query)
    await worker.finish(verdict.facts, await worker.start(verdict.facts))
    assert await worker.admit(record) == [Done()]
    assert len(await read_story(worker.pool, verdict.facts.query_id)) == 3


async def test_another_request_with_a_known_id_is_a_conflict_and_leaves_the_first_alone(worker: Worker) -> None:
    request = make_request()
    await worker.admit(make_record(request))
    row = await read_row(worker.pool, request.query_id)
    changes: list[dict[str, Any]] = [
        {"sql": "SELECT 2"},
        {"org_id": new_id()},
        {"user_id": new_id()},
        {"parameters": {"x": 1}},
        {"max_rows": 5},
    ]
    for change in changes:
        [verdict] = await worker.admit(make_record(replace(request, **change)))
        assert isinstance(verdict, Refused), change
        assert verdict.code is DeadCode.CONFLICT
    assert await read_row(worker.pool, request.query_id) == row
    assert await read_story(worker.pool, request.query_id) == [_QUEUED]


async def test_of_two_requests_with_one_id_in_one_batch_the_first_is_the_querys(worker: Worker) -> None:
    request = make_request()
    rival = replace(request, sql="SELECT 2")
    first, second = await worker.admit(make_record(request), make_record(rival))
    assert isinstance(first, Query)
    assert isinstance(second, Refused)
    assert (first.sql, second.code) == ("SELECT 1", DeadCode.CONFLICT)


async def test_a_parameters_type_is_part_of_the_request(worker: Worker) -> None:
    request = make_request(parameters={"x": 1})
    await worker.admit(make_record(request))
    for value in (1.0, True, "1", None):
        [verdict] = await worker.admit(make_record(replace(request, parameters={"x": value})))
        assert isinstance(verdict, Refused), repr(value)


async def test_a_deleted_query_does_not_run_again(worker: Worker) -> None:
    request = make_request()
    async with worker.pool.connection() as connection:
        await connection.execute("INSERT INTO deleted_ids (query_id) VALUES (%s)", [request.query_id])
    assert await worker.admit(make_record(request)) == [Done()]
    assert await read_row(worker.pool, request.query_id) is None
    assert await read_events(worker.pool, request.query_id) == []


_INVALID: dict[str, dict[str, Any]] = {
    "neither sql nor saved query": {"sql": None},
    "both sql and saved query": {"saved_query_id": new_id(), "sql": "SELECT 1"},
    "a limit of zero": {"max_rows": 0},
    "a limit below zero": {"timeout_seconds": -1},
    "an unknown engine": {"engine": "abacus"},
    "an ill-formed user": {"user_id": "someone"},
    "sql over its size": {"sql": "x" * 262_145},
}


@pytest.mark.parametrize("change", _INVALID.values(), ids=_INVALID)
async def test_an_invalid_request_fails_with_two_events_and_is_a_dead_letter(
    worker: Worker, change: dict[str, Any]
) -> None:
    request = make_request(**change)
    [verdict] = await worker.admit(make_record(request))
    await _assert_invalid(worker, request, verdict)


async def test_a_request_in_the_wrong_lane_is_invalid(worker: Worker) -> None:
    request = make_request(mode=Mode.BATCH)
    [verdict] = await worker.admit(make_record(request, mode=Mode.INTERACTIVE))
    await _assert_invalid(worker, request, verdict)


async def test_an_invalid_request_cannot_spoil_the_query_that_has_its_id(worker: Worker) -> None:
    request = make_request()
    await worker.admit(make_record(request))
    [verdict] = await worker.admit(make_record(replace(request, max_rows=0)))
    assert isinstance(verdict, Refused)
    assert verdict.code is DeadCode.INVALID_REQUEST
    assert await read_story(worker.pool, request.query_id) == [_QUEUED]


async def test_one_bad_record_does_not_fail_its_batch(worker: Worker) -> None:
    items = [read_legible(make_record(make_request())) for _ in range(5)]
    # Nothing that is decoded brings a NUL this far; a fault of ours must not cost the others anything.
    items[2] = replace(items[2], traceparent="\0")

    async def run(batch: Any) -> list[Verdict]:
        return await admit(worker.pool, worker.clock, RULES, batch)

    verdicts = await run_batch(run, items)
    assert [type(verdict) for verdict in verdicts] == [Query, Query, RowRefused, Query, Query]
    assert await _count(worker.pool, "query_results") == 4


async def test_waiting_counts_from_the_brokers_append_and_never_from_the_future(worker: Worker) -> None:
    record = make_record(make_request())
    assert record.timestamp_ms is not None
    hour = 3_600_000
    old, ahead = (
        replace(make_record(make_request()), timestamp_ms=record.timestamp_ms + shift) for shift in (-hour, hour)
    )
    # A producer may put what it likes into a time of its own.
    unstamped = replace(make_record(make_request()), timestamp_ms=0, appended_by_broker=False)
    verdicts = await worker.admit(record, old, ahead, unstamped)
    overdue = [isinstance(verdict, Query) and verdict.state.overdue for verdict in verdicts]
    assert overdue == [False, True, False, False]
    for verdict in verdicts:
        assert isinstance(verdict, Query)
        assert verdict.state.queued_at <= verdict.state.read_at


async def test_the_executor_that_has_the_record_ends_a_query_that_waited_too_long(
    worker: Worker,
) -> None:
    record = make_record(make_request())
    assert record.timestamp_ms is not None
    [query] = await worker.admit(replace(record, timestamp_ms=record.timestamp_ms - 3_600_000))
    assert isinstance(query, Query)
    watch, query_id = Watch(lease_seconds=600.0), query.facts.query_id
    watch.park(query)
    states = await worker.transitions.read([query_id])
    finished, takeable = watch.observe([query_id], states, elapsed())
    assert finished == []
    for each in (query, *takeable):
        failure = find_failure(each)
        assert failure is not None
        assert failure.code is ErrorCode.QUEUE_TIMEOUT
    assert [each.facts.query_id for each in takeable] == [query_id]


# Saved queries.

_TEXT = "SELECT 'saved'"
_CREATOR, _MEMBER, _HOLDER, _STRANGER, _NAMESAKE, _TASK = (
    "creator",
    "member",
    "role holder",
    "another org's member",
    "another org's user of the same id and role",
    "a task without a user",
)
_VISIBLE = {
    "private": {_CREATOR},
    "org": {_CREATOR, _MEMBER, _HOLDER, _TASK},
    "role:analyst": {_HOLDER},
    "public": {_CREATOR, _MEMBER, _HOLDER, _STRANGER, _NAMESAKE, _TASK},
}


@pytest.mark.parametrize("visibility", _VISIBLE)
async def test_a_saved_query_runs_for_those_who_may_see_it_and_does_not_exist_for_others(
    worker: Worker, visibility: str
) -> None:
    org, creator = new_id(), new_id()
    saved = await _save(worker.pool, org, creator, visibility)
    callers: dict[str, dict[str, Any]] = {
        _CREATOR: {"org_id": org, "user_id": creator},
        # A slug is a whole word, and another slug's prefix is another slug.
        _MEMBER: {"org_id": org, "roles": ("analyst2", "analy", "role:analyst", "%")},
        _HOLDER: {"org_id": org, "roles": ("other", "analyst")},
        _STRANGER: {},
        _NAMESAKE: {"user_id": creator, "roles": ("analyst",)},
        _TASK: {"org_id": org, "user_id": None, "mode": Mode.BATCH, "task_id": new_id()},
    }
    requests = {
        caller: make_request(saved_query_id=saved, output_format="csv", **fields) for caller, fields in callers.items()
    }
    verdicts = await worker.admit(*map(make_record, requests.values()))
    for (caller, request), verdict in zip(requests.items(), verdicts, strict=True):
        if caller in _VISIBLE[visibility]:
            assert isinstance(verdict, Query), caller
            assert verdict.sql == _TEXT
            row = await read_row(worker.pool, request.query_id)
            assert row is not None
            assert (row.status, row.saved_query_id) == ("Queued", saved), caller
            assert row.sql_hash == hashlib.sha256(_TEXT.encode()).hexdigest()
        else:
            assert verdict == Done(), caller
            await _assert_not_found(worker.pool, request)


async def test_an_invisible_saved_query_looks_like_one_that_does_not_exist(worker: Worker) -> None:
    saved = await _save(worker.pool, new_id(), new_id(), "org")
    fields = {"org_id": new_id(), "user_id": new_id()}
    told = []
    for saved_query_id in (saved, new_id()):
        request = make_request(saved_query_id=saved_query_id, **fields)
        await worker.admit(make_record(request))
        row = await read_row(worker.pool, request.query_id)
        assert row is not None
        own = {"query_id", "created_at", "updated_at"}
        events = [asdict(stored.event) for stored in await read_events(worker.pool, request.query_id)]
        told.append(
            (
                {name: value for name, value in asdict(row).items() if name not in own},
                [{name: v for name, v in event.items() if name not in {"query_id", "occurred_at"}} for event in events],
            )
        )
    assert told[0] == told[1]


async def test_a_saved_query_edited_since_its_admission_does_not_run_with_the_new_text(worker: Worker) -> None:
    org, user = new_id(), new_id()
    saved = await _save(worker.pool, org, user, "org")
    record = make_record(make_request(org_id=org, user_id=user, saved_query_id=saved))
    [first] = await worker.admit(record)
    async with worker.pool.connection() as connection:
        await connection.execute("UPDATE saved_queries SET query = 'SELECT 2' WHERE id = %s", [saved])
    [again] = await worker.admit(record)
    assert isinstance(first, Query)
    assert isinstance(again, Query)
    assert (first.sql, again.sql) == (_TEXT, None)
    assert again.facts.sql_hash == first.facts.sql_hash


async def _assert_invalid(worker: Worker, request: QueryRequested, verdict: Verdict) -> None:
    assert isinstance(verdict, Refused)
    assert verdict.code is DeadCode.INVALID_REQUEST
    row = await read_row(worker.pool, request.query_id)
    assert row is not None
    assert (row.status, row.error_code, row.error_message) == ("Failed", "INVALID_REQUEST", verdict.reason)
    assert await read_story(worker.pool, request.query_id) == [_QUEUED, (2, "Failed", 0)]
    # Nobody can claim it, and it is never overdue.
    state = await worker.read(request.query_id)
    facts = QueryFacts.from_state(state)
    refused = await worker.claim(facts, state, new_id())
    assert refused is not None
    assert (refused.status, refused.token, refused.overdue) == ("Failed", None, False)


async def _assert_not_found(pool: DataPool, request: QueryRequested) -> None:
    row = await read_row(pool, request.query_id)
    assert row is not None
    assert (row.status, row.error_code, row.saved_query_id) == ("Failed", "SAVED_QUERY_NOT_FOUND", None)
    assert row.sql_hash == _HASH_OF_NOTHING
    events = [stored.event for stored in await read_events(pool, request.query_id)]
    assert [(event.sequence, event.status) for event in events] == [(1, "Queued"), (2, "Failed")]
    assert [event.saved_query_id for event in events] == [None, None]
    assert [event.error_code for event in events] == [None, "SAVED_QUERY_NOT_FOUND"]
    assert {event.sql_hash for event in events} == {_HASH_OF_NOTHING}


async def _save(pool: DataPool, org_id: str, user_id: str, visibility: str) -> str:
    async with pool.connection() as connection:
        saved = await insert_saved(
            connection, org_id=org_id, user_id=user_id, name="a name", query=_TEXT, visibility=visibility
        )
    return saved.id


async def _renew(worker: Worker, *states: RunState) -> dict[str, bool]:
    renewals = [Renewal(state.query_id, state.token or str(uuid.UUID(int=0)), 600.0) for state in states]
    async with worker.pool.connection() as connection:
        return await renew(connection, renewals)


async def _count(pool: DataPool, table: str) -> int:
    async with pool.connection() as connection:
        row = await (await connection.execute(f"SELECT count(*) FROM {table}".encode())).fetchone()
    assert row is not None
    return int(row[0])


async def _read_shards(pool: DataPool, query_id: str) -> set[int]:
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT shard FROM outbox WHERE query_id = %s", [query_id])
        return {row[0] for row in await cursor.fetchall()}


async def _dump(pool: DataPool) -> str:
    """Every row of every table, as text."""
    async with pool.connection() as connection:
        tables = await (
            await connection.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 2200")
        ).fetchall()
        rows: list[Any] = []
        for (table,) in tables:
            rows += await (await connection.execute(f"SELECT t::text FROM {table} t".encode())).fetchall()
    return "\n".join(row[0] for row in rows)


def _id_of(verdicts: list[Verdict]) -> str:
    [verdict] = verdicts
    assert isinstance(verdict, Query)
    return verdict.facts.query_id


async def test_two_ends_of_one_query_in_one_batch_write_one_event(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    taking = make_failure(query.facts, running, stale_lease_version=running.lease_renewal)
    await asyncio.gather(worker.finish(query.facts, running), worker.end(taking))
    assert len(await read_story(worker.pool, query.facts.query_id)) == 3
    row = await read_row(worker.pool, query.facts.query_id)
    assert row is not None and row.status == "Succeeded"


async def test_an_end_without_token_does_not_ride_on_the_holders_in_one_batch(worker: Worker) -> None:
    query = await worker.admit_new()
    running = await worker.start(query.facts)
    await asyncio.gather(worker.end(make_failure(query.facts, running)), worker.finish(query.facts, running))
    assert len(await read_story(worker.pool, query.facts.query_id)) == 3
    row = await read_row(worker.pool, query.facts.query_id)
    assert row is not None and row.status == "Succeeded"


async def test_a_slot_and_the_reaper_end_one_overdue_query_once(worker: Worker) -> None:
    query = await worker.admit_new()
    await pass_deadline(worker.pool, query.facts.query_id)
    state = await worker.read(query.facts.query_id)
    ending = fail(query.facts, state, overdue_failure(Status.QUEUED), now=state.read_at)
    await asyncio.gather(worker.end(ending), worker.end(ending))
    assert await read_story(worker.pool, query.facts.query_id) == [(1, "Queued", 0), (2, "Failed", 0)]


async def test_of_two_claims_of_one_query_in_one_batch_one_is_granted(worker: Worker) -> None:
    query = await worker.admit_new()
    tokens = [new_id(), new_id()]
    answers = await worker.claim_all([make_claim(query.facts, query.state, token) for token in tokens])
    assert len({answer.token for answer in answers if isinstance(answer, RunState)} & set(tokens)) == 1
    assert len(await read_story(worker.pool, query.facts.query_id)) == 2


async def test_two_requests_of_one_id_in_one_batch_never_see_each_others_saved_query(worker: Worker) -> None:
    own_org, other_org, author = new_id(), new_id(), new_id()
    async with worker.pool.connection() as connection:
        ours, theirs = [
            await insert_saved(connection, org_id=org_id, user_id=author, name="q", query=text, visibility=visibility)
            for org_id, text, visibility in ((own_org, "SELECT 1", "org"), (other_org, "SELECT 2", "private"))
        ]
    query_id = new_id()
    first = make_request(query_id=query_id, org_id=own_org, saved_query_id=ours.id, sql=None)
    second = make_request(query_id=query_id, org_id=other_org, user_id=author, saved_query_id=theirs.id, sql=None)
    admitted, refused = await worker.admit(make_record(first), make_record(second))
    assert isinstance(admitted, Query)
    assert admitted.sql == "SELECT 1"
    assert admitted.facts.sql_hash == hashlib.sha256(b"SELECT 1").hexdigest()
    assert isinstance(refused, Refused)
