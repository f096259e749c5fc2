"""Outages: each entry of the lists has a situation that causes it; similar errors are no outage."""

import contextlib
import ctypes
import itertools
import json
import socket
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import boto3
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql as pgsql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from engines.duckdb import listing
from engines.duckdb.instance import Instance
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import EngineUnavailable, Execution, Outage, Output, QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode, OrgId, OutputFormat, QueryId
from service.embedded.object_store import ObjectStore
from tests.integration.outputs import read_output
from tests.servers.tcp_proxy import TcpProxy

_MIB = 1024 * 1024
_NUMBERS = itertools.count(1)
_MNT_DETACH = 2

_SKEWED = b'<?xml version="1.0"?><Error><Code>RequestTimeTooSkewed</Code><Message>The difference</Message></Error>'
_SALES = Relation("sales", RelationKind.PARQUET, "s3://bucket/sales/part.parquet", "1")
_SHOPS = Relation("shops", RelationKind.POSTGRES, "public.shops", "1")

Run = Callable[..., Any]


@dataclass
class _Store:
    """An S3 server with one object, whose answers a test chooses."""

    body: bytes
    status: int = 200
    error: bytes = b""
    # Cut the connection after so many bytes of the body, or before the answer.
    cut_after: int | None = None
    port: int = field(default=0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that the base class wants
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        store = cast(_Server, self.server).store
        if store.cut_after == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body, headers = store.body, {"ETag": '"x"', "Last-Modified": "Mon, 02 Jan 2023 00:00:00 GMT"}
        status = store.status
        if status != 200:
            body = store.error
        elif (wanted := self.headers.get("Range")) and with_body:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and store.cut_after:
            self.wfile.write(body[: store.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif with_body:
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    def __init__(self, store: _Store) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        store.port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no matter."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[_Store]:
    pq.write_table(pa.table({"id": range(1000), "name": ["x"] * 1000}), tmp_path / "part.parquet")
    store = _Store((tmp_path / "part.parquet").read_bytes())
    server = _Server(store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield store
    server.shutdown()
    server.server_close()


@asynccontextmanager
async def _engine(tmp_path: Path, url: str | None, postgres_url: str | None = None) -> AsyncIterator[DuckDBEngine]:
    settings = DuckDBSettings(
        256 * _MIB,
        1,
        tmp_path / f"engine-{next(_NUMBERS)}",
        endpoint_url=url,
        region="us-east-1",
        access_key="reader",
        secret_key="secret",
        postgres_url=postgres_url,
    )
    engine = DuckDBEngine(settings, 1)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Run]:
    """Opens engines: `await opened(store_url, postgres_url)`."""
    async with AsyncExitStack() as stack:

        async def open_one(url: str | None, postgres_url: str | None = None) -> DuckDBEngine:
            return await stack.enter_async_context(_engine(tmp_path, url, postgres_url))

        yield open_one


async def _execute(engine: DuckDBEngine, tmp_path: Path, statement: str, *relations: Relation) -> Output:
    scratch = tmp_path / f"attempt-{next(_NUMBERS)}"
    scratch.mkdir()
    execution = Execution(
        QueryId(str(uuid.uuid4())),
        OrgId(str(uuid.UUID(int=7))),
        statement,
        {},
        relations,
        OutputFormat.JSON,
        scratch,
        60.0,
    )
    return await engine.execute(execution)


async def _outage(engine: DuckDBEngine, tmp_path: Path, statement: str, *relations: Relation) -> Outage:
    with pytest.raises(EngineUnavailable) as caught:
        await _execute(engine, tmp_path, statement, *relations)
    return caught.value.outage


async def _failure(engine: DuckDBEngine, tmp_path: Path, statement: str, *relations: Relation) -> QueryFailed:
    with pytest.raises(QueryFailed) as caught:
        await _execute(engine, tmp_path, statement, *relations)
    return caught.value


# The store.


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_store_that_says_later_is_an_outage(store: _Store, opened: Run, tmp_path: Path, status: int) -> None:
    engine = await opened(store.url)
    store.status = status
    assert await _outage(engine, tmp_path, "SELECT sum(id) FROM sales", _SALES) is Outage.STORE
    store.status = 200
    assert (await _execute(engine, tmp_path, "SELECT sum(id) FROM sales", _SALES)).rows == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (301, ErrorCode.INTERNAL, "The datasets' store refuses to be read (HTTP 301)."),
        (400, ErrorCode.INTERNAL, "The datasets' store refuses to be read (HTTP 400)."),
        (401, ErrorCode.ENGINE_UNAVAILABLE, "The engine's credentials may not read the dataset."),
        (403, ErrorCode.ENGINE_UNAVAILABLE, "The engine's credentials may not read the dataset."),
        (404, ErrorCode.QUERY_ERROR, "The dataset's files are missing."),
        (410, ErrorCode.QUERY_ERROR, "The dataset's files are missing."),
        (416, ErrorCode.QUERY_ERROR, "A file of the dataset can't be read."),
        (501, ErrorCode.INTERNAL, "The datasets' store refuses to be read (HTTP 501)."),
    ],
)
async def test_any_other_answer_of_the_store_ends_the_query_at_once(
    store: _Store, opened: Run, tmp_path: Path, status: int, code: ErrorCode, sentence: str
) -> None:
    engine = await opened(store.url)
    store.status = status
    failure = await _failure(engine, tmp_path, "SELECT sum(id) FROM sales", _SALES)
    assert (failure.code, failure.message) == (code, sentence)


async def test_a_wrong_clock_is_an_outage(store: _Store, opened: Run, tmp_path: Path) -> None:
    engine = await opened(store.url)
    store.status, store.error = 403, _SKEWED
    assert await _outage(engine, tmp_path, "SELECT sum(id) FROM sales", _SALES) is Outage.CLOCKS


@pytest.mark.slow
async def test_a_store_that_cuts_its_answers_is_an_outage(store: _Store, opened: Run, tmp_path: Path) -> None:
    engine = await opened(store.url)
    for store.cut_after in (0, 5):
        assert await _outage(engine, tmp_path, "SELECT sum(id) FROM sales", _SALES) is Outage.STORE


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://no-such-host.invalid"], ids=["nobody listens", "name unknown"]
)
async def test_a_store_that_is_not_there_is_an_outage(opened: Run, tmp_path: Path, url: str) -> None:
    engine = await opened(url)
    assert await _outage(engine, tmp_path, "SELECT sum(id) FROM sales", _SALES) is Outage.STORE


