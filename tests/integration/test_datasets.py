"""Datasets in the data database and on their stores: registering, granting, looking, pruning, pushing down."""

import asyncio
import json
import os
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql
from typer.testing import CliRunner

from access.datasets import NoSuchDataset, add_dataset, check_dataset, find_dataset, grant, remove_dataset, revoke
from access.grants import authorize
from access.visibility import InvalidRegistration
from db.connection import DataPool
from db.data.datasets import Dataset, NewDataset
from db.data.versions.v0005_access import _GRANTS
from db.datasets_server import READER, prepare_datasets_database
from db.migrations.upgrade import upgrade_data
from engines.duckdb import pool as duckdb_pool
from engines.duckdb.instance import Instance
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Execution, Looked, QueryFailed, Relation, RelationKind
from queryd.events import Column, ErrorCode, OrgId, OutputFormat, QueryId
from service.cli import app
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.looking import CantLook, Looker
from tests.integration.outputs import read_output
from tests.integration.queries import new_id, opened_pool

_MIB = 1024 * 1024


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> Iterator[str]:
    """One migrated data database for all of these tests: each has orgs of its own."""
    name = f"registry_{uuid.uuid4().hex}"
    postgres_server.create_database(name)
    upgrade_data(postgres_server.url(name))
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[DataPool]:
    async with opened_pool(database) as opened:
        yield opened


def _new(org_id: str, name: str = "sales", **changes: Any) -> NewDataset:
    fields: dict[str, Any] = {
        "org_id": org_id,
        "user_id": None,
        "name": name,
        "kind": "parquet",
        "location": "s3://bucket/sales.parquet",
        "visibility": "org",
        "pii_columns": [],
    }
    return NewDataset(**(fields | changes))


async def _readable(pool: DataPool, org_id: str, user_id: str | None = None, *roles: str) -> dict[str, str]:
    return {dataset.name: dataset.location for dataset in await authorize(pool, org_id, user_id, roles)}


# Names and grants.


async def test_a_name_is_one_whatever_its_case_and_a_replacement_is_granted_to_nobody(pool: DataPool) -> None:
    org_id, other = new_id(), new_id()
    first = await add_dataset(pool, _new(org_id, "Order Details"))
    await grant(pool, org_id, "order details", [f"org:{other}"])
    second = await add_dataset(pool, _new(org_id, "ORDER details", location="s3://bucket/other.parquet"))
    assert (second.id, second.name, second.version) == (first.id, "ORDER details", first.version + 2)
    found, grants = await find_dataset(pool, org_id, "oRDER dETAILS")
    assert (found, grants) == (second, [])
    assert await _readable(pool, other) == {}
    # Letters beyond ASCII keep their case, as they do in DuckDB.
    assert (await add_dataset(pool, _new(org_id, "Ä"))).id != (await add_dataset(pool, _new(org_id, "ä"))).id


async def test_two_registrations_at_once_are_one_dataset(pool: DataPool) -> None:
    org_id = new_id()
    names = ["sales", "Sales", "SALES", "sAles"] * 5
    stored = await asyncio.gather(*(add_dataset(pool, _new(org_id, name)) for name in names))
    assert len({dataset.id for dataset in stored}) == 1
    assert sorted(dataset.version for dataset in stored) == list(range(1, len(names) + 1))


async def test_every_change_of_grants_raises_the_version_and_a_repetition_does_not(pool: DataPool) -> None:
    org_id, user, other = new_id(), new_id(), new_id()
    await add_dataset(pool, _new(org_id, visibility="private", user_id=new_id()))
    grantees = [f"user:{user}", "role:analysts", f"org:{other}"]
    granted, grants = await grant(pool, org_id, "sales", grantees)
    assert (granted.version, grants) == (2, sorted(grantees))
    again, _ = await grant(pool, org_id, "Sales", grantees[:2])
    assert again.version == 2
    revoked, grants = await revoke(pool, org_id, "sales", [f"user:{user}"])
    assert (revoked.version, grants) == (3, sorted(grantees[1:]))
    again, _ = await revoke(pool, org_id, "sales", [f"user:{user}"])
    assert again.version == 3
    assert await _readable(pool, org_id, user) == {}
    assert len(await _readable(pool, org_id, user, "analysts")) == 1
    # A role or a user of another org is somebody else.
    assert await _readable(pool, new_id(), user, "analysts") == {}
    assert len(await _readable(pool, other)) == 1


