"""Retention on a real Postgres and a real S3: what goes, what stays, and who wins when things happen at once."""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import CapturingLogger

from consumers.executor.admission import Done
from consumers.executor.query import Query
from consumers.projector import Projector
from db.connection import DatabaseUnavailable, StatePool, make_pool
from db.data.retention import Find, judge, opened_sweep, read_sweep, try_lock
from db.data.runs import RunState
from db.migrations.upgrade import upgrade_state
from db.state.platform import create_platform_tables
from processes.scratch import ScratchFolder
from producers.relay.relay import Relay, RelayRules
from queryd.events import OutputFormat, Topic
from results.formats import content_type
from results.location import prefix, read_key
from results.retention import bucket, sweep
from results.retention.sweep import Retention, SweepUnderWay, Swept
from results.store import StoreUnavailable
from service.embedded.object_store import ObjectStore
from telemetry.events import LogEvent
from tests.integration.queries import (
    make_record,
    make_request,
    new_id,
    read_row,
)
from tests.integration.records import prepare_topics, read_topic, until
from tests.integration.retention_place import (
    LONG_SECONDS,
    Attempt,
    Crash,
    Place,
    crash,
    end_event_of,
    follow_failure,
    log_access,
    opened_place,
)
from tests.servers.kafka import Kafka

_DAY = 24 * 3600.0
_MIB = 1024 * 1024
_SESSION = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 500}


@pytest.fixture
async def place(data_url: str, object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[Place]:
    async with opened_place(data_url, object_store, tmp_path) as opened:
        yield opened


# Results whose time is over.


async def test_an_expired_result_goes_and_its_row_promises_nothing_any_more(place: Place) -> None:
    over, fresh = await place.announce(timedelta(0)), await place.announce()
    swept = await place.sweep()
    assert (swept.expired, swept.objects, swept.rows) == (1, 0, 0)
    assert place.objects(over.prefix) == []
    row = await read_row(place.pool, over.query_id)
    assert row is not None
    # What it was stays; where it lay does not.
    assert (row.status, row.output_location, row.row_count, row.bytes) == ("Succeeded", None, 1, 1)
    assert (await place.worker.read(over.query_id)).sequence == 3
    kept = await read_row(place.pool, fresh.query_id)
    assert kept is not None
    assert kept.output_location == f"s3://{place.bucket}/{fresh.prefix}"
    assert place.objects(fresh.prefix) == [fresh.key]
    # Nobody is told: the event said when. And nothing is left to do.
    assert await place.tombstones() == []
    assert await place.sweep() == Swept()


async def test_a_sweep_that_dies_between_a_row_and_its_object_is_made_up_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = await place.announce(timedelta(0))
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "delete_results", crash)
        with pytest.raises(Crash):
            await place.sweep()
    row = await read_row(place.pool, over.query_id)
    assert row is not None
    assert row.output_location is None
    assert place.objects(over.prefix) == [over.key]
    assert (await place.sweep()).objects == 1
    assert place.objects(over.prefix) == []


# Objects that no terminal row points to.


async def test_the_objects_of_a_failed_query_go(place: Place) -> None:
    attempt = await place.start()
    place.put(attempt.key)
    await place.fail(attempt)
    assert (await place.sweep()).objects == 1
    assert place.objects(attempt.prefix) == []


async def test_the_objects_of_a_live_attempt_stay(place: Place) -> None:
    attempt = await place.start()
    place.put(attempt.key)
    assert (await place.sweep()).objects == 0
    await place.succeed(attempt)
    assert (await place.sweep()).objects == 0
    assert place.objects(attempt.prefix) == [attempt.key]


async def test_of_two_attempts_the_dead_ones_objects_go_while_the_other_runs_and_after(place: Place) -> None:
    first = await place.start()
    place.put(first.key)
    # Handed back: no other attempt has begun, so that it is the newest still.
    await place.worker.hand_back(first.state)
    assert (await place.sweep()).objects == 0
    second = Attempt(first.facts, await place.worker.start(first.facts))
    place.put(second.key)
    assert (await place.sweep()).objects == 1
    assert place.objects(f"results/{first.facts.org_id}/") == [second.key]
    # A zombie of the first stores once more, after the second has announced its result.
    await place.succeed(second)
    place.put(first.key)
    assert (await place.sweep()).objects == 1
    assert place.objects(f"results/{first.facts.org_id}/") == [second.key]


