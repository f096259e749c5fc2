"""The state database rebuilt: equal to the old one, without a gap for those who read it or write to it meanwhile."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from consumers.projector import Projector, to_row
from db.connection import DataPool, StatePool, make_pool, transaction
from db.data.replays import begin, read_replay
from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from db.state.query_status import delete_statuses, move_tasks, upsert_statuses, write_offsets
from db.state.rebuild import Difference, RebuildUnderWay, TablesMissing
from queryd.codec import encode
from queryd.events import ErrorCode, Mode, OrgId, QueryId, QueryStatusChanged, Status, Topic
from queryd.topics import read_topic_identity
from replay.rebuild.rebuild import Found, Rebuilt, opened
from replay.rebuild.source import SourceName
from replay.refused import PlanStale, ReplayRefused
from service.cli.rebuild import state_db
from tests.integration.queries import new_id, opened_pool
from tests.integration.records import PATIENCE_SECONDS, prepare_topics, until, write
from tests.servers.kafka import Kafka

_START = datetime(2026, 1, 1, tzinfo=UTC)
# The embedded broker lets a member wait for half of its session timeout before it may begin.
_SESSION = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 500}
# Nobody listens there: what asks Kafka anything fails.
_NO_KAFKA = {"bootstrap.servers": "127.0.0.1:9"}

Story = list[QueryStatusChanged]
Ends = dict[int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """Both databases of a test's own."""

    state_url: str
    data_url: str
    state: StatePool
    data: DataPool

    async def read_all(self) -> dict[str, Any]:
        """Every row of `query_status` by id, without when it was written; the tasks, and the offsets."""
        return {
            "rows": {row[0]: row[:-1] for row in await self.read("SELECT * FROM query_status")},
            "tasks": sorted(await self.read("SELECT id, org_id, status FROM tasks")),
            "offsets": sorted(
                await self.read("SELECT cluster_id, topic_id, partition, next_offset FROM consumer_offsets")
            ),
        }

    async def read_rows(self, *stories: Story) -> dict[str, tuple[Any, ...]]:
        """Status and sequence of the queries of these stories, where there is a row."""
        found = await self.read("SELECT query_id::text, status, sequence FROM query_status")
        wanted = {story[0].query_id for story in stories}
        return {row[0]: row[1:] for row in found if row[0] in wanted}

    async def read(self, statement: str) -> list[tuple[Any, ...]]:
        async with self.state.connection() as connection:
            cursor = await connection.execute(statement.encode())
            return await cursor.fetchall()

    async def change(self, statement: str, *parameters: object) -> None:
        """Do to the state database what nobody should."""
        async with self.state.connection() as connection:
            await connection.execute(statement.encode(), parameters)

    async def project(self, *stories: Story) -> None:
        """Bring the live table to the last events of these stories, as the projector does."""
        rows = [to_row(story[-1]) for story in stories]
        async with transaction(self.state) as connection:
            await upsert_statuses(connection, rows)
            await move_tasks(connection, rows)

    async def forget(self, *stories: Story) -> None:
        """Delete queries in Postgres data, and then in the live table, as the projector does at a tombstone."""
        query_ids = [story[0].query_id for story in stories]
        async with self.data.connection() as connection:
            await connection.execute("DELETE FROM query_results WHERE id = ANY(%s::uuid[])", [query_ids])
        async with transaction(self.state) as connection:
            await delete_statuses(connection, query_ids)

    async def commit(self, *stories: Story) -> None:
        """Let Postgres data have these stories, with their last events."""
        last = [story[-1] for story in stories]
        async with self.data.connection() as connection, connection.cursor() as cursor:
            await cursor.executemany(
                "INSERT INTO query_results (id, org_id, mode, status, sql_hash) VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT DO NOTHING",
                [(event.query_id, event.org_id, event.mode, event.status, event.sql_hash) for event in last],
            )
            await cursor.executemany(
                "INSERT INTO query_runs (query_id, fingerprint, topic, partition, record_offset, traceparent, sequence,"
                " queued_at, last_event) VALUES (%s, '', 'lane', 0, 0, '', %s, %s, %s) "
                "ON CONFLICT (query_id) DO UPDATE SET last_event = excluded.last_event",
                [(event.query_id, event.sequence, _START, encode(event)) for event in last],
            )

    async def spoil(self, story: Story) -> None:
        """Let a query's last event in Postgres data be none."""
        async with self.data.connection() as connection:
            await connection.execute(
                "UPDATE query_runs SET last_event = 'a secret that is no event' WHERE query_id = %s",
                [story[0].query_id],
            )

    async def rebuild(self, source: SourceName, kafka: dict[str, Any]) -> tuple[Found, Rebuilt]:
        """Plan, and then do it."""
        plan = await self.plan(source, kafka)
        async with opened(source, self.state_url, self.data, kafka) as rebuild:
            rebuild.check(plan.hash)
            await rebuild.stage(_ignore)
            return plan, await rebuild.swap(plan.hash)

    async def plan(self, source: SourceName, kafka: dict[str, Any]) -> Found:
        async with opened(source, self.state_url, self.data, kafka) as rebuild:
            await rebuild.stage(_ignore)
            return await rebuild.plan()


