"""Parquet datasets whose files differ, are no data, can't be read, or have odd names."""

import asyncio
import datetime
import io
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from access.visibility import InvalidRegistration
from db.data.datasets import NewDataset
from engines.duckdb.instance import Instance
from engines.duckdb.listing import ObjectLister
from engines.duckdb.parquet_source import digest_files
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.duckdb.snapshot import Place, take_snapshot
from engines.protocol import Execution, Looked, QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode, OrgId, OutputFormat, QueryId
from service.embedded.object_store import ObjectStore
from service.looking import Looker, check_looked
from tests.integration.outputs import read_output

_MIB = 1024 * 1024


class Folder:
    """A folder in S3, and an engine that reads it."""

    def __init__(self, store: ObjectStore, engine: DuckDBEngine, scratch: Path) -> None:
        self._store = store
        self._engine = engine
        self._scratch = scratch
        self._name = f"datasets/{uuid.uuid4()}"
        self._org = OrgId(str(uuid.uuid4()))
        self._s3 = boto3.client(
            "s3",
            endpoint_url=store.endpoint_url,
            region_name=store.region,
            aws_access_key_id=store.writer.access_key,
            aws_secret_access_key=store.writer.secret_key,
        )

    def put(self, key: str, table: pa.Table | dict[str, Any] | bytes) -> None:
        """Store a file."""
        body = table if isinstance(table, bytes) else _to_parquet(table)
        self._s3.put_object(Bucket=self._store.bucket, Key=f"{self._name}/{key}", Body=body)

    def location(self, path: str = "") -> str:
        return f"s3://{self._store.bucket}/{self._name}/{path}"

    def dataset(self, path: str = "") -> NewDataset:
        return NewDataset(self._org, None, "d", "parquet", self.location(path), "org", [])

    async def look(self, path: str = "") -> Looked:
        """As `datasets show` does."""
        return await Looker(self._engine).look(self.dataset(path))

    async def register(self, path: str = "") -> Relation:
        """As `datasets add` does."""
        looked = await self.look(path)
        check_looked(looked, self.location(path))
        assert looked.registered is not None
        return replace(self.relation(path), registered=json.dumps(asdict(looked.registered)))

    def relation(self, path: str = "") -> Relation:
        """One that nobody has looked at."""
        return Relation("d", RelationKind.PARQUET, self.location(path), "1")

    async def ask(self, relation: Relation, sql: str) -> list[dict[str, Any]]:
        scratch = self._scratch / str(uuid.uuid4())
        scratch.mkdir()
        execution = Execution(
            query_id=QueryId(str(uuid.uuid4())),
            org_id=self._org,
            sql=sql,
            parameters={},
            relations=(relation,),
            output_format=OutputFormat.PARQUET,
            scratch=scratch,
            timeout_seconds=60.0,
        )
        output = await self._engine.execute(execution)
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(read_output(output))).to_pylist()
        return rows

    async def fail(self, relation: Relation, sql: str) -> QueryFailed:
        with pytest.raises(QueryFailed) as caught:
            await self.ask(relation, sql)
        assert caught.value.code is ErrorCode.QUERY_ERROR
        return caught.value


def _to_parquet(table: pa.Table | dict[str, Any]) -> bytes:
    body = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), body)
    return body.getvalue()


def _settings(store: ObjectStore, scratch: Path) -> DuckDBSettings:
    return DuckDBSettings(
        512 * _MIB,
        2,
        scratch,
        endpoint_url=store.endpoint_url,
        region=store.region,
        access_key=store.reader.access_key,
        secret_key=store.reader.secret_key,
    )


@pytest.fixture
async def folder(object_store_server: ObjectStore, tmp_path: Path) -> AsyncIterator[Folder]:
    engine = DuckDBEngine(_settings(object_store_server, tmp_path / "engine"), 1)
    await engine.start()
    yield Folder(object_store_server, engine, tmp_path)
    await engine.close()


# Files that differ.

_DAY, _NOON = datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 3, 12)


