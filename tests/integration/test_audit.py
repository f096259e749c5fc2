"""What is kept of reads of personal data, and of errors: on real servers, by real attempts."""

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg.rows import dict_row

from access.audit import PersonalRead, record_reads
from consumers.executor.attempt import AttemptRules, Attempts
from consumers.executor.leases import Leases, Stop
from consumers.executor.query import Attempt, Query
from db.connection import DataPool, transaction
from db.data.audit import AuditRefused
from db.data.datasets import NewDataset, upsert_dataset
from db.data.retention import Scope
from db.migrations.upgrade import upgrade_data
from engines.duckdb import pool as engine_pool
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Outage, Read
from queryd.events import Delivery, Mode
from results.retention.deletion import DeletionRules, delete_for_good
from results.retention.sweep import Retention, RetentionRules
from results.store import ResultStore, StoreAccess
from service.embedded.object_store import ObjectStore
from tests.integration.queries import Worker, new_id, opened_pool, read_events, read_row

_LEASE_SECONDS = 15.0
_MEMORY = 256 * 1024**2
# What must not be told in an event or a row, and may be in `error.json`.
_CANARY = "Ottilie Zwicky"


class Place:
    """A data database of the test's own, a dataset with personal data, and a worker that runs attempts."""

    def __init__(
        self,
        url: str,
        pool: DataPool,
        store: ObjectStore,
        attempts: Attempts,
        results: ResultStore,
        engine: DuckDBEngine,
        leases: Leases,
    ) -> None:
        self.url = url
        self.engine = engine
        self.leases = leases
        self.pool = pool
        self.worker = Worker(pool)
        self.org_id = new_id()
        self.results = results
        self.bucket = store.bucket
        self._attempts = attempts
        self.s3 = _make_client(store)

    async def add_dataset(self, folder: Path, name: str = "people", pii: tuple[str, ...] = ("email", "name")) -> None:
        """A Parquet dataset of the org with an id, a name and an email."""
        path = folder / f"{name}.parquet"
        table = pa.table({"id": [1, 2], "name": [_CANARY, "B"], "email": ["a@example.com", "b@example.com"]})
        pq.write_table(table, path)
        key = f"datasets/{self.org_id}/{name}.parquet"
        self.s3.upload_file(str(path), self.bucket, key)
        dataset = NewDataset(
            org_id=self.org_id,
            user_id=None,
            name=name,
            kind="parquet",
            location=f"s3://{self.bucket}/{key}",
            visibility="org",
            pii_columns=list(pii),
        )
        async with transaction(self.pool) as connection:
            await upsert_dataset(connection, dataset)

    async def admit(self, sql: str, **changes: Any) -> Query:
        """Admit a query."""
        return await self.worker.admit_new(sql=sql, org_id=self.org_id, **changes)

    async def run(self, sql: str, **changes: Any) -> str:
        """Admit a query and run one attempt; its id."""
        admitted = await self.admit(sql, **changes)
        assert await self.attempt(admitted)
        return admitted.facts.query_id

    async def attempt(self, admitted: Query) -> bool:
        """One attempt at an admitted query: whether it is terminal then."""
        [claimed] = await self._attempts.claim([admitted])
        assert isinstance(claimed, Attempt)
        return await self._attempts.run(claimed, lambda: None)

    def read_log(self, query_id: str) -> list[dict[str, Any]]:
        """What was recorded of a query."""
        with psycopg.connect(self.url, row_factory=dict_row) as connection:
            return connection.execute(
                "SELECT org_id::text, user_id::text, task_id::text, dataset, column_name, action FROM pii_access_log"
                " WHERE record_id = %s ORDER BY dataset, column_name",
                [query_id],
            ).fetchall()

    def columns(self, query_id: str) -> list[tuple[str, str | None]]:
        """Which columns of which dataset were recorded."""
        return [(row["dataset"], row["column_name"]) for row in self.read_log(query_id)]

    def objects(self, query_id: str) -> list[str]:
        """The keys of a query's objects."""
        listed = self.s3.list_objects_v2(Bucket=self.bucket, Prefix=f"results/{self.org_id}/{query_id}/")
        return [found["Key"] for found in listed.get("Contents", ())]


def _make_client(store: ObjectStore) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=store.writer.access_key,
        aws_secret_access_key=store.writer.secret_key,
    )