@pytest.fixture
async def place(state_url: str, data_url: str) -> AsyncIterator[Place]:
    upgrade_state(state_url)
    create_platform_tables(state_url)
    upgrade_data(data_url)
    state = StatePool(make_pool(state_url, "test", 3))
    await state.open()
    try:
        async with opened_pool(data_url) as data:
            yield Place(state_url, data_url, state, data)
    finally:
        await state.close()


@pytest.fixture
def config(kafka: Kafka) -> dict[str, Any]:
    return prepare_topics(kafka)


# From the log.


@pytest.mark.slow
async def test_the_state_database_emptied_and_rebuilt_from_the_log_equals_the_old_one(
    place: Place, config: dict[str, Any]
) -> None:
    stories = await _make_all_kinds(place)
    deleted = _make_story()
    _publish(config, *stories, deleted)
    _bury(config, deleted)
    async with _projecting(place, config):
        pass
    old = await place.read_all()
    assert len(await place.read_rows(*stories)) == len(stories)
    await _empty(place)
    plan, rebuilt = await place.rebuild(SourceName.LOG, config)
    assert await place.read_all() == old
    assert plan.difference == rebuilt.found.difference == Difference(len(old["rows"]), 0, 0)
    assert rebuilt.tasks == sum(status != "Queued" for _, _, status in old["tasks"])
    assert await place.read_rows(deleted) == {}


async def test_a_projector_goes_on_beside_a_rebuild_and_nothing_is_lost(place: Place, config: dict[str, Any]) -> None:
    known, deleted, later = _make_story(), _make_story(), _make_story()
    _publish(config, known[:1], deleted)
    async with _projecting(place, config) as wait_for:
        async with opened(SourceName.LOG, place.state_url, place.data, config) as rebuild:
            await rebuild.stage(_ignore)
            # The copy knows nothing of all this, and the live table does by the time of the swap.
            ends = _publish(config, known[1:2], later[:2])
            ends |= _bury(config, deleted)
            await wait_for(ends)
            plan = await rebuild.plan()
            rebuilt = await rebuild.swap(plan.hash)
        assert plan.difference == rebuilt.found.difference == Difference(0, 0, 0)
        expected = {known[0].query_id: ("Running", 2), later[0].query_id: ("Running", 2)}
        assert await place.read_rows(known, later, deleted) == expected
        await wait_for(_publish(config, known[2:], later[2:]))
        assert await place.read_rows(known, later) == {
            known[0].query_id: ("Succeeded", 3),
            later[0].query_id: ("Succeeded", 3),
        }


@pytest.mark.slow
async def test_what_the_copy_is_ahead_of_is_read_again_by_a_projector_that_was_behind(
    place: Place, config: dict[str, Any]
) -> None:
    gone, story = _make_story(), _make_story()
    _publish(config, gone, story[:1])
    async with _projecting(place, config):
        pass
    offsets = (await place.read_all())["offsets"]
    _publish(config, story[1:])
    _bury(config, gone)
    await place.rebuild(SourceName.LOG, config)
    assert await place.read_rows(story, gone) == {story[0].query_id: ("Succeeded", 3)}
    # A projector that is still at work may yet write what lies in between: whoever comes after it must read it too.
    assert (await place.read_all())["offsets"] == offsets
    async with _projecting(place, config):
        pass
    assert await place.read_rows(story, gone) == {story[0].query_id: ("Succeeded", 3)}


