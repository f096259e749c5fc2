"""The projector: what the status topic says stands in the state database, however often and however late it comes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import Consumer, TopicPartition
from psycopg.rows import dict_row
from structlog.testing import CapturingLogger

from consumers import projector
from consumers.projector import Projector, StateStore, to_row
from db.connection import StatePool, make_pool
from db.migrations.upgrade import upgrade_state
from db.state.platform import create_platform_tables
from db.state.query_status import move_tasks, write_offsets
from queryd.codec import encode
from queryd.events import ErrorCode, Mode, OrgId, QueryId, QueryStatusChanged, Status, Topic
from queryd.kafka.record import Record
from queryd.status_records import StatusRecord
from queryd.topics import TopicIdentity, read_topic_identity
from service.embedded.broker import Broker
from service.embedded.servers import Lifeline
from service.topics import apply_topics
from telemetry.events import LogEvent
from tests.integration.queries import new_id
from tests.integration.records import PATIENCE_SECONDS, prepare_topics, until, write
from tests.servers.kafka import Kafka

# The embedded broker lets a member wait for half of its session timeout before it may begin.
_SESSION = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 500}
_START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Place:
    """A state database and a consumer group of the test's own, and a broker."""

    pool: StatePool
    kafka: dict[str, Any]
    group: str


@pytest.fixture
async def pool(state_url: str) -> AsyncIterator[StatePool]:
    upgrade_state(state_url)
    create_platform_tables(state_url)
    made = StatePool(make_pool(state_url, "test", 3))
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def place(pool: StatePool, kafka: Kafka) -> Place:
    return Place(pool, prepare_topics(kafka), new_id())


# Rows.


async def test_a_query_stands_as_its_newest_event_tells(place: Place) -> None:
    story = _make_story(user_id=new_id(), task_id=new_id())
    async with _projecting(place) as running:
        for event in story:
            await _project(place, running, event)
            row = await _read_row(place.pool, event.query_id)
            assert row is not None
            row.pop("updated_at")
            told = {name: getattr(event, name) for name in row}
            assert {name: _plain(value) for name, value in row.items()} == told
            assert row["sequence"] == event.sequence


async def test_duplicates_and_old_sequences_change_nothing(place: Place) -> None:
    story = _make_story()
    async with _projecting(place) as running:
        await _project(place, running, *story)
        before = await _read_row(place.pool, story[0].query_id)
        assert before is not None
        # The last one with another content: what was seen first stands.
        again = replace(story[-1], row_count=77, occurred_at=_START + timedelta(days=1))
        for event in (story[-1], story[1], story[0], again):
            await _project(place, running, event)
        await _project(place, running, *reversed(story))
        assert await _read_row(place.pool, story[0].query_id) == before


async def test_the_highest_sequence_wins_inside_one_batch_too(place: Place) -> None:
    story = _make_story()
    # Written before anybody reads, so that they come in one batch.
    ends = await _publish(place, story[2], story[0], story[1], story[2])
    async with _projecting(place) as running:
        await _wait_for(place, running, ends)
    row = await _read_row(place.pool, story[0].query_id)
    assert row is not None
    assert (row["status"], row["sequence"]) == ("Succeeded", 3)


async def test_a_tombstone_deletes_the_query(place: Place) -> None:
    deleted, other = _make_story(), _make_story()
    async with _projecting(place) as running:
        await _project(place, running, *deleted, *other)
        kept = await _read_row(place.pool, other[0].query_id)
        for query_id in (deleted[0].query_id, new_id()):
            offset = write(place.kafka, Topic.STATUS, query_id, None)
            await _wait_for(place, running, {0: offset})
        assert await _read_row(place.pool, deleted[0].query_id) is None
        assert await _read_row(place.pool, other[0].query_id) == kept


async def test_a_tombstone_in_the_batch_of_its_queries_events_deletes_it(place: Place) -> None:
    story = _make_story()
    await _publish(place, *story)
    offset = write(place.kafka, Topic.STATUS, story[0].query_id, None)
    async with _projecting(place) as running:
        await _wait_for(place, running, {0: offset})
    assert await _read_row(place.pool, story[0].query_id) is None