@pytest.fixture
async def place(data_url: str, object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[Place]:
    upgrade_data(data_url)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(opened_pool(data_url))
        worker = Worker(pool)
        settings = DuckDBSettings(
            memory_bytes=_MEMORY,
            threads=1,
            scratch_root=tmp_path / "children",
            endpoint_url=object_store.endpoint_url,
            region=object_store.region,
            access_key=object_store.reader.access_key,
            secret_key=object_store.reader.secret_key,
            # Nobody listens on port 9.
            postgres_url="postgresql://nobody@127.0.0.1:9/nothing",
        )
        engine = DuckDBEngine(settings, 1, quiet=False)
        await engine.start()
        stack.push_async_callback(engine.close)
        aws = {
            "AWS_ENDPOINT_URL": object_store.endpoint_url,
            "AWS_ACCESS_KEY_ID": object_store.writer.access_key,
            "AWS_SECRET_ACCESS_KEY": object_store.writer.secret_key,
            "AWS_REGION": object_store.region,
        }
        results = ResultStore(object_store.bucket, StoreAccess.from_variables(aws))
        leases = Leases(pool, _LEASE_SECONDS, _LEASE_SECONDS)
        attempts = Attempts(
            pool=pool,
            clock=worker.clock,
            transitions=worker.transitions,
            leases=leases,
            engine=engine,
            store=results,
            rules=AttemptRules(
                worker="worker",
                bucket=object_store.bucket,
                scratch=tmp_path / "attempts",
                lease_seconds=_LEASE_SECONDS,
                default_seconds=dict.fromkeys(Mode, 30.0),
                longest_seconds=dict.fromkeys(Mode, 30.0),
                queue_seconds=dict.fromkeys(Mode, 30.0),
                retention=timedelta(days=7),
            ),
        )
        yield Place(data_url, pool, object_store, attempts, results, engine, leases)


# What is recorded.


async def test_a_read_of_personal_data_is_recorded_by_column(place: Place, tmp_path: Path) -> None:
    await place.add_dataset(tmp_path)
    user_id = new_id()
    query_id = await place.run("SELECT email FROM people", user_id=user_id)
    assert place.read_log(query_id) == [
        {
            "org_id": place.org_id,
            "user_id": user_id,
            "task_id": None,
            "dataset": "people",
            "column_name": "email",
            "action": "read",
        }
    ]
    row = await read_row(place.pool, query_id)
    assert row is not None
    assert row.status == "Succeeded"


async def test_the_principal_of_a_batch_query_is_its_task(place: Place, tmp_path: Path) -> None:
    await place.add_dataset(tmp_path)
    task_id = new_id()
    query_id = await place.run("SELECT email FROM people", mode=Mode.BATCH, task_id=task_id)
    [entry] = place.read_log(query_id)
    assert (entry["user_id"], entry["task_id"]) == (None, task_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sql", "recorded"),
    [
        ("SELECT * FROM people", ["email", "name"]),
        ("SELECT id FROM people WHERE name = 'B'", ["name"]),
        ("SELECT count(*) FROM people", [None]),
        ("SELECT a.email FROM people a JOIN people b ON a.id = b.id", [None]),
        ("SELECT people FROM people", [None]),
    ],
)
async def test_columns_are_named_where_they_can_be_told(
    place: Place, tmp_path: Path, sql: str, recorded: list[str | None]
) -> None:
    await place.add_dataset(tmp_path)
    query_id = await place.run(sql)
    # A join of a dataset with itself can be told by its aliases, or left open.
    columns = [column for _, column in place.columns(query_id)]
    assert columns in ([["email"], [None]] if "JOIN" in sql else [recorded])


async def test_a_read_without_personal_data_is_not_recorded(place: Place, tmp_path: Path) -> None:
    await place.add_dataset(tmp_path, "shops", ())
    query_id = await place.run("SELECT * FROM shops")
    assert place.read_log(query_id) == []


async def test_a_read_by_nobody_is_denied_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    await place.add_dataset(tmp_path)
    await place.add_dataset(tmp_path, "shops", ())
    denied = await place.run("SELECT count(*) FROM people", user_id=None)
    row = await read_row(place.pool, denied)
    assert row is not None
    assert (row.status, row.error_code) == ("Failed", "ACCESS_DENIED")
    assert (place.read_log(denied), place.objects(denied)) == ([], [])
    allowed = await read_row(place.pool, await place.run("SELECT count(*) FROM shops", user_id=None))
    assert allowed is not None
    assert allowed.status == "Succeeded"


# However the query ends.

_ENDLESS = """SELECT count(*) FROM people p, range(10000000) a, range(10000000) b
              WHERE a.range < b.range * 2 + hash(p.name) % 3"""


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a child has said what it reads."""
    event = asyncio.Event()
    to_reads = engine_pool._to_reads

    def note(told: Iterable[tuple[str, list[str] | None]]) -> Iterator[Read]:
        event.set()
        return to_reads(told)

    monkeypatch.setattr(engine_pool, "_to_reads", note)
    return event


@pytest.mark.slow
async def test_a_read_that_runs_into_its_time_limit_is_recorded(place: Place, tmp_path: Path) -> None:
    await place.add_dataset(tmp_path)
    query_id = await place.run(_ENDLESS, timeout_seconds=2)
    row = await read_row(place.pool, query_id)
    assert row is not None
    assert (row.status, row.error_code) == ("Failed", "QUERY_TIMEOUT")
    assert place.columns(query_id) == [("people", "name")]


@pytest.mark.slow
async def test_a_read_of_a_child_that_dies_is_recorded(place: Place, tmp_path: Path, reading: asyncio.Event) -> None:
    await place.add_dataset(tmp_path)
    admitted = await place.admit(_ENDLESS)
    running = asyncio.create_task(place.attempt(admitted))
    await reading.wait()
    [child] = place.engine._all
    os.kill(child.process.pid, signal.SIGKILL)
    assert await running is False
    assert place.columns(admitted.facts.query_id) == [("people", "name")]


async def test_a_read_that_is_cancelled_is_recorded(place: Place, tmp_path: Path, reading: asyncio.Event) -> None:
    await place.add_dataset(tmp_path)
    admitted = await place.admit(_ENDLESS)
    running = asyncio.create_task(place.attempt(admitted))
    await reading.wait()
    assert place.leases.stop(admitted.facts.query_id, Stop.CANCELLED)
    assert await running is True
    row = await read_row(place.pool, admitted.facts.query_id)
    assert row is not None
    assert row.error_code == "QUERY_CANCELLED"
    assert place.columns(admitted.facts.query_id) == [("people", "name")]


@pytest.mark.slow
async def test_a_read_that_its_store_cuts_off_is_recorded_and_the_event_names_the_outage(
    place: Place, tmp_path: Path
) -> None:
    await place.add_dataset(tmp_path)
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("UPDATE datasets SET kind = 'postgres', location = 'public.people'")
    query_id = await place.run("SELECT name FROM people", timeout_seconds=2)
    row = await read_row(place.pool, query_id)
    assert row is not None
    assert (row.error_code, row.error_message) == ("ENGINE_UNAVAILABLE", Outage.POSTGRES.sentence)
    assert place.columns(query_id) == [("people", "name")]


# No entry, no result.


@pytest.mark.parametrize("delivery", Delivery)
async def test_without_its_entry_a_result_is_not_released(place: Place, tmp_path: Path, delivery: Delivery) -> None:
    await place.add_dataset(tmp_path)
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("ALTER TABLE pii_access_log ADD CONSTRAINT shut CHECK (dataset <> 'people')")
    query_id = await place.run("SELECT email FROM people", delivery=delivery)
    row = await read_row(place.pool, query_id)
    assert row is not None
    assert (row.status, row.error_code, row.output_location) == ("Failed", "INTERNAL", None)
    assert place.objects(query_id) == []
    assert [stored.event.inline_result for stored in await read_events(place.pool, query_id)] == [None] * 3


async def test_a_retry_records_nothing_twice(place: Place) -> None:
    facts = (await place.worker.admit_new(org_id=place.org_id)).facts
    state = await place.worker.start(facts)
    assert state.token is not None
    reads = [PersonalRead("people", frozenset({"email", "name"})), PersonalRead("staff", None)]
    for _ in range(2):
        await record_reads(place.pool, facts.query_id, state.token, reads)
    await place.worker.hand_back(state)
    again = await place.worker.start(facts)
    assert again.token is not None
    await record_reads(place.pool, facts.query_id, again.token, reads)
    assert place.columns(facts.query_id) == [("people", "email"), ("people", "name"), ("staff", None)]


async def test_a_stale_attempt_records_nothing(place: Place) -> None:
    facts = (await place.worker.admit_new(org_id=place.org_id)).facts
    stale = await place.worker.start(facts)
    assert stale.token is not None
    await place.worker.hand_back(stale)
    await place.worker.start(facts)
    await record_reads(place.pool, facts.query_id, stale.token, [PersonalRead("people", None)])
    assert place.read_log(facts.query_id) == []


async def test_a_deleted_query_leaves_no_entry_behind(place: Place) -> None:
    facts = (await place.worker.admit_new(org_id=place.org_id)).facts
    state = await place.worker.start(facts)
    assert state.token is not None
    reads = [PersonalRead("people", None)]
    await record_reads(place.pool, facts.query_id, state.token, reads)
    await delete_for_good(DeletionRules(place.url, place.bucket, 0.0), place.results.access, Scope(place.org_id))
    await record_reads(place.pool, facts.query_id, state.token, reads)
    assert place.read_log(facts.query_id) == []


async def test_an_entry_that_is_refused_is_told_apart_from_a_database_that_is_away(place: Place) -> None:
    facts = (await place.worker.admit_new(org_id=place.org_id, user_id=None)).facts
    state = await place.worker.start(facts)
    assert state.token is not None
    # Nobody reads personal data: the table itself does not take it.
    with pytest.raises(AuditRefused, match="CheckViolation"):
        await record_reads(place.pool, facts.query_id, state.token, [PersonalRead("people", None)])


# What an author may know of an error.


async def test_an_error_tells_its_author_more_than_anybody_else(place: Place, tmp_path: Path) -> None:
    await place.add_dataset(tmp_path)
    query_id = await place.run("SELECT CAST(name AS INTEGER) FROM people")
    row = await read_row(place.pool, query_id)
    assert row is not None
    assert (row.status, row.error_code, row.output_location) == ("Failed", "QUERY_ERROR", None)
    told = json.dumps([str(stored.event) for stored in await read_events(place.pool, query_id)])
    assert _CANARY not in told + (row.error_message or "")
    [key] = place.objects(query_id)
    assert key.endswith("/error.json")
    known = json.loads(place.s3.get_object(Bucket=place.bucket, Key=key)["Body"].read())
    assert (known["code"], known["message"]) == ("QUERY_ERROR", row.error_message)
    assert _CANARY in known["detail"]
    # The detail quotes a value, so that it counts as a read.
    assert place.columns(query_id) == [("people", "name")]


@pytest.mark.slow
async def test_an_error_goes_with_its_retention_and_not_before(place: Place, tmp_path: Path) -> None:
    query_id = await place.run("SELECT CAST('x' AS INTEGER)")
    [key] = place.objects(query_id)
    rules = RetentionRules(
        data_url=place.url,
        bucket=place.bucket,
        lease_seconds=0.0,
        result_seconds=86_400.0,
        row_seconds=86_400.0,
        interval_seconds=3_600.0,
        scratch=tmp_path / "scratch",
        scratch_prefixes=(),
    )
    retention = Retention(rules, place.results.access)
    await retention.sweep(patience_seconds=0.0)
    assert place.objects(query_id) == [key]
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("UPDATE query_runs SET expires_at = now() - interval '1 s'")
    swept = await retention.sweep(patience_seconds=0.0)
    assert swept.expired == 1
    assert place.objects(query_id) == []


async def test_a_relation_that_is_not_there_is_named_to_the_author_alone(place: Place) -> None:
    canary = f"r{uuid.uuid4().hex}"
    query_id = await place.run(f"SELECT 1,\n  2 FROM {canary}")
    row = await read_row(place.pool, query_id)
    assert row is not None
    assert (row.status, row.error_code) == ("Failed", "SQL_REJECTED")
    told = json.dumps([str(stored.event) for stored in await read_events(place.pool, query_id)])
    assert canary not in told + (row.error_message or "")
    assert "line" not in (row.error_message or "")
    [key] = place.objects(query_id)
    known = json.loads(place.s3.get_object(Bucket=place.bucket, Key=key)["Body"].read())
    assert known["detail"] == f"There is no relation {canary} that you may read (line 2, column 10)."


async def test_a_statement_that_the_gate_refuses_leaves_no_object(place: Place) -> None:
    query_id = await place.run(f"SELECT '{uuid.uuid4()}' FROM read_csv('x')")
    row = await read_row(place.pool, query_id)
    assert row is not None
    assert (row.status, row.error_code) == ("Failed", "SQL_REJECTED")
    assert place.objects(query_id) == []