@pytest.mark.slow
async def test_a_query_asked_for_again_after_its_deletion_stands(place: Place, config: dict[str, Any]) -> None:
    story = _make_story()
    _publish(config, story)
    async with _projecting(place, config) as wait_for:
        # In one batch, so that it is one to the projector too.
        await wait_for(_write(config, [(story[0].query_id, None), (story[0].query_id, encode(story[0]))]))
    assert await place.read_rows(story) == {story[0].query_id: ("Queued", 1)}
    await _empty(place)
    await place.rebuild(SourceName.LOG, config)
    assert await place.read_rows(story) == {story[0].query_id: ("Queued", 1)}


@pytest.mark.slow
async def test_a_damaged_table_is_mended_and_whole_rows_are_left_alone(place: Place, config: dict[str, Any]) -> None:
    stories = [_make_story() for _ in range(6)]
    _publish(config, *stories)
    await place.rebuild(SourceName.LOG, config)
    whole = await place.read_all()
    written = dict(await place.read("SELECT query_id, updated_at FROM query_status"))
    missing, behind, ahead, other, *_ = [story[0].query_id for story in stories]
    await place.change("DELETE FROM query_status WHERE query_id = %s", missing)
    await place.change("UPDATE query_status SET sequence = 2, status = 'Running' WHERE query_id = %s", behind)
    await place.change("UPDATE query_status SET sequence = 99 WHERE query_id = %s", ahead)
    await place.change("UPDATE query_status SET org_id = gen_random_uuid() WHERE query_id = %s", other)
    await place.project(_make_story())
    plan, rebuilt = await place.rebuild(SourceName.LOG, config)
    assert plan.difference == rebuilt.found.difference == Difference(missing=1, stale=3, surplus=1)
    assert await place.read_all() == whole
    now_written = dict(await place.read("SELECT query_id, updated_at FROM query_status"))
    changed = {str(query_id) for query_id, time in now_written.items() if written[query_id] != time}
    assert changed == {missing, behind, ahead, other}
    assert (await place.plan(SourceName.LOG, config)).difference == Difference(0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by its report", "by a cancel"])
async def test_a_rebuild_that_is_given_up_has_changed_nothing(place: Place, config: dict[str, Any], how: str) -> None:
    class GivenUp(Exception):
        pass

    reached = asyncio.Event()

    async def give_up(_read: int, _total: int) -> None:
        reached.set()
        if how == "by its report":
            raise GivenUp
        await asyncio.Event().wait()

    async def run() -> None:
        async with opened(SourceName.LOG, place.state_url, place.data, config) as rebuild:
            await rebuild.stage(give_up)

    _publish(config, _make_story())
    task = asyncio.create_task(run())
    async with asyncio.timeout(PATIENCE_SECONDS):
        await reached.wait()
        if how == "by a cancel":
            task.cancel()
        with pytest.raises((GivenUp, asyncio.CancelledError)):
            await task
    assert await place.read_all() == {"rows": {}, "tasks": [], "offsets": []}
    assert (await place.plan(SourceName.LOG, config)).difference.missing > 0


@pytest.mark.slow
@pytest.mark.needs_kafka
async def test_what_no_transaction_has_committed_is_not_rebuilt(place: Place, config: dict[str, Any]) -> None:
    committed, aborted, under_way = _make_story(), _make_story(), _make_story()
    _publish(config, committed)
    producer = Producer(config | {"transactional.id": new_id(), "transaction.timeout.ms": 60_000})
    producer.init_transactions(PATIENCE_SECONDS)
    try:
        for story in (aborted, under_way):
            producer.begin_transaction()
            for event in story:
                producer.produce(Topic.STATUS, key=event.query_id, value=encode(event))
            assert producer.flush(PATIENCE_SECONDS) == 0
            if story is aborted:
                producer.abort_transaction(PATIENCE_SECONDS)
        # It does not wait for the one that is under way either.
        await place.rebuild(SourceName.LOG, config)
    finally:
        producer.abort_transaction(PATIENCE_SECONDS)
    assert await place.read_rows(committed, aborted, under_way) == {committed[0].query_id: ("Succeeded", 3)}


async def test_a_state_database_without_tables_is_refused(place: Place) -> None:
    await place.change("DROP TABLE query_status")
    with pytest.raises(TablesMissing, match="queryd db upgrade"):
        await place.plan(SourceName.POSTGRES, _NO_KAFKA)


async def test_a_log_that_does_not_reach_back_is_refused(place: Place, config: dict[str, Any]) -> None:
    async with transaction(place.state) as connection:
        await write_offsets(connection, "another cluster", new_id(), {0: 5})
    with pytest.raises(ReplayRefused, match="--source postgres"):
        await place.plan(SourceName.LOG, config)


@pytest.mark.slow
async def test_a_plan_over_a_log_says_what_it_has_read(place: Place, config: dict[str, Any]) -> None:
    ends = _publish(config, _make_story())
    found = await place.plan(SourceName.LOG, config)
    topic = read_topic_identity(config, Topic.STATUS)
    assert (found.facts["cluster_id"], found.facts["topic_id"]) == (topic.cluster_id, topic.topic_id)
    read = {each.partition: each.end for each in found.reading.partitions}
    assert all(read[partition] > offset for partition, offset in ends.items())
    assert found.queries == found.difference.missing > 0
    assert await place.read_all() == {"rows": {}, "tasks": [], "offsets": []}
    # New events don't make it stale.
    _publish(config, _make_story())
    assert (await place.plan(SourceName.LOG, config)).hash == found.hash


# From Postgres data.


async def test_the_state_database_rebuilt_from_postgres_data_alone_equals_the_old_one(place: Place) -> None:
    stories = await _make_all_kinds(place)
    await place.commit(*stories)
    await place.project(*stories)
    async with transaction(place.state) as connection:
        await write_offsets(connection, "cluster", "topic", {0: 5})
    old = await place.read_all()
    assert len(old["rows"]) == len(stories)
    await place.change("TRUNCATE query_status")
    await place.change("UPDATE tasks SET status = 'Queued'")
    plan, rebuilt = await place.rebuild(SourceName.POSTGRES, _NO_KAFKA)
    assert await place.read_all() == old
    assert plan.difference == rebuilt.found.difference == Difference(len(stories), 0, 0)
    assert plan.queries == plan.queries_in_data == len(stories)


async def test_what_happens_during_a_rebuild_from_postgres_data_is_not_undone(place: Place) -> None:
    still, deleted, lacking, moved, new = (_make_story() for _ in range(5))
    early = [still, deleted, lacking[:1], moved[:1]]
    await place.commit(*early)
    await place.project(still, deleted, moved[:1])
    async with opened(SourceName.POSTGRES, place.state_url, place.data, _NO_KAFKA) as rebuild:
        await rebuild.stage(_ignore)
        await place.forget(deleted)
        await place.commit(moved, new)
        await place.project(moved, new)
        plan = await rebuild.plan()
        await rebuild.swap(plan.hash)
    assert plan.difference == Difference(missing=1, stale=0, surplus=0)
    assert await place.read_rows(still, deleted, lacking, moved, new) == {
        still[0].query_id: ("Succeeded", 3),
        lacking[0].query_id: ("Queued", 1),
        moved[0].query_id: ("Succeeded", 3),
        new[0].query_id: ("Succeeded", 3),
    }


@pytest.mark.parametrize("projected", [False, True])
async def test_a_query_asked_for_again_during_a_rebuild_from_postgres_data_stands(
    place: Place, projected: bool
) -> None:
    old = _make_story()
    again = _make_story(query_id=old[0].query_id)[:1]
    await place.commit(old)
    await place.project(old)
    plan = await place.plan(SourceName.POSTGRES, _NO_KAFKA)
    async with opened(SourceName.POSTGRES, place.state_url, place.data, _NO_KAFKA) as rebuild:
        await rebuild.stage(_ignore)
        await place.forget(old)
        await place.commit(again)
        if projected:
            await place.project(again)
        await rebuild.swap(plan.hash)
    # Its lower sequence would never be projected over the old story's.
    assert await place.read_rows(again) == {again[0].query_id: ("Queued", 1)}


async def test_a_row_whose_last_event_cannot_be_read_is_left_as_it_is(place: Place) -> None:
    story = _make_story()
    await place.commit(story)
    await place.project(story)
    await place.spoil(story)
    before = await place.read_all()
    plan, _ = await place.rebuild(SourceName.POSTGRES, _NO_KAFKA)
    assert plan.reading.unreadable == 1
    assert plan.difference == Difference(0, 0, 0)
    assert await place.read_all() == before


# The swap.


async def test_readers_never_see_fewer_rows_than_there_are(place: Place) -> None:
    stories = [_make_story() for _ in range(400)]
    await place.commit(*stories)
    # Every row is stale, and some are too many: the swap has to write them all.
    strangers = [_make_story() for _ in range(50)]
    await place.project(*(story[:1] for story in stories), *strangers)
    plan = await place.plan(SourceName.POSTGRES, _NO_KAFKA)
    assert plan.difference == Difference(missing=0, stale=400, surplus=50)
    async with opened(SourceName.POSTGRES, place.state_url, place.data, _NO_KAFKA) as rebuild:
        await rebuild.stage(_ignore)
        with _counting(place.state_url) as seen:
            await rebuild.swap(plan.hash)
    assert set(seen) <= {(450, 400), (400, 0)}
    assert seen[-1] == (400, 0)


async def test_a_writer_waits_for_the_swap_and_a_reader_does_not(place: Place) -> None:
    story = _make_story()
    await place.commit(story)
    await place.project(story[:1])
    with _stopped_at("swapping", place) as process:
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await place.read_rows(story) == {story[0].query_id: ("Queued", 1)}
            writing = asyncio.create_task(place.project(story[:2]))
            await until(lambda: _waits_for_a_lock(place))
            assert not writing.done()
            process.kill()
            await writing
    assert await place.read_rows(story) == {story[0].query_id: ("Running", 2)}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["staged", "swapping"])
