"""The embedded servers: on loopback only, with their own credentials, durable, and gone when their owner is."""

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from service.embedded import object_store as object_store_server
from service.embedded import postgres as postgres_server
from service.embedded import servers, warden
from service.embedded.object_store import Credentials, ObjectStore
from service.embedded.ports import pick_ports
from service.embedded.postgres import Postgres
from service.embedded.servers import EmbeddedError, Lifeline, Recipe, Server
from service.embedded.stack import EmbeddedStack
from service.embedded.warden import Ending

# An orphaned Postgres may take three seconds before it is killed; a busy machine, some more.
_GONE_SECONDS = 15.0

_OWNER = """
import signal, sys
from pathlib import Path
from service.embedded.stack import EmbeddedStack

for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
with EmbeddedStack(Path(sys.argv[1])):
    print("ready", flush=True)
    while True:
        signal.pause()
"""

# What the parts of the S3 server do for whoever asks, where nothing is closed: read and write an object, hand out a
# place to write to with its token, drop a bucket's volumes.
_KEYLESS = (
    "/buckets/queryd/inner",
    "/dir/assign?collection=queryd",
    "/dir/lookup?volumeId=1&fileId=1,01637037d6",
    "/col/delete?collection=queryd",
    "/submit",
    "/1,01637037d6",
    "/queryd/inner",
)
# The first bytes of an HTTP/2 client, with an empty SETTINGS frame.
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

# Refuses to stop, and has a child that left its session.
_STUBBORN = """
import signal, subprocess, sys
from pathlib import Path

signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
Path("ready").touch()
while True:
    signal.pause()
"""


