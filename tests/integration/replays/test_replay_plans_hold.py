"""What was planned is what is published, whatever changes before a replay goes on; odd records are passed over."""

import os
import signal

import psycopg
import pytest

from queryd.events import Mode, Topic
from tests.integration.fleet import Fleet, await_that
from tests.integration.queries import make_request, new_id
from tests.integration.records import config_of, write
from tests.integration.replays.commands import (
    CommandLine,
    await_terminal,
    find_copies,
    publish,
    read_records,
    stretch,
)
from tests.servers.kafka import Kafka

_SLOWLY = ["--rate", "1", "--max-lag", "0"]
_FAST = ["--rate", "1000", "--max-lag", "0"]


def _set_status(fleet: Fleet, query_id: str, status: str) -> None:
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        changed = connection.execute("UPDATE query_results SET status = %s WHERE id = %s", [status, query_id])
        assert changed.rowcount == 1


@pytest.mark.slow
def test_a_resumed_replay_publishes_what_was_planned_and_says_what_has_changed(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka
) -> None:
    org_id, replay_id = new_id(), new_id()
    failed = [make_request(org_id=org_id, saved_query_id=new_id()) for _ in range(6)]
    fine = make_request(org_id=org_id)
    with stretch() as span:
        publish(kafka, [*failed, fine])
        await_terminal(fleet, org_id, 7)
    asked = ["requests", *span.options, "--org", org_id, "--status", "Failed"]
    run = ["--execute", queryd.replay(*asked)["hash"], "--reason", "a test", "--id", replay_id]
    running = queryd.start(*asked, *run, *_SLOWLY)
    await_that(lambda: find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id), "a first copy")
    running.send_signal(signal.SIGINT)
    running.communicate()
    sent = {record.key() for record in find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id)}
    # One more would match now, and one of the planned no longer does.
    other = next(request.query_id for request in failed if request.query_id.encode() not in sent)
    _set_status(fleet, fine.query_id, "Failed")
    _set_status(fleet, other, "Succeeded")
    another = "another key, which is long enough"
    assert "QUERYD_SQL_HASH_KEY" in queryd.refuse("resume", replay_id, QUERYD_SQL_HASH_KEY=another)
    refused = queryd.refuse("resume", replay_id, QUERYD_SCHEMA_REGISTRY_URL="mock://registry")
    assert "QUERYD_SCHEMA_REGISTRY_URL was not set when the replay began and is set" in refused
    done = queryd.replay("resume", replay_id, *_FAST, code=1)
    assert (done["status"], done["published"], done["skipped"]) == ("Done", 5, {"changed": 1})
    sent = {record.key() for record in find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id)}
    assert sent == {request.query_id.encode() for request in failed if request.query_id != other}


@pytest.mark.slow
def test_a_cancelled_replay_whose_process_died_sends_nothing_more(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka
) -> None:
    org_id, replay_id = new_id(), new_id()
    with stretch() as span:
        publish(kafka, [make_request(org_id=org_id, saved_query_id=new_id()) for _ in range(20)])
        await_terminal(fleet, org_id, 20)
    asked = ["requests", *span.options, "--org", org_id]
    run = ["--execute", queryd.replay(*asked)["hash"], "--reason", "a test", "--id", replay_id]
    running = queryd.start(*asked, *run, *_SLOWLY)
    await_that(lambda: find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id), "a first copy")
    running.send_signal(signal.SIGSTOP)
    assert queryd.replay("cancel", replay_id)["status"] == "Cancelling"
    running.kill()
    running.communicate()
    sent = len(find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id))
    assert queryd.replay("resume", replay_id, *_FAST, code=1)["status"] == "Cancelled"
    assert len(find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), replay_id)) == sent


def test_an_offset_and_a_time_narrow_each_other(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    with stretch() as span:
        publish(kafka, [make_request(org_id=org_id, saved_query_id=new_id()) for _ in range(12)])
        await_terminal(fleet, org_id, 12)
    offsets = [
        record.offset() for record in read_records(kafka, [Topic.REQUESTS_INTERACTIVE]) if record.partition() == 0
    ]
    last = str(max(offset for offset in offsets if offset is not None))
    asked = ["requests", "--mode", "interactive", *span.options, "--org", org_id, "--partition", "0"]
    assert queryd.replay(*asked, "--from-offset", last)["matched"] == 1


# The embedded broker takes a record of any size.
@pytest.mark.needs_kafka
def test_a_letter_that_its_topic_would_not_take_is_passed_over(queryd: CommandLine, kafka: Kafka) -> None:
    """With our headers it is larger than it was."""
    key = new_id()
    limit = 1_048_576
    write(config_of(kafka) | {"message.max.bytes": 2 * limit}, Topic.REQUESTS_INTERACTIVE, key, os.urandom(limit - 160))
    await_that(
        lambda: [each for each in read_records(kafka, [Topic.DEAD_LETTERS]) if each.key() == key.encode()], "the letter"
    )
    done = queryd.carry_out("dead-letters", "--key", key)
    assert (done["published"], done["skipped"]) == (0, {"too_large": 1})


def test_queries_that_are_not_finished_do_not_run_twice(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """Their task would hear of two ends, and there is nothing to compare."""
    org_id = new_id()
    request = make_request(org_id=org_id, mode=Mode.BATCH, saved_query_id=new_id())
    with stretch() as span:
        publish(kafka, [request])
        await_terminal(fleet, org_id, 1)
    _set_status(fleet, request.query_id, "Running")
    assert "1 unfinished" in queryd.refuse("requests", *span.options, "--org", org_id, "--as-new")