async def test_another_prefix_of_the_same_attempts_number_goes(place: Place) -> None:
    announced = await place.announce()
    other = prefix(announced.facts.org_id, announced.facts.query_id, 1, new_id()) + "result.csv"
    place.put(other)
    assert (await place.sweep()).objects == 1
    assert place.objects(f"results/{announced.facts.org_id}/") == [announced.key]


async def test_a_result_that_is_many_objects_stays_whole(place: Place) -> None:
    announced = await place.announce()
    parts = [f"{announced.prefix}part-{number}" for number in range(3)]
    place.put(*parts)
    assert (await place.sweep()).objects == 0
    assert place.objects(announced.prefix) == sorted([announced.key, *parts])


async def test_nothing_goes_before_its_attempt_is_dead_for_twice_the_lease(place: Place) -> None:
    failed = await place.start()
    again = await place.start()
    running = await place.start_again(again)
    place.put(failed.key, again.key)
    uploads = [place.upload(failed.key), place.upload(again.key)]
    await place.fail(failed)
    for attempt in (failed, running):
        await _age(place, attempt, 2 * LONG_SECONDS - 60)
    swept = await place.sweep(lease_seconds=LONG_SECONDS)
    assert (swept.objects, swept.uploads) == (0, 0)
    for attempt in (failed, running):
        await _age(place, attempt, 2 * LONG_SECONDS + 1)
    swept = await place.sweep(lease_seconds=LONG_SECONDS)
    assert (swept.objects, swept.uploads) == (2, 2)
    assert place.uploads(f"results/{failed.facts.org_id}/") == []
    assert len(uploads) == 2


async def _age(place: Place, attempt: Attempt, seconds: float) -> None:
    """The query's last step was so long ago."""
    await place.change(
        "UPDATE query_results SET updated_at = now() - make_interval(secs => %s) WHERE id = %s",
        seconds,
        attempt.query_id,
    )


async def test_a_clock_that_was_set_back_keeps_nothing_for_ever_and_no_live_attempt_loses_anything(
    place: Place,
) -> None:
    failed, live = await place.start(), await place.start()
    place.put(failed.key, live.key)
    await place.fail(failed)
    for attempt in (failed, live):
        await _age(place, attempt, -3600)
    assert (await place.sweep(lease_seconds=LONG_SECONDS)).objects == 1
    assert place.objects(failed.prefix) == []
    assert place.objects(live.prefix) == [live.key]


async def test_what_this_database_does_not_know_stays_for_as_long_as_a_result(place: Place) -> None:
    stranger = _stray_key()
    place.put(stranger)
    assert (await place.sweep()).objects == 0
    assert place.objects(stranger) == [stranger]
    place.s3.delete_object(Bucket=place.bucket, Key=stranger)

    now = datetime.now(UTC)
    assert await _judge_stranger(place, modified=now - timedelta(days=8), store_now=now) == {0}
    assert await _judge_stranger(place, modified=now - timedelta(days=8), store_now=None) == {0}
    assert await _judge_stranger(place, modified=now - timedelta(days=6), store_now=now) == set()
    # Neither clock is trusted alone: not a store's that runs ahead, nor one that ran behind when it stored.
    assert await _judge_stranger(place, modified=now - timedelta(days=6), store_now=now + timedelta(days=2)) == set()
    behind = now - timedelta(days=8)
    assert await _judge_stranger(place, modified=behind, store_now=behind + timedelta(hours=1)) == set()


async def _judge_stranger(place: Place, *, modified: datetime, store_now: datetime | None) -> set[int]:
    found = read_key(_stray_key())
    assert found is not None
    finds = [Find(0, found.query_id, found.attempt, found.prefix, modified)]
    async with place.pool.connection() as connection:
        return await judge(
            connection,
            finds,
            unfinished=False,
            store_now=store_now,
            grace_seconds=0.0,
            unknown_seconds=7 * _DAY,
        )


def _stray_key() -> str:
    return f"results/{new_id()}/{new_id()}/1-{new_id()[:8]}/result.csv"


async def test_keys_that_no_attempt_has_written_are_left_alone(place: Place) -> None:
    attempt = await place.start()
    await place.fail(attempt)
    base = f"results/{attempt.facts.org_id}/"
    keys = [
        f"{base}notes.txt",
        f"{base}{attempt.query_id}/readme",
        f"{base}{attempt.query_id}/1-nothex00/result.csv",
        f"{base}{attempt.query_id}/99999999999999-01234567/result.csv",
    ]
    place.put(*keys)
    assert (await place.sweep()).objects == 0
    assert place.objects(base) == sorted(keys)


