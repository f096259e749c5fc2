"""Every user and every dataset: what may be read is read, and what may not is refused like what does not exist.

5 orgs, 20 users, 30 datasets: every visibility and kind of grant, Parquet and Postgres, qualified names, names that
SQL can only quote, the same names in several orgs, and the same person in all of them.
"""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql

from access.datasets import add_dataset, grant, remove_dataset, revoke
from access.grants import authorize
from consumers.executor.attempt import AttemptRules, Attempts, _to_relation
from consumers.executor.leases import Leases
from consumers.executor.query import Attempt
from db.connection import DataPool
from db.data.datasets import NewDataset
from db.datasets_server import READER, prepare_datasets_database
from db.migrations.upgrade import upgrade_data
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Execution, QueryFailed, Relation
from queryd.events import ErrorCode, Mode, OrgId, OutputFormat, QueryId
from results.store import ResultStore, StoreAccess
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from tests.integration.outputs import read_output
from tests.integration.queries import Worker, new_id, opened_pool, read_events, read_row
from tests.integration.recorded import recorded_statements

_MIB = 1024 * 1024
_LEASE_SECONDS = 15.0

# The world, in words of the test's own.


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks: the number of the org and of the user in it, None for a task without a user."""

    org: int
    number: int | None
    roles: tuple[str, ...] = ()

    @property
    def org_id(self) -> str:
        return _org_id(self.org)

    @property
    def user_id(self) -> str | None:
        return None if self.number is None else _user_id(self.org, self.number)


@dataclass(frozen=True, slots=True)
class Table:
    """A dataset: its place in the list is the order of registration."""

    org: int
    name: str
    kind: str
    visibility: str
    creator: int | None = None
    # `org:3` is the third org, `user:1` the owner's first user.
    grants: tuple[str, ...] = ()
    pii: bool = False

    @property
    def marker(self) -> str:
        """The one value that stands in it and nowhere else."""
        return f"{self.org}/{self.name}"


_ROLES = ((), ("analyst",), ("analyst", "clerk"), ("clerk", "role:analyst", "%"))
_PEOPLE = tuple(Person(org, number, _ROLES[number]) for org in range(5) for number in range(4))
_TASKS = tuple(Person(org, None) for org in range(5))

_P, _S = "postgres", "parquet"
_TABLES = (
    Table(0, "sales", _S, "org"),
    Table(0, "Order Details", _P, "private", 0, ("user:1", "role:clerk")),
    Table(0, "finance.invoices", _S, "public"),
    Table(0, "load", _P, "role:analyst", pii=True),
    Table(0, "hr.Payroll", _S, "private", 0, ("org:4",), pii=True),
    Table(0, "events", _S, "private", 3),
    Table(1, "Sales", _S, "private", 1),
    Table(1, "Order Details", _P, "org"),
    Table(1, "finance.invoices", _P, "private", 0),
    Table(1, "hr.payroll", _S, "role:clerk", None, ("org:0",)),
    Table(1, "crm.customers", _P, "org", None, ("org:2", "org:3"), pii=True),
    Table(1, "vault", _S, "private", 2),
    Table(2, "SALES", _P, "role:analyst", None, ("user:0",)),
    Table(2, "orders", _S, "public", pii=True),
    Table(2, "crm.Customers", _S, "private", 3),
    Table(2, "prices", _P, "org"),
    Table(2, "internal.other_org_payroll", _S, "private", 0, pii=True),
    Table(2, "events", _S, "role:auditor", None, ("user:2",)),
    Table(3, "sales", _S, "public"),
    Table(3, "orders", _S, "org"),
    Table(3, "products", _P, "public"),
    Table(3, "weird; -- 'name'", _S, "org"),
    Table(3, "日本.売上", _S, "role:clerk"),
    Table(3, "hr.payroll", _P, "private", 1, ("role:analyst", "org:1"), pii=True),
    Table(4, "sales", _P, "org", None, ("org:0", "org:1", "org:3")),
    Table(4, "employees", _S, "org", pii=True),
    Table(4, "finance.Invoices", _S, "role:analyst"),
    Table(4, "select", _P, "public"),
    Table(4, "events", _P, "private", 0, ("role:analyst",)),
    Table(4, "orders", _S, "private", 2, ("org:2",)),
)


def _org_id(number: int) -> str:
    return str(uuid.UUID(int=0xF0 + number, version=4))


def _user_id(org: int, number: int) -> str:
    """The first user of every org is one person; the others are in one org alone."""
    return str(uuid.UUID(int=1 if number == 0 else 16 * (org + 1) + number, version=4))


def _may_read(person: Person, table: Table) -> bool:
    """The rule as the platform's page has it, in words that no statement of ours shares."""
    insider = person.org == table.org
    match table.visibility.partition(":")[0]:
        case "public":
            return True
        case "org" if insider:
            return True
        case "private" if insider and table.creator == person.number:
            return True
        case "role" if insider and table.visibility.removeprefix("role:") in person.roles:
            return True
    words = {f"role:{role}" for role in person.roles} | {f"user:{person.number}"} if insider else {f"org:{person.org}"}
    return not words.isdisjoint(table.grants)


