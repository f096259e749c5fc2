"""Limits of orgs on a real Postgres: held across all workers, whoever asks at the same time."""

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from access.limits import OrgLimits, change, list_own, read_own, reset
from access.visibility import InvalidRegistration
from consumers.executor.admission import Done, Refused, Verdict
from consumers.executor.query import Query
from consumers.executor.reaper import Reaper
from consumers.executor.transitions import Refusal
from db.connection import DatabaseUnavailable, DataPool, transaction
from db.data import limits as statements
from db.data.attempts import HandBack
from db.data.datasets import Caller
from db.data.limits import OwnLimits, find_surplus, try_lock_running
from db.data.runs import RunState
from db.migrations.upgrade import upgrade_data
from queryd.events import Mode
from service.cli import app
from service.embedded.postgres import Postgres
from service.sizes import MUST_BE
from tests.integration.queries import (
    Worker,
    ask_to_cancel,
    is_over,
    make_claim,
    make_failure,
    make_record,
    make_request,
    new_id,
    opened_pool,
    pass_deadline,
    read_row,
    read_story,
)

_WORKERS = 4
# Many times what an admission takes that waits for nobody.
_A_WHILE_SECONDS = 0.5


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> Iterator[str]:
    """One migrated data database for all of these tests: making one takes longer than most of them."""
    name = f"limits_{uuid.uuid4().hex}"
    postgres_server.create_database(name)
    url = postgres_server.url(name)
    upgrade_data(url)
    yield url
    postgres_server.drop_database(name)


@pytest.fixture
async def pools(database: str) -> AsyncIterator[list[DataPool]]:
    """Several processes' connections to the data database, which is empty again."""
    with psycopg.connect(database) as connection:
        connection.execute("TRUNCATE query_results, query_cancellations, deleted_ids, outbox, org_limits CASCADE")
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(opened_pool(database)) for _ in range(_WORKERS)]


@pytest.fixture
def pool(pools: list[DataPool]) -> DataPool:
    return pools[0]


@pytest.fixture
def workers(pools: list[DataPool]) -> list[Worker]:
    """Processes with connections of their own."""
    return [Worker(pool) for pool in pools]


@pytest.fixture
def worker(workers: list[Worker]) -> Worker:
    return workers[0]


def _statuses(verdicts: list[Verdict]) -> list[str]:
    """Of each record of a batch: `Queued`, or `over` when it is done already."""
    return ["Queued" if isinstance(verdict, Query) else "over" for verdict in verdicts]


def _admitted(verdicts: list[Verdict]) -> list[Query]:
    assert all(isinstance(verdict, Query) for verdict in verdicts)
    return [verdict for verdict in verdicts if isinstance(verdict, Query)]


async def _admit(worker: Worker, org: str, count: int) -> list[Query]:
    return _admitted(await worker.admit(*(make_record(make_request(org_id=org)) for _ in range(count))))


async def _claim(
    worker: Worker, query: Query, state: RunState | None = None, stale_lease_version: int | None = None
) -> RunState | Refusal | None:
    [answer] = await _claim_all(worker, [query], state, stale_lease_version)
    return answer


async def _claim_all(
    worker: Worker, queries: Sequence[Query], state: RunState | None = None, stale_lease_version: int | None = None
) -> list[RunState | Refusal | None]:
    """Claim queries in one batch."""
    claims = [
        make_claim(
            query.facts,
            state or query.state,
            new_id(),
            stale_lease_version,
            limited=query.limits.running_queries is not None,
        )
        for query in queries
    ]
    return [
        None if isinstance(answer, RunState) and answer.token != claim.token else answer
        for claim, answer in zip(claims, await worker.claim_all(claims), strict=True)
    ]


async def _claim_patiently(worker: Worker, query: Query) -> RunState | Refusal | None:
    """A claim whose answer does not depend on who else is counting just then."""
    while True:
        answer = await _claim(worker, query)
        if answer is not Refusal.BUSY:
            return answer
        await asyncio.sleep(0.001)


def _taken(answers: Sequence[RunState | Refusal | None]) -> list[RunState]:
    return [answer for answer in answers if isinstance(answer, RunState)]


async def _count(pool: DataPool, what: str, *values: Any) -> int:
    async with pool.connection() as connection:
        row = await (await connection.execute(f"SELECT count(*) FROM {what}".encode(), values)).fetchone()
        assert row is not None
        return int(row[0])


