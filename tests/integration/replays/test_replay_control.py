"""A replay under way is gentle, and does as it is told: it waits, it stops, it is cancelled, and one process has it."""

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from db.connection import Connection
from db.data.replays import hold_last_events
from queryd.events import Mode, Topic
from tests.integration.fleet import Fleet, await_that
from tests.integration.queries import make_request, new_id
from tests.integration.replays.commands import (
    CommandLine,
    Stretch,
    await_terminal,
    find_copies,
    publish,
    read_records,
    stretch,
)
from tests.servers.kafka import Kafka

_REQUESTS = 40
# Days of a core.
_ENDLESS = "SELECT count(*) FROM range(0, 9000000) AS a(i), range(0, 9000000) AS b(j) WHERE (i * j) % 7 = 3"


def _prepare(fleet: Fleet, kafka: Kafka, org_id: str) -> Stretch:
    with stretch() as span:
        publish(kafka, [make_request(org_id=org_id, saved_query_id=new_id()) for _ in range(_REQUESTS)])
        await_terminal(fleet, org_id, _REQUESTS)
    return span


@contextmanager
def _slowly(
    queryd: CommandLine, fleet: Fleet, span: Stretch, org_id: str, *options: str
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A replay of one record a second, once its row is there."""
    replay_id = new_id()
    asked = ["requests", *span.options, "--org", org_id]
    run = ["--execute", queryd.replay(*asked)["hash"], "--reason", "slowly", "--id", replay_id, "--rate", "1"]
    running = queryd.start(*asked, *run, *options)
    try:
        await_that(lambda: _status(fleet, replay_id) is not None, "the replay's row")
        yield replay_id, running
    finally:
        running.kill()
        running.communicate()


def _status(fleet: Fleet, replay_id: str) -> str | None:
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        row = connection.execute("SELECT status FROM replays WHERE id = %s", [replay_id]).fetchone()
    return None if row is None else str(row[0])


@pytest.mark.slow
def test_one_process_has_it_and_ctrl_c_leaves_it_to_be_resumed(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    span = _prepare(fleet, kafka, org_id)
    with _slowly(queryd, fleet, span, org_id) as (replay_id, running):
        assert "another process works on" in queryd.refuse("resume", replay_id)
        running.send_signal(signal.SIGINT)
        told, complaint = running.communicate()
        assert (running.returncode, complaint) == (130, "")
    assert f"queryd replay resume {replay_id}" in told
    assert _status(fleet, replay_id) == "Active"
    done = queryd.replay("resume", replay_id, "--rate", "1000")
    assert (done["status"], done["published"]) == ("Done", _REQUESTS)
    # Nothing was killed, so nothing is sent twice.
    assert len(find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id)) == _REQUESTS


@pytest.mark.slow
def test_a_cancel_reaches_the_process_that_works_on_it(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    span = _prepare(fleet, kafka, org_id)
    with _slowly(queryd, fleet, span, org_id) as (replay_id, running):
        # A cancel may come before the first copy.
        await_that(lambda: find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id), "a first copy")
        assert queryd.replay("cancel", replay_id)["status"] == "Cancelling"
        running.communicate()
        assert running.returncode == 1
    assert _status(fleet, replay_id) == "Cancelled"
    assert 0 < len(find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id)) < _REQUESTS
    assert "has ended" in queryd.refuse("resume", replay_id)


@pytest.mark.slow
def test_it_waits_while_live_traffic_is_behind(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """A request that runs holds back its partition's offset: everything behind it counts as waiting."""
    org_id = new_id()
    span = _prepare(fleet, kafka, org_id)
    stuck = make_request(org_id=new_id(), mode=Mode.BATCH, sql=_ENDLESS)
    publish(kafka, [stuck])
    await_that(lambda: fleet.read_status(stuck.query_id) == "Running", "the long query to run")
    # Of so many, more than five are in the long query's partition: fewer are as good as impossible.
    publish(kafka, [make_request(org_id=stuck.org_id, mode=Mode.BATCH, saved_query_id=new_id()) for _ in range(150)])
    with _slowly(queryd, fleet, span, org_id, "--rate", "1000", "--max-lag", "5") as (replay_id, running):
        with pytest.raises(subprocess.TimeoutExpired):
            # It looks every second.
            running.communicate(timeout=3.0)
        assert find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id) == []
        fleet.client.cancel(stuck.query_id, org_id=stuck.org_id)
        running.communicate()
        assert running.returncode == 0
    assert _status(fleet, replay_id) == "Done"


async def test_a_query_whose_last_event_is_sent_again_can_t_be_deleted_meanwhile(fleet: Fleet, kafka: Kafka) -> None:
    """Or the copy would lie behind its tombstone, and the query would be there again for every reader."""
    org_id = new_id()
    with stretch():
        request = make_request(org_id=org_id, saved_query_id=new_id())
        publish(kafka, [request])
        await asyncio.to_thread(await_terminal, fleet, org_id, 1)
    url = fleet.environment["QUERYD_DATA_URL"]
    holding: Connection
    async with (
        await psycopg.AsyncConnection.connect(url) as holding,
        await psycopg.AsyncConnection.connect(url) as deleting,
    ):
        assert (await hold_last_events(holding, [request.query_id])).keys() == {request.query_id}
        await deleting.execute("SET lock_timeout = '200ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await deleting.execute("DELETE FROM query_results WHERE id = %s", [request.query_id])
        await deleting.rollback()
        await holding.rollback()
        gone = await deleting.execute("DELETE FROM query_results WHERE id = %s", [request.query_id])
        await deleting.commit()
        assert gone.rowcount == 1
        assert await hold_last_events(holding, [request.query_id]) == {}