@pytest.mark.parametrize("wins", ["the finish", "the next attempt's finish"])
async def test_a_finish_between_the_listing_and_the_judgement_keeps_its_object(
    place: Place, monkeypatch: pytest.MonkeyPatch, wins: str
) -> None:
    attempt = await place.start()
    if wins == "the next attempt's finish":
        place.put(attempt.key)
        attempt = await place.start_again(attempt)
    place.put(attempt.key)
    finished: list[RunState | None] = []

    async def finish_first(*arguments: Any, **named: Any) -> set[int]:
        if not finished:
            finished.append(await place.succeed(attempt))
        return await judge(*arguments, **named)

    monkeypatch.setattr(sweep, "judge", finish_first)
    await place.sweep()
    assert finished[0] is not None
    assert finished[0].status == "Succeeded"
    assert place.objects(f"results/{attempt.facts.org_id}/") == [attempt.key]


async def test_a_finish_after_the_judgement_loses_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = await place.start()
    place.put(dead.key)
    live = await place.start_again(dead)
    place.put(live.key)
    late: list[RunState | None] = []

    async def judge_first(*arguments: Any, **named: Any) -> set[int]:
        places = await judge(*arguments, **named)
        if not late:
            # The dead one's finish is fenced, whatever was listed; the live one's is not.
            late.extend([await place.succeed(dead), await place.succeed(live)])
        return places

    monkeypatch.setattr(sweep, "judge", judge_first)
    assert (await place.sweep()).objects == 1
    row = await read_row(place.pool, live.query_id)
    assert row is not None
    assert row.output_location == f"s3://{place.bucket}/{live.prefix}"
    assert place.objects(f"results/{live.facts.org_id}/") == [live.key]