async def test_a_rebuild_that_is_killed_has_changed_nothing_and_can_be_repeated(place: Place, where: str) -> None:
    whole, lacking, stranger = _make_story(), _make_story(), _make_story()
    await place.commit(whole, lacking)
    await place.project(whole, stranger)
    before = await place.read_all()
    with _stopped_at(where, place) as process:
        with pytest.raises(RebuildUnderWay):
            await place.plan(SourceName.POSTGRES, _NO_KAFKA)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)
        await until(lambda: _nothing_is_left(place))
    assert await place.read_all() == before
    plan, _ = await place.rebuild(SourceName.POSTGRES, _NO_KAFKA)
    assert plan.difference == Difference(missing=1, stale=0, surplus=1)
    assert (await place.read_rows(whole, lacking, stranger)).keys() == {whole[0].query_id, lacking[0].query_id}


async def test_no_more_rows_go_than_the_plan_has_told_of(place: Place) -> None:
    story, stranger = _make_story(), _make_story()
    await place.commit(story)
    plan = await place.plan(SourceName.POSTGRES, _NO_KAFKA)
    await place.project(stranger)
    before = await place.read_all()
    async with opened(SourceName.POSTGRES, place.state_url, place.data, _NO_KAFKA) as rebuild:
        await rebuild.stage(_ignore)
        with pytest.raises(PlanStale, match="1 rows would go"):
            await rebuild.swap(plan.hash)
    assert await place.read_all() == before


