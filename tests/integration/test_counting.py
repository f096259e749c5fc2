"""Each query is counted once, whoever ends it and however many try."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from db.connection import DataPool
from db.data.outbox import measure_waiting
from db.data.saved_queries import insert_saved
from db.migrations.upgrade import upgrade_data
from queryd.events import Mode
from service.embedded.postgres import Postgres
from telemetry.metrics import METRICS
from tests.integration.queries import (
    Worker,
    make_failure,
    make_record,
    make_request,
    make_success,
    new_id,
    opened_pool,
)


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> Iterator[str]:
    name = f"counting_{uuid.uuid4().hex}"
    postgres_server.create_database(name)
    url = postgres_server.url(name)
    upgrade_data(url)
    yield url
    postgres_server.drop_database(name)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[DataPool]:
    async with opened_pool(database) as opened:
        yield opened


def _count(**labels: str) -> float:
    """How many queries were counted in this process so far."""
    return METRICS.registry.get_sample_value("queryd_queries_total", labels) or 0.0


async def test_of_many_workers_that_end_a_query_nobody_holds_one_counts_it(pool: DataPool) -> None:
    workers = [Worker(pool) for _ in range(4)]
    admitted = await workers[0].admit_new()
    before = _count(lane="interactive", outcome="QUERY_ERROR")
    state = await workers[0].read(admitted.facts.query_id)
    told = await asyncio.gather(*(worker.end(make_failure(admitted.facts, state)) for worker in workers))
    # All of them find it ended.
    assert {each.status for each in told if each is not None} == {"Failed"}
    assert _count(lane="interactive", outcome="QUERY_ERROR") == before + 1


async def test_a_success_is_counted_with_its_result_and_only_once(pool: DataPool) -> None:
    worker = Worker(pool)
    admitted = await worker.admit_new(mode=Mode.BATCH)
    running = await worker.start(admitted.facts)
    before = _count(lane="batch", outcome="Succeeded")
    rows = METRICS.registry.get_sample_value("queryd_result_rows_sum", {"lane": "batch"}) or 0.0
    await worker.end(make_success(admitted.facts, running, rows=3))
    # The answer of a COMMIT may be lost, and the ending sent again by another attempt at it: it is too late.
    await worker.end(make_failure(admitted.facts, running, token=new_id()))
    assert _count(lane="batch", outcome="Succeeded") == before + 1
    assert METRICS.registry.get_sample_value("queryd_result_rows_sum", {"lane": "batch"}) == rows + 3


async def test_an_attempt_whose_token_is_not_the_rows_counts_nothing(pool: DataPool) -> None:
    worker = Worker(pool)
    admitted = await worker.admit_new()
    running = await worker.start(admitted.facts)
    before = _count(lane="interactive", outcome="QUERY_ERROR")
    await worker.end(make_failure(admitted.facts, running, token=new_id()))
    assert _count(lane="interactive", outcome="QUERY_ERROR") == before


async def test_a_query_that_can_never_run_is_counted_as_it_is_admitted(pool: DataPool) -> None:
    worker = Worker(pool)
    before = _count(lane="interactive", outcome="SAVED_QUERY_NOT_FOUND")
    request = make_request(saved_query_id=new_id())
    # The same request comes twice: the second is not the query's own record.
    await worker.admit(make_record(request), make_record(request))
    await worker.admit(make_record(request))
    assert _count(lane="interactive", outcome="SAVED_QUERY_NOT_FOUND") == before + 1


async def test_a_query_is_not_counted_again_when_its_own_record_is_redelivered(pool: DataPool) -> None:
    worker = Worker(pool)
    before = _count(lane="interactive", outcome="SAVED_QUERY_NOT_FOUND")
    failed = make_record(make_request(saved_query_id=new_id()))
    async with pool.connection() as connection:
        saved = await insert_saved(
            connection, org_id=new_id(), user_id=new_id(), name="a", query="SELECT 1", visibility="org"
        )
    waits = make_record(make_request(org_id=saved.org_id, saved_query_id=saved.id))
    await worker.admit(failed, waits)
    assert _count(lane="interactive", outcome="SAVED_QUERY_NOT_FOUND") == before + 1
    async with pool.connection() as connection:
        await connection.execute("UPDATE saved_queries SET query = ''")
    await worker.admit(failed, waits)
    assert _count(lane="interactive", outcome="SAVED_QUERY_NOT_FOUND") == before + 1


async def test_the_outbox_is_measured_up_to_a_limit(pool: DataPool, database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("TRUNCATE query_results, outbox CASCADE")
    async with pool.connection() as connection:
        assert await measure_waiting(connection) == (0, 0.0)
    worker = Worker(pool)
    for _ in range(3):
        await worker.admit_new()
    async with pool.connection() as connection:
        await connection.execute(
            "UPDATE outbox SET created_at = now() - interval '1 hour' WHERE position = "
            "(SELECT min(position) FROM outbox)"
        )
        events, age_seconds = await measure_waiting(connection)
        limited, _ = await measure_waiting(connection, limit=2)
    assert (events, limited) == (3, 2)
    assert 3_600 <= age_seconds < 3_700