async def test_a_record_that_cannot_be_read_is_passed_over_and_told_of(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(projector, "_log", log)
    unreadable = [
        write(place.kafka, Topic.STATUS, new_id(), b"a secret that is no event"),
        write(place.kafka, Topic.STATUS, new_id(), encode(_make_story()[0])[:-1]),
        write(place.kafka, Topic.STATUS, new_id(), b""),
        write(place.kafka, Topic.STATUS, "no id", None),
    ]
    story = _make_story()
    async with _projecting(place) as running:
        await _project(place, running, *story)
    assert await _read_row(place.pool, story[0].query_id) is not None
    calls = [call for call in log.calls if call.args == (LogEvent.STATUS_UNREADABLE,)]
    # The tests share the topic, and another partition may have an unreadable record at the same offset.
    logged = {call.kwargs["offset"]: call for call in calls if call.kwargs["partition"] == 0}
    for offset in unreadable:
        assert logged[offset].method_name == "error"
        assert "secret" not in str(logged[offset])


# Offsets.


async def test_offsets_and_rows_are_one_transaction(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(Exception):
        pass

    async def crash(*_: object) -> None:
        raise Crash

    story = _make_story()
    ends = await _publish(place, *story)
    with monkeypatch.context() as patched:
        patched.setattr(projector, "write_offsets", crash)
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(Crash):
                await _make_projector(place).run()
    assert await _read_row(place.pool, story[0].query_id) is None
    assert await _read_offsets(place) == {}
    async with _projecting(place) as running:
        await _wait_for(place, running, ends)
    assert await _read_row(place.pool, story[0].query_id) is not None


@pytest.mark.parametrize("committed", ["at the earliest", "at the end", "nothing"])
async def test_a_projector_starts_from_its_stored_offsets_whatever_the_group_has_committed(
    place: Place, committed: str
) -> None:
    seen, missed = _make_story(), _make_story()
    async with _projecting(place) as running:
        await _project(place, running, *seen)
    stored = await _read_offsets(place)
    # A sign of a record that is read again.
    async with place.pool.connection() as connection:
        await connection.execute("DELETE FROM query_status WHERE query_id = %s", [seen[0].query_id])
    ends = await _publish(place, *missed)
    match committed:
        case "at the earliest":
            _commit(place, dict.fromkeys(stored, 0))
        case "at the end":
            _commit(place, {partition: offset + 1 for partition, offset in ends.items()})
    async with _projecting(place) as running:
        await _wait_for(place, running, ends)
    assert await _read_row(place.pool, missed[0].query_id) is not None
    assert await _read_row(place.pool, seen[0].query_id) is None


async def test_offsets_of_another_cluster_or_topic_mean_nothing(place: Place) -> None:
    story = _make_story()
    ends = await _publish(place, *story)
    topic = read_topic_identity(place.kafka, Topic.STATUS)
    far = dict.fromkeys(range(3), 1_000_000_000)
    async with place.pool.connection() as connection:
        await write_offsets(connection, new_id(), topic.topic_id, far)
        await write_offsets(connection, topic.cluster_id, new_id(), far)
    async with _projecting(place) as running:
        await _wait_for(place, running, ends)
    assert await _read_row(place.pool, story[0].query_id) is not None


@pytest.mark.slow
async def test_another_cluster_is_read_from_its_earliest_record(
    pool: StatePool, tmp_path: Path, lifeline: Lifeline
) -> None:
    group = new_id()
    # The second cluster has fewer records than were read of the first.
    for name, queries in (("first", 5), ("second", 1)):
        broker = Broker(tmp_path / name, tmp_path / f"{name}.log", lifeline)
        broker.start()
        try:
            place = Place(pool, {"bootstrap.servers": broker.bootstrap}, group)
            apply_topics(place.kafka, partitions=1, replication=1)
            stories = [_make_story() for _ in range(queries)]
            ends = await _publish(place, *(event for story in stories for event in story))
            async with _projecting(place) as running:
                await _wait_for(place, running, ends)
            assert await _read_offsets(place) == {0: 3 * queries}
        finally:
            broker.stop()
        for story in stories:
            assert await _read_row(pool, story[0].query_id) is not None


async def test_stored_offsets_only_grow(pool: StatePool) -> None:
    async with pool.connection() as connection:
        for ends in ({0: 5, 1: 1}, {0: 3, 1: 2}, {2: 9}):
            await write_offsets(connection, "cluster", "topic", ends)
        cursor = await connection.execute("SELECT partition, next_offset FROM consumer_offsets ORDER BY partition")
        assert await cursor.fetchall() == [(0, 5), (1, 2), (2, 9)]


async def test_a_member_that_wakes_brings_no_deleted_query_back(pool: StatePool) -> None:
    """It was stopped with a batch in its hands, and another has projected that and the query's deletion since."""
    store, topic = StateStore(pool), TopicIdentity("cluster", "topic")
    [queued, running, ended] = _make_story()
    story = [
        _make_record(offset, queued.query_id, event) for offset, event in enumerate((queued, running, ended, None))
    ]
    await store.apply(topic, story, {0: 4})
    assert await _read_row(pool, queued.query_id) is None
    await store.apply(topic, story[:2], {0: 2})
    assert await _read_row(pool, queued.query_id) is None
    # What lies behind is a new query under the old id.
    again = _make_record(4, queued.query_id, queued)
    await store.apply(topic, [story[2], again], {0: 5})
    row = await _read_row(pool, queued.query_id)
    assert row is not None
    assert row["sequence"] == 1


def _make_record(offset: int, query_id: QueryId, event: QueryStatusChanged | None) -> StatusRecord:
    record = Record(
        topic=Topic.STATUS,
        partition=0,
        offset=offset,
        key=query_id.encode(),
        value=None if event is None else encode(event),
        headers=(),
        timestamp_ms=0,
        appended_by_broker=True,
        polled_at=0.0,
        epoch=1,
    )
    return StatusRecord(query_id, event, record)


# Tasks.

_SUCCEEDED = (Status.SUCCEEDED, None)
_FAILED = (Status.FAILED, ErrorCode.QUERY_ERROR)
_CANCELLED = (Status.FAILED, ErrorCode.QUERY_CANCELLED)


@pytest.mark.parametrize(
    ("end", "expected"),
    [(_SUCCEEDED, "Completed"), (_FAILED, "Failed"), (_CANCELLED, "Canceled")],
    ids=["succeeded", "failed", "cancelled"],
)
async def test_a_task_goes_with_its_query_and_never_out_of_a_terminal_state(
    place: Place, end: tuple[Status, ErrorCode | None], expected: str
) -> None:
    task_id, org_id = new_id(), new_id()
    await _insert_task(place.pool, task_id, org_id)
    story = _make_story(end=end, task_id=task_id, org_id=OrgId(org_id))
    async with _projecting(place) as running:
        seen = [await _read_task(place.pool, task_id)]
        for event in story:
            await _project(place, running, event)
            seen.append(await _read_task(place.pool, task_id))
        assert [status for status, _ in seen] == ["Queued", "Queued", "Running", expected]
        # Duplicates, and another query for the same task, later.
        await _project(place, running, *story)
        for other in (_SUCCEEDED, _FAILED, _CANCELLED):
            later = _make_story(end=other, task_id=task_id, org_id=OrgId(org_id), start=_START + timedelta(days=1))
            for event in later:
                await _project(place, running, event)
        assert await _read_task(place.pool, task_id) == seen[-1]


async def test_a_task_that_was_queued_when_its_query_ended_ends_too(place: Place) -> None:
    task_id, org_id = new_id(), new_id()
    await _insert_task(place.pool, task_id, org_id)
    # All in one batch.
    ends = await _publish(place, *_make_story(task_id=task_id, org_id=OrgId(org_id)))
    async with _projecting(place) as running:
        await _wait_for(place, running, ends)
    assert (await _read_task(place.pool, task_id))[0] == "Completed"


async def test_a_running_task_is_never_queued_again(place: Place) -> None:
    task_id, org_id = new_id(), new_id()
    await _insert_task(place.pool, task_id, org_id, "Running")
    before = await _read_task(place.pool, task_id)
    async with _projecting(place) as running:
        await _project(place, running, *_make_story(task_id=task_id, org_id=OrgId(org_id))[:2])
    assert await _read_task(place.pool, task_id) == before


async def test_another_orgs_query_does_not_move_a_task(place: Place) -> None:
    task_id = new_id()
    await _insert_task(place.pool, task_id, new_id())
    before = await _read_task(place.pool, task_id)
    story = _make_story(task_id=task_id)
    async with _projecting(place) as running:
        await _project(place, running, *story)
    assert await _read_row(place.pool, story[0].query_id) is not None
    assert await _read_task(place.pool, task_id) == before


def _make_story(
    end: tuple[Status, ErrorCode | None] = _SUCCEEDED, start: datetime = _START, **facts: Any
) -> list[QueryStatusChanged]:
    """The three events of a new query."""
    status, code = end
    queued = QueryStatusChanged(
        query_id=QueryId(new_id()),
        sequence=1,
        status=Status.QUEUED,
        attempt=0,
        org_id=OrgId(new_id()),
        mode=Mode.BATCH,
        sql_hash="0" * 64,
        occurred_at=start,
    )
    queued = replace(queued, **facts)
    running = replace(
        queued,
        sequence=2,
        previous_status=Status.QUEUED,
        status=Status.RUNNING,
        attempt=1,
        occurred_at=start + timedelta(seconds=1),
    )
    ended = replace(
        running, sequence=3, previous_status=Status.RUNNING, status=status, occurred_at=start + timedelta(seconds=2)
    )
    if code is None:
        ended = replace(ended, output_location="s3://results/results/", row_count=3, bytes=100)
    else:
        ended = replace(ended, error_code=code, error_message="it failed")
    return [queued, running, ended]


def _make_projector(place: Place, ready: asyncio.Event | None = None) -> Projector:
    # The embedded broker answers an empty fetch after half of `fetch.wait.max.ms`, which is 500 ms by default.
    group = {"group.id": place.group, "fetch.wait.max.ms": 20} | _SESSION
    return Projector(place.pool, place.kafka, group, (ready or asyncio.Event()).set)


@asynccontextmanager
async def _projecting(place: Place) -> AsyncIterator["asyncio.Task[None]"]:
    """A projector at work."""
    ready = asyncio.Event()
    made = _make_projector(place, ready)
    task = asyncio.create_task(made.run())

    async def is_ready() -> bool:
        return ready.is_set()

    try:
        await until(is_ready, task)
        yield task
        made.stop()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _publish(place: Place, *events: QueryStatusChanged) -> dict[int, int]:
    """Write events into partition 0, in their order; the last one's offset by partition."""
    offsets = [
        await asyncio.to_thread(write, place.kafka, Topic.STATUS, event.query_id, encode(event)) for event in events
    ]
    return {0: offsets[-1]}


async def _project(place: Place, running: "asyncio.Task[None]", *events: QueryStatusChanged) -> None:
    """Publish events and wait until they are projected."""
    await _wait_for(place, running, await _publish(place, *events))


async def _wait_for(place: Place, running: "asyncio.Task[None]", ends: dict[int, int]) -> None:
    """Return once the records at these offsets are projected."""

    async def is_projected() -> bool:
        stored = await _read_offsets(place)
        return all(stored.get(partition, 0) > offset for partition, offset in ends.items())

    await until(is_projected, running)


async def _read_offsets(place: Place) -> dict[int, int]:
    topic = await asyncio.to_thread(read_topic_identity, place.kafka, Topic.STATUS)
    async with place.pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT partition, next_offset FROM consumer_offsets WHERE cluster_id = %s AND topic_id = %s",
            [topic.cluster_id, topic.topic_id],
        )
        return dict(await cursor.fetchall())


def _commit(place: Place, offsets: dict[int, int]) -> None:
    """Commit offsets for the projector's group from outside, as an operator might."""
    consumer = Consumer(place.kafka | {"group.id": place.group, "enable.auto.commit": False})
    try:
        positions = [TopicPartition(Topic.STATUS, partition, offset) for partition, offset in offsets.items()]
        consumer.commit(offsets=positions, asynchronous=False)
    finally:
        consumer.close()


async def _read_row(pool: StatePool, query_id: str) -> dict[str, Any] | None:
    async with pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM query_status WHERE query_id = %s", [query_id])
        return await cursor.fetchone()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, UUID) else value