async def test_a_store_that_never_answers_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_TIMEOUT_SECONDS", 1.0)
    # The kernel accepts connections for it.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = DuckDBSettings(256 * _MIB, 1, tmp_path, endpoint_url=url, access_key="reader", secret_key="secret")
        instance = Instance(settings, tmp_path, frozenset({_SALES}), frozenset({RelationKind.PARQUET}))
        try:
            with pytest.raises(EngineUnavailable) as caught:
                instance.expose(["sales"])
        finally:
            instance.close()
    assert caught.value.outage is Outage.STORE


@pytest.mark.slow
async def test_a_store_that_cuts_the_tls_handshake_is_an_outage(opened: Run, tmp_path: Path, store: _Store) -> None:
    store.cut_after = 0
    engine = await opened(store.url.replace("http:", "https:"))
    assert await _outage(engine, tmp_path, "SELECT sum(id) FROM sales", _SALES) is Outage.STORE


@pytest.mark.slow
async def test_a_store_that_dies_while_it_is_read_is_an_outage(
    object_store: ObjectStore, opened: Run, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"id": range(1000)}), tmp_path / "part.parquet")
    writer = object_store.writer
    s3 = boto3.client(
        "s3",
        endpoint_url=object_store.endpoint_url,
        region_name=object_store.region,
        aws_access_key_id=writer.access_key,
        aws_secret_access_key=writer.secret_key,
    )
    relations = []
    for name in ("before", "after"):
        key = f"datasets/{uuid.uuid4()}/part.parquet"
        s3.upload_file(str(tmp_path / "part.parquet"), object_store.bucket, key)
        relations.append(Relation(name, RelationKind.PARQUET, f"s3://{object_store.bucket}/{key}", "1"))
    with TcpProxy("127.0.0.1", int(object_store.endpoint_url.rpartition(":")[2])) as proxy:
        settings = DuckDBSettings(
            256 * _MIB,
            1,
            tmp_path / "engine",
            endpoint_url=f"http://127.0.0.1:{proxy.port}",
            region=object_store.region,
            access_key=object_store.reader.access_key,
            secret_key=object_store.reader.secret_key,
        )
        engine = DuckDBEngine(settings, 1)
        await engine.start()
        try:
            assert (await _execute(engine, tmp_path, "SELECT sum(id) FROM before", *relations)).rows == 1
            proxy.cut()
            proxy.refuse()
            # What was read before may still be in the engine's cache.
            assert await _outage(engine, tmp_path, "SELECT sum(id) FROM after", *relations) is Outage.STORE
            proxy.pass_through()
            assert (await _execute(engine, tmp_path, "SELECT sum(id) FROM after", *relations)).rows == 1
        finally:
            await engine.close()


