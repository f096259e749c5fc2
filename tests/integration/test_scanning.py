"""Bytes scanned and bytes written: what is told of them, and that a query ends where it oversteps its limits."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from engines.duckdb.forecast import certain_scans
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Execution, QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode, OrgId, OutputFormat, Parameter, QueryId
from service.embedded.object_store import ObjectStore
from tests.servers.tcp_proxy import TcpProxy

_MIB = 1024 * 1024
_ROWS, _GROUP = 400_000, 50_000
# What a file costs beside its chunks: its footer, and a gap up to what DuckDB has in its cache, which it fetches along.
_ASIDE = 1 * _MIB

_SLOW_BYTES = 1_000_000

# A hundred million rows, a few at a time: nothing is gathered, all of it is written.
_LONG = "SELECT a.range AS a, b.range AS b FROM range(10000000) a, range(10) b"


class _World:
    """One Parquet relation of random numbers, `v` and `w`, sorted by `id`, in two months; one in Postgres."""

    def __init__(self, store: ObjectStore, postgres_url: str, tmp_path: Path) -> None:
        self.endpoint_url = store.endpoint_url
        prefix = f"datasets/{uuid.uuid4()}/numbers"
        self.numbers = Relation("numbers", RelationKind.PARQUET, f"s3://{store.bucket}/{prefix}/", "1")
        self.shops = Relation("shops", RelationKind.POSTGRES, "public.shops", "1")
        self.chunks: dict[str, int] = {}
        self.by_month: dict[int, int] = {}
        random = np.random.default_rng(4)
        s3 = boto3.client(
            "s3",
            endpoint_url=store.endpoint_url,
            region_name=store.region,
            aws_access_key_id=store.writer.access_key,
            aws_secret_access_key=store.writer.secret_key,
        )
        for month in (1, 2):
            path = tmp_path / "part.parquet"
            columns = {"id": np.arange(_ROWS), "v": random.random(_ROWS), "w": random.random(_ROWS)}
            pq.write_table(pa.table(columns), path, row_group_size=_GROUP, compression="zstd")
            s3.upload_file(str(path), store.bucket, f"{prefix}/month={month}/part.parquet")
            for name, size in _chunks(path):
                self.chunks[name] = self.chunks.get(name, 0) + size
                self.by_month[month] = self.by_month.get(month, 0) + (size if name == "v" else 0)
        with psycopg.connect(postgres_url) as connection:
            connection.execute("CREATE TABLE shops AS SELECT 1 AS id")
        self.settings = DuckDBSettings(
            # Small, so that a cache which it might fill doesn't count for much; it is no limit of these queries.
            64 * _MIB,
            1,
            tmp_path / "scratch",
            endpoint_url=store.endpoint_url,
            region=store.region,
            access_key=store.reader.access_key,
            secret_key=store.reader.secret_key,
            postgres_url=postgres_url,
        )


def _chunks(path: Path) -> Iterator[tuple[str, int]]:
    metadata = pq.read_metadata(path)
    for group, column in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
        chunk = metadata.row_group(group).column(column)
        yield chunk.path_in_schema, chunk.total_compressed_size


@pytest.fixture
def world(object_store: ObjectStore, postgres_url: str, tmp_path: Path) -> _World:
    return _World(object_store, postgres_url, tmp_path)


class _Asking:
    """One child, and the statements that it is asked to run over both relations."""

    def __init__(self, engine: DuckDBEngine, world: _World, tmp_path: Path) -> None:
        self.engine = engine
        self._world = world
        self._tmp_path = tmp_path
        self._numbers = itertools.count(1)

    def prepare(self, sql: str, **limits: Any) -> Execution:
        scratch = self._tmp_path / f"attempt-{next(self._numbers)}"
        scratch.mkdir()
        # Each of another org, so that nothing is cached.
        org, query = OrgId(str(uuid.uuid4())), QueryId(str(uuid.uuid4()))
        relations = (self._world.numbers, self._world.shops)
        return Execution(query, org, sql, {}, relations, OutputFormat.CSV, scratch, 60.0, **limits)

    async def scan(self, sql: str, **limits: Any) -> int | None:
        return (await self.engine.execute(self.prepare(sql, **limits))).bytes_scanned

    async def fail(self, sql: str, **limits: Any) -> QueryFailed:
        execution = self.prepare(sql, **limits)
        with pytest.raises(QueryFailed) as caught:
            await self.engine.execute(execution)
        assert list(execution.scratch.iterdir()) == []
        return caught.value


@pytest_asyncio.fixture
async def asking(world: _World, tmp_path: Path) -> AsyncIterator[_Asking]:
    engine = DuckDBEngine(world.settings, 1)
    await engine.start()
    yield _Asking(engine, world, tmp_path)
    await engine.close()


@pytest.mark.slow
async def test_bytes_scanned_are_those_of_the_column_chunks(asking: _Asking, world: _World) -> None:
    scanned = await asking.scan("SELECT sum(v) AS s FROM numbers")
    assert scanned is not None
    assert world.chunks["v"] <= scanned <= world.chunks["v"] + 2 * _ASIDE
    # A month that is pruned, and row groups that are, are not read.
    one_month = await asking.scan("SELECT sum(v) AS s FROM numbers WHERE month = 2")
    assert one_month is not None
    assert world.by_month[2] <= one_month <= world.by_month[2] + _ASIDE
    few = await asking.scan("SELECT sum(w) AS s FROM numbers WHERE id < 100 AND month = 1")
    assert few is not None
    assert 0 < few < world.chunks["w"] / 4 + _ASIDE


@pytest.mark.slow
async def test_nothing_scanned_is_zero_and_what_postgres_sends_is_unknown(asking: _Asking) -> None:
    assert await asking.scan("SELECT 1 AS a") == 0
    assert await asking.scan("SELECT id FROM shops") is None
    assert await asking.scan("SELECT count(*) AS n FROM numbers, shops") is None


@pytest.mark.slow
async def test_a_scan_over_its_limit_leaves_nothing(asking: _Asking, world: _World) -> None:
    limit = world.chunks["v"] // 2
    failure = await asking.fail("SELECT sum(v) AS s FROM numbers", max_bytes_scanned=limit)
    assert failure.code is ErrorCode.SCAN_LIMIT_EXCEEDED
    assert failure.message == f"The query scans more than {limit} bytes."
    enough = world.chunks["v"] + 2 * _ASIDE
    assert await asking.scan("SELECT sum(v) AS s FROM numbers", max_bytes_scanned=enough) is not None
    # Of the same files, little is read.
    few = "SELECT sum(v) AS s FROM numbers WHERE id < 100 AND month = 1"
    assert await asking.scan(few, max_bytes_scanned=limit) is not None


@pytest.mark.parametrize("output_format", [OutputFormat.CSV, OutputFormat.PARQUET])
async def test_a_result_over_its_limit_is_stopped_while_it_is_written(
    asking: _Asking, output_format: OutputFormat
) -> None:
    execution = asking.prepare(_LONG, max_bytes=4 * _MIB)
    [child] = asking.engine._all
    largest = 0
    running = asyncio.create_task(asking.engine.execute(execution))
    while not running.done():
        largest = max([largest, *(file.stat().st_size for file in (child.home.path / "out").iterdir())])
        await asyncio.sleep(0.01)
    with pytest.raises(QueryFailed) as caught:
        running.result()
    assert caught.value.code is ErrorCode.RESULT_TOO_LARGE
    # As a whole it has 1.5 GB.
    assert largest < 512 * _MIB
    assert list(execution.scratch.iterdir()) == []
    assert list((child.home.path / "out").iterdir()) == []
    assert asking.engine._all == {child}


@pytest.mark.slow
async def test_a_scan_over_its_limit_is_stopped_while_it_reads(world: _World, tmp_path: Path) -> None:
    """A filter might leave row groups out, so that nothing is certain before the run."""
    store = urlsplit(world.endpoint_url)
    assert store.hostname is not None
    assert store.port is not None
    with TcpProxy(store.hostname, store.port) as proxy:
        engine = DuckDBEngine(replace(world.settings, endpoint_url=f"http://127.0.0.1:{proxy.port}"), 1)
        await engine.start()
        try:
            asking = _Asking(engine, world, tmp_path)
            proxy.slow(_SLOW_BYTES)
            started = time.monotonic()
            sql = "SELECT sum(v) AS s FROM numbers WHERE w > 0.0"
            failure = await asking.fail(sql, max_bytes_scanned=2 * _MIB)
            assert failure.code is ErrorCode.SCAN_LIMIT_EXCEEDED
            # Reading it all would take the time of fifteen megabytes.
            assert time.monotonic() - started < (world.chunks["v"] + world.chunks["w"]) / _SLOW_BYTES * 0.7
        finally:
            await engine.close()


def _scan(**facts: object) -> dict[str, Any]:
    known: dict[str, object] = {"Function": "READ_PARQUET", "Projections": ["v", "w"], "Estimated Cardinality": "9"}
    return {"name": "READ_PARQUET", "children": [], "extra_info": known | facts}


def _above(name: str, *children: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "children": list(children), "extra_info": {}}


def test_only_what_is_read_to_its_end_is_forecast() -> None:
    assert certain_scans(_above("UNGROUPED_AGGREGATE", _above("PROJECTION", _scan()))) == [["v", "w"]]
    assert certain_scans(_scan(Projections="v")) == [["v"]]
    assert certain_scans(_above("UNION", _scan(), _scan())) == [["v", "w"]] * 2
    assert certain_scans(_above("STREAMING_LIMIT", _scan())) == []
    assert certain_scans(_above("STREAMING_LIMIT", _above("HASH_GROUP_BY", _scan()))) == [["v", "w"]]
    assert certain_scans(_above("TOP_N", _scan())) == []
    assert certain_scans(_above("HASH_JOIN", _scan(), _scan())) == []
    assert certain_scans(_scan(Filters="id>5")) == []
    assert certain_scans(_scan(**{"File Filters": "(month = 2)"})) == []
    assert certain_scans(_above("NEWER_THAN_US", _scan())) == []


async def test_a_certain_overstep_is_refused_before_anything_is_read(world: _World, tmp_path: Path) -> None:
    """The plan and the footers tell."""
    from engines.duckdb.forecast import forecast_scan  # noqa: PLC0415 - DuckDB is used here without a child
    from engines.duckdb.instance import Instance  # noqa: PLC0415
    from engines.duckdb.statement import Wrapped  # noqa: PLC0415

    home = tmp_path / "home"
    for folder in ("out", "spill", "secrets"):
        (home / folder).mkdir(parents=True)
    instance = Instance(world.settings, home, frozenset({world.numbers}), frozenset({RelationKind.PARQUET}))
    try:
        instance.expose(["numbers"])

        def forecast(sql: str, limit: int = 1000, values: dict[str, Parameter] | None = None) -> int:
            statement = Wrapped("\n", sql, "\n")
            return forecast_scan(instance, statement, values, frozenset({"numbers"}), limit)

        # Of the files nothing is cached but their ends, where the footers are.
        both, one = world.chunks["v"] + world.chunks["w"], world.chunks["v"]
        assert one - 2 * _ASIDE <= forecast("SELECT sum(v) FROM numbers") <= one
        assert both - 2 * _ASIDE <= forecast("SELECT sum(v + w) FROM numbers") <= both
        assert one - 2 * _ASIDE <= forecast("SELECT sum(v * $by) FROM numbers", values={"by": 2.0}) <= one
        assert forecast("SELECT sum(v) FROM numbers WHERE id > 5") == 0
        assert forecast("SELECT sum(v) FROM numbers WHERE month = 2") == 0
        assert forecast("SELECT v FROM numbers LIMIT 3") == 0
        assert forecast("SELECT sum(v) FROM numbers", limit=1024**4) == 0
        assert instance.bytes_cached() < 2 * _ASIDE
        # What has been read once is not fetched again.
        instance.connection.execute("SELECT sum(v) FROM numbers").fetchall()
        assert forecast("SELECT sum(v) FROM numbers") == 0
    finally:
        instance.close()
