"""One org's queries don't delay another's, all the way through whole executors: counted by what begins, not by time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer

from access.limits import OrgLimits, change
from consumers.executor import executor as executor_module
from consumers.executor.transitions import Refusal
from db.migrations.upgrade import upgrade_data
from queryd.codec import encode
from queryd.events import Mode, OrgId, QueryRequested
from service.embedded.servers import Lifeline
from tests.integration.queries import make_request, new_id, opened_pool
from tests.integration.records import until
from tests.integration.small_executor import Stage, own_broker, running_executor

_PARTITIONS = 3
# As librdkafka says it.
_BY_KEY = -1
_CROWD = 10_000
# With the test's share, the longest rest.
_LONG_FOR_A_REST_SECONDS = 0.1
# Guards against hanging only: ten thousand queries are admitted in seconds.
_PATIENCE_SECONDS = 120.0


@pytest.fixture
def kafka(lifeline: Lifeline, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A broker of the test's own, for the lanes have fixed names; librdkafka's configuration."""
    with own_broker(tmp_path, lifeline, _PARTITIONS) as config:
        yield config


def _publish(kafka: dict[str, Any], requests: list[QueryRequested], partition: int = _BY_KEY) -> None:
    """Publish in this order, each into the partition of its key unless one is given."""
    producer = Producer(kafka)
    for request in requests:
        producer.produce(request.mode.topic.value, key=request.query_id, value=encode(request), partition=partition)
        producer.poll(0)
    assert producer.flush(_PATIENCE_SECONDS) == 0


def _ask(org: str, count: int = 1, **changes: Any) -> list[QueryRequested]:
    return [make_request(org_id=OrgId(org), **changes) for _ in range(count)]


