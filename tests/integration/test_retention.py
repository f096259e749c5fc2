"""Retention on a real Postgres and a real S3: what goes, what stays, and who wins when things happen at once."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from structlog.testing import CapturingLogger

from consumers.executor.admission import Admitted, Done
from consumers.executor.endings import Success, succeed
from consumers.executor.story import QueryFacts
from consumers.projector import Projector
from db.connection import DatabaseUnavailable, DataPool, StatePool, make_pool
from db.data.datasets import NewDataset, upsert_dataset
from db.data.retention import Find, Scope, judge, opened_sweep, read_sweep, try_lock
from db.data.runs import RunState, read_deleted
from db.data.saved_queries import insert_saved
from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from processes.scratch import ScratchFolder
from producers.relay.relay import Relay, RelayRules
from queryd.events import OutputFormat, ResultFile, Topic
from results.formats import content_type
from results.location import file_name, prefix, read_key
from results.retention import bucket, deletion, sweep
from results.retention.bucket import Bucket
from results.retention.deletion import Deleted, DeletionRules, delete_for_good
from results.retention.sweep import Retention, RetentionRules, SweepUnderWay, Swept
from results.uploader import StoreUnavailable, Uploader
from service.embedded.object_store import ObjectStore
from service.topics import TOPICS, days_until_forgotten
from telemetry.events import LogEvent
from tests.integration.queries import (
    Worker,
    make_failure,
    make_record,
    make_request,
    new_id,
    opened_pool,
    read_row,
)
from tests.integration.records import PATIENCE_SECONDS, prepare_topics, read_topic, until
from tests.servers.kafka import Kafka

_DAY = 24 * 3600.0
_LONG_SECONDS = 600.0
_MIB = 1024 * 1024
_SESSION = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 500}


@dataclass(frozen=True, slots=True)
class Attempt:
    """A query's attempt that has just been claimed."""

    facts: QueryFacts
    state: RunState

    @property
    def query_id(self) -> str:
        return self.facts.query_id

    @property
    def prefix(self) -> str:
        assert self.state.token is not None
        return prefix(self.facts.org_id, self.facts.query_id, self.state.attempt, self.state.token)

    @property
    def key(self) -> str:
        return self.prefix + file_name(OutputFormat.CSV)


class Crash(Exception):
    """The process ends here."""