# What is in force.


async def test_an_org_without_a_row_has_the_defaults_and_one_with_a_row_what_it_sets(pool: DataPool) -> None:
    worker = Worker(pool, OrgLimits(timeout_seconds=7, result_bytes=100))
    org = new_id()
    [query] = await _admit(worker, org, 1)
    assert query.limits == OrgLimits(timeout_seconds=7, result_bytes=100)
    await change(pool, org, {"result_bytes": 5, "result_rows": 6, "weight": 3})
    [query] = await _admit(worker, org, 1)
    assert query.limits == OrgLimits(weight=3, timeout_seconds=7, result_bytes=5, result_rows=6)
    [other] = await _admit(worker, new_id(), 1)
    assert other.limits == OrgLimits(timeout_seconds=7, result_bytes=100)


async def test_each_query_of_a_batch_has_its_own_orgs_limits(worker: Worker) -> None:
    orgs = [new_id() for _ in range(3)]
    await change(worker.pool, orgs[1], {"timeout_seconds": 5})
    queries = _admitted(await worker.admit(*(make_record(make_request(org_id=org)) for org in orgs)))
    assert [query.limits.timeout_seconds for query in queries] == [None, 5, None]


async def test_a_change_names_what_it_changes_and_leaves_the_rest(pool: DataPool) -> None:
    org = new_id()
    assert await read_own(pool, org) is None
    assert await change(pool, org, {"queued_queries": 5}) == OwnLimits(org, 1, None, 5, None, None, None, None)
    await change(pool, org, {"weight": 2, "bytes_scanned": 2**62})
    assert await change(pool, org, {"queued_queries": None}) == OwnLimits(org, 2, None, None, None, 2**62, None, None)
    assert await list_own(pool) == [await read_own(pool, org)]
    assert await reset(pool, org)
    assert not await reset(pool, org)
    assert await list_own(pool) == []


@pytest.mark.parametrize(
    ("name", "value"), [("weight", 0), ("running_queries", -1), ("timeout_seconds", 2**31), ("result_rows", 2**63)]
)
async def test_a_limit_that_is_none_is_refused(pool: DataPool, name: str, value: int) -> None:
    with pytest.raises(InvalidRegistration, match=f"{name} must be from 1 to"):
        await change(pool, new_id(), {name: value})
    assert await list_own(pool) == []


# Queued queries.


async def test_what_exceeds_the_limit_of_waiting_queries_fails_and_tells_its_story(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"queued_queries": 3})
    requests = [make_request(org_id=org) for _ in range(5)]
    verdicts = await worker.admit(*(make_record(request) for request in requests))
    # Whoever came first.
    assert _statuses(verdicts) == ["Queued"] * 3 + ["over"] * 2
    for request in requests[3:]:
        row = await read_row(worker.pool, request.query_id)
        assert row is not None
        assert (row.status, row.error_code) == ("Failed", "QUOTA_EXCEEDED")
        assert row.error_message == "the org has as many queries waiting as its limit allows"
        assert await read_story(worker.pool, request.query_id) == [(1, "Queued", 0), (2, "Failed", 0)]
    assert await _count(worker.pool, "query_runs WHERE org_id = %s AND deadline IS NOT NULL", org) == 3


async def test_by_default_nothing_is_refused_and_a_default_limit_holds_for_every_org(pool: DataPool) -> None:
    assert len(await _admit(Worker(pool), new_id(), 50)) == 50
    limited = Worker(pool, OrgLimits(queued_queries=2))
    orgs = [new_id() for _ in range(2)]
    verdicts = await limited.admit(*(make_record(make_request(org_id=org)) for org in orgs * 3))
    assert _statuses(verdicts) == ["Queued"] * 4 + ["over"] * 2


async def test_a_query_that_has_begun_leaves_its_place_to_another(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"queued_queries": 2})
    first, _ = await _admit(worker, org, 2)
    await worker.start(first.facts)
    verdicts = await worker.admit(*(make_record(make_request(org_id=org)) for _ in range(2)))
    assert _statuses(verdicts) == ["Queued", "over"]


