"""Requests are replayed exactly as planned, however the replay ends and is taken up again."""

import signal
import uuid

import psycopg
import pytest

from queryd.events import Mode, Topic
from queryd.headers import ReplayHeader
from tests.integration.fleet import Fleet, await_that
from tests.integration.queries import make_request, new_id
from tests.integration.records import headers_of
from tests.integration.replays.commands import (
    CommandLine,
    Stretch,
    await_terminal,
    count_origins,
    find_copies,
    place_of,
    publish,
    read_records,
    read_rows,
    stretch,
)
from tests.servers.kafka import Kafka

_MANY = 10_000
# These run, and have results; the rest name a saved query that is not there, and end as they are admitted.
_WITH_RESULTS = 30
_REQUESTS = (Topic.REQUESTS_INTERACTIVE.value, Topic.REQUESTS_BATCH.value)
_BATCH = 500


def _publish_many(kafka: Kafka, org_id: str) -> Stretch:
    with stretch() as span:
        publish(
            kafka,
            [
                make_request(org_id=org_id, mode=Mode.BATCH if n % 7 == 0 else Mode.INTERACTIVE)
                for n in range(_WITH_RESULTS)
            ]
            + [make_request(org_id=org_id, saved_query_id=new_id()) for _ in range(_MANY - _WITH_RESULTS)],
            {"ce_id": b"theirs", "traceparent": b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01", "x-own": b"kept"},
        )
    return span


# Ten thousand requests are for a broker that keeps them on disk.
@pytest.mark.slow
@pytest.mark.needs_kafka
def test_ten_thousand_finished_requests_change_nothing_and_a_killed_replay_goes_on(
    fleet: Fleet, queryd: CommandLine, kafka: Kafka
) -> None:
    org_id = new_id()
    span = _publish_many(kafka, org_id)
    await_terminal(fleet, org_id, _MANY)
    originals = [record for record in read_records(kafka, _REQUESTS) if headers_of(record).get("x-own")]
    assert len(originals) == _MANY
    rows, objects = read_rows(fleet, org_id), fleet.list_objects(org_id)
    events = len(_events(kafka, rows))
    assert len(objects) == _WITH_RESULTS

    done = queryd.carry_out("requests", *span.options, "--org", org_id, options=["--max-lag", "0", "--rate", "100000"])
    assert (done["status"], done["published"], done["notes"]) == ("Done", _MANY, {"finished": _MANY})
    copies = find_copies(read_records(kafka, _REQUESTS), done["id"])
    by_origin = {origin: record for record in copies for origin in count_origins([record])}
    assert by_origin.keys() == {place_of(record) for record in originals}
    assert len(copies) == _MANY
    for original in originals:
        copied = by_origin[place_of(original)]
        headers = headers_of(copied)
        assert (copied.key(), copied.value()) == (original.key(), original.value())
        assert (copied.topic(), copied.partition()) == (original.topic(), original.partition())
        assert headers["x-own"] == b"kept"
        assert headers["ce_id"] == b"theirs"
        assert headers[ReplayHeader.COUNT] == b"1"
        assert headers[ReplayHeader.TIMESTAMP] == str(original.timestamp()[1]).encode()
        assert headers[ReplayHeader.TRACEPARENT] == headers_of(original)["traceparent"] != headers["traceparent"]

    again = str(uuid.uuid4())
    plan = queryd.replay("requests", *span.options, "--org", org_id)
    running = queryd.start(
        "requests", *span.options, "--org", org_id, "--execute", plan["hash"], "--reason", "killed", "--id", again,
        "--max-lag", "0", "--rate", "4000",
    )  # fmt: skip
    await_that(lambda: _published(fleet, again) >= _MANY * 3 // 10, "three tenths of the replay")
    running.send_signal(signal.SIGKILL)
    running.communicate()
    noted = _published(fleet, again)
    assert noted < _MANY
    resumed = queryd.replay("resume", again, "--max-lag", "0", "--rate", "100000")
    assert (resumed["status"], resumed["published"]) == ("Done", _MANY)
    counted = count_origins(find_copies(read_records(kafka, _REQUESTS), again))
    assert counted.keys() == {place_of(record) for record in originals}
    assert 0 <= counted.total() - _MANY <= _BATCH

    # Whatever an executor makes of a copy it has made of it before it runs this.
    _await_read(fleet, kafka)
    assert read_rows(fleet, org_id) == rows
    assert fleet.list_objects(org_id) == objects
    assert len(_events(kafka, rows)) == events


def _published(fleet: Fleet, replay_id: str) -> int:
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        row = connection.execute(
            "SELECT (counts->>'published')::int FROM replays WHERE id = %s", [replay_id]
        ).fetchone()
    return 0 if row is None or row[0] is None else int(row[0])


def _events(kafka: Kafka, rows: list[tuple[object, ...]]) -> list[bytes]:
    ids = {str(row[0]).encode() for row in rows}
    return [
        key for record in read_records(kafka, [Topic.STATUS]) if (key := record.key()) in ids and isinstance(key, bytes)
    ]


def _await_read(fleet: Fleet, kafka: Kafka) -> None:
    """A query of each partition's has ended that was published behind everything else."""
    org_id, lanes = new_id(), 12
    publish(
        kafka,
        [make_request(org_id=org_id, mode=mode, saved_query_id=new_id()) for mode in Mode for _ in range(lanes)],
    )
    await_terminal(fleet, org_id, lanes * len(Mode))