async def test_the_hash_of_another_plan_is_refused(place: Place) -> None:
    plan = await place.plan(SourceName.POSTGRES, _NO_KAFKA)
    async with opened(SourceName.POSTGRES, place.state_url, place.data, _NO_KAFKA) as rebuild:
        rebuild.check(plan.hash)
        for wrong in ("", "-", "0123456789abcdef-0", plan.hash.removesuffix("-0"), plan.hash + "x"):
            with pytest.raises(PlanStale, match="plan again"):
                rebuild.check(wrong)


async def test_a_task_that_is_at_its_end_stays_there(place: Place) -> None:
    org_id, task_id = OrgId(new_id()), new_id()
    await place.change("INSERT INTO tasks (id, org_id) VALUES (%s, %s)", task_id, org_id)
    # Of two queries for one task the first to end decides.
    first = _make_story(_FAILED, org_id=org_id, task_id=task_id)
    second = _make_story(org_id=org_id, task_id=task_id, start=_START + timedelta(hours=1))
    await place.commit(first, second)
    _, rebuilt = await place.rebuild(SourceName.POSTGRES, _NO_KAFKA)
    assert rebuilt.tasks == 1
    assert [row[2] for row in (await place.read_all())["tasks"]] == ["Failed"]
    await place.change("TRUNCATE query_status")
    _, rebuilt = await place.rebuild(SourceName.POSTGRES, _NO_KAFKA)
    assert rebuilt.tasks == 0
    assert [row[2] for row in (await place.read_all())["tasks"]] == ["Failed"]