async def test_a_known_id_takes_no_place_and_is_never_refused(worker: Worker, workers: list[Worker]) -> None:
    org = new_id()
    await change(worker.pool, org, {"queued_queries": 2})
    requests = [make_request(org_id=org) for _ in range(2)]
    records = [make_record(request) for request in requests]
    await worker.admit(*records)
    # The queue is full: their own records again, and duplicates at other coordinates.
    assert _statuses(await workers[1].admit(*records)) == ["Queued", "Queued"]
    duplicates = await worker.admit(*(make_record(request) for request in requests))
    assert [type(verdict) for verdict in duplicates] == [Done, Done]
    for request in requests:
        assert await read_story(worker.pool, request.query_id) == [(1, "Queued", 0)]
    assert _statuses(await worker.admit(make_record(make_request(org_id=org)))) == ["over"]


async def test_a_refused_query_that_is_delivered_again_stays_refused(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"queued_queries": 1})
    [waiting] = await _admit(worker, org, 1)
    record = make_record(make_request(org_id=org))
    assert _statuses(await worker.admit(record)) == ["over"]
    await worker.start(waiting.facts)
    assert _statuses(await worker.admit(record)) == ["over"]


async def test_of_a_batch_only_what_will_wait_takes_places(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"queued_queries": 2})
    cancelled, twice, last = (make_request(org_id=org) for _ in range(3))
    await ask_to_cancel(worker.pool, cancelled.query_id, org)
    lost = make_request(org_id=org, saved_query_id=new_id())
    stolen = make_request(org_id=org, query_id=lost.query_id)
    batch = [cancelled, lost, stolen, twice, last, twice, make_request(org_id=org)]
    verdicts = await worker.admit(*(make_record(request) for request in batch))
    assert [type(verdict) for verdict in verdicts] == [Query, Done, Refused, Query, Query, Done, Done]
    row = await read_row(worker.pool, batch[-1].query_id)
    assert row is not None
    assert row.error_code == "QUOTA_EXCEEDED"


async def test_a_full_queue_of_one_org_is_nobody_elses(worker: Worker) -> None:
    full, other = new_id(), new_id()
    await change(worker.pool, full, {"queued_queries": 1})
    verdicts = await worker.admit(*(make_record(make_request(org_id=org)) for org in (full, full, other, other)))
    assert _statuses(verdicts) == ["Queued", "over", "Queued", "Queued"]


async def test_workers_that_admit_at_the_same_time_never_exceed_the_limit(workers: list[Worker]) -> None:
    orgs = [new_id() for _ in range(3)]
    limits = dict(zip(orgs, (1, 7, 30), strict=True))
    for org, limit in limits.items():
        await change(workers[0].pool, org, {"queued_queries": limit})
    batches = [
        # Each in an order of its own.
        [make_record(make_request(org_id=org)) for org in (orgs * 4)[number % 3 :]]
        for number in range(5 * _WORKERS)
    ]
    answers = await asyncio.gather(*(workers[number % _WORKERS].admit(*batch) for number, batch in enumerate(batches)))
    waiting = Counter(query.facts.org_id for verdicts in answers for query in verdicts if isinstance(query, Query))
    assert waiting == limits
    for org, limit in limits.items():
        assert await _count(workers[0].pool, "query_results WHERE org_id = %s AND status = 'Queued'", org) == limit


async def test_admission_waits_for_who_counts_the_same_queue_and_for_nobody_else(workers: list[Worker]) -> None:
    org = new_id()
    await change(workers[0].pool, org, {"queued_queries": 1})
    async with transaction(workers[0].pool) as connection:
        assert await find_surplus(connection, [(new_id(), org)], {org: 1}) == set()
        waiting = asyncio.create_task(workers[1].admit(make_record(make_request(org_id=org))))
        assert len(await _admit(workers[2], new_id(), 1)) == 1
        assert await asyncio.wait([waiting], timeout=_A_WHILE_SECONDS) == (set(), {waiting})
    assert _statuses(await waiting) == ["Queued"]


async def test_a_worker_that_stands_still_while_it_counts_loses_its_locks(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statements, "_IDLE_SECONDS", 0.2)
    org = new_id()
    await change(workers[0].pool, org, {"queued_queries": 1, "running_queries": 1})
    with pytest.raises(DatabaseUnavailable):
        async with transaction(workers[0].pool) as stalled:
            await find_surplus(stalled, [(new_id(), org)], {org: 1})
            assert await try_lock_running(stalled, {org}) == {org}
            # Until the server has ended that session.
            [query] = await _admit(workers[1], org, 1)
            assert isinstance(await _claim_patiently(workers[1], query), RunState)
            await stalled.execute("SELECT 1")