def _decimals(text: str, precision: int, scale: int) -> pa.Array:
    return pa.array([Decimal(text)], pa.decimal128(precision, scale))


@pytest.mark.parametrize(
    ("one", "other", "values"),
    [
        (pa.array([1]), pa.array([2.5]), [1.0, 2.5]),
        (_decimals("1.50", 5, 2), _decimals("2.12345", 20, 5), [Decimal("1.5"), Decimal("2.12345")]),
        (pa.array([_DAY]), pa.array([_NOON]), [datetime.datetime(2024, 1, 2), _NOON]),
        (pa.array([1], pa.int8()), pa.array([2**40]), [1, 2**40]),
        (_decimals("1.5", 5, 2), pa.array([2**40]), [Decimal("1.5"), Decimal(2**40)]),
        (pa.nulls(1), pa.array(["x"]), [None, "x"]),
        (pa.array([{"a": 1}]), pa.array([{"a": 2.5, "b": "x"}]), [{"a": 1.0, "b": None}, {"a": 2.5, "b": "x"}]),
        (pa.array([[1]]), pa.array([[2.5]]), [[1.0], [2.5]]),
    ],
    ids=["numbers", "decimals", "dates", "widths", "a decimal and an integer", "nulls", "structs", "lists"],
)
@pytest.mark.parametrize("turned", [False, True])
async def test_files_that_differ_are_read_by_the_wider_type(
    folder: Folder, one: pa.Array, other: pa.Array, values: list[Any], turned: bool
) -> None:
    for key, column, place in (("1", one, 0), ("2", other, 1)):
        folder.put(f"{1 - place if turned else place}/{key}.parquet", pa.table({"n": [int(key)], "v": column}))
    for relation in (folder.relation(), await folder.register()):
        rows = await folder.ask(relation, "SELECT n, v FROM d ORDER BY n")
        assert [row["v"] for row in rows] == values


async def test_what_a_filter_sees_is_what_the_file_holds(folder: Folder) -> None:
    folder.put("1.parquet", {"price": [1]})
    folder.put("2.parquet", {"price": [2.5]})
    assert await folder.ask(folder.relation(), "SELECT sum(price) AS s FROM d") == [{"s": 3.5}]
    assert await folder.ask(folder.relation(), "SELECT price FROM d WHERE price > 2") == [{"price": 2.5}]


async def test_a_column_that_a_file_lacks_is_null_whichever_comes_first(folder: Folder) -> None:
    folder.put("a/1.parquet", {"a": [1]})
    folder.put("a/2.parquet", {"a": [2], "c": ["x"]})
    folder.put("b/1.parquet", {"c": ["x"], "a": [2]})
    folder.put("b/2.parquet", {"A": [1]})
    for path in ("a/", "b/"):
        for relation in (folder.relation(path), await folder.register(path)):
            rows = await folder.ask(relation, "SELECT a AS a, c FROM d ORDER BY a")
            assert rows == [{"a": 1, "c": None}, {"a": 2, "c": "x"}]


async def test_files_that_no_type_holds_are_refused_by_the_columns_name(folder: Folder) -> None:
    folder.put("1.parquet", {"price": [1]})
    folder.put("2.parquet", {"price": ["x"]})
    failure = await folder.fail(folder.relation(), "SELECT count(*) AS n FROM d")
    assert failure.message == "The dataset's files differ: column price is BIGINT in one file and VARCHAR in another."
    assert failure.detail == 'Column "price" is BIGINT in 1.parquet and VARCHAR in 2.parquet.'
    with pytest.raises(InvalidRegistration, match="files differ: column price is BIGINT"):
        await folder.register()


async def test_a_file_that_comes_later_widens_a_registered_column_or_is_refused(folder: Folder) -> None:
    folder.put("1.parquet", {"price": [1]})
    relation = await folder.register()
    assert await folder.ask(relation, "SELECT sum(price) AS s FROM d") == [{"s": Decimal(1)}]
    folder.put("2.parquet", {"price": [2.5], "c": ["x"]})
    assert await folder.ask(relation, "SELECT sum(price) AS s, max(c) AS c FROM d") == [{"s": 3.5, "c": "x"}]
    folder.put("3.parquet", {"price": ["x"]})
    failure = await folder.fail(relation, "SELECT sum(price) AS s FROM d")
    assert (
        "column price was BIGINT and is VARCHAR" in failure.message or "files differ: column price" in failure.message
    )