# The command.


@pytest.mark.slow
async def test_the_command_plans_and_then_does_what_the_hash_says(place: Place, tmp_path: Path) -> None:
    story, stranger, odd = _make_story(), _make_story(), _make_story()
    await place.commit(story, odd)
    await place.project(stranger, odd)
    await place.spoil(odd)
    environment = _environment(place)
    rebuild = ("state-db", "--source", "postgres")

    async def replay(*arguments: str, code: int = 0) -> dict[str, Any]:
        command = [sys.executable, "-m", "queryd", "replay", *arguments]
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if code == 0 else {"said": done.stderr}

    plan = await replay(*rebuild, "--json")
    assert (plan["missing"], plan["stale"], plan["surplus"], plan["unreadable"]) == (1, 0, 1, 1)
    assert await place.read_rows(story, stranger) == {stranger[0].query_id: ("Succeeded", 3)}
    done = await replay(*rebuild, "--execute", plan["hash"], "--reason", "a test", "--json")
    assert await place.read_rows(story, stranger) == {story[0].query_id: ("Succeeded", 3)}
    async with place.data.connection() as connection:
        first = await read_replay(connection, done["id"])
        # What a process leaves that dies before the swap.
        left = {"source": "postgres", "hash": plan["hash"]}
        left_id = new_id()
        assert await begin(
            connection, replay_id=left_id, kind="state-db", scope="state-db", actor="me", reason="a test", plan=left
        )
    assert first is not None
    assert (first.kind, first.status, first.reason) == ("state-db", "Done", "a test")
    assert (first.counts["missing"], first.counts["surplus"], first.counts["tasks"]) == (1, 1, 0)
    await place.change("TRUNCATE query_status")
    refused = await replay(*rebuild, "--execute", plan["hash"], "--reason", "a test", code=1)
    assert left_id in refused["said"]
    resumed = await replay("resume", left_id, "--json")
    assert (resumed["id"], resumed["status"], resumed["missing"]) == (left_id, "Done", 1)
    assert await place.read_rows(story) == {story[0].query_id: ("Succeeded", 3)}


def test_a_rebuild_without_a_reason_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for reason in (None, " "):
        with pytest.raises(SystemExit) as refused:
            state_db(execute="0123456789abcdef-0", reason=reason)
        assert refused.value.code == 2
        assert "--reason" in capsys.readouterr().err


async def _ignore(_read: int, _total: int) -> None:
    return None


_SUCCEEDED = (Status.SUCCEEDED, None)
_FAILED = (Status.FAILED, ErrorCode.QUERY_ERROR)
_CANCELLED = (Status.FAILED, ErrorCode.QUERY_CANCELLED)


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
    running = replace(queued, sequence=2, previous_status=Status.QUEUED, status=Status.RUNNING, attempt=1)
    ended = replace(running, sequence=3, previous_status=Status.RUNNING, status=status, occurred_at=start)
    if code is None:
        return [queued, running, replace(ended, output_location="s3://results/results/", row_count=3, bytes=100)]
    return [queued, running, replace(ended, error_code=code, error_message="it failed")]


async def _make_all_kinds(place: Place) -> list[Story]:
    """Stories that end differently or have not ended, most of them for a task, which is there."""
    stories = [_make_story(user_id=new_id())]
    for end, length in ((_SUCCEEDED, 3), (_FAILED, 3), (_CANCELLED, 3), (_SUCCEEDED, 2), (_SUCCEEDED, 1)):
        org_id, task_id = OrgId(new_id()), new_id()
        await place.change("INSERT INTO tasks (id, org_id) VALUES (%s, %s)", task_id, org_id)
        stories.append(_make_story(end, org_id=org_id, task_id=task_id)[:length])
    return stories