# Running queries.


async def test_no_more_run_than_may_and_a_finished_one_makes_room(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"running_queries": 2})
    queries = await _admit(worker, org, 4)
    # One batch, in its order.
    answers = await _claim_all(worker, queries)
    assert [isinstance(answer, RunState) for answer in answers] == [True, True, False, False]
    assert answers[2:] == [Refusal.LIMIT] * 2
    # A refused claim changes nothing.
    for query in queries[2:]:
        assert await read_story(worker.pool, query.facts.query_id) == [(1, "Queued", 0)]
        state = await worker.read(query.facts.query_id)
        assert (state.status, state.sequence, state.attempt, state.token) == ("Queued", 1, 0, None)
    [first, _] = _taken(answers)
    await worker.finish(queries[0].facts, first)
    assert isinstance(await _claim(worker, queries[2]), RunState)
    assert await _claim(worker, queries[3]) is Refusal.LIMIT


async def test_an_orgs_limit_holds_back_nobody_else(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"running_queries": 1})
    mine, others = await _admit(worker, org, 3), await _admit(worker, new_id(), 3)
    mixed = [query for pair in zip(mine, others, strict=True) for query in pair]
    answers = await _claim_all(worker, mixed)
    assert [answer is Refusal.LIMIT for answer in answers] == [False, False, True, False, True, False]


async def test_a_limit_holds_over_both_lanes(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"running_queries": 1})
    queries = _admitted(
        await worker.admit(
            *(make_record(make_request(org_id=org, mode=mode)) for mode in (Mode.BATCH, Mode.INTERACTIVE))
        )
    )
    # Each lane claims for itself.
    answers = await asyncio.gather(*(_claim_patiently(worker, query) for query in queries))
    assert len(_taken(answers)) == 1


async def test_of_two_workers_that_race_for_the_last_place_one_gets_it(workers: list[Worker]) -> None:
    org = new_id()
    await change(workers[0].pool, org, {"running_queries": 2})
    busy, *queries = await _admit(workers[0], org, 21)
    await workers[0].start(busy.facts)
    for one, other in zip(queries[::2], queries[1::2], strict=True):
        answers = await asyncio.gather(_claim_patiently(workers[1], one), _claim_patiently(workers[2], other))
        [taken] = _taken(answers)
        assert Refusal.LIMIT in answers
        query = one if taken.query_id == one.facts.query_id else other
        await workers[3].finish(query.facts, taken)


@pytest.mark.parametrize("known", [True, False], ids=["known at admission", "set since"])
async def test_whoever_claims_at_once_never_more_run_than_may(workers: list[Worker], known: bool) -> None:
    """Four workers, ten claims each, again and again while queries end: the leases are watched all the time."""
    org, limit = new_id(), 3
    if known:
        await change(workers[0].pool, org, {"running_queries": limit})
    queries = await _admit(workers[0], org, 10 * _WORKERS)
    await change(workers[0].pool, org, {"running_queries": limit})
    most = 0
    done = asyncio.Event()

    async def observe() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, await _count(workers[0].pool, "query_leases"))

    async def run(worker: Worker, query: Query) -> None:
        while True:
            answer = await _claim_patiently(worker, query)
            if isinstance(answer, RunState):
                await worker.finish(query.facts, answer)
                return
            await asyncio.sleep(0.005)

    observer = asyncio.create_task(observe())
    await asyncio.gather(*(run(workers[number % _WORKERS], query) for number, query in enumerate(queries)))
    done.set()
    await observer
    assert most == limit
    assert await _count(workers[0].pool, "query_results WHERE org_id = %s AND status = 'Succeeded'", org) == 40


async def test_a_takeover_of_a_dead_lease_takes_its_place(worker: Worker, workers: list[Worker]) -> None:
    org = new_id()
    await change(worker.pool, org, {"running_queries": 1})
    left_behind, waiting = await _admit(worker, org, 2)
    running = await worker.start(left_behind.facts)
    # The worker of a dead lease may still run its query.
    assert await _claim(workers[1], waiting) is Refusal.LIMIT
    taken = await _claim(workers[1], left_behind, running, running.lease_renewal)
    assert isinstance(taken, RunState)
    assert (taken.attempt, taken.crashes) == (2, 1)
    assert await _count(worker.pool, "query_leases") == 1