# Files.


def _truncated(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _flipped_data(whole: bytes) -> bytes:
    return whole[:60] + bytes(byte ^ 0xFF for byte in whole[60:200]) + whole[200:]


def _flipped_footer(whole: bytes) -> bytes:
    return whole[:-200] + bytes(byte ^ 0x55 for byte in whole[-200:-8]) + whole[-8:]


def _flipped_page_header(whole: bytes) -> bytes:
    return whole[:4] + bytes(byte ^ 0xFF for byte in whole[4:30]) + whole[30:]


def _latin_1(_whole: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    names = pa.array([b"caf\xe9"] * 1000, pa.binary())
    strings = pa.StringArray.from_buffers(1000, names.buffers()[1], names.buffers()[2])
    pq.write_table(pa.table({"id": range(1000), "name": strings}), sink)
    return bytes(sink.getvalue())


_DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda _: b"",
    lambda _: b"id,name\n1,x\n" * 100,
    lambda whole: whole + b"\n",
    _truncated,
    _flipped_data,
    _flipped_footer,
    _flipped_page_header,
    _latin_1,
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    _DAMAGES,
    ids=["0 bytes", "text", "a byte more", "truncated", "data", "footer", "page header", "Latin-1 in UTF-8"],
)
async def test_a_file_that_cannot_be_read_is_blamed_by_its_key(
    store: _Store, opened: Run, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    engine = await opened(store.url)
    store.body = damage(store.body)
    failure = await _failure(engine, tmp_path, "SELECT max(hash(id)), max(lower(name)) FROM sales", _SALES)
    assert (failure.code, failure.message) == (ErrorCode.QUERY_ERROR, "A file of the dataset can't be read.")
    assert failure.detail is not None
    assert failure.detail.startswith("part.parquet: ")
    assert "bucket" not in failure.detail
    assert "127.0.0.1" not in failure.detail


# Postgres.


class _Database:
    def __init__(self, url: str) -> None:
        self.url = make_conninfo(url, host="127.0.0.1")
        self.role = f"reader_{uuid.uuid4().hex}"
        self.run("CREATE TABLE shops AS SELECT i AS id, 'x' AS name FROM generate_series(1, 10) i")
        self.run("CREATE VIEW slow AS SELECT 1 AS id, pg_sleep(60)::text AS name")
        self.run(f"CREATE ROLE {self.role} LOGIN PASSWORD 'reader'")

    def run(self, statement: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(pgsql.SQL(cast(Any, statement)))

    def close(self) -> None:
        self.run(f"DROP OWNED BY {self.role}")
        self.run(f"DROP ROLE {self.role}")

    def as_role(self, **given: Any) -> str:
        return make_conninfo(self.url, **{"user": self.role, "password": "reader"} | given)


@pytest.fixture
def database(postgres_url: str) -> Iterator[_Database]:
    made = _Database(postgres_url)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{"port": 9}, {"host": "no-such-host.invalid"}], ids=["nobody listens", "name unknown"]
)
async def test_a_postgres_that_is_not_there_is_an_outage(
    database: _Database, opened: Run, tmp_path: Path, given: dict[str, Any]
) -> None:
    engine = await opened(None, make_conninfo(database.url, **given))
    assert await _outage(engine, tmp_path, "SELECT id FROM shops", _SHOPS) is Outage.POSTGRES
    assert (await _execute(engine, tmp_path, "SELECT 1 AS a", _SHOPS)).rows == 1


@pytest.mark.slow
async def test_a_postgres_that_never_answers_or_cuts_is_an_outage(
    database: _Database, opened: Run, tmp_path: Path
) -> None:
    with TcpProxy("127.0.0.1", int(str(conninfo_to_dict(database.url)["port"]))) as proxy:
        engine = await opened(None, make_conninfo(database.url, port=proxy.port))
        proxy.hang()
        assert await _outage(engine, tmp_path, "SELECT id FROM shops", _SHOPS) is Outage.POSTGRES
        proxy.pass_through()
        proxy.cut_after(100)
        assert await _outage(engine, tmp_path, "SELECT id FROM shops", _SHOPS) is Outage.POSTGRES
        proxy.pass_through()
        assert (await _execute(engine, tmp_path, "SELECT id FROM shops", _SHOPS)).rows == 10


async def test_a_postgres_that_is_away_harms_no_statement_that_reads_only_files(
    database: _Database, store: _Store, opened: Run, tmp_path: Path
) -> None:
    with TcpProxy("127.0.0.1", int(str(conninfo_to_dict(database.url)["port"]))) as proxy:
        engine = await opened(store.url, make_conninfo(database.url, port=proxy.port))
        assert (await _execute(engine, tmp_path, "SELECT id FROM shops", _SHOPS, _SALES)).rows == 10
        proxy.cut()
        proxy.refuse()
        # The first makes an instance for files, the second uses it.
        for _ in range(2):
            assert (await _execute(engine, tmp_path, "SELECT count(*) FROM sales", _SHOPS, _SALES)).rows == 1
        assert await _outage(engine, tmp_path, "SELECT id FROM shops", _SHOPS, _SALES) is Outage.POSTGRES
        assert (await _execute(engine, tmp_path, "SELECT 1 AS a", _SHOPS, _SALES)).rows == 1


async def test_a_postgres_without_free_connections_is_an_outage(
    database: _Database, opened: Run, tmp_path: Path
) -> None:
    database.run(f"ALTER ROLE {database.role} CONNECTION LIMIT 0")
    engine = await opened(None, database.as_role())
    assert await _outage(engine, tmp_path, "SELECT id FROM shops", _SHOPS) is Outage.POSTGRES


async def test_a_connection_that_an_administrator_ends_is_an_outage(
    database: _Database, opened: Run, tmp_path: Path
) -> None:
    engine = await opened(None, database.url)
    slow = Relation("slow", RelationKind.POSTGRES, "public.slow", "1")
    ended = threading.Event()

    def end() -> None:
        with psycopg.connect(database.url, autocommit=True) as connection:
            while not ended.wait(0.1):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND wait_event = 'PgSleep'"
                )

    thread = threading.Thread(target=end)
    thread.start()
    try:
        assert await _outage(engine, tmp_path, "SELECT name FROM slow", slow) is Outage.POSTGRES
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
async def test_a_scan_that_is_in_the_way_of_replication_is_an_outage(
    database: _Database, opened: Run, tmp_path: Path
) -> None:
    """As a replica says it; here a function says it in its place."""
    database.run(
        "CREATE FUNCTION conflict() RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'canceling statement due to conflict with recovery' USING ERRCODE = '40001'; END $$"
    )
    database.run("CREATE VIEW replicated AS SELECT conflict() AS id")
    engine = await opened(None, database.url)
    relation = Relation("shops", RelationKind.POSTGRES, "public.replicated", "1")
    assert await _outage(engine, tmp_path, "SELECT id FROM shops", relation) is Outage.POSTGRES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "code", "sentence"),
    [
        (
            {"password": "wrong"},
            ErrorCode.ENGINE_UNAVAILABLE,
            "The engine's credentials may not read the dataset.",
        ),
        ({}, ErrorCode.ENGINE_UNAVAILABLE, "The engine's credentials may not read the dataset."),
        (
            {"dbname": "nowhere"},
            ErrorCode.INTERNAL,
            "The engine can't log in to the datasets' Postgres: check QUERYD_DATASETS_PG_URL.",
        ),
        (
            {"sslmode": "require"},
            ErrorCode.INTERNAL,
            "The engine can't log in to the datasets' Postgres: check QUERYD_DATASETS_PG_URL.",
        ),
    ],
    ids=["wrong password", "no right to the table", "no such database", "no TLS"],
)
async def test_an_error_that_is_no_outage_ends_the_query_at_once(
    database: _Database, opened: Run, tmp_path: Path, given: dict[str, str], code: ErrorCode, sentence: str
) -> None:
    engine = await opened(None, database.as_role(**given))
    failure = await _failure(engine, tmp_path, "SELECT id FROM shops", _SHOPS)
    assert (failure.code, failure.message, failure.detail) == (code, sentence, None)