def _find(person: Person, name: str) -> Table | None:
    """What a name means to a person: the own dataset of that name, else the one registered first."""
    readable = [table for table in _TABLES if table.name.lower() == name.lower() and _may_read(person, table)]
    own = [table for table in readable if table.org == person.org]
    return next(iter(own + readable), None)


def test_the_world_has_every_case() -> None:
    assert (len(_PEOPLE), len(_TABLES), len({person.org for person in _PEOPLE})) == (20, 30, 5)
    pairs = [(person, table) for person in _PEOPLE for table in _TABLES]
    read = [_find(person, table.name) is table for person, table in pairs]
    hidden = [_may_read(person, table) and _find(person, table.name) is not table for person, table in pairs]
    refused = [_find(person, table.name) is None for person, table in pairs]
    assert min(map(sum, (read, hidden, refused))) > 30


# The servers with it.


@dataclass(frozen=True, slots=True)
class World:
    """Where it lies."""

    data_url: str
    datasets_url: str
    store: ObjectStore

    def settings(self, scratch: Path) -> DuckDBSettings:
        return DuckDBSettings(
            512 * _MIB,
            2,
            scratch,
            endpoint_url=self.store.endpoint_url,
            region=self.store.region,
            access_key=self.store.reader.access_key,
            secret_key=self.store.reader.secret_key,
            postgres_url=self.datasets_url,
        )


@pytest.fixture(scope="module")
def world(
    postgres_server: Postgres, object_store_server: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    names = [f"visibility_{uuid.uuid4().hex}" for _ in range(2)]
    for name in names:
        postgres_server.create_database(name)
    data_url, owner_url = map(postgres_server.url, names)
    upgrade_data(data_url)
    password, folder = uuid.uuid4().hex, f"datasets/{uuid.uuid4()}"
    prepare_datasets_database(owner_url, password)
    locations = _fill(object_store_server, folder, owner_url, tmp_path_factory.mktemp("parquet"))
    asyncio.run(_register(data_url, locations))
    yield World(data_url, re.sub(r"//[^@]+@", f"//{READER}:{password}@", owner_url), object_store_server)
    for name in names:
        postgres_server.drop_database(name)


def _fill(store: ObjectStore, folder: str, owner_url: str, scratch: Path) -> list[str]:
    """One row in each dataset: its marker, and an address. Returns their locations."""
    s3: Any = boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=store.writer.access_key,
        aws_secret_access_key=store.writer.secret_key,
    )
    locations = []
    with psycopg.connect(owner_url) as connection:
        for number, table in enumerate(_TABLES):
            if table.kind == _P:
                made = sql.SQL("CREATE TABLE {} AS SELECT {}::text AS marker, 'a@b'::text AS \"E-Mail\"")
                connection.execute(made.format(sql.Identifier(f"d{number}"), sql.Literal(table.marker)))
                locations.append(f"public.d{number}")
                continue
            path = scratch / "part.parquet"
            pq.write_table(pa.table({"marker": [table.marker], "E-Mail": ["a@b"]}), path)
            # A file, a folder and a pattern, in turn.
            s3.upload_file(str(path), store.bucket, f"{folder}/d{number}/part.parquet")
            locations.append(f"s3://{store.bucket}/{folder}/d{number}/{('part.parquet', '', '*.parquet')[number % 3]}")
    return locations