async def test_a_removed_dataset_is_gone_with_its_grants(pool: DataPool) -> None:
    org_id, other = new_id(), new_id()
    first = await add_dataset(pool, _new(org_id))
    await grant(pool, org_id, "sales", [f"org:{other}"])
    assert (await remove_dataset(pool, org_id, "SALES")).id == first.id
    assert await _readable(pool, other) == await _readable(pool, org_id) == {}
    for change in (grant, revoke):
        with pytest.raises(NoSuchDataset):
            await change(pool, org_id, "sales", [f"org:{other}"])
    with pytest.raises(NoSuchDataset):
        await remove_dataset(pool, org_id, "sales")
    await add_dataset(pool, _new(org_id))
    assert await _readable(pool, other) == {}


async def test_a_grant_and_a_removal_at_once_leave_no_half(pool: DataPool) -> None:
    org_id, other = new_id(), new_id()
    for _ in range(20):
        await add_dataset(pool, _new(org_id))
        granted, removed = await asyncio.gather(
            grant(pool, org_id, "sales", [f"org:{other}"]),
            remove_dataset(pool, org_id, "sales"),
            return_exceptions=True,
        )
        assert isinstance(removed, Dataset)
        assert isinstance(granted, tuple | NoSuchDataset)
        assert await _readable(pool, other) == {}


async def test_an_own_dataset_hides_a_foreign_one_and_of_two_foreign_ones_the_elder_stands(pool: DataPool) -> None:
    elder, younger, reader, user = new_id(), new_id(), new_id(), new_id()
    name = f"n{uuid.uuid4().hex}"
    await add_dataset(pool, _new(elder, name, visibility="public", location="s3://bucket/elder"))
    await add_dataset(pool, _new(younger, name.upper(), location="s3://bucket/younger"))
    await grant(pool, younger, name, [f"org:{reader}"])
    # What was not asked for can't slip in under a name that is in use.
    assert (await _readable(pool, reader))[name] == "s3://bucket/elder"
    # Replaced, it is still the elder.
    await add_dataset(pool, _new(elder, name, visibility="public", location="s3://bucket/elder2"))
    assert (await _readable(pool, reader))[name] == "s3://bucket/elder2"
    await add_dataset(pool, _new(reader, name, visibility="private", user_id=user, location="s3://bucket/own"))
    assert (await _readable(pool, reader, user))[name] == "s3://bucket/own"
    # A colleague, who may not see it, sees no trace of it.
    assert (await _readable(pool, reader, new_id()))[name] == "s3://bucket/elder2"
    await remove_dataset(pool, elder, name)
    assert (await _readable(pool, reader))[name.upper()] == "s3://bucket/younger"


def test_names_that_differ_only_in_case_are_told_apart_when_the_rule_comes(data_url: str) -> None:
    upgrade_data(data_url)
    org_id = new_id()
    with psycopg.connect(data_url, autocommit=True) as connection:
        connection.execute("DROP TABLE dataset_grants")
        connection.execute("DROP INDEX idx_datasets_name")
        connection.execute("ALTER TABLE datasets ADD CONSTRAINT datasets_org_id_name_key UNIQUE (org_id, name)")
        for name, age in (("sales", 3), ("Sales", 1), ("SALES", 2), ("other", 1)):
            connection.execute(
                "INSERT INTO datasets (org_id, name, kind, location, visibility, updated_at) "
                "VALUES (%s, %s, 'parquet', 's3://b/k', 'org', now() - %s * interval '1 day')",
                [org_id, name, age],
            )
        connection.execute(_GRANTS)
        rows = connection.execute("SELECT name, left(id::text, 8), version FROM datasets").fetchall()
    versions = {name.removesuffix(f"_{digits}"): (name, version) for name, digits, version in rows}
    assert versions["Sales"] == ("Sales", 1)
    assert versions["other"] == ("other", 1)
    assert {versions[name][0][:6] for name in ("sales", "SALES")} == {"sales_", "SALES_"}
    assert {versions[name][1] for name in ("sales", "SALES")} == {2}