async def test_a_listing_of_many_pages_is_swept_to_its_end_and_goes_on_where_it_was_cut_short(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_PAGE", 100)
    # Other tests' objects lie in the bucket too: this org's come first, so that the first page is all its own.
    announced = await place.announce(org_id="00000000" + new_id()[8:])
    failed = await place.start(org_id=announced.facts.org_id)
    strays = [f"{failed.prefix}part-{number:03}" for number in range(210)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(place.put, strays))
    await place.fail(failed)
    pages = 0

    async def crash_at_the_second(*arguments: Any, **named: Any) -> set[int]:
        nonlocal pages
        pages += 1
        if pages == 2:
            raise Crash
        return await judge(*arguments, **named)

    monkeypatch.setattr(sweep, "judge", crash_at_the_second)
    with pytest.raises(Crash):
        await place.sweep()
    left = len(place.objects(failed.prefix))
    assert 0 < left < 210
    async with opened_sweep(place.url) as connection:
        position, fresh = await read_sweep(connection, place.bucket, 3600.0)
    assert position
    assert not fresh

    # What an executor does at its next look: it goes on, and so leaves alone what lies before.
    log = CapturingLogger()
    monkeypatch.setattr(sweep, "_log", log)
    retention = Retention(place.rules(), place.results.access)
    await retention._sweep_if_due()
    assert place.objects(f"results/{announced.facts.org_id}/") == [announced.key]
    [told] = log.calls
    assert told.args == (LogEvent.RETENTION_SWEPT,)
    assert told.kwargs["objects"] == left
    # Done for this interval, whoever looks.
    await retention._sweep_if_due()
    assert len(log.calls) == 1


# Unfinished uploads.


async def test_unfinished_uploads_of_ended_queries_and_dead_attempts_are_aborted_and_a_live_ones_stay(
    place: Place,
) -> None:
    org_id = new_id()
    dead = await place.start(org_id=org_id)
    failed, announced = await place.start(org_id=org_id), await place.announce(org_id=org_id)
    place.upload(dead.key)
    live = await place.start_again(dead)
    kept = {place.upload(live.key)}
    place.upload(failed.key)
    await place.fail(failed)
    # The upload was cut, and the attempt stored its result once more, to the same key.
    place.upload(announced.key)
    stranger = place.upload(f"results/{org_id}/{new_id()}/1-01234567/result.csv")
    kept.add(stranger)
    swept = await place.sweep()
    assert (swept.uploads, swept.objects) == (3, 0)
    assert set(place.uploads(f"results/{org_id}/")) == kept
    assert place.objects(announced.prefix) == [announced.key]
    await place.fail(live)
    assert (await place.sweep()).uploads == 1
    assert place.uploads(f"results/{org_id}/") == [stranger]


@pytest.mark.slow
async def test_more_uploads_than_a_page_are_aborted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_PAGE", 10)
    attempt = await place.start()
    keys = [f"{attempt.prefix}part-{number}" for number in range(35)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(place.upload, keys))
    await place.fail(attempt)
    assert (await place.sweep()).uploads == 35
    assert place.uploads(attempt.prefix) == []


async def test_a_result_of_many_parts_outlives_the_sweep_that_comes_in_the_middle_of_its_upload(
    place: Place, tmp_path: Path
) -> None:
    attempt = await place.start()
    (tmp_path / "result").write_bytes(os.urandom(40 * _MIB))
    storing = asyncio.create_task(place.results.put(attempt.key, tmp_path / "result", content_type(OutputFormat.CSV)))
    await until(lambda: _has_upload(place, attempt), follow_failure(storing))
    await place.sweep()
    stored = await storing
    assert stored.bytes == 40 * _MIB
    assert place.objects(attempt.prefix) == [attempt.key]


async def _has_upload(place: Place, attempt: Attempt) -> bool:
    return bool(await asyncio.to_thread(place.uploads, attempt.prefix))


# One sweeps at a time.


async def test_one_sweeps_at_a_time_and_a_second_waits_or_says_so(place: Place) -> None:
    failed = await place.start()
    place.put(failed.key)
    await place.fail(failed)
    retention = Retention(place.rules(), place.results.access)
    async with opened_sweep(place.url) as other:
        assert await try_lock(other)
        with pytest.raises(SweepUnderWay):
            await retention.sweep(patience_seconds=0.0)
        await retention._sweep_if_due()
        assert place.objects(failed.prefix) == [failed.key]
        waiting = asyncio.create_task(retention.sweep(patience_seconds=LONG_SECONDS))
    # Its right went with its connection.
    assert (await waiting).objects == 1


async def test_an_executors_loop_outlives_a_store_and_a_database_that_are_away(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = await place.start()
    place.put(failed.key)
    await place.fail(failed)
    log = CapturingLogger()
    monkeypatch.setattr(sweep, "_log", log)
    away: list[Exception] = [StoreUnavailable("away"), DatabaseUnavailable("away")]

    async def judge_when_back(*arguments: Any, **named: Any) -> set[int]:
        if away:
            raise away.pop()
        return await judge(*arguments, **named)

    monkeypatch.setattr(sweep, "judge", judge_when_back)
    loop = asyncio.create_task(
        Retention(place.rules(interval_seconds=0.05), place.results.access).sweep_for_ever(), name="retention"
    )
    await until(lambda: _is_gone(place, failed), loop)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    told = [call.args[0] for call in log.calls]
    assert told[:2] == [LogEvent.RETENTION_POSTPONED] * 2


async def _is_gone(place: Place, attempt: Attempt) -> bool:
    return not await asyncio.to_thread(place.objects, attempt.prefix)


# Rows and notes.


async def test_rows_go_with_what_they_still_point_to_and_leave_a_tombstone(place: Place) -> None:
    old, failed, waiting = await place.announce(), await place.start(), await place.start()
    young = await place.announce()
    await place.fail(failed)
    for attempt in (old, failed, waiting):
        await place.change(
            "UPDATE query_runs SET queued_at = now() - interval '401 days' WHERE query_id = %s", attempt.query_id
        )
    await log_access(place, old)
    swept = await place.sweep()
    assert (swept.rows, swept.expired, swept.objects) == (2, 0, 0)
    assert place.objects(old.prefix) == []
    assert [await read_row(place.pool, attempt.query_id) for attempt in (old, failed)] == [None, None]
    assert await place.tombstones() == sorted([old.query_id, failed.query_id])
    # What has not ended stays, however old. An audit outlives what it tells of.
    assert await read_row(place.pool, waiting.query_id) is not None
    assert await read_row(place.pool, young.query_id) is not None
    assert await place.count("pii_access_log") == 1
    assert (await place.sweep()).rows == 0


async def test_a_row_is_not_deleted_before_its_object_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await place.announce()
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "delete_results", crash)
        with pytest.raises(Crash):
            await place.sweep(row_seconds=0.0)
    assert await read_row(place.pool, old.query_id) is not None
    assert (await place.sweep(row_seconds=0.0)).rows == 1
    assert place.objects(old.prefix) == []


async def test_a_young_row_that_went_is_not_run_again_by_a_redelivery(place: Place) -> None:
    request = make_request()
    record = make_record(request)
    [verdict] = await place.worker.admit(record)
    assert isinstance(verdict, Query)
    attempt = Attempt(verdict.facts, await place.worker.start(verdict.facts))
    await place.succeed(attempt)
    assert (await place.sweep(row_seconds=0.0)).rows == 1
    assert await place.worker.admit(record) == [Done()]
    assert await read_row(place.pool, attempt.query_id) is None


@pytest.mark.slow
async def test_tombstones_reach_the_status_topic_and_the_state_database_forgets(
    place: Place, kafka: Kafka, state_url: str
) -> None:
    config = prepare_topics(kafka)
    upgrade_state(state_url)
    create_platform_tables(state_url)
    state_pool = StatePool(make_pool(state_url, "test", 2))
    await state_pool.open()
    gone, kept = await place.announce(), await place.announce()
    relay = Relay(RelayRules(place.url, config, transactions=False), lambda: None)
    projector = Projector(state_pool, config, _SESSION | {"group.id": new_id()}, lambda: None)
    running = [asyncio.create_task(relay.run()), asyncio.create_task(projector.run())]

    async def states(expected: set[str]) -> bool:
        async with state_pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT query_id::text FROM query_status WHERE query_id = ANY(%s::uuid[]) AND status = 'Succeeded'",
                [[gone.query_id, kept.query_id]],
            )
            return {row[0] for row in await cursor.fetchall()} == expected

    try:
        await until(lambda: states({gone.query_id, kept.query_id}), *running)
        await place.change(
            "UPDATE query_runs SET queued_at = now() - interval '401 days' WHERE query_id = %s", gone.query_id
        )
        assert (await place.sweep()).rows == 1
        await until(lambda: states({kept.query_id}), *running)
    finally:
        relay.stop()
        projector.stop()
        await asyncio.gather(*running)
        await state_pool.close()
    ours = [message for message in await read_topic(kafka, Topic.STATUS) if message.key() == gone.query_id.encode()]
    assert [message.value() is None for message in ours] == [False, False, False, True]
    headers = dict(ours[-1].headers() or ())
    assert headers["ce_id"] == end_event_of(gone.query_id).encode()
    assert headers["ce_type"] == b"queryd.QueryDeleted"