async def _register(data_url: str, locations: Sequence[str]) -> None:
    async with opened_pool(data_url) as pool:
        for table, location in zip(_TABLES, locations, strict=True):
            owner = _org_id(table.org)
            dataset = NewDataset(
                org_id=owner,
                user_id=None if table.creator is None else _user_id(table.org, table.creator),
                name=table.name,
                kind=table.kind,
                location=location,
                visibility=table.visibility,
                pii_columns=["E-Mail"] if table.pii else [],
            )
            await add_dataset(pool, dataset)
            if table.grants:
                await grant(pool, owner, table.name, [_spell(table.org, each) for each in table.grants])


def _spell(owner: int, grantee: str) -> str:
    kind, _, who = grantee.partition(":")
    match kind:
        case "org":
            return f"org:{_org_id(int(who))}"
        case "user":
            return f"user:{_user_id(owner, int(who))}"
        case _:
            return grantee


@pytest.fixture
async def pool(world: World) -> AsyncIterator[DataPool]:
    async with opened_pool(world.data_url) as opened:
        yield opened


@pytest.fixture
async def engine(world: World, tmp_path: Path) -> AsyncIterator[DuckDBEngine]:
    made = DuckDBEngine(world.settings(tmp_path / "scratch"), 1)
    await made.start()
    yield made
    await made.close()


# The pairs.


@dataclass(frozen=True, slots=True)
class Answer:
    """How a statement ended: its rows, or the failure as its author learns it; and what was said to the database."""

    rows: list[dict[str, Any]] | None
    code: ErrorCode | None
    message: str | None
    detail: str | None
    statements: list[str]


async def _ask(pool: DataPool, engine: DuckDBEngine, scratch: Path, person: Person, text: str) -> Answer:
    """What an attempt does: authorize, then execute."""
    with recorded_statements() as statements:
        granted = await authorize(pool, person.org_id, person.user_id, person.roles)
        folder = scratch / uuid.uuid4().hex
        folder.mkdir()
        execution = Execution(
            query_id=QueryId(new_id()),
            org_id=OrgId(person.org_id),
            sql=text,
            parameters={},
            relations=tuple(_to_relation(dataset) for dataset in granted),
            output_format=OutputFormat.JSON,
            scratch=folder,
            timeout_seconds=60.0,
        )
        try:
            output = await engine.execute(execution)
        except QueryFailed as failed:
            return Answer(None, failed.code, failed.message, failed.detail, statements)
    rows = [json.loads(line) for line in read_output(output).decode().splitlines()]
    return Answer(rows, None, None, None, statements)


def _quote(name: str) -> str:
    """The name as SQL writes it, in another case: case means nothing."""
    return ".".join(f'"{part.swapcase()}"' for part in name.split("."))


def _like(name: str) -> str:
    """A name that nobody has, of the same shape."""
    return re.sub(r"\w", "q", name)


async def _list_readable(pool: DataPool, person: Person) -> set[tuple[str, str]]:
    granted = await authorize(pool, person.org_id, person.user_id, person.roles)
    return {(dataset.org_id, dataset.name) for dataset in granted}