async def test_what_was_handed_back_takes_no_place_and_needs_one_again(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"running_queries": 1})
    first, second = await _admit(worker, org, 2)
    running = await worker.start(first.facts)
    assert running.token is not None
    await worker.transitions.hand_back(HandBack(first.facts.query_id, running.token, crashed=False))
    assert isinstance(await _claim(worker, second), RunState)
    assert await _claim(worker, first, await worker.read(first.facts.query_id)) is Refusal.LIMIT


async def test_a_query_that_can_t_be_claimed_is_not_refused_by_the_limit(worker: Worker, workers: list[Worker]) -> None:
    org = new_id()
    await change(worker.pool, org, {"running_queries": 1})
    running, cancelled, ended = await _admit(worker, org, 3)
    state = await worker.start(running.facts)
    await ask_to_cancel(worker.pool, cancelled.facts.query_id, org)
    await worker.end(make_failure(ended.facts, ended.state))
    # Somebody else has it, it is cancelled, it is over: waiting would not help.
    for query in (running, cancelled, ended):
        assert await _claim(workers[1], query) is None
    assert await _claim(workers[1], running, state) is None


async def test_who_counts_keeps_others_from_counting_and_not_from_working(workers: list[Worker]) -> None:
    org = new_id()
    await change(workers[0].pool, org, {"running_queries": 5})
    [query] = await _admit(workers[0], org, 1)
    [other] = await _admit(workers[0], new_id(), 1)
    async with transaction(workers[0].pool) as connection:
        assert await try_lock_running(connection, {org}) == {org}
        answers = await _claim_all(workers[1], [query, other])
        assert answers[0] is Refusal.BUSY
        assert isinstance(answers[1], RunState)
    assert isinstance(await _claim(workers[1], query), RunState)


async def test_a_limit_that_is_changed_holds_at_once(worker: Worker) -> None:
    org = new_id()
    queries = await _admit(worker, org, 4)
    assert isinstance(await _claim(worker, queries[0]), RunState)
    await change(worker.pool, org, {"running_queries": 1})
    assert await _claim(worker, queries[1]) is Refusal.LIMIT
    await change(worker.pool, org, {"running_queries": 2})
    assert isinstance(await _claim(worker, queries[1]), RunState)
    assert await _claim(worker, queries[2]) is Refusal.LIMIT
    await reset(worker.pool, org)
    assert isinstance(await _claim(worker, queries[2]), RunState)


async def test_a_default_limit_holds_and_an_orgs_own_is_higher(pool: DataPool) -> None:
    worker = Worker(pool, OrgLimits(running_queries=1))
    usual, special = new_id(), new_id()
    await change(pool, special, {"running_queries": 2})
    for org, limit in ((usual, 1), (special, 2)):
        queries = await _admit(worker, org, 3)
        answers = await _claim_all(worker, queries)
        assert len(_taken(answers)) == limit