@pytest.mark.parametrize(
    ("table", "insert", "days"),
    [
        (
            "query_cancellations",
            "INSERT INTO query_cancellations (query_id, org_id, created_at) "
            "VALUES (%s, %s, now() - %s * interval '1 day')",
            60,
        ),
        (
            "deleted_ids",
            "INSERT INTO deleted_ids (query_id, deleted_at) SELECT %s::uuid, now() - %s * interval '1 day' "
            "WHERE %s <> ''",
            60,
        ),
        (
            "dead_letters",
            "INSERT INTO dead_letters (topic_id, partition, record_offset, created_at) "
            "VALUES (%s || %s, 0, 1, now() - %s * interval '1 day')",
            40,
        ),
    ],
)
async def test_notes_go_when_nobody_can_need_them(place: Place, table: str, insert: str, days: int) -> None:
    for age in (days - 1, days + 1):
        values = [new_id(), age, "x"] if table == "deleted_ids" else [new_id(), new_id(), age]
        await place.change(insert, *values)
    assert asdict(await place.sweep())[table] == 1
    assert await place.count(table) == 1


async def test_scratch_of_dead_processes_goes_and_a_live_ones_stays(place: Place) -> None:
    live, dead = (ScratchFolder.make(place.scratch, "attempts-") for _ in range(2))
    child = ScratchFolder.make(place.scratch, "child-")
    (dead.path / "result.csv").write_text("x")
    foreign = place.scratch / "notes"
    foreign.mkdir()
    # A process that ends gives up its locks.
    os.close(dead.lock)
    os.close(child.lock)
    assert (await place.sweep()).scratch == 2
    assert sorted(place.scratch.iterdir()) == sorted([live.path, foreign])
    live.remove()