def _count(url: str, status: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM query_results WHERE status = %s", [status]).fetchone()
        assert row is not None
        return int(row[0])


def _is_known(url: str, query_id: str) -> bool:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT FROM query_results WHERE id = %s", [query_id]).fetchone() is not None


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    await until(condition, seconds=_PATIENCE_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
async def test_behind_ten_thousand_of_another_org_a_query_waits_for_one_that_runs(
    kafka: dict[str, Any], data_url: str, tmp_path: Path, slots: int
) -> None:
    upgrade_data(data_url)
    stage, crowd, one = Stage(), new_id(), new_id()
    async with running_executor(data_url, kafka, tmp_path, stage, slots=slots) as executor:
        _publish(kafka, _ask(crowd, _CROWD))

        async def all_wait() -> bool:
            return executor.count_waiting()[Mode.INTERACTIVE] == _CROWD - slots

        await _until(all_wait)
        await stage.until_begun(slots)
        for _ in range(3):
            # Some have had their turn when the newcomer comes.
            stage.end_one()
            await stage.until_begun(len(stage.begun) + 1)
        waiting = executor.count_waiting()[Mode.INTERACTIVE]
        [newcomer] = _ask(one)
        _publish(kafka, [newcomer])

        async def has_come() -> bool:
            return executor.count_waiting()[Mode.INTERACTIVE] == waiting + 1

        await _until(has_come)
        begun = len(stage.begun)
        stage.end_one()
        await stage.until_begun(begun + 1)
        assert stage.begun[begun].query_id == newcomer.query_id
        assert stage.running == {crowd: slots - 1, one: 1}


@pytest.mark.slow
async def test_a_query_behind_a_burst_is_admitted_before_the_rest_of_the_burst(
    kafka: dict[str, Any], data_url: str, tmp_path: Path
) -> None:
    upgrade_data(data_url)
    stage, crowd = Stage(), new_id()
    async with running_executor(data_url, kafka, tmp_path, stage, slots=1) as executor:
        [newcomer] = _ask(new_id())
        # In one partition, so that it is read last.
        _publish(kafka, [*_ask(crowd, _CROWD), newcomer], partition=0)
        await asyncio.wait_for(stage.until_begun(1), _PATIENCE_SECONDS)

        async def is_admitted() -> bool:
            return _is_known(data_url, newcomer.query_id)

        await _until(is_admitted)
        admitted = _count(data_url, "Queued")
        # In arrival order the whole burst would have been admitted first.
        assert admitted < 0.9 * _CROWD

        async def is_scheduled() -> bool:
            # The row is visible before the executor schedules the query. Batches are scheduled in commit order.
            return executor.count_waiting()[Mode.INTERACTIVE] >= admitted

        await _until(is_scheduled)
        stage.end_one()
        await asyncio.wait_for(stage.until_begun(2), _PATIENCE_SECONDS)
        assert stage.begun[1].query_id == newcomer.query_id


@pytest.mark.slow
async def test_an_org_at_its_limit_takes_no_slot_from_others_on_any_worker(
    kafka: dict[str, Any], data_url: str, tmp_path: Path
) -> None:
    upgrade_data(data_url)
    stage, limited, other, limit = Stage(), new_id(), new_id(), 2
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(opened_pool(data_url))
        await change(pool, limited, {"running_queries": limit})
        for number in range(2):
            await stack.enter_async_context(running_executor(data_url, kafka, tmp_path / str(number), stage, slots=3))
        _publish(kafka, _ask(limited, 40))
        await asyncio.wait_for(stage.until_begun(limit), _PATIENCE_SECONDS)
        # As many as there are slots left, and none of them has to wait for the other org.
        _publish(kafka, _ask(other, 40))
        await asyncio.wait_for(stage.until_begun(6), _PATIENCE_SECONDS)
        assert stage.running == {limited: limit, other: 4}
        stage.end_all()

        async def all_done() -> bool:
            return _count(data_url, "Succeeded") == 80

        await _until(all_done)
        assert stage.most[limited] == limit
        assert len(stage.begun) == 80


@pytest.mark.slow
async def test_an_org_that_is_held_goes_on_in_its_order_when_one_of_its_queries_ends(
    kafka: dict[str, Any], data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing but the end of a query lets it go on.
    monkeypatch.setitem(executor_module._HELD_SECONDS, Refusal.LIMIT, _PATIENCE_SECONDS)
    upgrade_data(data_url)
    stage, org = Stage(), new_id()
    limits = OrgLimits(running_queries=1)
    async with running_executor(data_url, kafka, tmp_path, stage, slots=2, limits=limits) as executor:
        # One partition of one lane keeps its order.
        requests = _ask(org, 6)
        _publish(kafka, requests, partition=0)

        async def others_wait() -> bool:
            return executor.count_waiting()[Mode.INTERACTIVE] == 5

        await asyncio.wait_for(stage.until_begun(1), _PATIENCE_SECONDS)
        await _until(others_wait)
        for number in range(2, 7):
            stage.end_one()
            await asyncio.wait_for(stage.until_begun(number), _PATIENCE_SECONDS)
        assert [execution.query_id for execution in stage.begun] == [request.query_id for request in requests]
        assert stage.most[org] == 1
        stage.end_all()


@pytest.mark.slow
async def test_no_worker_keeps_the_only_place_for_itself(
    kafka: dict[str, Any], data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after a query of some seconds.
    monkeypatch.setattr(executor_module, "_REST", 10.0)
    upgrade_data(data_url)
    stage = Stage()
    limits = OrgLimits(running_queries=1)
    async with AsyncExitStack() as stack:
        for name in ("one", "other"):
            # With one slot each: who runs the org's query is never refused.
            await stack.enter_async_context(
                running_executor(data_url, kafka, tmp_path / name, stage, slots=1, limits=limits)
            )
        _publish(kafka, _ask(new_id(), 30))
        for number in range(1, 11):
            await asyncio.wait_for(stage.until_begun(number), _PATIENCE_SECONDS)
            await asyncio.sleep(_LONG_FOR_A_REST_SECONDS)
            stage.end_one()
        workers = {execution.scratch.relative_to(tmp_path).parts[0] for execution in stage.begun}
        assert workers == {"one", "other"}
        assert stage.most.total() == 1
        stage.end_all()


@pytest.mark.slow
async def test_each_limit_of_an_org_reaches_the_engine_and_the_smaller_one_holds(
    kafka: dict[str, Any], data_url: str, tmp_path: Path
) -> None:
    upgrade_data(data_url)
    stage, orgs = Stage(), [new_id() for _ in range(4)]
    stage.end_all()
    defaults = OrgLimits(bytes_scanned=10_000, result_bytes=20_000)
    own = {"timeout_seconds": 30, "bytes_scanned": 100, "result_bytes": 200, "result_rows": 300}
    async with running_executor(data_url, kafka, tmp_path, stage, slots=1, limits=defaults):
        async with opened_pool(data_url) as pool:
            await change(pool, orgs[1], own)
            await change(pool, orgs[2], own)
            await change(pool, orgs[3], own)
        asked = {"timeout_seconds": 20, "max_rows": 7, "max_bytes_scanned": 8}
        _publish(kafka, [*_ask(orgs[0]), *_ask(orgs[1]), *_ask(orgs[2], **asked)])
        _publish(kafka, _ask(orgs[3], timeout_seconds=40, max_rows=700, max_bytes_scanned=800))
        await asyncio.wait_for(stage.until_begun(4), _PATIENCE_SECONDS)
    found = {
        run.org_id: (run.timeout_seconds, run.max_bytes_scanned, run.max_bytes, run.max_rows) for run in stage.begun
    }
    assert [found[OrgId(org)] for org in orgs] == [
        (600.0, 10_000, 20_000, None),
        (30.0, 100, 200, 300),
        (20.0, 8, 200, 7),
        (30.0, 100, 200, 300),
    ]
