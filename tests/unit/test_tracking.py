"""What a client makes of a query's records, in whichever order and however often they come."""

import itertools
import uuid
import weakref
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from queryd import tracking
from queryd.client import QueryClient
from queryd.errors import ClientStopped, QueryDeleted
from queryd.events import QueryId, QueryStatusChanged, Status
from queryd.tracking import Known, Track, partition_of
from tests.unit.samples import QUERY_ID, make_status

QUEUED = make_status()
RUNNING = make_status(sequence=2, status=Status.RUNNING)
SUCCEEDED = make_status(sequence=3, status=Status.SUCCEEDED, inline_result=b"a result")
EXPIRED = replace(SUCCEEDED, inline_result=None)
PATIENCE_SECONDS = 15.0


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([QUEUED, RUNNING, SUCCEEDED], Known(SUCCEEDED)),
        # A replay's copies, early and late.
        ([QUEUED, QUEUED, RUNNING, QUEUED, SUCCEEDED, RUNNING, SUCCEEDED], Known(SUCCEEDED)),
        # The last event again, without what has expired.
        ([SUCCEEDED, EXPIRED], Known(EXPIRED)),
        ([SUCCEEDED, None], Known(SUCCEEDED, deleted=True)),
        ([None, None], Known(deleted=True)),
        # A replay's copy that overtook nothing.
        ([SUCCEEDED, None, SUCCEEDED], Known(SUCCEEDED, deleted=True)),
        # The id was used again, after the time for which deletions are remembered.
        ([SUCCEEDED, None, QUEUED, RUNNING], Known(RUNNING)),
    ],
)
def test_what_is_known_follows_the_story(told: list[QueryStatusChanged | None], expected: Known) -> None:
    known = Known()
    for event in told:
        known = known.after(event)
    assert known == expected
    assert known.over == (expected.deleted or expected.event is not RUNNING)


def test_a_look_up_is_older_than_whatever_was_heard_meanwhile() -> None:
    for heard, found in itertools.permutations([RUNNING, SUCCEEDED], 2):
        track = Track(QUERY_ID)
        track.hear(heard)
        track.find(Known(found))
        assert track.known == Known(heard)
        assert track.ended.done() == heard.status.terminal
    track = Track(QUERY_ID)
    track.find(Known(SUCCEEDED))
    assert track.answer() == SUCCEEDED


def test_a_look_up_in_vain_is_told_and_ends_no_wait() -> None:
    track = Track(QUERY_ID)
    track.find(Known())
    assert track.looked_up.done()
    assert not track.ended.done()
    track.hear(SUCCEEDED)
    assert track.ended.done()


def test_who_holds_a_deleted_query_is_told_so_whatever_comes() -> None:
    track = Track(QUERY_ID)
    for event in (SUCCEEDED, None, QUEUED):
        track.hear(event)
    with pytest.raises(QueryDeleted, match=QUERY_ID):
        track.answer()


def test_a_client_that_stops_ends_the_waits_and_keeps_what_it_knows() -> None:
    finished, running = Track(QUERY_ID), Track(QUERY_ID)
    finished.hear(SUCCEEDED)
    running.hear(RUNNING)
    for track in (finished, running):
        track.stop("the broker refuses")
        assert track.ended.done()
    assert finished.answer() == SUCCEEDED
    with pytest.raises(ClientStopped, match="the broker refuses"):
        running.answer()


def test_nobody_can_cancel_what_others_wait_for() -> None:
    track = Track(QUERY_ID)
    assert not track.ended.cancel()
    assert not track.looked_up.cancel()


def test_a_querys_partition_is_where_librdkafka_puts_its_key() -> None:
    """On the mock cluster that librdkafka carries, whose topics have four partitions."""
    producer = Producer({"test.mock.num.brokers": 1, "log_level": 0})
    partitions = len(producer.list_topics("status", timeout=PATIENCE_SECONDS).topics["status"].partitions)
    told: dict[bytes, int | None] = {}

    def report(_: KafkaError | None, message: Message) -> None:
        key: Any = message.key()
        told[key] = message.partition()

    for _ in range(200):
        producer.produce("status", key=str(uuid.uuid4()).encode(), value=b"", on_delivery=report)
    assert producer.flush(PATIENCE_SECONDS) == 0
    assert told == {key: partition_of(key, partitions) for key in told}
    assert len(set(told.values())) == partitions == 4


class _Electing:
    """A consumer of a topic whose leaders are elected while it looks."""

    def __init__(self, *, errors: int) -> None:
        self._errors = errors

    def list_topics(self, topic: str, timeout: float) -> Any:
        assert timeout > 0
        known = type("Topic", (), {"error": None, "partitions": {0: None, 1: None}})
        return type("Metadata", (), {"topics": {topic: known}})

    def get_watermark_offsets(self, partition: TopicPartition, timeout: float) -> tuple[int, int]:
        assert timeout > 0
        if self._errors:
            self._errors -= 1
            raise KafkaException(KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION))
        return 0, 7 + partition.partition


def test_leaders_that_are_being_elected_are_waited_for_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_LOOK_SECONDS", 0.0)
    consumer: Any = _Electing(errors=3)
    assert [(each.partition, each.offset) for each in tracking._await_ends(consumer)] == [(0, 7), (1, 8)]
    monkeypatch.setattr(tracking, "_BROKER_SECONDS", 0.01)
    hopeless: Any = _Electing(errors=10**9)
    with pytest.raises(KafkaException):
        tracking._await_ends(hopeless)


def test_a_client_whose_broker_is_away_names_it_and_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_BROKER_SECONDS", 0.2)
    with pytest.raises(KafkaException) as refused:
        QueryClient({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
    (note,) = refused.value.__notes__
    assert "127.0.0.1:1" in note
    assert "queryd doctor" in note


@pytest.mark.parametrize("broker", ["localhost:9092", ["localhost:9092"]])
def test_a_client_made_of_a_broker_alone_says_what_it_takes(broker: Any) -> None:
    with pytest.raises(TypeError, match=r"bootstrap\.servers"):
        QueryClient(broker)


def test_a_look_up_holds_nothing() -> None:
    track = Track(QUERY_ID)
    reference = weakref.ref(track)
    assert tracking._unheard(reference) == QUERY_ID.encode()
    track.hear(QUEUED)
    assert tracking._unheard(reference) is None
    del track
    assert tracking._unheard(reference) is None


def test_events_that_this_process_cannot_read_at_all_end_the_waits() -> None:
    """On a mock cluster of its own, for nothing may read such a record by accident."""
    producer = Producer({"test.mock.num.brokers": 1, "log_level": 0})
    brokers = producer.list_topics("query.status", timeout=PATIENCE_SECONDS).brokers.values()
    tracks = tracking.Tracking({"bootstrap.servers": ",".join(f"{broker.host}:{broker.port}" for broker in brokers)})
    track, later = tracks.take(QUERY_ID), QueryId(str(uuid.uuid4()))
    # Confluent's wire format, and nobody has told of a registry.
    producer.produce("query.status", key=QUERY_ID.encode(), value=b"\0\0\0\0\7body")
    assert producer.flush(PATIENCE_SECONDS) == 0
    track.ended.result(PATIENCE_SECONDS)
    with pytest.raises(ClientStopped, match="QUERYD_SCHEMA_REGISTRY_URL"):
        track.answer()
    assert tracks.take(later).ended.done()
    tracks.close()