# On their stores.


@dataclass(frozen=True, slots=True)
class Stores:
    """Sales of twelve months in S3, hive-partitioned, and a few tables in Postgres behind a role that can only read."""

    store: ObjectStore
    folder: str
    owner_url: str
    reader_url: str

    @property
    def sales(self) -> str:
        return f"s3://{self.store.bucket}/{self.folder}/sales/"

    def location(self, path: str) -> str:
        return f"s3://{self.store.bucket}/{self.folder}/{path}"

    def settings(self, scratch: Path, **changes: Any) -> DuckDBSettings:
        settings = DuckDBSettings(
            512 * _MIB,
            2,
            scratch,
            endpoint_url=self.store.endpoint_url,
            region=self.store.region,
            access_key=self.store.reader.access_key,
            secret_key=self.store.reader.secret_key,
            postgres_url=self.reader_url,
        )
        return replace(settings, **changes)


@pytest.fixture(scope="module")
def stores(
    object_store_server: ObjectStore, postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stores]:
    store, folder = object_store_server, f"datasets/{uuid.uuid4()}"
    s3 = boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=store.writer.access_key,
        aws_secret_access_key=store.writer.secret_key,
    )
    path = tmp_path_factory.mktemp("parquet") / "part.parquet"
    for month in range(1, 13):
        pq.write_table(pa.table({"id": range(month * 10, month * 10 + 10), "E-Mail": ["x@y"] * 10}), path)
        s3.upload_file(str(path), store.bucket, f"{folder}/sales/year=2024/month={month}/part.parquet")
    s3.upload_file(str(path), store.bucket, f"{folder}/torn/part=a/part.parquet")
    s3.put_object(Bucket=store.bucket, Key=f"{folder}/torn/part=b/part.parquet", Body=b"no Parquet at all" * 10)
    s3.put_object(Bucket=store.bucket, Key=f"{folder}/text.parquet", Body=b"no Parquet at all" * 10)
    name = f"datasets_{uuid.uuid4().hex}"
    postgres_server.create_database(name)
    url, password = postgres_server.url(name), uuid.uuid4().hex
    prepare_datasets_database(url, password)
    with psycopg.connect(url) as connection:
        connection.execute(
            "CREATE TABLE shops AS SELECT i AS id, 'town' || i AS \"Town\", i * 2 AS x FROM generate_series(1, 1000) i"
        )
        connection.execute("CREATE TABLE empty (id int, name text)")
        connection.execute(
            "CREATE VIEW slow AS SELECT i, pg_sleep(0.1) IS NULL AS slept FROM generate_series(1, 300) i"
        )
        connection.execute("CREATE TABLE hidden AS SELECT 'hunter2' AS s")
        connection.execute("CREATE TABLE half AS SELECT 1 AS open, 'hunter2' AS closed")
        for statement in ("REVOKE SELECT ON hidden, half FROM {}", "GRANT SELECT (open) ON half TO {}"):
            connection.execute(sql.SQL(statement).format(sql.Identifier(READER)))
    reader_url = re.sub(r"//[^@]+@", f"//{READER}:{password}@", url)
    yield Stores(store, folder, url, reader_url)
    postgres_server.drop_database(name)