async def test_a_caller_is_given_exactly_what_the_rule_says(pool: DataPool) -> None:
    names = {table.name.lower() for table in _TABLES}
    for person in (*_PEOPLE, *_TASKS, Person(9, 1, ("analyst",))):
        meant = [found for name in names if (found := _find(person, name)) is not None]
        assert await _list_readable(pool, person) == {(_org_id(table.org), table.name) for table in meant}, person


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_user_reads_what_may_be_read_and_the_rest_does_not_exist(
    pool: DataPool, engine: DuckDBEngine, tmp_path: Path
) -> None:
    pairs = read = 0
    for person in _PEOPLE:
        unknown: dict[str, Answer] = {}
        for table in _TABLES:
            pairs += 1
            meant = _find(person, table.name)
            answer = await _ask(pool, engine, tmp_path, person, f"SELECT marker FROM {_quote(table.name)}")
            if meant is not None:
                assert answer.rows == [{"marker": meant.marker}], (person, table)
                read += 1
                continue
            like = _like(table.name)
            if like not in unknown:
                unknown[like] = await _ask(pool, engine, tmp_path, person, f"SELECT marker FROM {_quote(like)}")
            # The author's own word for it comes back to the author.
            written, other = (_quote(name).replace('"', "") for name in (table.name, like))
            assert answer.detail is not None
            told = replace(answer, detail=answer.detail.replace(f" {written} ", f" {other} "))
            assert told == unknown[like], (person, table)
            assert answer.code is ErrorCode.SQL_REJECTED
            assert len(answer.statements) == 1
    assert pairs == 600
    assert read == sum(_find(person, table.name) is not None for person in _PEOPLE for table in _TABLES)


def _leaks(person: Person, text: str) -> list[str]:
    """The names and markers in a text that this person may not see."""
    visible = {table.name.lower() for table in _TABLES if _find(person, table.name) is not None}
    hidden = {table.name for table in _TABLES if table.name.lower() not in visible}
    markers = {table.marker for table in _TABLES if not _may_read(person, table)}
    parts = {part for name in hidden for part in name.split(".")} - {
        part for name in visible for part in name.split(".")
    }
    return [word for word in parts | markers if word.lower() in text.lower()]


_LISTINGS = (
    "SHOW TABLES",
    "SHOW ALL TABLES",
    "DESCRIBE vault",
    "SUMMARIZE vault",
    "DESCRIBE SELECT * FROM vault",
    "FROM information_schema.tables",
    "FROM information_schema.columns",
    "FROM pg_catalog.pg_class",
    "FROM pg_tables",
    "FROM sqlite_master",
    "FROM duckdb_tables()",
    "FROM duckdb_views()",
    "FROM duckdb_columns()",
    "FROM duckdb_secrets()",
    "FROM __queryd_datasets.public.d11",
    'FROM "__queryd_datasets"."public"."d11"',
    "FROM __queryd_datasets.d11",
    "FROM memory.main.vault",
    "FROM query_table(['vault'])",
    "FROM query('FROM vault')",
    "SELECT (SELECT marker FROM vault)",
    "WITH vault AS (FROM vault) FROM vault",
    "FROM vaul",
    "FROM crm.custmers",
    "FROM hr.payrol",
    "SELECT vault.marker FROM products AS p, vault",
)


@pytest.mark.slow
@pytest.mark.parametrize("person", [Person(2, 1, ("analyst",)), Person(4, 3, ("clerk",))], ids=["analyst", "clerk"])
async def test_no_listing_and_no_mistake_tells_of_what_is_hidden(
    pool: DataPool, engine: DuckDBEngine, tmp_path: Path, person: Person
) -> None:
    for text in _LISTINGS:
        answer = await _ask(pool, engine, tmp_path, person, text)
        assert answer.code in (ErrorCode.SQL_REJECTED, ErrorCode.QUERY_ERROR), text
        assert _leaks(person, f"{answer.message}") == [], text
        # To its author an engine may quote what the author wrote, and suggest what the author may see.
        assert set(_leaks(person, f"{answer.detail}")) <= set(_leaks(person, text)), text
    # Columns and functions are suggested too, when there are relations in the instance to take them from.
    for text in (
        "SELECT markr FROM products",
        "SELECT p.vault FROM products p",
        "SELECT vaul.marker FROM products",
        "SELECT d11 FROM products",
        "SELECT vault(marker) FROM products",
    ):
        answer = await _ask(pool, engine, tmp_path, person, text)
        assert answer.rows is None, text
        assert set(_leaks(person, f"{answer.message} {answer.detail}")) <= set(_leaks(person, text)), text


