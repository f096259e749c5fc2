"""At 200 queries a second, the executor runs at most one statement for two queries."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer

from db.migrations.upgrade import upgrade_data
from queryd.codec import encode
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.integration.queries import make_request
from tests.integration.records import until
from tests.integration.small_executor import Stage, own_broker, running_executor

_RATE = 200
# Some 100 admission batches.
_SECONDS = 4.0
_PARTITIONS = 2
_MAX_STATEMENTS_PER_QUERY = 0.5


@pytest.fixture
def counting_server(lifeline: Lifeline, tmp_path: Path) -> Iterator[Postgres]:
    """A Postgres that counts the statements that it runs, BEGIN and COMMIT included."""
    server = Postgres(tmp_path / "postgres", tmp_path / "postgres.log", lifeline)
    server.start()
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'")
        connection.execute("CREATE EXTENSION pg_stat_statements")
    server.stop()
    server.start()
    try:
        server.create_database("data")
        upgrade_data(server.url("data"))
        yield server
    finally:
        server.stop()


@pytest.fixture
def kafka(lifeline: Lifeline, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """librdkafka's configuration for a broker of the test's own, for the request topics have fixed names."""
    with own_broker(tmp_path, lifeline, _PARTITIONS) as config:
        yield config


@pytest.mark.slow
async def test_at_200_queries_a_second_two_queries_share_a_statement(
    kafka: dict[str, Any], counting_server: Postgres, tmp_path: Path
) -> None:
    stage = Stage()
    stage.end_all()
    async with running_executor(counting_server.url("data"), kafka, tmp_path, stage, slots=2) as executor:
        with psycopg.connect(counting_server.url("postgres"), autocommit=True) as server:
            server.execute("SELECT pg_stat_statements_reset()")
            published = await _publish_evenly(kafka)

            async def all_are_finished() -> bool:
                return len(stage.begun) == published and not any(executor.count_behind().values())

            await until(all_are_finished, seconds=60.0)
            calls = _count_calls(server)
    assert published >= _RATE * _SECONDS
    # Guards against an empty count: admission, claim and end are three statements.
    assert len(calls) >= 3
    assert sum(count for count, _ in calls) <= published * _MAX_STATEMENTS_PER_QUERY, calls


async def _publish_evenly(kafka: dict[str, Any]) -> int:
    """Publish requests at an even rate; returns how many. Overdue requests follow immediately."""
    producer, published, started = Producer(kafka | {"linger.ms": 0}), 0, time.monotonic()
    while published < _RATE * _SECONDS:
        while published < _RATE * (time.monotonic() - started):
            request = make_request()
            producer.produce(request.mode.topic.value, key=request.query_id, value=encode(request))
            published += 1
        producer.poll(0)
        await asyncio.sleep(1 / _RATE)
    assert producer.flush(10.0) == 0
    return published


def _count_calls(server: psycopg.Connection[Any]) -> list[tuple[int, str]]:
    """How often each statement of the data database ran, with its last words."""
    rows = server.execute(
        "SELECT s.calls, right(s.query, 60) FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid"
        " WHERE d.datname = 'data' ORDER BY s.calls DESC"
    ).fetchall()
    return [(calls, " ".join(end.split())) for calls, end in rows]