async def test_a_postgres_that_is_not_configured_is_no_outage(opened: Run, tmp_path: Path) -> None:
    engine = await opened(None)
    failure = await _failure(engine, tmp_path, "SELECT id FROM shops", _SHOPS)
    assert (failure.code, failure.message) == (
        ErrorCode.INTERNAL,
        "The datasets' Postgres is not configured: set QUERYD_DATASETS_PG_URL.",
    )


@pytest.mark.parametrize(
    ("made", "statement", "sentence"),
    [
        ("SELECT 1", "SELECT id FROM shops", "The dataset's table or view is missing."),
        (
            "CREATE VIEW other AS SELECT 1 / (id - 1) AS id FROM shops",
            "SELECT id FROM shops",
            "The datasets' Postgres could not read the dataset.",
        ),
        (
            "CREATE TABLE other AS SELECT '{{1,2},{3,4}}'::int[] AS id",
            "SELECT id FROM shops",
            "A column of the dataset holds arrays with several dimensions, which can't be read.",
        ),
    ],
    ids=["no table", "a view that raises", "arrays of arrays"],
)
async def test_a_dataset_in_postgres_is_blamed_for_its_own_errors(
    database: _Database, opened: Run, tmp_path: Path, made: str, statement: str, sentence: str
) -> None:
    database.run(made)
    engine = await opened(None, database.url)
    relation = Relation("shops", RelationKind.POSTGRES, "public.other", "1")
    failure = await _failure(engine, tmp_path, statement, relation)
    assert (failure.code, failure.message) == (ErrorCode.QUERY_ERROR, sentence)