class Place:
    """A data database of the test's own, the shared bucket, and a worker."""

    def __init__(self, url: str, pool: DataPool, store: ObjectStore, uploader: Uploader, scratch: Path) -> None:
        self.url = url
        self.pool = pool
        self.bucket = store.bucket
        self.uploader = uploader
        self.scratch = scratch
        self.worker = Worker(pool)
        self.s3: Any = boto3.client("s3", **_client_arguments(store))

    def rules(self, **changes: Any) -> RetentionRules:
        """An attempt is dead for good at once, and rows stay."""
        rules = RetentionRules(
            data_url=self.url,
            bucket=self.bucket,
            lease_seconds=0.0,
            result_seconds=7 * _DAY,
            row_seconds=400 * _DAY,
            interval_seconds=3600.0,
            scratch=self.scratch,
            scratch_prefixes=("attempts-", "child-"),
        )
        return dataclasses.replace(rules, **changes)

    async def sweep(self, **changes: Any) -> Swept:
        return await Retention(self.rules(**changes), self.uploader).sweep(patience_seconds=0.0)

    async def delete(self, scope: Scope, stop_seconds: float = 0.0) -> Deleted:
        return await delete_for_good(DeletionRules(self.url, self.bucket, stop_seconds), self.uploader, scope)

    async def start(self, **changes: Any) -> Attempt:
        """A query whose first attempt runs."""
        facts = (await self.worker.admit_new(**changes)).facts
        return Attempt(facts, await self.worker.start(facts))

    async def start_again(self, attempt: Attempt) -> Attempt:
        """The next attempt, after this one was handed back."""
        await self.worker.hand_back(attempt.state)
        return Attempt(attempt.facts, await self.worker.start(attempt.facts))

    async def succeed(self, attempt: Attempt, retention: timedelta = timedelta(days=7)) -> RunState | None:
        success = Success(
            location=f"s3://{self.bucket}/{attempt.prefix}",
            file=ResultFile(attempt.key, bytes=1, rows=1, etag="etag", sha256="0" * 64),
            columns=(),
            bytes_scanned=None,
            duration_ms=5,
            queued_ms=1,
            engine="duckdb",
            retention=retention,
        )
        assert attempt.state.token is not None
        ending = succeed(attempt.facts, attempt.state, success, now=attempt.state.read_at, token=attempt.state.token)
        return await self.worker.transitions.end(ending)

    async def fail(self, attempt: Attempt) -> None:
        ended = await self.worker.transitions.end(make_failure(attempt.facts, attempt.state, token=attempt.state.token))
        assert ended is not None
        assert ended.status == "Failed"

    async def announce(self, retention: timedelta = timedelta(days=7), **changes: Any) -> Attempt:
        """A query that has succeeded, with its object."""
        attempt = await self.start(**changes)
        self.put(attempt.key)
        await self.succeed(attempt, retention)
        return attempt

    def put(self, *keys: str) -> None:
        for key in keys:
            self.s3.put_object(Bucket=self.bucket, Key=key, Body=b"x")

    def upload(self, key: str) -> str:
        """Begin an upload and send a part of it; its id."""
        upload_id: str = self.s3.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
        self.s3.upload_part(Bucket=self.bucket, Key=key, UploadId=upload_id, PartNumber=1, Body=b"x")
        return upload_id

    def objects(self, under: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=under)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def uploads(self, under: str) -> list[str]:
        found = self.s3.list_multipart_uploads(Bucket=self.bucket, Prefix=under).get("Uploads", ())
        return [upload["UploadId"] for upload in found]

    async def change(self, statement: str, *values: object) -> None:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(statement.encode(), values)
            assert cursor.rowcount == 1

    async def count(self, table: str) -> int:
        async with self.pool.connection() as connection:
            row = await (await connection.execute(f"SELECT count(*) FROM {table}".encode())).fetchone()
            assert row is not None
            return int(row[0])

    async def tombstones(self) -> list[str]:
        """Ids of the queries whose end waits for the relay: as their last event, and nothing is told before it."""
        async with self.pool.connection() as connection:
            rows = await (
                await connection.execute("SELECT query_id::text, event_id::text, payload FROM outbox ORDER BY position")
            ).fetchall()
        ended = [query_id for query_id, event_id, _ in rows if event_id == _end_of(query_id)]
        assert len(set(ended)) == len(ended)
        last = {query_id: event_id for query_id, event_id, _ in rows}
        assert all(last[query_id] == _end_of(query_id) for query_id in ended)
        assert {query_id for query_id, _, payload in rows if payload is None} == set(ended)
        assert all(payload is None for query_id, _, payload in rows if query_id in ended)
        return ended


def _end_of(query_id: str) -> str:
    return str(uuid.uuid5(uuid.UUID(query_id), "deleted"))


def _client_arguments(store: ObjectStore) -> dict[str, str]:
    return {
        "endpoint_url": store.endpoint_url,
        "region_name": store.region,
        "aws_access_key_id": store.writer.access_key,
        "aws_secret_access_key": store.writer.secret_key,
    }


def _variables(store: ObjectStore) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_REGION": store.region,
        "AWS_ACCESS_KEY_ID": store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
    }


