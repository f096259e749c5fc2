"""What a change and its event owe each other: one transaction in, and out however late the transaction commits."""

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from consumers.executor.transitions import EndResult
from db.connection import DataPool
from db.data.datasets import Caller
from db.migrations.upgrade import upgrade_data
from producers.relay.relay import Relay, RelayRules
from queryd.events import Topic
from tests.integration.queries import Worker, make_claim, make_success, new_id, opened_pool, read_row, read_story
from tests.integration.records import headers_of, prepare_topics, read_topic, until
from tests.servers.kafka import Kafka

_NO_EVENTS = "ALTER TABLE outbox ADD CONSTRAINT no_events CHECK (false) NOT VALID"
_EVENTS_AGAIN = "ALTER TABLE outbox DROP CONSTRAINT no_events"
_INSERT = (
    "INSERT INTO outbox (shard, event_id, query_id, type, payload, headers) "
    "VALUES (0, %(id)s::uuid, %(id)s::uuid, 'test', 'payload', jsonb_build_object('ce_id', %(id)s::text)) "
    "RETURNING position"
)


@pytest.fixture
async def pool(data_url: str) -> AsyncIterator[DataPool]:
    upgrade_data(data_url)
    async with opened_pool(data_url) as opened:
        yield opened


async def test_without_its_event_no_change_stands(pool: DataPool) -> None:
    """Rule 22: whichever step it is, the change and its event are written together or not at all."""
    worker = Worker(pool)
    query = await worker.admit_new()
    running_facts = (await worker.admit_new()).facts
    running = await worker.start(running_facts)
    before = [await read_row(pool, query_id) for query_id in (query.facts.query_id, running.query_id)]
    await _execute(pool, _NO_EVENTS)
    with pytest.raises(psycopg.errors.CheckViolation):
        await worker.admit_new()
    state = await worker.read(query.facts.query_id)
    assert await worker.transitions.claim(
        [(make_claim(query.facts, state, new_id()), Caller(query.facts.org_id, None, ()))]
    ) == [None]
    assert await worker.transitions.end(make_success(running_facts, running)) is EndResult.NOT_OURS
    await _execute(pool, _EVENTS_AGAIN)
    assert [await read_row(pool, query_id) for query_id in (query.facts.query_id, running.query_id)] == before
    assert await read_story(pool, query.facts.query_id) == [(1, "Queued", 0)]
    assert await read_story(pool, running.query_id) == [(1, "Queued", 0), (2, "Running", 1)]
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT count(*) FROM query_results")
        assert await cursor.fetchone() == (2,)


@pytest.mark.slow
async def test_a_row_that_commits_after_rows_behind_it_is_published_too(
    pool: DataPool, data_url: str, kafka: Kafka
) -> None:
    """Rule 23: positions are drawn before they commit, so a relay that looked beyond the last it saw would miss one."""
    early, late = new_id(), new_id()
    relay = Relay(RelayRules(data_url, prepare_topics(kafka), transactions=False), lambda: None)
    task = asyncio.create_task(relay.run())

    async def published() -> bool:
        return await _count_waiting(pool) == 0

    async with await psycopg.AsyncConnection.connect(data_url) as slow:
        [first] = await (await slow.execute(_INSERT, {"id": late})).fetchone() or ()
        async with pool.connection() as connection:
            [second] = await (await connection.execute(_INSERT, {"id": early})).fetchone() or ()
        assert first < second
        await until(published, task)
        assert await _read_ids(kafka, {early, late}) == [early]
        await slow.commit()
    await until(published, task)
    assert sorted(await _read_ids(kafka, {early, late})) == sorted([early, late])
    relay.stop()
    await task


async def _read_ids(kafka: Kafka, wanted: set[str]) -> list[str]:
    ids = [(headers_of(message).get("ce_id") or b"").decode() for message in await read_topic(kafka, Topic.STATUS)]
    return [each for each in ids if each in wanted]


async def _count_waiting(pool: DataPool) -> int:
    async with pool.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM outbox")).fetchone()
    assert row is not None
    return int(row[0])


async def _execute(pool: DataPool, statement: str) -> None:
    async with pool.connection() as connection:
        await connection.execute(statement.encode())