async def test_claims_of_orgs_without_a_limit_cost_one_statement(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[str] = []
    execute = psycopg.AsyncConnection.execute

    async def note(self: Any, query: Any, *args: Any, **named: Any) -> Any:
        executed.append(" ".join(str(query).split())[:30])
        return await execute(self, query, *args, **named)

    [query] = await _admit(worker, new_id(), 1)
    monkeypatch.setattr(psycopg.AsyncConnection, "execute", note)
    claim = make_claim(query.facts, query.state, new_id())
    [claimed] = await worker.transitions.claim([(claim, Caller(claim.org_id, None, ()))])
    assert claimed == ()
    # The other reads what the caller may read, by a cursor of its own.
    assert len(executed) == 1
    executed.clear()
    await _admit(worker, new_id(), 2)
    assert not any("pg_advisory" in statement or "newcomers" in statement for statement in executed)


async def test_waiting_for_the_limit_is_waiting_in_the_queue(worker: Worker) -> None:
    org = new_id()
    await change(worker.pool, org, {"running_queries": 1})
    running, waiting = await _admit(worker, org, 2)
    await worker.start(running.facts)
    assert await _claim(worker, waiting) is Refusal.LIMIT
    await pass_deadline(worker.pool, waiting.facts.query_id)
    assert await Reaper(worker.pool, worker.clock, worker.transitions, 15.0).reap(is_over) == 1
    row = await read_row(worker.pool, waiting.facts.query_id)
    assert row is not None
    assert (row.status, row.error_code) == ("Failed", "QUEUE_TIMEOUT")
    assert await _claim(worker, waiting) is None


# The command line.


@dataclass(frozen=True, slots=True)
class Said:
    """What a command has answered."""

    exit_code: int
    stdout: str
    stderr: str


Command = Callable[..., Said]


@pytest.fixture
def command(database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`queryd limits …`, with a default of 9 running queries."""
    with psycopg.connect(database) as connection:
        connection.execute("TRUNCATE org_limits")
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "QUERYD_KAFKA_BOOTSTRAP": "localhost:1",
        "QUERYD_DATA_URL": database,
        "QUERYD_STATE_URL": database,
        "QUERYD_RESULTS_URL": "s3://results",
        "QUERYD_ORG_RUNNING_QUERIES": "9",
    }.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Said:
        said = CliRunner().invoke(app, ["limits", *arguments])
        assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
        return Said(said.exit_code, said.stdout, said.stderr)

    return run


_DEFAULTS = {
    "weight": 1,
    "running_queries": 9,
    "queued_queries": None,
    "timeout_seconds": None,
    "bytes_scanned": 1024**4,
    "result_bytes": 10 * 1024**3,
    "result_rows": None,
}


def _told(said: Said) -> Any:
    assert (said.exit_code, said.stderr) == (0, "")
    return json.loads(said.stdout)


def test_the_command_shows_sets_lists_and_resets(command: Command) -> None:
    org = new_id()
    assert _told(command("show", org, "--json")) == {"org_id": org, **_DEFAULTS, "own": []}
    given = ["--running", "2", "--queued", "30", "--timeout", "40", "--bytes-scanned", "50", "--result-bytes", "60"]
    own = {
        "weight": 4,
        "running_queries": 2,
        "queued_queries": 30,
        "timeout_seconds": 40,
        "bytes_scanned": 50,
        "result_bytes": 60,
        "result_rows": 70,
    }
    told = _told(command("set", org, *given, "--result-rows", "70", "--weight", "4", "--json"))
    assert told == {"org_id": org, **own, "own": list(own)}
    assert _told(command("list", "--json")) == [{"org_id": org, **own}]
    changed = _told(command("set", org, "--running", "default", "--queued", "31", "--weight", "default", "--json"))
    assert (changed["running_queries"], changed["queued_queries"], changed["weight"]) == (9, 31, 1)
    assert changed["own"] == ["queued_queries", "timeout_seconds", "bytes_scanned", "result_bytes", "result_rows"]
    assert _told(command("reset", org, "--json")) == {"org_id": org, **_DEFAULTS, "own": []}
    assert _told(command("list", "--json")) == []


def test_the_command_tells_people_what_is_default_and_what_is_no_limit(command: Command) -> None:
    org = new_id()
    assert command("list").stdout == "no limits\n"
    said = command("set", org, "--running", "2").stdout.splitlines()
    assert said[:4] == [
        f"org id: {org}",
        "weight: 1 (default)",
        "running queries: 2",
        "queued queries: no limit (default)",
    ]
    assert org in command("list").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--running", "0"], "running_queries must be from 1 to 2147483647"),
        (["--running", "-1"], "running_queries must be a number above 0, or `default`"),
        (["--running", "1GiB"], "running_queries must be a number above 0, or `default`"),
        (["--bytes-scanned", "1 gig"], f"bytes_scanned {MUST_BE}"),
        (["--result-bytes", "0GiB"], "result_bytes must be from 1 to 9223372036854775807"),
        (["--result-rows", str(2**63)], "result_rows must be from 1 to 9223372036854775807"),
        ([], "give at least one limit, see `queryd limits set --help`"),
    ],
)
def test_the_command_says_what_is_wrong(command: Command, arguments: list[str], sentence: str) -> None:
    said = command("set", new_id(), *arguments)
    assert (said.exit_code, said.stderr) == (2, f"queryd: {sentence}\n")
    assert _told(command("list", "--json")) == []
    assert command("show", "acme").exit_code == 2


def test_sizes_are_given_and_shown_with_their_unit(command: Command) -> None:
    org = new_id()
    said = command("set", org, "--bytes-scanned", "1.5GiB", "--result-bytes", "10GB")
    assert "bytes scanned: 1,536 MiB\n" in said.stdout
    assert "result bytes: 10 GB\n" in said.stdout
    assert json.loads(command("show", org, "--json").stdout)["bytes_scanned"] == 3 * 2**29