@pytest.fixture
async def place(data_url: str, object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[Place]:
    upgrade_data(data_url)
    uploader = Uploader(object_store.bucket, _variables(object_store), quiet=False)
    async with opened_pool(data_url) as pool:
        yield Place(data_url, pool, object_store, uploader, tmp_path / "scratch")
    await uploader.close()


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
        patched.setattr(sweep, "delete_results", _crash)
        with pytest.raises(Crash):
            await place.sweep()
    row = await read_row(place.pool, over.query_id)
    assert row is not None
    assert row.output_location is None
    assert place.objects(over.prefix) == [over.key]
    assert (await place.sweep()).objects == 1
    assert place.objects(over.prefix) == []


async def _crash(*_arguments: object, **_named: object) -> None:
    raise Crash


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
        await _age(place, attempt, 2 * _LONG_SECONDS - 60)
    swept = await place.sweep(lease_seconds=_LONG_SECONDS)
    assert (swept.objects, swept.uploads) == (0, 0)
    for attempt in (failed, running):
        await _age(place, attempt, 2 * _LONG_SECONDS + 1)
    swept = await place.sweep(lease_seconds=_LONG_SECONDS)
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
    assert (await place.sweep(lease_seconds=_LONG_SECONDS)).objects == 1
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
    retention = Retention(place.rules(), place.uploader)
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
    # The uploader's process died, and the attempt stored its result once more, to the same key.
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
    storing = asyncio.create_task(
        place.uploader.store(tmp_path / "result", attempt.key, content_type(OutputFormat.CSV))
    )
    await until(lambda: _has_upload(place, attempt), _failing(storing))
    await place.sweep()
    stored = await storing
    assert stored.bytes == 40 * _MIB
    assert place.objects(attempt.prefix) == [attempt.key]


async def _has_upload(place: Place, attempt: Attempt) -> bool:
    return bool(await asyncio.to_thread(place.uploads, attempt.prefix))


def _failing(task: "asyncio.Task[Any]") -> "asyncio.Task[None]":
    """A task that raises what another one raises."""

    async def wait() -> None:
        await asyncio.shield(task)

    return asyncio.create_task(wait())


# One sweeps at a time.


async def test_one_sweeps_at_a_time_and_a_second_waits_or_says_so(place: Place) -> None:
    failed = await place.start()
    place.put(failed.key)
    await place.fail(failed)
    retention = Retention(place.rules(), place.uploader)
    async with opened_sweep(place.url) as other:
        assert await try_lock(other)
        with pytest.raises(SweepUnderWay):
            await retention.sweep(patience_seconds=0.0)
        await retention._sweep_if_due()
        assert place.objects(failed.prefix) == [failed.key]
        waiting = asyncio.create_task(retention.sweep(patience_seconds=_LONG_SECONDS))
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
        Retention(place.rules(interval_seconds=0.05), place.uploader).sweep_for_ever(), name="retention"
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
    await _log_access(place, old)
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


async def _log_access(place: Place, attempt: Attempt) -> None:
    await place.change(
        "INSERT INTO pii_access_log (org_id, user_id, task_id, dataset, record_id) VALUES (%s, %s, %s, 'people', %s)",
        attempt.facts.org_id,
        attempt.facts.user_id if attempt.facts.task_id is None else None,
        attempt.facts.task_id,
        attempt.query_id,
    )


async def test_a_row_is_not_deleted_before_its_object_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await place.announce()
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "delete_results", _crash)
        with pytest.raises(Crash):
            await place.sweep(row_seconds=0.0)
    assert await read_row(place.pool, old.query_id) is not None
    assert (await place.sweep(row_seconds=0.0)).rows == 1
    assert place.objects(old.prefix) == []


async def test_a_young_row_that_went_is_not_run_again_by_a_redelivery(place: Place) -> None:
    request = make_request()
    record = make_record(request)
    [verdict] = await place.worker.admit(record)
    assert isinstance(verdict, Admitted)
    attempt = Attempt(verdict.facts, await place.worker.start(verdict.facts))
    await place.succeed(attempt)
    assert (await place.sweep(row_seconds=0.0)).rows == 1
    assert await place.worker.admit(record) == [Done()]
    assert await read_row(place.pool, attempt.query_id) is None


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
    assert headers["ce_id"] == _end_of(gone.query_id).encode()
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
    assert (await place.sweep()).counts()[table] == 1
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


# Hard deletion.


@dataclass(frozen=True, slots=True)
class Household:
    """An org with two users, with something of every kind, and a neighbour."""

    org_id: str
    user_id: str
    other_id: str
    own: tuple[Attempt, ...]
    others: tuple[Attempt, ...]
    neighbour: Attempt


async def _furnish(place: Place) -> Household:
    org_id, user_id, other_id = new_id(), new_id(), new_id()
    own, others = [await _furnish_user(place, org_id, each, limits=each == user_id) for each in (user_id, other_id)]
    neighbour = await place.announce()
    return Household(org_id, user_id, other_id, tuple(own), tuple(others), neighbour)