def _publish(config: dict[str, Any], *stories: Story) -> Ends:
    """Write events; the last one's offset by partition."""
    return _write(config, [(event.query_id, encode(event)) for story in stories for event in story])


def _bury(config: dict[str, Any], *stories: Story) -> Ends:
    """Write the tombstones of queries."""
    return _write(config, [(story[0].query_id, None) for story in stories])


def _write(config: dict[str, Any], records: Sequence[tuple[str, bytes | None]]) -> Ends:
    ends: Ends = {}

    def note(_error: object, message: Any) -> None:
        ends[message.partition()] = max(message.offset(), ends.get(message.partition(), 0))

    # The partitioner goes by the key, as the relay's does.
    producer = Producer(config)
    for key, value in records:
        producer.produce(Topic.STATUS, key=key, value=value, on_delivery=note)
    assert producer.flush(PATIENCE_SECONDS) == 0
    return ends


def _write_to_all(config: dict[str, Any]) -> Ends:
    """Write the tombstone of a query that never was to the end of each partition; its offsets."""
    return {
        partition: write(config, Topic.STATUS, new_id(), None, partition)
        for partition in AdminClient(config).list_topics(Topic.STATUS).topics[Topic.STATUS].partitions
    }


@asynccontextmanager
async def _projecting(place: Place, config: dict[str, Any]) -> AsyncIterator[Any]:
    """A projector at work, which has projected all that there is, of other tests too; yields how to wait for more."""
    ready = asyncio.Event()
    made = Projector(place.state, config, {"group.id": new_id()} | _SESSION, ready.set)
    task = asyncio.create_task(made.run())
    topic = read_topic_identity(config, Topic.STATUS)

    async def wait_for(ends: Ends) -> None:
        async def is_projected() -> bool:
            found = await place.read_all()
            stored = {row[2]: row[3] for row in found["offsets"] if row[:2] == (topic.cluster_id, topic.topic_id)}
            return all(stored.get(partition, 0) > offset for partition, offset in ends.items())

        await until(is_projected, task)

    try:
        await wait_for(_write_to_all(config))
        yield wait_for
        made.stop()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _empty(place: Place) -> None:
    """All that ours is gone, and the tasks are where they began."""
    await place.change("TRUNCATE query_status, consumer_offsets")
    await place.change("UPDATE tasks SET status = 'Queued'")


@contextmanager
def _counting(state_url: str) -> Iterator[list[tuple[int, int]]]:
    """How many rows a reader sees, and how many of them are stale, again and again until the end, and once after it."""
    seen: list[tuple[int, int]] = []
    first, over = threading.Event(), threading.Event()

    def count() -> None:
        with psycopg.connect(state_url, autocommit=True) as connection:
            while True:
                last = over.is_set()
                row = connection.execute(
                    "SELECT count(*), count(*) FILTER (WHERE sequence = 1) FROM query_status"
                ).fetchone()
                assert row is not None
                seen.append((row[0], row[1]))
                first.set()
                if last:
                    return

    thread = threading.Thread(target=count)
    thread.start()
    try:
        assert first.wait(PATIENCE_SECONDS)
        yield seen
    finally:
        over.set()
        thread.join(PATIENCE_SECONDS)


@contextmanager
def _stopped_at(where: str, place: Place) -> Iterator["subprocess.Popen[str]"]:
    """A process that rebuilds from Postgres data, and has come to a place where it stays."""
    command = [sys.executable, "-m", "tests.integration.rebuild_process", place.state_url, place.data_url, where]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == where
            yield process
        finally:
            process.kill()


async def _nothing_is_left(place: Place) -> bool:
    """The server has noticed that the process is gone: its copy went with it."""
    return await place.read("SELECT relname FROM pg_class WHERE relname LIKE 'rebuilt_%'") == []


async def _waits_for_a_lock(place: Place) -> bool:
    waiting = await place.read("SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'query_status'::regclass")
    return bool(waiting)


def _environment(place: Place) -> dict[str, str]:
    """What the command needs where it asks nothing of Kafka and the store."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "AWS_"))}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "QUERYD_KAFKA_BOOTSTRAP": _NO_KAFKA["bootstrap.servers"],
        "QUERYD_DATA_URL": place.data_url,
        "QUERYD_STATE_URL": place.state_url,
        "QUERYD_RESULTS_URL": "s3://results",
    }