async def _insert_task(pool: StatePool, task_id: str, org_id: str, status: str = "Queued") -> None:
    async with pool.connection() as connection:
        await connection.execute(
            "INSERT INTO tasks (id, org_id, status) VALUES (%s, %s, %s)", [task_id, org_id, status]
        )


async def _read_task(pool: StatePool, task_id: str) -> tuple[str, datetime]:
    """A task's status, and when it got it."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT status, updated_at FROM tasks WHERE id = %s", [task_id])
        row = await cursor.fetchone()
    assert row is not None
    return row[0], row[1]


async def test_an_unknown_topic_is_read_from_its_earliest_record_whatever_the_group_has_committed(
    place: Place,
) -> None:
    story = _make_story()
    ends = await _publish(place, *story)
    _commit(place, {partition: offset + 1 for partition, offset in ends.items()})
    later = _make_story()
    async with _projecting(place) as running:
        await _project(place, running, *later)
    assert await _read_row(place.pool, later[0].query_id) is not None
    assert await _read_row(place.pool, story[0].query_id) is not None


async def test_another_orgs_event_does_not_hide_a_tasks_own(pool: StatePool) -> None:
    task_id, org_id = new_id(), new_id()
    await _insert_task(pool, task_id, org_id)
    own = _make_story(task_id=task_id, org_id=OrgId(org_id))[-1]
    foreign = _make_story(task_id=task_id, start=_START + timedelta(hours=1))[1]
    async with pool.connection() as connection:
        await move_tasks(connection, [to_row(own), to_row(foreign)])
    assert (await _read_task(pool, task_id))[0] == "Completed"
