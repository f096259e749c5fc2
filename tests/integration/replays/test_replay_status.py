"""Last events again, byte for byte; and what is refused before anything is published."""

import uuid
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from confluent_kafka import Message, TopicPartition
from confluent_kafka.admin import AdminClient

from queryd.events import Mode, Topic
from queryd.headers import ReplayHeader
from tests.integration.fleet import Fleet
from tests.integration.queries import make_request, new_id
from tests.integration.records import PATIENCE_SECONDS, config_of, headers_of, write
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


def _run_some(fleet: Fleet, kafka: Kafka, org_id: str, count: int = 6) -> Stretch:
    with stretch() as span:
        publish(kafka, [make_request(org_id=org_id, mode=list(Mode)[n % 2]) for n in range(count)])
        await_terminal(fleet, org_id, count)
    return span


def _by_key(records: list[Message]) -> dict[bytes | str | None, Message]:
    return {record.key(): record for record in records}


@pytest.mark.slow
def test_each_finished_query_s_last_event_comes_again_byte_for_byte(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka
) -> None:
    org_id = new_id()
    _run_some(fleet, kafka, org_id)
    before = read_records(kafka, [Topic.STATUS])
    planned = queryd.replay("status", "--org", org_id)
    # Queued and Running went before.
    assert (planned["matched"], planned["skipped"]) == (6, {"superseded": 12})
    done = queryd.carry_out("status", "--org", org_id)
    copies = find_copies(read_records(kafka, [Topic.STATUS]), done["id"])
    last = _by_key(before)
    assert len(copies) == 6
    for copied in copies:
        original = last[copied.key()]
        assert copied.value() == original.value()
        assert copied.partition() == original.partition()
        assert headers_of(copied)["ce_id"] == headers_of(original)["ce_id"]
        assert headers_of(copied)[ReplayHeader.OFFSET] == str(original.offset()).encode()

    # Of an event and its copy one is sent when both lie in the window.
    again = queryd.carry_out("status", "--org", org_id)
    assert (again["published"], again["skipped"]) == (6, {"superseded": 12, "repeated": 6})