class _OpenStore(ObjectStore):
    """As SeaweedFS is by itself, with the HTTP of master and filer."""

    def _command(self, ports: tuple[int, ...]) -> list[str]:
        return [option for option in super()._command(ports) if option != "-disableHttp"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def stack(home: Path) -> Iterator[EmbeddedStack]:
    with EmbeddedStack(home) as started:
        yield started


def test_every_server_listens_on_loopback_only(stack: EmbeddedStack, home: Path) -> None:
    listening = []
    for process in _servers_in(home):
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            listening += [found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN]
    # The S3 server's ten, Postgres's and the broker's.
    assert listening == ["127.0.0.1"] * 12


def test_no_server_is_in_our_process_group(stack: EmbeddedStack) -> None:
    assert os.getpgrp() not in {os.getpgid(process.pid) for process in _wardens_and_servers(psutil.Process())}


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_the_s3_server_leaves_no_socket_outside_its_directory(tmp_path: Path, lifeline: Lifeline, end: str) -> None:
    store = ObjectStore(tmp_path, tmp_path / "s3.log", lifeline)
    store.start()
    sockets = [Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock") for part, port in _grpc_ports(store).items()]
    # It does make them, or this test would hold nothing.
    assert any(path.is_socket() for path in sockets)
    store.server.kill() if end == "kill" else store.stop()
    assert not [path for path in sockets if path.exists()]


def test_the_wardens_leave_another_servers_socket_alone(tmp_path: Path) -> None:
    alive, dead = tmp_path / "alive", tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as gone:
        listener.bind(str(alive))
        listener.listen()
        gone.bind(str(dead))
        gone.close()
        for path in (alive, dead, tmp_path / "absent"):
            warden.remove_dead_socket(path)
    assert alive.exists()
    assert not dead.exists()


def test_a_reader_reads_and_cannot_write(stack: EmbeddedStack) -> None:
    store = stack.object_store
    _s3(store, store.writer).put_object(Bucket=store.bucket, Key="a/b", Body=b"whole")
    reader = _s3(store, store.reader)
    assert reader.get_object(Bucket=store.bucket, Key="a/b")["Body"].read() == b"whole"
    assert [found["Key"] for found in reader.list_objects_v2(Bucket=store.bucket, Prefix="a/")["Contents"]] == ["a/b"]
    assert _refusal(lambda: reader.put_object(Bucket=store.bucket, Key="a/c", Body=b"")) == "AccessDenied"
    assert _refusal(lambda: reader.delete_object(Bucket=store.bucket, Key="a/b")) == "AccessDenied"
    assert _refusal(lambda: reader.list_objects_v2(Bucket="another")) == "AccessDenied"


def test_a_stranger_is_refused(stack: EmbeddedStack) -> None:
    store = stack.object_store
    stranger = _s3(store, Credentials("STRANGER", "unknown"))
    assert _refusal(lambda: stranger.list_objects_v2(Bucket=store.bucket)) == "InvalidAccessKeyId"
    liar = _s3(store, Credentials(store.writer.access_key, "wrong"))
    assert _refusal(lambda: liar.put_object(Bucket=store.bucket, Key="a", Body=b"")) == "SignatureDoesNotMatch"


@pytest.mark.parametrize("path", _KEYLESS)
def test_without_a_key_no_port_of_the_s3_server_reads_or_writes(stack: EmbeddedStack, path: str) -> None:
    store = stack.object_store
    _s3(store, store.writer).put_object(Bucket=store.bucket, Key="inner", Body=b"secret-bytes")
    for port in store.server.ports:
        for method in ("GET", "PUT", "POST", "DELETE"):
            status, body = _ask_http(port, method, path)
            assert (status, b"secret-bytes" in body) in {(0, False), *((code, False) for code in range(400, 500))}
    assert _s3(store, store.reader).get_object(Bucket=store.bucket, Key="inner")["Body"].read() == b"secret-bytes"


def test_no_grpc_server_of_the_s3_server_talks_to_a_client_without_our_certificate(stack: EmbeddedStack) -> None:
    store = stack.object_store
    for part, port in _grpc_ports(store).items():
        assert not _speaks_plain_grpc(socket.AF_INET, ("127.0.0.1", port))
        assert not _speaks_plain_grpc(socket.AF_UNIX, f"/tmp/seaweedfs-{part}-grpc-{port}.sock")
        assert _is_refused_without_certificate(port)


@pytest.mark.slow
def test_those_probes_find_an_open_s3_server(
    tmp_path: Path, lifeline: Lifeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store_server, "write_security", lambda _: None)
    store = _OpenStore(tmp_path, tmp_path / "s3.log", lifeline)
    store.start()
    try:
        _s3(store, store.writer).put_object(Bucket=store.bucket, Key="inner", Body=b"secret-bytes")
        answers = [_ask_http(port, "GET", path) for path in _KEYLESS for port in store.server.ports]
        assert any(b"secret-bytes" in body for _, body in answers)
        assert any(b'"fid"' in body for _, body in answers)
        for part, port in _grpc_ports(store).items():
            assert _speaks_plain_grpc(socket.AF_INET, ("127.0.0.1", port))
            assert _speaks_plain_grpc(socket.AF_UNIX, f"/tmp/seaweedfs-{part}-grpc-{port}.sock")
    finally:
        store.stop()


def test_the_keys_of_the_s3_server_are_for_its_user_alone(stack: EmbeddedStack, home: Path) -> None:
    files = [home / "s3" / name for name in ("security.toml", "identity.pem", "identities.json", "s3.sock")]
    files += [Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock") for part, port in _grpc_ports(stack.object_store).items()]
    assert {path.stat().st_mode & 0o077 for path in files} == {0}


def test_postgres_asks_for_its_password(stack: EmbeddedStack) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(f"postgresql://queryd:wrong@127.0.0.1:{stack.postgres.port}/postgres")


def test_sql_and_values_never_reach_postgres_log(stack: EmbeddedStack, home: Path) -> None:
    with psycopg.connect(stack.postgres.url("postgres"), autocommit=True) as connection:
        for statement in ("SELECT 'pii-in-sql'::integer", "SELECT nothing AS pii_in_name"):
            with pytest.raises(psycopg.Error):
                connection.execute(statement)
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT %s::text::integer", ["pii-in-parameter"])
    log = (home / "logs" / "postgres.log").read_text()
    assert "ready to accept connections" in log
    assert "pii" not in log


def test_a_database_is_made_once_and_dropped_under_its_sessions(stack: EmbeddedStack) -> None:
    for _ in range(2):
        stack.postgres.create_database("once")
    with psycopg.connect(stack.postgres.url("once")) as session:
        stack.postgres.drop_database("once")
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")


@pytest.mark.slow
def test_a_killed_server_is_noticed_and_starts_again_where_it_was(tmp_path: Path, lifeline: Lifeline) -> None:
    store = ObjectStore(tmp_path, tmp_path / "s3.log", lifeline)
    store.start()
    try:
        before = store.endpoint_url
        _s3(store, store.writer).put_object(Bucket=store.bucket, Key="kept", Body=b"acknowledged")
        store.server.kill()
        assert not store.server.running
        store.start()
        assert store.endpoint_url == before
        body = _s3(store, store.reader).get_object(Bucket=store.bucket, Key="kept")["Body"]
        assert body.read() == b"acknowledged"
    finally:
        store.stop()


@pytest.mark.slow
def test_data_and_ports_survive_stop_and_kill(tmp_path: Path) -> None:
    with EmbeddedStack(tmp_path) as first:
        _write(first, 1)
    with EmbeddedStack(tmp_path) as second:
        assert second.object_store.writer == first.object_store.writer
        assert _ports(second) == _ports(first)
        _write(second, 2)
        second.postgres.server.kill()
        second.object_store.server.kill()
        assert second.ended == ["postgres", "s3"]
    with EmbeddedStack(tmp_path, broker=False) as third:
        assert third.broker is None
        assert _read(third) == [1, 2]


@pytest.mark.slow
def test_a_port_that_another_program_has_taken_since_is_replaced(tmp_path: Path) -> None:
    with EmbeddedStack(tmp_path) as first:
        _write(first, 1)
        before = _ports(first)
    # One of each server's, and for S3 one in the middle.
    with ExitStack() as others:
        for port in (before[0], before[5], before[-1]):
            others.enter_context(socket.create_server(("127.0.0.1", port)))
        with EmbeddedStack(tmp_path) as second:
            assert not {before[0], before[5], before[-1]} & set(_ports(second))
            assert _read(second) == [1]


@pytest.mark.slow
def test_kill_9_of_the_owner_leaves_no_process(tmp_path: Path) -> None:
    with _owner(tmp_path / "stack") as owner:
        born = _below(psutil.Process(owner.pid))
        # Three wardens, three servers, and Postgres's own children.
        assert len(born) >= 9
        owner.kill()
        owner.wait()
        _assert_gone(born)


@pytest.mark.slow
def test_a_signal_to_the_owners_group_does_not_reach_the_servers(tmp_path: Path) -> None:
    with _owner(tmp_path / "stack") as owner:
        born = _wardens_and_servers(psutil.Process(owner.pid))
        for number in (signal.SIGTERM, signal.SIGHUP):
            os.killpg(owner.pid, number)
        gone, _ = psutil.wait_procs(born, timeout=1)
        assert not gone
        owner.kill()
        owner.wait()
        _assert_gone(born)


@pytest.mark.slow
def test_kill_9_of_the_wardens_leaves_no_process(tmp_path: Path) -> None:
    with _owner(tmp_path / "stack") as owner:
        wardens = psutil.Process(owner.pid).children()
        born = [child for warden in wardens for child in _below(warden)]
        for warden in wardens:
            warden.kill()
        _assert_gone(born)
        owner.kill()
        owner.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands a server's orphans to its warden")
def test_a_server_that_refuses_to_stop_is_killed_with_all_it_started(tmp_path: Path, lifeline: Lifeline) -> None:
    ending = Ending(signal.SIGTERM, 0.1)
    stubborn = Recipe(
        name="a stubborn server",
        directory=tmp_path,
        log=tmp_path / "log",
        pick=tuple,
        command=lambda _: [sys.executable, "-c", _STUBBORN],
        ready=lambda _: (tmp_path / "ready").exists(),
        stop=ending,
        orphaned=ending,
    )
    server = Server(stubborn, lifeline)
    server.start(seconds=10)
    born = [process for process in _below(psutil.Process()) if Path(process.cwd()) == tmp_path]
    assert len(born) == 3
    server.stop()
    assert not [process for process in born if process.is_running()]


def test_a_server_that_cannot_start_says_where_its_log_is(tmp_path: Path, lifeline: Lifeline) -> None:
    (tmp_path / "data").mkdir()
    postgres = Postgres(tmp_path, tmp_path / "postgres.log", lifeline)
    with pytest.raises(EmbeddedError, match=r"postgres\.log"):
        postgres.start()
    assert not postgres.server.running


@pytest.mark.slow
def test_a_second_stack_runs_beside_the_first(stack: EmbeddedStack, tmp_path: Path) -> None:
    with EmbeddedStack(tmp_path) as other:
        assert other.broker is not None
        assert stack.broker is not None
        assert other.broker.cluster_id != stack.broker.cluster_id
        assert other.ended == []
        assert stack.ended == []


def test_a_lost_port_is_replaced_by_another(
    tmp_path: Path, lifeline: Lifeline, stack: EmbeddedStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    picks = iter([(stack.postgres.port,), pick_ports(1)])
    monkeypatch.setattr(postgres_server, "pick_ports", lambda _: next(picks))
    postgres = Postgres(tmp_path, tmp_path / "postgres.log", lifeline)
    postgres.start()
    try:
        assert postgres.port != stack.postgres.port
    finally:
        postgres.stop()


@pytest.mark.slow
def test_one_directory_has_one_server(tmp_path: Path, lifeline: Lifeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_LOCK_SECONDS", 0.1)
    first, second = (Postgres(tmp_path, tmp_path / "postgres.log", lifeline) for _ in range(2))
    first.start()
    try:
        with pytest.raises(EmbeddedError, match="another"):
            second.start()
    finally:
        first.stop()


@contextmanager
def _owner(directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that owns a running stack; it leads a process group."""
    command = [sys.executable, "-c", _OWNER, str(directory)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, start_new_session=True) as owner:
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == b"ready\n"
            yield owner
        finally:
            owner.kill()


def _below(process: psutil.Process) -> list[psutil.Process]:
    below: list[psutil.Process] = process.children(recursive=True)
    return below


def _grpc_ports(store: ObjectStore) -> dict[str, int]:
    """Ports alternate: each part's HTTP port, then its gRPC port."""
    return dict(zip(("s3", "master", "volume", "filer", "admin"), store.server.ports[1::2], strict=True))


def _wardens_and_servers(owner: psutil.Process) -> list[psutil.Process]:
    """Without Postgres's children, some of which come and go, and without what other tests have left to run."""
    wardens = [child for child in owner.children() if "service.embedded.warden" in child.cmdline()]
    return [process for warden in wardens for process in (warden, *warden.children())]


def _servers_in(home: Path) -> list[psutil.Process]:
    """Our descendants that are servers of the stack in `home`: they work below it, and wardens are Python."""
    found = []
    for process in _below(psutil.Process()):
        # Some of Postgres's come and go.
        with suppress(psutil.NoSuchProcess):
            if Path(process.cwd()).is_relative_to(home) and "python" not in process.name():
                found.append(process)
    return found


def _assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=_GONE_SECONDS)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def _s3(store: ObjectStore, credentials: Credentials) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, proxies={}),
    )


def _ask_http(port: int, method: str, path: str) -> tuple[int, bytes]:
    """The status and the body; 0 where a port does not talk HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, body=b"evil" if method in {"PUT", "POST"} else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (http.client.HTTPException, OSError):
        return 0, b""
    finally:
        connection.close()


def _speaks_plain_grpc(family: socket.AddressFamily, address: Any) -> bool:
    """True for a server that answers HTTP/2 without TLS: gRPC without a certificate."""
    with socket.socket(family) as client, suppress(OSError):
        client.settimeout(5)
        client.connect(address)
        client.sendall(_HTTP2)
        # The type of a frame is its fourth byte, and 4 is SETTINGS.
        return client.recv(9)[3:4] == b"\x04"
    return False


def _is_refused_without_certificate(port: int) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
            context.wrap_socket(plain) as client,
        ):
            client.sendall(_HTTP2)
            return client.recv(9) == b""
    except ssl.SSLError as error:
        return "certificate" in str(error).lower()
    except ConnectionError:
        return True


def _refusal(call: Callable[[], object]) -> str:
    """The S3 error code of a call that must fail."""
    with pytest.raises(ClientError) as refused:
        call()
    return str(refused.value.response["Error"]["Code"])


def _ports(stack: EmbeddedStack) -> tuple[int, ...]:
    assert stack.broker is not None
    return (stack.postgres.port, *stack.object_store.server.ports, *stack.broker.server.ports)


def _write(stack: EmbeddedStack, number: int) -> None:
    """Leave a mark in Postgres and in S3."""
    with psycopg.connect(stack.postgres.url("postgres")) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS marks (number integer)")
        connection.execute("INSERT INTO marks VALUES (%s)", [number])
    store = stack.object_store
    _s3(store, store.writer).put_object(Bucket=store.bucket, Key=f"marks/{number}", Body=b"x")


def _read(stack: EmbeddedStack) -> list[int]:
    """The marks, which both stores must agree on."""
    with psycopg.connect(stack.postgres.url("postgres")) as connection:
        rows = [number for (number,) in connection.execute("SELECT number FROM marks ORDER BY number")]
    store = stack.object_store
    found = _s3(store, store.reader).list_objects_v2(Bucket=store.bucket, Prefix="marks/")["Contents"]
    assert [f"marks/{number}" for number in rows] == [entry["Key"] for entry in found]
    return rows