async def test_a_registered_column_stays_when_the_files_that_had_it_go(folder: Folder) -> None:
    folder.put("1.parquet", {"a": [1], "c": ["x"]})
    relation = await folder.register()
    folder.put("1.parquet", {"a": [2]})
    assert await folder.ask(relation, "SELECT a, c FROM d") == [{"a": 2, "c": None}]


# Partitions.


async def test_partition_columns_and_their_types_are_those_that_registration_saw(folder: Folder) -> None:
    folder.put("month=7/a.parquet", {"a": [7]})
    folder.put("month=8/a.parquet", {"a": [8]})
    relation = await folder.register()
    for key in ("readme.parquet", "month=none/a.parquet", "year=1/month=9/a.parquet"):
        folder.put(key, {"a": [-1]})
    folder.put("month=09/a.parquet", {"a": [9]})
    folder.put("month=__HIVE_DEFAULT_PARTITION__/a.parquet", {"a": [0]})
    rows = await folder.ask(relation, "SELECT a, month FROM d ORDER BY a")
    assert rows == [{"a": 0, "month": None}, *({"a": month, "month": month} for month in (7, 8, 9))]
    assert await folder.ask(relation, "SELECT a FROM d WHERE month = 9") == [{"a": 9}]
    looked = await Looker(folder._engine).look(replace(folder.dataset(), registered=relation.registered))
    assert sorted(key.partition("/")[2].partition("/")[2] for key in looked.outside) == [
        "month=none/a.parquet",
        "readme.parquet",
        "year=1/month=9/a.parquet",
    ]
    assert [(column.name, column.type) for column in looked.columns] == [("a", "BIGINT"), ("month", "BIGINT")]


async def test_folders_that_name_different_columns_are_refused_when_added(folder: Folder) -> None:
    folder.put("month=7/a.parquet", {"a": [7]})
    folder.put("year=1/month=8/a.parquet", {"a": [8]})
    with pytest.raises(InvalidRegistration, match="month= and others in month=/year="):
        await folder.register()


# What is not data.


async def test_names_that_begin_with_an_underscore_or_a_dot_are_not_data(folder: Folder) -> None:
    folder.put("a.parquet", {"a": [1]})
    hidden = ("_temporary/0/b.parquet", ".staging/b.parquet", "_delta_log/1.parquet", ".b.parquet", "_b.parquet")
    for key in hidden:
        folder.put(key, {"b": ["x"]})
    for relation in (folder.relation(), folder.relation("*.parquet"), await folder.register()):
        assert await folder.ask(relation, "FROM d") == [{"a": 1}]
    assert len((await folder.look()).hidden) == len(hidden)


@pytest.mark.parametrize("body", [b"", b"no Parquet at all" * 10, b"PAR1" + b"x" * 100 + b"PAR1"])
async def test_a_file_that_is_none_is_named_when_added_and_when_asked(folder: Folder, body: bytes) -> None:
    folder.put("a.parquet", {"a": [1]})
    folder.put("bad.parquet", body)
    with pytest.raises(InvalidRegistration, match=r"a file of the dataset can't be read: s3://.*/bad\.parquet$"):
        await folder.register()
    failure = await folder.fail(folder.relation(), "SELECT max(a) AS a FROM d")
    assert failure.message == "A file of the dataset can't be read."
    assert failure.detail is not None
    assert failure.detail.startswith("bad.parquet")


# Keys.

_KEYS = (
    *("x?y", "st*ar", "br[a]ck", "cur{a,b}ly", "ha#sh", "per%20cent", "per%cent", "amp&x=1/in", "a&amp;b", "plus+plus"),
    *("sp ace", "quo'te", 'dq"x', "lt<gt>", "semi;colon", "ünï", "co,mma", "col:on", "at@x", "dollar$x", "q?a=b/in"),
    *("x=1?y/in", "?", "a%3Fb", "100%", "s3://x/y"),
)