@pytest.mark.slow
def test_what_is_not_finished_or_was_deleted_is_not_replayed(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """Behind the event of an unfinished query its next one may come, and behind a tombstone nothing."""
    org_id = new_id()
    _run_some(fleet, kafka, org_id, 3)
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        rows = connection.execute("SELECT id FROM query_results WHERE org_id = %s ORDER BY id", [org_id]).fetchall()
        (unfinished,), (deleted,), _ = rows
        connection.execute(
            "UPDATE query_runs SET deadline = now() + interval '1 hour', attempt = 1 WHERE query_id = %s", [unfinished]
        )
        connection.execute("DELETE FROM query_results WHERE id = %s", [deleted])
    planned = queryd.replay("status", "--org", org_id, "--status", "Succeeded")
    assert (planned["matched"], planned["skipped"]) == (1, {"deleted": 2})
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        connection.execute("UPDATE query_runs SET deadline = NULL WHERE query_id = %s", [unfinished])


@pytest.mark.slow
def test_filters_narrow_a_window(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id, user_id = new_id(), new_id()
    with stretch() as span:
        mine = make_request(org_id=org_id, user_id=user_id, mode=Mode.BATCH)
        publish(kafka, [mine], {"x-job": b"nightly"})
        failing = make_request(org_id=org_id, sql="SELECT 1 / 'a'")
        publish(kafka, [failing, make_request(org_id=org_id)])
        await_terminal(fleet, org_id, 3)
    every = ["requests", *span.options, "--org", org_id]
    assert queryd.replay(*every)["matched"] == 3
    for narrow, found in (
        (["--user", user_id], [mine.query_id]),
        (["--mode", "batch"], [mine.query_id]),
        (["--header", "x-job=nightly"], [mine.query_id]),
        (["--key", failing.query_id], [failing.query_id]),
        (["--status", "Failed"], [failing.query_id]),
        (["--error-code", "QUERY_ERROR"], [failing.query_id]),
    ):
        planned = queryd.replay(*every, *narrow)
        assert (narrow, planned["first_ids"]) == (narrow, found)
    [record] = [each for each in read_records(kafka, [Mode.BATCH.topic]) if each.key() == mine.query_id.encode()]
    offset = record.offset()
    assert offset is not None
    by_offset = queryd.replay(
        "requests", "--mode", "batch", "--partition", str(record.partition()),
        "--from-offset", str(offset), "--to-offset", str(offset + 1),
    )  # fmt: skip
    assert by_offset["first_ids"] == [mine.query_id]
    assert [(each["start"], each["end"]) for each in by_offset["ranges"]] == [(offset, offset + 1)]


@pytest.mark.slow
def test_headers_are_kept_and_dropped_as_asked(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    with stretch() as span:
        publish(kafka, [make_request(org_id=org_id)], {"x-a": b"1", "x-b": b"2", "tracestate": b"x=y"})
        await_terminal(fleet, org_id, 1)
    for rules, kept in ((["--deny-header", "X-A"], {"x-b"}), (["--allow-header", "x-a"], {"x-a"})):
        done = queryd.carry_out("requests", *span.options, "--org", org_id, *rules)
        [copied] = find_copies(read_records(kafka, [Topic.REQUESTS_INTERACTIVE]), done["id"])
        ours = {header.value for header in ReplayHeader} | {"traceparent"}
        assert headers_of(copied).keys() - ours == kept


@pytest.mark.slow
def test_records_with_odd_times_are_judged_one_by_one(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    """Dead letters carry their producers' times: one from before the window may lie behind one from within it."""
    begin = datetime.now(UTC) - timedelta(days=3)
    keys = [new_id() for _ in range(4)]
    minutes = (10, -60, 20, 90)
    for key, minute in zip(keys, minutes, strict=True):
        moment = begin + timedelta(minutes=minute)
        write_at(kafka, key, moment)
    window = ["--since", _say(begin), "--until", _say(begin + timedelta(hours=1))]
    for key, inside in zip(keys, (True, False, True, False), strict=True):
        planned = queryd.refuse("dead-letters", *window, "--key", key)
        assert ("1 foreign" in planned) == inside


def write_at(kafka: Kafka, key: str, moment: datetime) -> None:
    """A record of that time in the dead letters' topic."""
    write(config_of(kafka), Topic.DEAD_LETTERS, key, b"nothing", timestamp_ms=int(moment.timestamp() * 1000))


def _say(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# What is refused, before anything is published.


@pytest.mark.slow
def test_a_stale_plan_is_refused(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    span = _run_some(fleet, kafka, org_id, 2)
    arguments = ["requests", *span.options, "--org", org_id]
    planned = queryd.replay(*arguments)
    assert "say why" in queryd.refuse(*arguments, "--execute", planned["hash"])
    assert "nothing was published" in queryd.refuse(*arguments, "--execute", "0" * 16, "--reason", "a test")
    # The same hash with another question is another plan.
    other = [*arguments, "--mode", "batch", "--execute", planned["hash"], "--reason", "a test"]
    assert "nothing was published" in queryd.refuse(*other)
    # So is the same question when there is more to be found.
    letters = ["dead-letters", "--org", org_id]
    publish(kafka, [make_request(org_id=org_id, timeout_seconds=0)])
    await_terminal(fleet, org_id, 3)
    first = queryd.replay(*letters)
    publish(kafka, [make_request(org_id=org_id, timeout_seconds=0)])
    await_terminal(fleet, org_id, 4)
    assert "nothing was published" in queryd.refuse(*letters, "--execute", first["hash"], "--reason", "a test")


def test_an_empty_match_is_refused(queryd: CommandLine, kafka: Kafka) -> None:
    with stretch() as span:
        pass
    assert "none of the" in queryd.refuse("dead-letters", "--key", new_id())
    assert "queryd: " in queryd.refuse("requests", *span.options, "--org", new_id())


# The embedded broker removes no records.
@pytest.mark.needs_kafka
def test_a_window_beyond_retention_is_refused(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id = new_id()
    with stretch() as span:
        publish(kafka, [make_request(org_id=org_id, saved_query_id=new_id(), mode=Mode.BATCH) for _ in range(30)])
        await_terminal(fleet, org_id, 30)
    records = [each for each in read_records(kafka, [Topic.REQUESTS_BATCH]) if each.partition() == 0]
    last = records[-1].offset()
    assert last is not None
    # As retention does it. The client must outlive its answer.
    admin, place = AdminClient(config_of(kafka)), TopicPartition(Topic.REQUESTS_BATCH, 0, last)
    admin.delete_records([place])[place].result(PATIENCE_SECONDS)
    since = ["--since", _say(span.since - timedelta(days=30))]
    assert "goes back to" in queryd.refuse("requests", "--mode", "batch", *since, *span.options[2:])
    by_offset = ["requests", "--mode", "batch", "--partition", "0", "--from-offset"]
    assert "removed by retention" in queryd.refuse(*by_offset, "0")
    assert queryd.replay(*by_offset, str(last))["ranges"][0]["start"] == last


@pytest.mark.slow
def test_one_replay_at_a_time_on_a_scope(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    org_id, first = new_id(), str(uuid.uuid4())
    span = _run_some(fleet, kafka, org_id, 4)
    arguments = ["requests", *span.options, "--org", org_id]
    planned = queryd.replay(*arguments)
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        connection.execute(
            "INSERT INTO replays (id, kind, scope, status, actor, reason, plan) "
            "VALUES (%s, 'requests', 'requests', 'Active', 'somebody', 'left behind', '{}')",
            [first],
        )
    run = [*arguments, "--execute", planned["hash"], "--reason", "a test"]
    assert first in queryd.refuse(*run)
    # Nobody works on it, so that it ends at once.
    assert queryd.replay("cancel", first) == {"id": first, "status": "Cancelled"}
    assert "has ended" in queryd.refuse("resume", first)
    assert "ended before" in queryd.refuse("cancel", first)
    done = queryd.replay(*run, "--by", "an auditor's friend")
    newest = queryd.list_replays()[0]
    assert (newest["id"], newest["by"], newest["reason"]) == (done["id"], "an auditor's friend", "a test")
    shown = queryd.replay("show", done["id"])
    assert shown["plan"]["hash"] == planned["hash"]
    assert shown["counts"]["published"] == shown["plan"]["matched"] == 4


def test_a_replay_over_a_topic_that_was_made_anew_is_refused(fleet: Fleet, queryd: CommandLine, kafka: Kafka) -> None:
    replay_id = str(uuid.uuid4())
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        connection.execute(
            "INSERT INTO replays (id, kind, scope, status, actor, reason, plan) VALUES (%s, 'status', 'status', "
            "'Active', 'somebody', 'left behind', %s::jsonb)",
            [
                replay_id,
                '{"matched": 1, "options": {}, "topics": {"query.status": "another/topic"}, "ranges": [], '
                '"asked": {"window": {}, "selection": {}, "headers": {}}}',
            ],
        )
    assert "made anew" in queryd.refuse("resume", replay_id)
    queryd.replay("cancel", replay_id)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["requests"], "say which requests"),
        (["requests", "--since", "2026-01-01T00:00:00", "--until", "2026-01-02T00:00:00Z"], "UTC"),
        (["requests", "--since", "2026-01-01T00:00:00+02:00", "--until", "2026-01-02T00:00:00Z"], "UTC"),
        (["requests", "--since", "2026-01-02T00:00:00Z", "--until", "2026-01-01T00:00:00Z"], "earlier"),
        (["requests", "--since", "2026-01-01T00:00:00Z", "--until", "2999-01-01T00:00:00Z"], "future"),
        (["requests", "--from-offset", "0"], "--partition"),
        (["requests", "--from-offset", "0", "--partition", "0"], "--mode"),
        (["status", "--user", "00000000-0000-0000-0000-000000000001"], "--org"),
        (["status", "--partition", "99"], "no partition 99"),
        (["requests", "--since", "2026-01-01T00:00:00Z", "--until", "2026-01-02T00:00:00Z", "--compare"], "--as-new"),
        (["resume", "00000000-0000-0000-0000-000000000001"], "there is no replay"),
    ],
)
def test_what_is_asked_wrongly_is_said_in_a_sentence(queryd: CommandLine, arguments: list[str], said: str) -> None:
    assert said in queryd.refuse(*arguments)
