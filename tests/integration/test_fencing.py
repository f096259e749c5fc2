"""Attempts and fencing, with real executors that are stopped, woken, ended and killed."""

import signal
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from typing import Any

import pytest

from processes.failpoints import Failpoint
from queryd.client import QueryHandle
from queryd.events import ErrorCode, QueryStatusChanged, Status
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.integration.fleet import PATIENCE_SECONDS, Fleet, Service, await_that, own_broker, running_fleet
from tests.servers.kafka import Kafka

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
SQL = "SELECT i, i * i AS square FROM generate_series(1, 1000) AS t(i)"
# The promise: the next attempt of a query that was handed back starts within this.
_NEXT_ATTEMPT_SECONDS = 2.0

_Steps = list[tuple[Status, int]]


@pytest.fixture(scope="module")
def whole_fleet(
    kafka: Kafka,
    postgres_server: Postgres,
    object_store_server: ObjectStore,
    lifeline: Lifeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        own = kafka if kafka.transactions else stack.enter_context(own_broker(folder, lifeline))
        yield stack.enter_context(running_fleet(own, postgres_server, object_store_server, folder))


@pytest.fixture
def fleet(whole_fleet: Fleet) -> Iterator[Fleet]:
    """Two executors at work, and nothing armed."""
    whole_fleet.disarm()
    whole_fleet.man(2)
    yield whole_fleet
    whole_fleet.disarm()


# A worker that stops and wakes up after its lease.


@pytest.mark.slow
@pytest.mark.parametrize("place", [Failpoint.CHILD_BEFORE, Failpoint.EXECUTE_AFTER, Failpoint.FINISH_BEFORE])
def test_a_worker_that_wakes_past_its_lease_can_neither_finish_nor_publish_nor_spoil_an_object(
    fleet: Fleet, place: Failpoint
) -> None:
    fleet.arm(place, "STOP")
    query = fleet.client.submit(SQL, org_id=ORG)
    zombie, child = _stop(fleet, place)
    event = query.wait(PATIENCE_SECONDS)
    assert (event.status, event.attempt) == (Status.SUCCEEDED, 2)
    row, objects = fleet.read_row(query.query_id), fleet.read_objects(ORG, query.query_id)
    for process in (child, zombie.process):
        if process is not None:
            process.send_signal(signal.SIGCONT)
    await_that(lambda: zombie.has_lost(query.query_id, attempt=1), "the zombie to let go")
    assert fleet.read_row(query.query_id) == row
    assert _steps(fleet, query) == [
        (Status.QUEUED, 0),
        (Status.RUNNING, 1),
        (Status.RUNNING, 2),
        (Status.SUCCEEDED, 2),
    ]
    _assert_one_result(event, row, objects)
    # What the zombie may have stored lies under a prefix of its own, to which nobody points.
    after = fleet.read_objects(ORG, query.query_id)
    assert objects.items() <= after.items()
    assert all("/1-" in key for key in after.keys() - objects.keys())
    # Both go on working.
    fleet.man(2)
    assert fleet.client.submit("SELECT 1 AS one", org_id=ORG).wait(PATIENCE_SECONDS).status is Status.SUCCEEDED


def _stop(fleet: Fleet, place: Failpoint) -> tuple[Service, Any]:
    """Stop the executor at the place; while its query runs, its child as well, which then never ends."""
    if place is not Failpoint.CHILD_BEFORE:
        return fleet.await_stopped(), None
    held = fleet.await_held()
    held.executor.process.send_signal(signal.SIGSTOP)
    return held.executor, held.child


def _assert_one_result(event: QueryStatusChanged, row: dict[str, Any], objects: dict[str, tuple[str, bytes]]) -> None:
    [file] = event.files
    assert (row["status"], row["output_location"], row["attempt"]) == ("Succeeded", event.output_location, 2)
    visible = [key for key in objects if key.startswith((event.output_location or "").split("/", 3)[3])]
    assert visible == [file.key]
    etag, body = objects[file.key]
    assert (etag.strip('"'), len(body)) == (file.etag, file.bytes)


# Leases handed back.


@pytest.mark.slow
def test_a_handed_back_query_starts_again_within_two_seconds_and_restarts_are_not_held_against_it(
    fleet: Fleet,
) -> None:
    restarts = 5
    # All who will take it over are there from the beginning: waiting for each to start would take longer.
    fleet.man(1 + restarts)
    fleet.arm(Failpoint.CHILD_BEFORE, "STOP")
    query = fleet.client.submit(SQL, org_id=ORG)
    held = fleet.await_held()
    handed_back: list[datetime] = []
    for restart in range(restarts):
        if restart < restarts - 1:
            fleet.arm(Failpoint.CHILD_BEFORE, "STOP")
        held.executor.terminate()
        handed_back.append(_read_hand_back(held.executor, query))
        if restart < restarts - 1:
            held = fleet.await_held(held.child)
    event = query.wait(PATIENCE_SECONDS)
    assert (event.status, event.attempt) == (Status.SUCCEEDED, 1 + restarts)
    assert fleet.read_row(query.query_id)["crashes"] == 0
    story = fleet.read_story(query.query_id)
    started = [told.occurred_at for told in story if told.status is Status.RUNNING and told.attempt > 1]
    waits = [(start - back).total_seconds() for back, start in zip(handed_back, started, strict=True)]
    assert max(waits) < _NEXT_ATTEMPT_SECONDS, waits


def _read_hand_back(executor: Service, query: QueryHandle) -> datetime:
    [line] = [line for line in executor.read_log() if line["event"] == "query_handed_back"]
    assert line["query_id"] == query.query_id
    return datetime.fromisoformat(line["timestamp"])


# Crashes, and what is none.


@pytest.mark.slow
def test_a_querys_own_error_is_never_tried_again(fleet: Fleet) -> None:
    query = fleet.client.submit("SELECT CAST('no number' AS INTEGER)", org_id=ORG)
    event = query.wait(PATIENCE_SECONDS)
    assert (event.status, event.error_code, event.attempt) == (Status.FAILED, ErrorCode.QUERY_ERROR, 1)
    assert _steps(fleet, query) == [(Status.QUEUED, 0), (Status.RUNNING, 1), (Status.FAILED, 1)]


@pytest.mark.slow
def test_three_crashes_of_its_own_fail_a_query_and_its_neighbours_never_notice(fleet: Fleet) -> None:
    fleet.arm(Failpoint.CHILD_BEFORE, "STOP")
    neighbour = fleet.client.submit(SQL, org_id=str(uuid.uuid4()))
    beside = fleet.await_held()
    fleet.arm(Failpoint.CHILD_BEFORE, "STOP")
    query = fleet.client.submit(SQL, org_id=ORG)
    held = fleet.await_held(beside.child)
    for crash in range(3):
        if crash < 2:
            fleet.arm(Failpoint.CHILD_BEFORE, "STOP")
        held.child.kill()
        if crash < 2:
            held = fleet.await_held(beside.child, held.child)
    event = query.wait(PATIENCE_SECONDS)
    assert (event.status, event.error_code, event.attempt) == (Status.FAILED, ErrorCode.ENGINE_CRASHED, 3)
    assert fleet.read_row(query.query_id)["crashes"] == 3
    assert fleet.read_objects(ORG, query.query_id) == {}
    # The neighbour was running all the time, perhaps in the same executor; others come and go.
    others = [fleet.client.submit(SQL, org_id=ORG) for _ in range(5)]
    assert {(each.wait(PATIENCE_SECONDS).status, each.wait(0).attempt) for each in others} == {(Status.SUCCEEDED, 1)}
    assert neighbour.event is not None
    assert (neighbour.event.status, neighbour.event.attempt) == (Status.RUNNING, 1)
    beside.child.send_signal(signal.SIGCONT)
    assert (neighbour.wait(PATIENCE_SECONDS).status, neighbour.wait(0).attempt) == (Status.SUCCEEDED, 1)


@pytest.mark.slow
def test_sql_that_kills_its_whole_worker_three_times_is_a_crash_of_its_own(fleet: Fleet) -> None:
    fleet.man(4)
    fleet.arm(Failpoint.CHILD_BEFORE, "STOP")
    query = fleet.client.submit(SQL, org_id=ORG)
    held = fleet.await_held()
    for kill in range(3):
        if kill < 2:
            fleet.arm(Failpoint.CHILD_BEFORE, "STOP")
        held.executor.kill()
        if kill < 2:
            held = fleet.await_held(held.child)
    event = query.wait(PATIENCE_SECONDS)
    assert (event.status, event.error_code, event.attempt) == (Status.FAILED, ErrorCode.ENGINE_CRASHED, 3)
    assert _steps(fleet, query) == [
        (Status.QUEUED, 0),
        *((Status.RUNNING, attempt) for attempt in (1, 2, 3)),
        (Status.FAILED, 3),
    ]
    assert fleet.read_objects(ORG, query.query_id) == {}


def _steps(fleet: Fleet, query: QueryHandle) -> _Steps:
    story = fleet.read_story(query.query_id)
    assert [event.sequence for event in story] == list(range(1, len(story) + 1))
    return [(event.status, event.attempt) for event in story]