async def test_every_key_is_read_as_it_is_spelled(folder: Folder) -> None:
    kept = []
    for number, key in enumerate(_KEYS):
        folder.put(f"{key}.parquet", {"n": [number]})
        kept.append(number)
    for relation in (folder.relation(), await folder.register()):
        rows = await folder.ask(relation, "SELECT n FROM d ORDER BY n")
        assert [row["n"] for row in rows] == kept
    # One by one: with the odd name alone in its folder.
    for number, key in enumerate(("x?y", "amp&x=1/in", "br[a]ck")):
        folder.put(f"alone/{number}/{key}.parquet", {"n": [number]})
        assert await folder.ask(folder.relation(f"alone/{number}/"), "SELECT n FROM d") == [{"n": number}]


@pytest.mark.parametrize(
    "settings", ["s3_endpoint={host}&s3_region=x", "s3_use_ssl=false&s3_endpoint={host}", "s3_url_style=path&x={host}"]
)
async def test_a_key_is_never_taken_for_settings(folder: Folder, settings: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        called = threading.Event()

        def listen() -> None:
            try:
                listener.accept()[0].close()
            except OSError:
                return
            called.set()

        threading.Thread(target=listen, daemon=True).start()
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        folder.put(f"z.parquet?{settings.format(host=host)}.parquet", {"n": [1]})
        folder.put("a.parquet", {"n": [2]})
        for relation in (folder.relation(), await folder.register()):
            rows = await folder.ask(relation, "SELECT sum(n) AS n FROM d")
            assert rows == [{"n": Decimal(3)}]
        assert not called.is_set()
        listener.shutdown(socket.SHUT_RDWR)


# Columns.


async def test_decimals_of_more_than_38_digits_are_refused_and_the_other_columns_read(folder: Folder) -> None:
    wide = pa.array([Decimal("1.50")], pa.decimal256(39, 2))
    folder.put("a.parquet", pa.table({"a": [1], "wide": wide, "nested": pa.array([[Decimal(1)]], pa.list_(wide.type))}))
    with pytest.raises(InvalidRegistration, match=r"column wide has more than 38 digits.*column nested has"):
        await folder.register()
    assert await folder.ask(folder.relation(), "SELECT a FROM d") == [{"a": 1}]
    for column in ("wide", "nested"):
        failure = await folder.fail(folder.relation(), f"SELECT max({column}) AS m FROM d")
        assert failure.message == f"The dataset's column {column} has more than 38 digits, which can't be read exactly."


async def test_a_variant_is_refused_and_never_read(folder: Folder, tmp_path: Path) -> None:
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"COPY (SELECT 1 AS a, {{'x': 2}}::VARIANT AS v) TO '{tmp_path / 'v.parquet'}'")
    folder.put("a.parquet", (tmp_path / "v.parquet").read_bytes())
    with pytest.raises(InvalidRegistration, match="column v is a VARIANT"):
        await folder.register()
    assert await folder.ask(folder.relation(), "SELECT a FROM d") == [{"a": 1}]
    for sql in ("FROM d", "SELECT v FROM d", "SELECT count(v) AS n FROM d"):
        failure = await folder.fail(folder.relation(), sql)
        assert failure.message == "The dataset's column v is a VARIANT, which can't be read."


@pytest.mark.parametrize(
    "table",
    [
        pa.table([pa.array([1]), pa.array([2])], names=["Id", "id"]),
        pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["id", "x", "ID"]),
        pa.table({"s": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["Id", "id"])}),
    ],
    ids=["two", "apart", "fields"],
)
async def test_names_that_differ_in_case_only_are_refused(folder: Folder, table: pa.Table) -> None:
    folder.put("a.parquet", table)
    failure = await folder.fail(folder.relation(), "SELECT count(*) AS n FROM d")
    assert "differ only in case" in failure.message
    with pytest.raises(InvalidRegistration, match="differ only in case"):
        await folder.register()


# What is read, and when.


