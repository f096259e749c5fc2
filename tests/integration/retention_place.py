"""A data database, the shared bucket and a worker: where retention and hard deletion are tried."""

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3

from consumers.executor.endings import Result, Success, succeed
from consumers.executor.status_event import QueryFacts
from db.connection import DataPool
from db.data.retention import Scope
from db.data.runs import RunState
from db.migrations.upgrade import upgrade_data
from queryd.events import OutputFormat, ResultFile
from results.location import file_name, prefix
from results.retention.deletion import Deleted, DeletionRules, delete_for_good
from results.retention.sweep import Retention, RetentionRules, Swept
from results.store import ResultStore, StoreAccess
from service.embedded.object_store import ObjectStore
from tests.integration.queries import (
    Worker,
    make_failure,
    opened_pool,
)

_DAY = 24 * 3600.0
LONG_SECONDS = 600.0


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

    def __init__(self, url: str, pool: DataPool, store: ObjectStore, results: ResultStore, scratch: Path) -> None:
        self.url = url
        self.pool = pool
        self.bucket = store.bucket
        self.results = results
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
        return await Retention(self.rules(**changes), self.results.access).sweep(patience_seconds=0.0)

    async def delete(self, scope: Scope, stop_seconds: float = 0.0) -> Deleted:
        return await delete_for_good(DeletionRules(self.url, self.bucket, stop_seconds), self.results.access, scope)

    async def start(self, **changes: Any) -> Attempt:
        """A query whose first attempt runs."""
        facts = (await self.worker.admit_new(**changes)).facts
        return Attempt(facts, await self.worker.start(facts))

    async def start_again(self, attempt: Attempt) -> Attempt:
        """The next attempt, after this one was handed back."""
        await self.worker.hand_back(attempt.state)
        return Attempt(attempt.facts, await self.worker.start(attempt.facts))

    async def succeed(
        self, attempt: Attempt, retention: timedelta = timedelta(days=7), inline: bytes | None = None
    ) -> RunState | None:
        """The attempt's result is one object, or `inline` if that is given."""
        file = ResultFile(attempt.key, bytes=1, rows=1, etag="etag", sha256="0" * 64)
        success = Success(
            result=Result.stored(f"s3://{self.bucket}/{attempt.prefix}", file)
            if inline is None
            else Result.in_event(inline, rows=1),
            columns=(),
            bytes_scanned=None,
            duration_ms=5,
            queued_ms=1,
            engine="duckdb",
            retention=retention,
        )
        assert attempt.state.token is not None
        ending = succeed(attempt.facts, attempt.state, success, now=attempt.state.read_at, token=attempt.state.token)
        return await self.worker.end(ending)

    async def fail(self, attempt: Attempt) -> None:
        ended = await self.worker.end(make_failure(attempt.facts, attempt.state, token=attempt.state.token))
        assert ended is not None
        assert ended.status == "Failed"

    async def announce(self, retention: timedelta = timedelta(days=7), **changes: Any) -> Attempt:
        """A query that has succeeded, with its object."""
        attempt = await self.start(**changes)
        self.put(attempt.key)
        await self.succeed(attempt, retention)
        return attempt

    async def announce_inline(self, body: bytes, retention: timedelta = timedelta(days=7), **changes: Any) -> Attempt:
        """A query that has succeeded, with its result in its last event."""
        attempt = await self.start(**changes)
        await self.succeed(attempt, retention, body)
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
        ended = [query_id for query_id, event_id, _ in rows if event_id == end_event_of(query_id)]
        assert len(set(ended)) == len(ended)
        last = {query_id: event_id for query_id, event_id, _ in rows}
        assert all(last[query_id] == end_event_of(query_id) for query_id in ended)
        assert {query_id for query_id, _, payload in rows if payload is None} == set(ended)
        assert all(payload is None for query_id, _, payload in rows if query_id in ended)
        return ended


def end_event_of(query_id: str) -> str:
    return str(uuid.uuid5(uuid.UUID(query_id), "deleted"))


def _client_arguments(store: ObjectStore) -> dict[str, str]:
    return {
        "endpoint_url": store.endpoint_url,
        "region_name": store.region,
        "aws_access_key_id": store.writer.access_key,
        "aws_secret_access_key": store.writer.secret_key,
    }


def aws_variables(store: ObjectStore) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_REGION": store.region,
        "AWS_ACCESS_KEY_ID": store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
    }


@asynccontextmanager
async def opened_place(url: str, store: ObjectStore, folder: Path) -> AsyncIterator[Place]:
    """A place on a data database that is still empty."""
    upgrade_data(url)
    results = ResultStore(store.bucket, StoreAccess.from_variables(aws_variables(store)))
    async with opened_pool(url) as pool:
        yield Place(url, pool, store, results, folder / "scratch")


async def crash(*_arguments: object, **_named: object) -> None:
    raise Crash


def follow_failure(task: "asyncio.Task[Any]") -> "asyncio.Task[None]":
    """A task that raises what another one raises."""

    async def wait() -> None:
        await asyncio.shield(task)

    return asyncio.create_task(wait())


async def log_access(place: Place, attempt: Attempt) -> None:
    await place.change(
        "INSERT INTO pii_access_log (org_id, user_id, task_id, dataset, record_id) VALUES (%s, %s, %s, 'people', %s)",
        attempt.facts.org_id,
        attempt.facts.user_id if attempt.facts.task_id is None else None,
        attempt.facts.task_id,
        attempt.query_id,
    )