async def _furnish_user(place: Place, org_id: str, user_id: str, *, limits: bool) -> list[Attempt]:
    ids: dict[str, Any] = {"org_id": org_id, "user_id": user_id}
    async with place.pool.connection() as connection:
        saved = await insert_saved(connection, **ids, name="a", query="SELECT 1", visibility="public")
        await upsert_dataset(
            connection, NewDataset(org_id, user_id, f"d_{user_id[:8]}", "parquet", "s3://b/d", "org", [])
        )
        if limits:
            await connection.execute("INSERT INTO org_limits (org_id) VALUES (%s)", [org_id])
    announced = await place.announce(**ids, saved_query_id=saved.id)
    task = await place.announce(**ids, task_id=new_id())
    failed, running = await place.start(**ids), await place.start(**ids)
    place.put(failed.key, running.key)
    place.upload(running.key)
    await place.fail(failed)
    await _log_access(place, announced)
    await _log_access(place, task)
    await place.change(
        "INSERT INTO query_cancellations (query_id, org_id, user_id) VALUES (%s, %s, %s)", new_id(), org_id, user_id
    )
    return [announced, task, failed, running]


async def _find_everywhere(place: Place, wanted: Sequence[str]) -> set[str]:
    """The tables in which any of the ids stands."""
    async with place.pool.connection() as connection:
        tables = await (
            await connection.execute(
                "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
            )
        ).fetchall()
        found = set()
        for (table,) in tables:
            rows = await (await connection.execute(f"SELECT t::text FROM {table} t".encode())).fetchall()
            if any(each in row[0] for each in wanted for row in rows):
                found.add(table)
        return found


async def test_deleting_an_org_leaves_nothing_of_it_but_what_refuses_a_redelivery(place: Place) -> None:
    home = await _furnish(place)
    deleted = await place.delete(Scope(home.org_id))
    assert deleted.counts() == {
        "queries": 8,
        "stopped": 2,
        "saved_queries": 2,
        "datasets": 2,
        "org_limits": 1,
        "query_cancellations": 4,
        "pii_access_log": 4,
        "objects": 8,
        "uploads": 2,
    }
    attempts = [*home.own, *home.others]
    ids = [attempt.query_id for attempt in attempts]
    assert await _find_everywhere(place, [home.org_id, home.user_id, home.other_id]) == set()
    assert await _find_everywhere(place, ids) == {"deleted_ids", "outbox"}
    # What waited for the relay is not told any more.
    assert sorted(await place.tombstones()) == sorted(ids)
    assert place.objects(f"results/{home.org_id}/") == []
    assert place.uploads(f"results/{home.org_id}/") == []
    # The neighbour has noticed nothing.
    assert await place.count("query_results") == 1
    assert place.objects(home.neighbour.prefix) == [home.neighbour.key]
    assert await place.delete(Scope(home.org_id)) == Deleted()


async def test_deleting_a_user_leaves_the_orgs_others_as_they_are(place: Place) -> None:
    home = await _furnish(place)
    deleted = await place.delete(Scope(home.org_id, home.user_id))
    assert (deleted.queries, deleted.stopped, deleted.objects, deleted.uploads) == (4, 1, 4, 1)
    assert (deleted.saved_queries, deleted.datasets, deleted.org_limits, deleted.pii_access_log) == (1, 1, 0, 2)
    assert await _find_everywhere(place, [home.user_id]) == set()
    for attempt in home.own:
        assert place.objects(attempt.prefix) == []
    for attempt in home.others:
        assert await read_row(place.pool, attempt.query_id) is not None
        assert len(place.objects(attempt.prefix)) == 1
    assert len(place.uploads(f"results/{home.org_id}/")) == 1
    assert await place.count("org_limits") == 1
    # The same user in another org is another matter.
    elsewhere = await place.announce(user_id=home.user_id)
    assert await place.delete(Scope(home.org_id, home.user_id)) == Deleted()
    assert await read_row(place.pool, elsewhere.query_id) is not None


# In order; what happens before a step is what happens after the one before it.
_STEPS = (
    "read_unfinished",
    "cancel",
    "remember_deleted",
    "delete_results",
    "delete_queries",
    "delete_saved",
    "delete_belongings",
    "judge_deleted",
)