# The scratch disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if not sys.platform.startswith("linux") or libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=8m") != 0:
        pytest.skip("only root of a Linux machine can mount a file system")
    yield folder
    libc.umount2(bytes(folder), _MNT_DETACH)


async def test_a_full_scratch_disk_is_an_outage_of_its_own(small_disk: Path, tmp_path: Path) -> None:
    settings = DuckDBSettings(256 * _MIB, 1, small_disk / "scratch")
    engine = DuckDBEngine(settings, 1)
    await engine.start()
    try:
        statement = "SELECT hash(range) AS h FROM range(100000)"
        filler = small_disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            file.write(bytes(8 * _MIB))
        assert await _outage(engine, tmp_path, statement) is Outage.SCRATCH
        filler.unlink()
        assert (await _execute(engine, tmp_path, statement)).rows == 100_000
    finally:
        await engine.close()


# Neither.


async def test_a_query_that_reads_no_dataset_is_never_retried(store: _Store, opened: Run, tmp_path: Path) -> None:
    """With everything away that it does not need."""
    store.status = 503
    engine = await opened(store.url, "postgresql://nobody@127.0.0.1:9/nothing")
    assert (await _execute(engine, tmp_path, "SELECT 1 AS a", _SALES, _SHOPS)).rows == 1
    for statement in (
        "SELECT unhex('ä')",
        "SELECT 'x error for HTTP GET to ''y'''::INT",
        "SELECT regexp_matches('', '(')",
    ):
        failure = await _failure(engine, tmp_path, statement, _SALES, _SHOPS)
        assert failure.code is ErrorCode.QUERY_ERROR
        assert failure.detail is not None


@pytest.mark.slow
async def test_a_child_is_replaced_after_an_unknown_error_and_kept_after_a_known_one(
    opened: Run, tmp_path: Path
) -> None:
    engine = await opened(None)
    [child] = engine._all
    for statement in (
        "SELECT unhex('ä')",
        "SELECT 'x'::INT",
        "SELECT chr(-1)",
        "SELECT a",
        "SELECT (SELECT unnest([1, 2]))",
    ):
        assert (await _failure(engine, tmp_path, statement)).code is ErrorCode.QUERY_ERROR
        assert (await _execute(engine, tmp_path, "SELECT 1 AS a")).rows == 1
        assert engine._all == {child}
    # DuckDB 1.5.5 fails inside itself here.
    statement = "SELECT array_cosine_similarity([1.0]::FLOAT[1], [NULL]::FLOAT[1])"
    failure = await _failure(engine, tmp_path, statement)
    assert (failure.code, "inside the engine" in failure.message) == (ErrorCode.QUERY_ERROR, True)
    output = await _execute(engine, tmp_path, "SELECT 1 AS a")
    assert json.loads(read_output(output).decode()) == {"a": 1}
    assert child not in engine._all