@pytest.fixture(scope="module")
def reachable(stores: Stores, database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The settings of a command beside those servers, in a folder of its own."""
    before, folder = dict(os.environ), Path.cwd()
    os.chdir(tmp_path_factory.mktemp("command"))
    os.environ |= {
        "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:9",
        "QUERYD_DATA_URL": database,
        "QUERYD_STATE_URL": database,
        "QUERYD_DATASETS_PG_URL": stores.reader_url,
        "QUERYD_RESULTS_URL": f"s3://{stores.store.bucket}",
        "QUERYD_DATASETS_ACCESS_KEY_ID": stores.store.reader.access_key,
        "QUERYD_DATASETS_SECRET_ACCESS_KEY": stores.store.reader.secret_key,
        "AWS_ENDPOINT_URL": stores.store.endpoint_url,
        "AWS_REGION": stores.store.region,
    }
    yield
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
async def looker(stores: Stores, tmp_path: Path) -> AsyncIterator[Looker]:
    engine = DuckDBEngine(stores.settings(tmp_path), 1)
    await engine.start()
    yield Looker(engine)
    await engine.close()


def _columns(looked: Looked) -> tuple[Column, ...]:
    return tuple(Column(column.name, column.type) for column in looked.columns)


@pytest.mark.slow
async def test_columns_are_read_as_they_are_spelled(looker: Looker, stores: Stores) -> None:
    columns = {
        location: _columns(await looker.look(_new(new_id(), name, kind=kind, location=location)))
        for name, kind, location in (
            ("sales", "parquet", stores.sales),
            ("Order Details", "parquet", stores.location("sales/*/month=1/*.parquet")),
            ("finance.load", "postgres", "public.shops"),
            ("x", "postgres", "public.empty"),
        )
    }
    hive = (Column("id", "BIGINT"), Column("E-Mail", "VARCHAR"), Column("month", "BIGINT"), Column("year", "BIGINT"))
    assert columns == {
        stores.sales: hive,
        stores.location("sales/*/month=1/*.parquet"): hive,
        "public.shops": (Column("id", "INTEGER"), Column("Town", "VARCHAR"), Column("x", "INTEGER")),
        "public.empty": (Column("id", "INTEGER"), Column("name", "VARCHAR")),
    }


@pytest.mark.slow
async def test_what_cannot_be_read_is_refused_with_the_reason(looker: Looker, stores: Stores) -> None:
    for kind, location, sentence in (
        ("parquet", stores.location("nothing.parquet"), "missing"),
        ("parquet", stores.location("nothing/"), "missing"),
        ("parquet", stores.location("text.parquet"), "can't be read"),
        # The reader's right ends with its bucket.
        ("parquet", "s3://another-bucket/sales.parquet", "may not read|missing"),
        ("postgres", "public.nothing", "no table or view public.nothing"),
        ("postgres", "nothing.shops", "no table or view nothing.shops"),
        ("postgres", "public.hidden", "may not read"),
        ("postgres", "public.half", "may not read"),
    ):
        with pytest.raises(InvalidRegistration, match=sentence):
            await looker.look(_new(new_id(), kind=kind, location=location))


_ODD_NAMES = (
    *(
        "memory",
        "temp",
        "main",
        "system",
        "information_schema",
        "pg_catalog",
        "duckdb_tables",
        "pg_class",
        "result",
        "t",
    ),
    *("sqlite_master", "load", "SELECT", "Order Details", "it's", "a;b--", "$1", "1", "日本.売上", "Ä", "ä", "x" * 63),
    *("memory_.temp", "a.memory", "shops.shops", "shops", "public.shops", "s p.[x]", "range", "unnest.range", "?.*"),
)


@pytest.mark.slow
async def test_every_name_that_can_be_registered_can_be_read(stores: Stores, tmp_path: Path) -> None:
    for name in _ODD_NAMES:
        check_dataset(_new(new_id(), name))
    relations = tuple(
        Relation(name, RelationKind.PARQUET, stores.location(f"sales/year=2024/month={1 + place % 12}/"), str(place))
        for place, name in enumerate(_ODD_NAMES)
    )
    engine = DuckDBEngine(stores.settings(tmp_path / "scratch"), 1)
    await engine.start()
    try:
        for place, name in enumerate(_ODD_NAMES):
            named = ".".join(f'"{part}"' for part in name.split("."))
            text = f"SELECT min(id) AS least FROM {named}"
            running = replace(_execution(tmp_path / f"run-{place}", text, relations[0]), relations=relations)
            output = await engine.execute(running)
            assert json.loads(read_output(output).decode()) == {"least": 10 * (1 + place % 12)}, name
    finally:
        await engine.close()


async def test_a_store_out_of_reach_says_nothing_against_a_dataset(stores: Stores, tmp_path: Path) -> None:
    # Nobody listens on port 9.
    lost = stores.settings(
        tmp_path, endpoint_url="http://127.0.0.1:9", postgres_url="postgresql://nobody@127.0.0.1:9/nothing"
    )
    engine = DuckDBEngine(lost, 1)
    await engine.start()
    try:
        looker = Looker(engine)
        for kind, location in (("parquet", stores.sales), ("postgres", "public.shops")):
            with pytest.raises(CantLook):
                await looker.look(_new(new_id(), kind=kind, location=location))
    finally:
        await engine.close()


def _execution(scratch: Path, statement: str, relation: Relation) -> Execution:
    scratch.mkdir()
    return Execution(
        query_id=QueryId(new_id()),
        org_id=OrgId(new_id()),
        sql=statement,
        parameters={},
        relations=(relation,),
        output_format=OutputFormat.JSON,
        scratch=scratch,
        timeout_seconds=60.0,
    )


def _explain(stores: Stores, folder: Path, relation: Relation, statement: str) -> str:
    """What DuckDB says about a statement over one relation, asked in this process."""
    for name in ("out", "secrets", "spill"):
        (folder / name).mkdir(exist_ok=True)
    instance = Instance(stores.settings(folder), folder, frozenset({relation}), frozenset({relation.kind}))
    try:
        instance.pin([relation.name])
        instance.expose([relation.name])
        told = instance.connection.execute(statement).fetchall()
    finally:
        instance.close()
    # Boxes break long lines: whoever looks for words looks without blanks and frames.
    return re.sub(r"[\s│]+", "", "".join(str(part) for row in told for part in row))


@pytest.mark.parametrize("pattern", ["sales/", "sales/*/*/*.parquet", "sales/year=2024/**/*.parquet"])
def test_hive_partitions_prune(stores: Stores, tmp_path: Path, pattern: str) -> None:
    relation = Relation("sales", RelationKind.PARQUET, stores.location(pattern), "1")
    told = _explain(stores, tmp_path, relation, "EXPLAIN SELECT sum(id) FROM sales WHERE month = 7 AND year = 2024")
    assert "ScanningFiles:1/12" in told
    assert "ScanningFiles" not in _explain(stores, tmp_path, relation, "EXPLAIN SELECT sum(id) FROM sales")


async def test_what_is_pruned_is_not_read(stores: Stores, tmp_path: Path) -> None:
    engine = DuckDBEngine(stores.settings(tmp_path / "scratch"), 1)
    await engine.start()
    # Of two partitions the second holds what nobody can read.
    torn = Relation("torn", RelationKind.PARQUET, stores.location("torn/"), "1")
    try:
        for scratch, condition, rows in (("a", "part = 'a'", 10), ("b", "part < 'b' AND id >= 0", 10)):
            output = await engine.execute(_execution(tmp_path / scratch, f"FROM torn WHERE {condition}", torn))
            assert output.rows == rows
        with pytest.raises(QueryFailed) as caught:
            await engine.execute(_execution(tmp_path / "c", "FROM torn", torn))
        assert caught.value.code is ErrorCode.QUERY_ERROR
    finally:
        await engine.close()


def test_postgres_is_asked_for_what_a_query_needs_and_no_more(stores: Stores, tmp_path: Path) -> None:
    relation = Relation("shops", RelationKind.POSTGRES, "public.shops", "1")
    told = _explain(stores, tmp_path, relation, 'EXPLAIN SELECT "Town" FROM shops WHERE id = 7 AND x > 3')
    scan = told[told.index("POSTGRES_SCAN") :]
    assert re.search(r"Filters:.*id=7", scan)
    assert re.search(r"Filters:.*x>3", scan)
    assert re.search(r"Projections:.*Town", scan)
    # Nothing is left to be filtered on this side.
    assert "FILTER" not in told.replace("Filters", "")
    counted = _explain(stores, tmp_path, relation, "EXPLAIN SELECT max(x) FROM shops")
    assert "Town" not in counted


async def test_the_server_ends_a_scan_that_takes_too_long(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duckdb_pool, "_SCAN_MILLISECONDS", 500)
    engine = DuckDBEngine(stores.settings(tmp_path / "scratch"), 1)
    await engine.start()
    try:
        slow = Relation("slow", RelationKind.POSTGRES, "public.slow", "1")
        with pytest.raises(QueryFailed) as caught:
            await engine.execute(_execution(tmp_path / "a", "SELECT count(*) FROM slow WHERE slept", slow))
        assert caught.value.code is ErrorCode.QUERY_TIMEOUT
        shops = Relation("shops", RelationKind.POSTGRES, "public.shops", "1")
        assert (await engine.execute(_execution(tmp_path / "b", "FROM shops", shops))).rows == 1000
    finally:
        await engine.close()


def test_the_role_that_reads_datasets_can_do_nothing_else(stores: Stores, tmp_path: Path) -> None:
    with psycopg.connect(stores.reader_url, autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM shops").fetchone() == (1000,)
        # The default can be changed by whoever is in; the rights can't.
        connection.execute("SET default_transaction_read_only = off")
        for statement in ("DELETE FROM shops", "CREATE TABLE t (i int)", "CREATE SCHEMA s", "SELECT pg_read_file('x')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
    # Nor does the engine's own connection let anybody write, whatever a gate let through.
    relation = Relation("shops", RelationKind.POSTGRES, "public.shops", "1")
    for statement in ("DELETE FROM __queryd_datasets.public.shops", "CREATE TABLE __queryd_datasets.public.t (i INT)"):
        with pytest.raises(Exception, match=r"(?i)read-only"):
            _explain(stores, tmp_path, relation, statement)


# By the command.


def _command(*arguments: str) -> tuple[int, str, str]:
    said = CliRunner().invoke(app, ["datasets", *arguments])
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    return said.exit_code, said.stdout, said.stderr


def _json(*arguments: str) -> Any:
    code, out, err = _command(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.usefixtures("reachable")
def test_the_command_registers_shows_grants_and_removes(stores: Stores) -> None:
    org, other, user = new_id(), new_id(), new_id()
    place = ("--org", org)
    parquet = ("--kind", "parquet", "--location", stores.sales, "--visibility", "org")
    added = _json("add", "Order Details", *place, *parquet, "--pii-columns", "e-mail")
    assert (added["pii_columns"], added["grants"], added["version"]) == (["E-Mail"], [], 1)
    assert [column["name"] for column in added["columns"]] == ["id", "E-Mail", "month", "year"]
    granted = _json("grant", "order details", *place, "--to", f"org:{other}", "--to", "role:x")
    assert (granted["grants"], granted["version"]) == ([f"org:{other}", "role:x"], 2)
    assert _json("show", "ORDER DETAILS", *place) == added | {"grants": granted["grants"], "version": 2}
    code, out, _ = _command("show", "Order Details", *place)
    assert code == 0
    assert "  E-Mail VARCHAR  PII" in out.splitlines()
    for caller, names in (
        (("--org", other, "--user", user), ["Order Details"]),
        ((*place, "--role", "y"), ["Order Details"]),
        (("--org", new_id(), "--user", user), []),
        (place, ["Order Details"]),
        (("--org", other), []),
    ):
        found = [each["name"] for each in _json("list", *caller)]
        assert [name for name in found if name == "Order Details"] == names
    assert _json("revoke", "Order Details", *place, "--from", f"org:{other}")["grants"] == ["role:x"]
    assert _json("list", "--org", other, "--user", user) == []
    assert _json("remove", "order details", *place)["id"] == added["id"]
    for arguments in (("show",), ("remove",), ("grant", "--to", "role:x"), ("revoke", "--from", "role:x")):
        code, out, err = _command(arguments[0], "Order Details", *place, *arguments[1:])
        assert (code, out, err) == (1, "", "queryd: the org has no dataset of that name\n")


@pytest.mark.slow
@pytest.mark.usefixtures("reachable")
def test_the_command_refuses_what_is_not_there_unless_told_not_to_look(stores: Stores) -> None:
    org = new_id()
    lost = ("add", "x", "--org", org, "--visibility", "org", "--kind", "postgres", "--location", "public.nothing")
    code, out, err = _command(*lost)
    assert (code, out, err) == (2, "", "queryd: the datasets' Postgres has no table or view public.nothing\n")
    wrong = ("add", "x", "--org", org, "--visibility", "org", "--kind", "parquet", "--location", stores.sales)
    code, out, err = _command(*wrong, "--pii-columns", "phone")
    assert (code, out) == (2, "")
    assert "no column phone; it has id, E-Mail, month, year" in err
    results = ("--kind", "parquet", "--location", f"s3://{stores.store.bucket}/results/*")
    code, _, err = _command("add", "x", "--org", org, "--visibility", "org", *results, "--no-check")
    assert (code, "nobody's dataset" in err) == (2, True)
    assert _json("list", "--org", org) == []
    assert _json(*lost, "--no-check")["columns"] is None
    code, _, err = _command("show", "x", "--org", org)
    assert (code, err.count("\n")) == (1, 1)
    assert _json("show", "x", "--org", org, "--no-check")["location"] == "public.nothing"


@pytest.mark.slow
@pytest.mark.usefixtures("reachable")
def test_a_replacement_that_deletes_grants_asks_first(stores: Stores) -> None:
    org = new_id()
    add = ("add", "sales", "--org", org, "--kind", "parquet", "--location", stores.sales, "--visibility", "org")
    assert _json(*add)["registered"]["partitions"] == [
        {"name": "month", "type": "BIGINT"},
        {"name": "year", "type": "BIGINT"},
    ]
    # Without grants there is nothing to ask.
    assert _json(*add)["version"] == 2
    _json("grant", "sales", "--org", org, "--to", "role:analysts")
    code, out, err = _command(*add)
    assert (code, out) == (2, "")
    assert err == "queryd: this replaces sales and deletes its grants (role:analysts): confirm with --yes\n"
    assert _json("show", "sales", "--org", org, "--no-check")["grants"] == ["role:analysts"]
    assert _json(*add, "--yes")["grants"] == []
    code, out, _ = _command("add", "--help")
    assert code == 0
    assert "delete its grants" in " ".join(out.split())


@pytest.mark.usefixtures("reachable")
def test_the_command_names_the_file_and_the_column_that_cannot_be_read(stores: Stores) -> None:
    org = new_id()
    place = ("--org", org, "--visibility", "org")
    code, out, err = _command("add", "x", *place, "--kind", "parquet", "--location", stores.location("torn/"))
    assert (code, out) == (2, "")
    assert err == f"queryd: a file of the dataset can't be read: {stores.location('torn/part=b/part.parquet')}\n"
    with psycopg.connect(stores.owner_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE prices (id int, price numeric)")
    code, out, err = _command("add", "x", *place, "--kind", "postgres", "--location", "public.prices")
    assert (code, out) == (2, "")
    assert err.startswith("queryd: column price is numeric without a precision, which can't be read exactly")