async def test_a_deletion_that_dies_after_any_step_is_completed_by_its_repetition(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in _STEPS:
        home = await _furnish(place)
        ids = [attempt.query_id for attempt in home.own]
        with monkeypatch.context() as patched:
            patched.setattr(deletion, step, _dying_after(getattr(deletion, step)))
            with pytest.raises(Crash):
                await place.delete(Scope(home.org_id, home.user_id))
        await place.delete(Scope(home.org_id, home.user_id))
        assert await _find_everywhere(place, [home.user_id]) == set(), step
        assert await _find_everywhere(place, ids) == {"deleted_ids", "outbox"}, step
        assert set(ids) <= set(await place.tombstones()), step
        for attempt in home.own:
            assert place.objects(attempt.prefix) == [], step
        assert len(place.uploads(f"results/{home.org_id}/")) == 1, step


def _dying_after(real: Callable[..., Any]) -> Callable[..., Any]:
    async def die(*arguments: Any, **named: Any) -> None:
        await real(*arguments, **named)
        raise Crash

    return die


async def test_a_deletion_that_is_never_repeated_is_completed_by_the_sweep(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = await _furnish(place)
    with monkeypatch.context() as patched:
        patched.setattr(deletion, "judge_deleted", _crash)
        with pytest.raises(Crash):
            await place.delete(Scope(home.org_id))
    assert place.objects(f"results/{home.org_id}/") != []
    await place.sweep()
    assert place.objects(f"results/{home.org_id}/") == []
    assert place.uploads(f"results/{home.org_id}/") == []


async def test_a_live_attempt_of_a_deleted_query_can_not_finish_and_what_it_stores_late_is_swept(
    place: Place,
) -> None:
    record = make_record(make_request())
    [verdict] = await place.worker.admit(record)
    assert isinstance(verdict, Admitted)
    attempt = Attempt(verdict.facts, await place.worker.start(verdict.facts))
    deleted = await place.delete(Scope(attempt.facts.org_id))
    assert (deleted.queries, deleted.stopped) == (1, 1)
    # Its worker was stopped, and wakes.
    place.put(attempt.key)
    assert await place.succeed(attempt) is None
    assert await place.worker.hand_back(attempt.state) is None
    assert await place.worker.claim(attempt.facts, attempt.state, new_id()) is None
    assert await place.worker.admit(record) == [Done()]
    assert await read_row(place.pool, attempt.query_id) is None
    assert await place.tombstones() == [attempt.query_id]
    assert (await place.sweep(lease_seconds=_LONG_SECONDS)).objects == 0
    assert (await place.sweep()).objects == 1
    assert place.objects(attempt.prefix) == []


async def test_what_runs_is_cancelled_first_and_given_its_time_to_end(place: Place) -> None:
    attempt = await place.start()
    deleting = asyncio.create_task(place.delete(Scope(attempt.facts.org_id), stop_seconds=_LONG_SECONDS))

    async def is_cancelled() -> bool:
        return (await place.worker.read(attempt.query_id)).cancelled

    await until(is_cancelled, _failing(deleting))
    assert not deleting.done()
    await place.fail(attempt)
    deleted = await deleting
    assert (deleted.queries, deleted.stopped) == (1, 1)
    assert await place.tombstones() == [attempt.query_id]


async def test_a_finish_that_holds_the_row_is_waited_for_and_goes_with_the_rest(place: Place) -> None:
    attempt = await place.start()
    place.put(attempt.key)
    async with place.pool.connection() as connection:
        await connection.execute("SELECT FROM query_runs WHERE query_id = %s FOR UPDATE", [attempt.query_id])
        deleting = asyncio.create_task(place.delete(Scope(attempt.facts.org_id)))
        # The cancel waits for the row first, as the deletion would.
        await until(lambda: _is_waited_for(place), _failing(deleting))
        await connection.execute(
            "UPDATE query_runs SET deadline = NULL, sequence = 3 WHERE query_id = %s", [attempt.query_id]
        )
        await connection.execute("UPDATE query_results SET status = 'Succeeded' WHERE id = %s", [attempt.query_id])
    deleted = await deleting
    assert (deleted.queries, deleted.objects) == (1, 1)
    assert await place.tombstones() == [attempt.query_id]
    assert place.objects(attempt.prefix) == []


async def _is_waited_for(place: Place) -> bool:
    async with place.pool.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")).fetchone()
        assert row is not None
        return int(row[0]) > 0


async def test_an_admission_under_way_is_waited_for_and_none_that_hangs_holds_up_the_others(place: Place) -> None:
    attempt = await place.start()
    async with place.pool.connection() as hanging:
        # As an admission does that has not inserted yet.
        assert await read_deleted(hanging, [attempt.query_id]) == set()
        deleting = asyncio.create_task(place.delete(Scope(attempt.facts.org_id)))
        await until(lambda: _is_waited_for(place), _failing(deleting))
        # Others are admitted meanwhile, and the row stands while the first may still insert it.
        async with asyncio.timeout(PATIENCE_SECONDS):
            await place.announce()
        assert await read_row(place.pool, attempt.query_id) is not None
        assert not deleting.done()
    assert (await deleting).queries == 1


async def test_a_saved_query_that_others_have_run_goes_and_their_rows_stay(place: Place) -> None:
    org_id, author = new_id(), new_id()
    async with place.pool.connection() as connection:
        saved = await insert_saved(
            connection, org_id=org_id, user_id=author, name="a", query="SELECT 1", visibility="org"
        )
    run = await place.announce(org_id=org_id, saved_query_id=saved.id)
    assert (await place.delete(Scope(org_id, author))).saved_queries == 1
    row = await read_row(place.pool, run.query_id)
    assert row is not None
    assert (row.status, row.saved_query_id) == ("Succeeded", None)
    assert place.objects(run.prefix) == [run.key]
    assert await _find_everywhere(place, [saved.id, author]) == set()


async def test_more_queries_than_a_batch_are_deleted(place: Place) -> None:
    org_id = new_id()
    await place.worker.admit(*(make_record(make_request(org_id=org_id)) for _ in range(1100)))
    deleted = await place.delete(Scope(org_id))
    assert (deleted.queries, deleted.stopped) == (1100, 1100)
    assert await place.count("query_results") == 0
    assert len(await place.tombstones()) == 1100
    async with place.pool.connection() as connection:
        assert await read_deleted(connection, await place.tombstones()) == set(await place.tombstones())


async def test_results_in_a_bucket_of_an_earlier_setting_go_too(place: Place) -> None:
    earlier = f"earlier-{new_id()[:8]}"
    place.s3.create_bucket(Bucket=earlier)
    over, old, deleted = [await place.announce() for _ in range(3)]
    for attempt in (over, old, deleted):
        place.s3.put_object(Bucket=earlier, Key=attempt.key, Body=b"x")
        await place.change(
            "UPDATE query_results SET output_location = %s WHERE id = %s",
            f"s3://{earlier}/{attempt.prefix}",
            attempt.query_id,
        )
    await place.change("UPDATE query_runs SET expires_at = now() WHERE query_id = %s", over.query_id)
    await place.change(
        "UPDATE query_runs SET queued_at = now() - interval '401 days' WHERE query_id = %s", old.query_id
    )
    await place.sweep()
    await place.delete(Scope(deleted.facts.org_id))
    assert "Contents" not in place.s3.list_objects_v2(Bucket=earlier)


# The command line.


@pytest.fixture
def environment(place: Place, object_store: ObjectStore) -> dict[str, str]:
    """What the command needs; nobody listens at port 9, and retention asks nothing of Kafka or the state database."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "AWS_"))}
    return (
        inherited
        | _variables(object_store)
        | {
            "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:9",
            "QUERYD_DATA_URL": place.url,
            "QUERYD_STATE_URL": "postgresql://nobody@127.0.0.1:9/state",
            "QUERYD_RESULTS_URL": f"s3://{place.bucket}",
            "QUERYD_SCRATCH": str(place.scratch),
        }
    )


async def _queryd(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "queryd", "retention", *arguments],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


async def test_the_command_sweeps_and_says_how_much(place: Place, environment: dict[str, str], tmp_path: Path) -> None:
    over = await place.announce(timedelta(0))
    swept = await _queryd(environment, tmp_path, "--json")
    assert swept.returncode == 0, swept.stderr
    assert json.loads(swept.stdout) == Swept(expired=1).counts()
    assert place.objects(over.prefix) == []
    assert "expired: 0" in (await _queryd(environment, tmp_path)).stdout.splitlines()
    fetched = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "queryd", "fetch", over.query_id],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (fetched.returncode, fetched.stderr) == (1, "queryd: the result has expired and was removed\n")


async def test_the_command_deletes_only_when_told_twice_and_says_when_the_topics_have_forgotten(
    place: Place, environment: dict[str, str], tmp_path: Path
) -> None:
    attempt = await place.announce()
    org_id, user_id = attempt.facts.org_id, attempt.facts.user_id
    assert user_id is not None
    refused = await _queryd(environment, tmp_path, "delete-org", org_id)
    assert (refused.returncode, refused.stderr) == (2, "queryd: this deletes for good: give --yes\n")
    assert await read_row(place.pool, attempt.query_id) is not None
    deleted = await _queryd(environment, tmp_path, "delete-user", user_id, "--org", org_id, "--yes", "--json")
    assert deleted.returncode == 0, deleted.stderr
    told = json.loads(deleted.stdout)
    assert (told["org_id"], told["user_id"], told["queries"], told["objects"]) == (org_id, user_id, 1, 1)
    assert await read_row(place.pool, attempt.query_id) is None
    days = {
        topic: date.fromisoformat(day) - datetime.now(UTC).date() for topic, day in told["forgotten_by_topic"].items()
    }
    assert days.keys() == set(Topic)
    # The request topics' week, the status topic's last compaction, the dead letters' month.
    assert days[Topic.REQUESTS_BATCH].days in {8, 9}
    assert days[Topic.STATUS].days in {24, 25}
    assert days[Topic.DEAD_LETTERS].days in {31, 32}
    assert told["forgotten_on"] == told["forgotten_by_topic"][Topic.DEAD_LETTERS]
    again = await _queryd(environment, tmp_path, "delete-org", org_id, "--yes")
    assert again.stdout.splitlines()[1:3] == ["queries: 0", "stopped: 0"]


def test_no_topic_remembers_for_longer_than_its_settings_say() -> None:
    assert {spec.name: days_until_forgotten(spec) for spec in TOPICS} == {
        Topic.REQUESTS_INTERACTIVE: 9,
        Topic.REQUESTS_BATCH: 9,
        Topic.CANCELLATIONS: 9,
        Topic.STATUS: 25,
        Topic.DEAD_LETTERS: 32,
    }


async def test_the_uploaders_process_is_asked_for_nothing_that_it_does_not_know(place: Place) -> None:
    # A step that it does not know is a fault of ours: the process ends rather than guess.
    with pytest.raises(StoreUnavailable):
        await place.uploader.ask({"sweep": "everything", "bucket": place.bucket})
    assert await Bucket(place.uploader, place.bucket).delete([]) == 0


# A bucket or a clock of earlier times.


async def test_results_of_a_bucket_that_is_gone_hold_up_neither_a_deletion_nor_the_sweep(place: Place) -> None:
    deleted, stuck, other = await place.announce(), await place.announce(), await place.announce()
    for attempt in (deleted, stuck):
        location = f"s3://gone-{new_id()[:8]}/{attempt.prefix}"
        await place.change("UPDATE query_results SET output_location = %s WHERE id = %s", location, attempt.query_id)
    await place.delete(Scope(deleted.facts.org_id))
    assert await place.count("query_results") == 2
    for attempt in (stuck, other):
        await place.change(
            "UPDATE query_runs SET queued_at = now() - interval '401 days', expires_at = now() + interval '9 days' "
            "WHERE query_id = %s",
            attempt.query_id,
        )
    await place.sweep()
    assert await place.count("query_results") == 0


async def test_a_clock_that_was_put_right_long_ago_makes_no_row_old(place: Place) -> None:
    # The tables were made while the server's clock stood in the past.
    await place.change("UPDATE steady_clock SET skew = interval '401 days' WHERE only_row = %s", True)
    attempt = await place.announce()
    await place.sweep()
    assert await place.count("query_results") == 1
    assert place.objects(attempt.prefix) == [attempt.key]