# From the request to its last event.


async def test_to_its_caller_a_hidden_dataset_ends_a_query_as_a_missing_one_does(world: World, tmp_path: Path) -> None:
    person = Person(4, 1, ("analyst",))
    said = []
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(opened_pool(world.data_url))
        worker = Worker(pool)
        attempts = await _make_attempts(stack, world, worker, tmp_path)
        for name in ("vault", "qqqqq", "vault"):
            query = await worker.admit_new(
                org_id=person.org_id, user_id=person.user_id, roles=person.roles, sql=f"SELECT * FROM {name}"
            )
            with recorded_statements() as statements:
                [claimed] = await attempts.claim([query])
                assert isinstance(claimed, Attempt)
                assert await attempts.run(claimed, lambda: None)
            row = await read_row(pool, query.facts.query_id)
            events = [stored.event for stored in await read_events(pool, query.facts.query_id)]
            assert row is not None
            said.append(
                (
                    (row.status, row.error_code, row.error_message, row.output_location, row.bytes),
                    [(event.status, event.error_code, event.error_message, event.files) for event in events],
                    list(statements),
                )
            )
    assert said[0] == said[1] == said[2]
    assert said[0][0][:2] == ("Failed", ErrorCode.SQL_REJECTED)


async def _make_attempts(stack: AsyncExitStack, world: World, worker: Worker, folder: Path) -> Attempts:
    store = world.store
    engine = DuckDBEngine(world.settings(folder / "children"), 1)
    await engine.start()
    stack.push_async_callback(engine.close)
    aws = {
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_ACCESS_KEY_ID": store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
        "AWS_REGION": store.region,
    }
    return Attempts(
        pool=worker.pool,
        clock=worker.clock,
        transitions=worker.transitions,
        leases=Leases(worker.pool, _LEASE_SECONDS, _LEASE_SECONDS),
        engine=engine,
        store=ResultStore(store.bucket, StoreAccess.from_variables(aws)),
        rules=AttemptRules(
            worker="worker",
            bucket=store.bucket,
            scratch=folder / "attempts",
            lease_seconds=_LEASE_SECONDS,
            default_seconds=dict.fromkeys(Mode, 30.0),
            longest_seconds=dict.fromkeys(Mode, 30.0),
            queue_seconds=dict.fromkeys(Mode, 30.0),
            retention=timedelta(days=7),
        ),
    )


# What runs while a grant changes.


async def test_a_revoked_grant_ends_with_the_next_attempt_and_a_removal_hurts_nothing_that_runs(
    pool: DataPool, engine: DuckDBEngine, tmp_path: Path
) -> None:
    owner, reader = new_id(), Person(2, 1)
    [location] = [
        dataset.location for dataset in await authorize(pool, _org_id(3), None, ()) if dataset.name == "products"
    ]
    await add_dataset(pool, NewDataset(owner, None, "passing", "postgres", location, "org", []))
    await grant(pool, owner, "passing", [f"org:{reader.org_id}"])
    text = "SELECT marker FROM passing"
    assert (await _ask(pool, engine, tmp_path, reader, text)).rows == [{"marker": "3/products"}]
    held: tuple[Relation, ...] = tuple(
        _to_relation(dataset) for dataset in await authorize(pool, reader.org_id, reader.user_id, ())
    )
    await revoke(pool, owner, "passing", [f"org:{reader.org_id}"])
    assert (await _ask(pool, engine, tmp_path, reader, text)).code is ErrorCode.SQL_REJECTED
    await remove_dataset(pool, owner, "passing")
    # An attempt that was authorized before goes on.
    folder = tmp_path / "running"
    folder.mkdir()
    running = Execution(
        query_id=QueryId(new_id()),
        org_id=OrgId(reader.org_id),
        sql=text,
        parameters={},
        relations=held,
        output_format=OutputFormat.JSON,
        scratch=folder,
        timeout_seconds=60.0,
    )
    assert (await engine.execute(running)).rows == 1