async def test_a_replaced_file_is_read_again(folder: Folder) -> None:
    for path in ("one.parquet", ""):
        for value in range(4):
            folder.put("one.parquet", {"n": [value], "x" * (value + 1): [0]})
            assert await folder.ask(folder.relation(path), "SELECT n FROM d") == [{"n": value}]


async def test_files_come_and_go_between_queries(folder: Folder) -> None:
    folder.put("1.parquet", {"n": [1]})
    relation = await folder.register()
    assert await folder.ask(relation, "SELECT sum(n)::INT AS n FROM d") == [{"n": 1}]
    folder.put("2.parquet", {"n": [2]})
    assert await folder.ask(relation, "SELECT sum(n)::INT AS n FROM d") == [{"n": 3}]
    folder._s3.delete_object(Bucket=folder._store.bucket, Key=f"{folder._name}/1.parquet")
    assert await folder.ask(relation, "SELECT sum(n)::INT AS n FROM d") == [{"n": 2}]


@pytest.mark.parametrize("key", ["3.parquet", "2.parquet"], ids=["another file", "a replaced file"])
async def test_a_file_that_the_store_dates_before_registration_is_looked_at(
    folder: Folder, object_store_server: ObjectStore, tmp_path: Path, key: str
) -> None:
    folder.put("1.parquet", {"v": [1]})
    folder.put("2.parquet", {"v": [1]})
    relation = await folder.register()
    with closing(ObjectLister(_settings(object_store_server, tmp_path))) as lister:
        listed = take_snapshot(lister, Place.of(folder.location()), [])
    # As if everything that is in the folder now or later was older than registration.
    fields = json.loads(relation.registered or "")
    fields |= {"alike_until": fields["alike_until"] + 3600, "alike_digest": digest_files(listed.files)}
    dated_back = replace(relation, registered=json.dumps(fields))
    assert await folder.ask(dated_back, "SELECT max(v) AS v FROM d") == [{"v": 1}]
    folder.put(key, {"v": [2.5], "c": ["x"]})
    # In an instance that knows no footer yet.
    cold = replace(dated_back, version="2")
    assert await folder.ask(cold, "SELECT max(v) AS v, max(c) AS c FROM d") == [{"v": 2.5, "c": "x"}]


@pytest.fixture
def instance(folder: Folder, object_store_server: ObjectStore, tmp_path: Path) -> Iterator[Instance]:
    for name in ("out", "secrets", "spill"):
        (tmp_path / name).mkdir()
    relations = frozenset({folder.relation()})
    made = Instance(_settings(object_store_server, tmp_path), tmp_path, relations, frozenset({RelationKind.PARQUET}))
    yield made
    made.close()


async def test_a_query_reads_only_pinned_files(folder: Folder, instance: Instance) -> None:
    folder.put("1.parquet", {"n": [1]})

    def count() -> Any:
        instance.expose(["d"])
        return instance.connection.execute("SELECT count(*) FROM d").fetchall()

    assert instance.pin(["d"])
    folder.put("2.parquet", {"n": [2]})
    assert count() == [(1,)]
    assert instance.pin(["d"])
    assert count() == [(2,)]
    folder.put("2.parquet", {"n": [2, 2]})
    # What this instance remembers of the file is of the old one.
    assert not instance.pin(["d"])


async def test_a_hundred_files_are_pinned(
    folder: Folder, instance: Instance, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    body = _to_parquet({"n": [1]})
    await asyncio.gather(
        *(asyncio.to_thread(folder.put, f"m={number % 7}/{number:03}.parquet", body) for number in range(100))
    )
    assert instance.pin(["d"])
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        assert instance.pin(["d"])
        taken.append(1000 * (time.perf_counter() - start))
    assert len(instance.urls_of("d")) == 100
    # docs/performance.md has the figure of a quiet machine.
    record_property("pin_ms", sorted(taken)[len(taken) // 2])
    with capsys.disabled():
        print(f"\n100 files pinned in {sorted(taken)[len(taken) // 2]:.1f} ms (median of 20), {min(taken):.1f} at best")
