"""The second layer, with the gate left out: each limit of a child is proven by what happens at it.

Code and SQL that no gate would let through run in a process that entered the sandbox exactly as a child does, or on an
instance as a child makes it. What the kernel lacks is skipped, and says so.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import boto3
import duckdb
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from engines.duckdb import errors, landlock
from engines.duckdb.instance import Instance
from engines.duckdb.pool import DuckDBEngine, prepare_for_children
from engines.duckdb.sandbox import Layers
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import QueryFailed, Relation, RelationKind
from processes.child import minimal_environment
from queryd.events import ErrorCode
from service.embedded.object_store import Credentials, ObjectStore

_MIB = 1024 * 1024
_ADDRESS_SPACE = 3 * 1024 * _MIB
_FILE_BYTES = 4 * _MIB
# A start of the interpreter with DuckDB, many times over.
_PATIENCE_SECONDS = 60.0

_ROOT = Path(__file__).resolve().parents[2]
_ABI = landlock.supported_abi()
_HAS_SECCOMP = sys.platform.startswith("linux") and os.uname().machine in ("x86_64", "aarch64")

needs_landlock = pytest.mark.skipif(_ABI == 0, reason="this kernel has no Landlock")
needs_landlock_tcp = pytest.mark.skipif(_ABI < 4, reason="this kernel's Landlock does not bound TCP (it needs ABI 4)")
needs_seccomp = pytest.mark.skipif(not _HAS_SECCOMP, reason="there is no seccomp filter for this system")

# Everything that a child has imported, in the order in which a child enters.
_ENTER = """
import ctypes, errno, json, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import duckdb
import engines.duckdb.child
from engines.duckdb.sandbox import allow_cpu, confine, enter_sandbox

home = Path(os.environ["HOME"])
{before}
layers = confine(home, tuple(json.loads(sys.argv[1])))
enter_sandbox({address_space}, {file_bytes})
given = json.loads(sys.argv[2])

def refused(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    except (MemoryError, duckdb.Error) as error:
        return type(error).__name__
    return None
"""


def _sandboxed(
    tmp_path: Path, code: str, *, ports: tuple[int, ...] = (), before: str = "", **given: str | int
) -> list[Any]:
    """What `code` prints as JSON, line by line, in a process in the sandbox; `given` are its values.

    `before` runs before it enters.
    """
    ended = _run_sandboxed(tmp_path, code, ports=ports, before=before, **given)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def _run_sandboxed(
    tmp_path: Path, code: str, *, ports: tuple[int, ...] = (), before: str = "", **given: str | int
) -> subprocess.CompletedProcess[str]:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    enter = _ENTER.format(before=before, address_space=_ADDRESS_SPACE, file_bytes=_FILE_BYTES)
    return subprocess.run(
        [sys.executable, "-c", enter + code, json.dumps(ports), json.dumps(given)],
        env=minimal_environment(home) | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )


def _told(code: str, error: Exception) -> QueryFailed:
    ours = errors.translate(error, errors.Placed("", "", 0)).ours
    assert isinstance(ours, QueryFailed), code
    return ours


# The kernel's layers.


@needs_landlock
def test_files_outside_can_neither_be_read_nor_written(tmp_path: Path) -> None:
    secret, new = tmp_path / "secret.csv", tmp_path / "new.csv"
    secret.write_text("s\nhunter2\n")
    code = """
    # A DuckDB without any setting of ours: only the kernel stands in its way.
    free = duckdb.connect()
    print(json.dumps([
        refused(Path(given["secret"]).read_text),
        refused(Path(given["secret"]).write_text, "changed"),
        refused(Path(given["new"]).write_text, "made"),
        refused(Path(given["secret"]).unlink),
        refused(os.rename, given["secret"], home / "mine.csv"),
        refused(os.link, given["secret"], home / "mine.csv"),
        refused(os.listdir, given["folder"]),
        refused(free.execute, f"FROM read_csv('{given['secret']}')"),
        refused(free.execute, f"COPY (SELECT 1) TO '{given['new']}'"),
    ]))
    inside = home / "inside.csv"
    free.execute(f"COPY (SELECT 1 AS a) TO '{inside}'")
    print(json.dumps(free.execute(f"FROM read_csv('{inside}')").fetchall()))
    """
    codes, inside = _sandboxed(tmp_path, dedent(code), secret=str(secret), new=str(new), folder=str(tmp_path))
    assert codes[:4] == ["EACCES"] * 4
    assert codes[4] in ("EACCES", "EXDEV")
    assert codes[5] in ("EACCES", "EXDEV", "EPERM")
    assert codes[6:] == ["EACCES", "IOException", "IOException"]
    assert inside == [[1]]
    assert secret.read_text() == "s\nhunter2\n"
    assert not new.exists()


@needs_seccomp
def test_no_program_and_no_process_can_be_started_but_threads_can(tmp_path: Path) -> None:
    code = """
    print(json.dumps([
        refused(os.fork),
        refused(os.execv, "/bin/true", ["true"]),
        refused(os.posix_spawn, "/bin/true", ["true"], {}),
        refused(subprocess.Popen, ["/bin/true"]),
    ]))
    done = threading.Event()
    thread = threading.Thread(target=done.set)
    thread.start()
    thread.join()
    print(json.dumps(done.is_set()))
    """
    codes, thread_ran = _sandboxed(tmp_path, dedent(code))
    assert codes == ["EPERM"] * 4
    assert thread_ran is True


@needs_seccomp
def test_calls_that_lead_out_are_refused_by_number(tmp_path: Path) -> None:
    code = """
    from engines.duckdb import seccomp
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.argtypes = [ctypes.c_long] * 7
    def call(number):
        ctypes.set_errno(0)
        answer = library.syscall(number, 0, 0, 0, 0, 0, 0)
        return errno.errorcode.get(ctypes.get_errno()) if answer < 0 else "done"
    refusals = {name: call(number) for name, number in seccomp.refused_calls().items()}
    print(json.dumps(refusals))
    """
    [codes] = _sandboxed(tmp_path, dedent(code))
    assert {
        "ptrace",
        "bpf",
        "mount",
        "unshare",
        "io_uring_setup",
        "keyctl",
        "userfaultfd",
        "kexec_load",
    } <= codes.keys()
    assert {name: code for name, code in codes.items() if code != "EPERM" and name != "clone3"} == {}
    assert codes["clone3"] == "ENOSYS"


@needs_landlock_tcp
def test_tcp_goes_to_the_given_ports_only_and_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as allowed, socket.create_server(("127.0.0.1", 0)) as other:
        code = """
        def connect(port):
            socket.create_connection(("127.0.0.1", port)).close()
        def serve():
            with socket.socket() as server:
                server.bind(("127.0.0.1", 0))
        print(json.dumps([refused(connect, given["allowed"]), refused(connect, given["other"]), refused(serve)]))
        """
        port, elsewhere = allowed.getsockname()[1], other.getsockname()[1]
        [codes] = _sandboxed(tmp_path, dedent(code), ports=(port,), allowed=port, other=elsewhere)
    assert codes == [None, "EACCES", "EACCES"]


@needs_seccomp
def test_sockets_are_plain_tcp_or_udp_and_names_still_resolve(tmp_path: Path) -> None:
    code = """
    def make(family, kind, protocol=0):
        socket.socket(family, kind, protocol).close()
    def listen():
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(home / "socket"))
            server.listen()
    print(json.dumps([
        refused(make, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        refused(make, socket.AF_PACKET, socket.SOCK_RAW),
        refused(make, socket.AF_NETLINK, socket.SOCK_RAW, 9),
        refused(make, 40, socket.SOCK_STREAM),
        refused(make, socket.AF_INET, socket.SOCK_STREAM, 262),
        refused(make, socket.AF_INET6, socket.SOCK_STREAM, 262),
        refused(make, socket.AF_INET, socket.SOCK_STREAM, 132),
        refused(make, socket.AF_INET, socket.SOCK_DGRAM, 136),
        refused(make, socket.AF_UNIX, socket.SOCK_STREAM),
        refused(make, socket.AF_UNIX, socket.SOCK_DGRAM),
        refused(listen) is not None,
        refused(make, socket.AF_INET, socket.SOCK_DGRAM),
    ]))
    print(json.dumps([address[0] for *_, address in socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)]))
    """
    codes, addresses = _sandboxed(tmp_path, dedent(code))
    assert codes == ["EAFNOSUPPORT"] * 10 + [True, None]
    assert {"127.0.0.1", "::1"} & set(addresses)


@needs_landlock_tcp
@needs_seccomp
def test_no_connection_passes_the_rule_for_ports(tmp_path: Path) -> None:
    """A kernel that counts TCP Fast Open as no connection would let these go to any port."""
    code = """
    def fast_open(port):
        with socket.socket() as sending:
            sending.sendto(b"x", 0x20000000, ("127.0.0.1", port))
    def fast_message(port):
        with socket.socket() as sending:
            sending.sendmsg([b"x"], [], 0x20000000, ("127.0.0.1", port))
    def option(name):
        with socket.socket() as sending:
            sending.setsockopt(socket.IPPROTO_TCP, name, 1)
    port = given["port"]
    calls = [(fast_open, port), (fast_message, port), (option, 30), (option, 23), (option, 31)]
    print(json.dumps([refused(*call) for call in calls]))
    option(socket.TCP_NODELAY)
    """
    with socket.create_server(("127.0.0.1", 0)) as other:
        [codes] = _sandboxed(tmp_path, dedent(code), port=other.getsockname()[1])
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert codes == ["EPERM"] * 5


@needs_seccomp
def test_what_a_file_is_stays_as_it_was(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("s")
    outside.chmod(0o644)
    before = outside.stat()
    code = """
    import fcntl
    outside, inside = given["outside"], home / "inside"
    inside.write_text("s")
    # Readable, so that a descriptor of it can be had.
    library = os.open(duckdb.__file__, os.O_RDONLY)
    print(json.dumps([
        refused(os.chmod, outside, 0o777),
        refused(os.chmod, inside, 0o777),
        refused(os.fchmod, library, 0o777),
        refused(os.utime, outside, (1, 1)),
        refused(os.utime, library, (1, 1)),
        refused(os.setxattr, outside, "user.note", b"x"),
        refused(os.getxattr, outside, "user.note"),
        refused(os.listxattr, outside),
        refused(os.removexattr, outside, "user.note"),
        refused(os.chown, outside, -1, -1),
        refused(os.truncate, outside, 0),
        refused(os.link, outside, home / "link"),
        refused(os.symlink, outside, home / "link"),
        refused(fcntl.ioctl, library, 0x40086602, bytes(8)),
    ]))
    """
    [codes] = _sandboxed(tmp_path, dedent(code), outside=str(outside))
    assert codes == ["EPERM"] * 14
    after = outside.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)


@needs_seccomp
def test_no_local_server_and_no_channel_of_another_process_is_reached(tmp_path: Path) -> None:
    code = """
    library = ctypes.CDLL(None, use_errno=True)
    def call(name, *arguments):
        ctypes.set_errno(0)
        answer = getattr(library, name)(*arguments)
        return None if answer >= 0 else errno.errorcode[ctypes.get_errno()]
    def connect(address):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
    print(json.dumps([
        refused(connect, given["address"]),
        refused(connect, "\\0abstract"),
        call("shmget", 1, 4096, 0o1600),
        call("semget", 1, 1, 0o1600),
        call("msgget", 1, 0o1600),
        call("inotify_init1", 0),
        call("fanotify_init", 0, 0),
        call("setpriority", 0, os.getppid(), 19),
    ]))
    # Within the process they are needed: curl wakes its threads by them.
    left, right = socket.socketpair()
    left.send(b"x")
    print(json.dumps(right.recv(1) == b"x"))
    """
    address = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        codes, paired = _sandboxed(tmp_path, dedent(code), address=str(address))
    assert codes == ["EAFNOSUPPORT"] * 2 + ["EPERM"] * 6
    assert paired is True


@needs_seccomp
def test_no_signal_reaches_another_process_on_any_kernel(tmp_path: Path) -> None:
    before = "from engines.duckdb import landlock\nlandlock.supported_abi = lambda: 0"
    code = """
    print(json.dumps([refused(os.kill, os.getppid(), 0), refused(os.kill, 0, 0), refused(os.kill, os.getpid(), 0)]))
    """
    [codes] = _sandboxed(tmp_path, dedent(code), before=before)
    assert codes == ["EPERM", "EPERM", None]


@pytest.mark.skipif(_ABI < 6, reason="this kernel's Landlock does not bound signals (it needs ABI 6)")
def test_no_signal_reaches_another_process(tmp_path: Path) -> None:
    [code] = _sandboxed(tmp_path, "print(json.dumps(refused(os.kill, os.getppid(), 0)))")
    assert code == "EPERM"


@pytest.mark.parametrize("abi", [version for version in range(1, 7) if version < _ABI])
def test_an_older_landlock_is_entered_as_far_as_it_goes(tmp_path: Path, abi: int) -> None:
    (tmp_path / "secret").write_text("hunter2")
    before = f"from engines.duckdb import landlock\nlandlock.supported_abi = lambda: {abi}"
    code = """
    outside, inside = Path(given["secret"]), home / "own"
    print(json.dumps([layers.landlock, refused(outside.read_text), refused(inside.write_text, "")]))
    """
    [found] = _sandboxed(tmp_path, dedent(code), before=before, secret=str(tmp_path / "secret"))
    assert found == [abi, "EACCES", None]


def test_a_system_without_these_layers_says_so_and_goes_on(tmp_path: Path) -> None:
    before = """
from engines.duckdb import landlock, seccomp
landlock.supported_abi = lambda: 0
seccomp._MACHINES = {}
"""
    [found] = _sandboxed(tmp_path, "print(json.dumps([layers.landlock, layers.seccomp]))", before=before)
    assert found == [0, False]


async def test_a_child_says_which_layers_hold(tmp_path: Path) -> None:
    engine = DuckDBEngine(DuckDBSettings(512 * _MIB, 1, tmp_path / "scratch"), 1)
    await engine.start()
    try:
        assert engine.layers == Layers(_ABI, _HAS_SECCOMP)
    finally:
        await engine.close()


# What a process may take.


@pytest.mark.slow
def test_memory_beyond_the_address_space_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    code = """
    from engines.duckdb import errors
    outcomes = [refused(bytearray, 4 << 30)]
    connection = duckdb.connect(config={"memory_limit": "100GB", "threads": 1})
    many = "SELECT list(repeat('x', 1000) || i) FROM range(1000000000) t(i)"
    for statement in ("SELECT list_sum(range(1000000000))", many):
        try:
            connection.execute(statement)
        except (duckdb.Error, MemoryError) as error:
            outcomes.append(errors.translate(error).ours.code)
    print(json.dumps(outcomes))
    """
    [outcomes] = _sandboxed(tmp_path, dedent(code))
    assert outcomes == ["MemoryError", ErrorCode.MEMORY_LIMIT_EXCEEDED, ErrorCode.MEMORY_LIMIT_EXCEEDED]


@pytest.mark.slow
def test_cpu_beyond_the_budget_ends_the_process(tmp_path: Path) -> None:
    ended = _run_sandboxed(tmp_path, "allow_cpu(1.0)\nwhile True: pass")
    assert ended.returncode == -signal.SIGXCPU


def test_a_file_beyond_its_size_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    code = """
    from engines.duckdb import errors
    try:
        duckdb.connect().execute(f"COPY (SELECT hash(range) FROM range(10000000)) TO '{home}/large.csv'")
    except duckdb.Error as error:
        print(json.dumps(errors.translate(error).ours.code))
    print(json.dumps((home / "large.csv").stat().st_size if (home / "large.csv").exists() else 0))
    print(json.dumps(refused((home / "other").write_bytes, bytes(given["file_bytes"] + 1))))
    """
    told, size, other = _sandboxed(tmp_path, dedent(code), file_bytes=_FILE_BYTES)
    assert told == ErrorCode.RESULT_TOO_LARGE
    assert size <= _FILE_BYTES
    assert other == "EFBIG"


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    """A core holds whatever the query read."""
    home = tmp_path / "home"
    home.mkdir()
    code = _ENTER.format(before="", address_space=_ADDRESS_SPACE, file_bytes=_FILE_BYTES) + "os.chdir(home)\nos.abort()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "[]", "{}"],
        env=minimal_environment(home) | {"PYTHONPATH": str(_ROOT)},
        stderr=subprocess.DEVNULL,
    )
    _, status = os.waitpid(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert not os.WCOREDUMP(status)
    assert list(home.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux shows a process's environment")
async def test_a_child_inherits_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("QUERYD_DATA_URL", "postgresql://hunter2")
    engine = DuckDBEngine(DuckDBSettings(512 * _MIB, 1, tmp_path / "scratch"), 1)
    await engine.start()
    try:
        [child] = engine._all
        environment = await asyncio.to_thread(Path(f"/proc/{child.process.pid}/environ").read_bytes)
        assert b"HOME=" in environment
        assert b"hunter2" not in environment
    finally:
        await engine.close()


# What an instance may reach, without the kernel's help.


class _World:
    """One granted dataset in S3 and one in Postgres, and things beside them that were not granted."""

    def __init__(self, store: ObjectStore, postgres_url: str, home: Path) -> None:
        self.store, self.owner_url, self.home = store, postgres_url, home
        self.prefix = f"datasets/{uuid.uuid4()}"
        self.granted = Relation("sales", RelationKind.PARQUET, f"s3://{store.bucket}/{self.prefix}/sales/", "1")
        self.shops = Relation("shops", RelationKind.POSTGRES, "public.shops", "1")
        for folder in ("out", "spill", "secrets"):
            (home / folder).mkdir(parents=True)
        self.s3 = boto3.client(
            "s3",
            endpoint_url=store.endpoint_url,
            region_name=store.region,
            aws_access_key_id=store.writer.access_key,
            aws_secret_access_key=store.writer.secret_key,
        )
        pq.write_table(pa.table({"id": range(10)}), home.parent / "part.parquet")
        for place in ("sales", "payroll"):
            self.s3.upload_file(str(home.parent / "part.parquet"), store.bucket, f"{self.prefix}/{place}/part.parquet")
        self.role = f"reader_{uuid.uuid4().hex}"
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute("CREATE TABLE shops AS SELECT 1 AS id")
            connection.execute("CREATE TABLE payroll AS SELECT 'hunter2' AS s")
            role = sql.Identifier(self.role)
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'reader'").format(role))
            connection.execute(sql.SQL("GRANT SELECT ON shops TO {}").format(role))

    def close(self) -> None:
        """The role outlives its database, so it is dropped."""
        with psycopg.connect(self.owner_url, autocommit=True) as connection:
            role = sql.Identifier(self.role)
            connection.execute(sql.SQL("DROP OWNED BY {}").format(role))
            connection.execute(sql.SQL("DROP ROLE {}").format(role))

    def instance(self, credentials: Credentials, *, max_scratch_bytes: int = 1024 * _MIB) -> Instance:
        settings = DuckDBSettings(
            256 * _MIB,
            1,
            self.home,
            endpoint_url=self.store.endpoint_url,
            region=self.store.region,
            access_key=credentials.access_key,
            secret_key=credentials.secret_key,
            postgres_url=make_conninfo(self.owner_url, user=self.role, password="reader"),
            max_scratch_bytes=max_scratch_bytes,
        )
        relations = frozenset({self.granted, self.shops})
        made = Instance(prepare_for_children(settings), self.home, relations, frozenset(RelationKind))
        made.expose([relation.name for relation in relations])
        return made

    def stored(self) -> set[str]:
        listed = self.s3.list_objects_v2(Bucket=self.store.bucket, Prefix=f"{self.prefix}/")
        return {entry["Key"].removeprefix(f"{self.prefix}/") for entry in listed.get("Contents", ())}


@pytest.fixture
def world(object_store: ObjectStore, postgres_url: str, tmp_path: Path) -> Iterator[_World]:
    made = _World(object_store, postgres_url, tmp_path / "home")
    yield made
    made.close()


def _refusal(instance: Instance, statement: str) -> str:
    with pytest.raises(duckdb.Error) as caught:
        instance.connection.execute(statement).fetchall()
    return str(caught.value)


def test_no_password_is_shown_even_without_the_gate(world: _World) -> None:
    instance = world.instance(world.store.reader)
    try:
        assert instance.connection.execute("SELECT count(*) FROM shops").fetchall() == [(1,)]
        for asked in ("duckdb_databases()", "duckdb_secrets()", "duckdb_settings()", "duckdb_views()"):
            shown = repr(instance.connection.execute(f"FROM {asked}").fetchall())
            assert "password=reader" not in shown
            assert ":reader@" not in shown
            assert world.store.reader.secret_key not in shown
        # A connection string without a password finds none, wherever it leads.
        parts = conninfo_to_dict(world.owner_url)
        known = make_conninfo(host=str(parts["host"]), port=str(parts["port"]), user=world.role, dbname="postgres")
        assert "no password supplied" in _refusal(instance, f"FROM postgres_scan('{known}', 'public', 'shops')")
        _refusal(instance, "SET allow_unredacted_secrets = true")
    finally:
        instance.close()


def test_the_store_refuses_a_write_where_duckdb_would_allow_it(world: _World) -> None:
    """DuckDB allows writing wherever it allows reading, so that the credentials have to be for reading only."""
    statement = f"COPY (SELECT 1 AS id) TO '{world.granted.location}new.parquet'"
    reading = world.instance(world.store.reader)
    try:
        assert reading.connection.execute("SELECT count(*) FROM sales").fetchall() == [(10,)]
        assert "403" in _refusal(reading, statement)
        assert world.stored() == {"sales/part.parquet", "payroll/part.parquet"}
    finally:
        reading.close()
    writing = world.instance(world.store.writer)
    try:
        writing.connection.execute(statement)
        assert "sales/new.parquet" in world.stored()
    finally:
        writing.close()


def test_an_instance_reaches_its_own_prefix_and_its_own_folder_only(world: _World, tmp_path: Path) -> None:
    (tmp_path / "private.csv").write_text("s\nhunter2\n")
    instance = world.instance(world.store.reader)
    try:
        for statement in (
            f"FROM read_parquet('s3://{world.store.bucket}/{world.prefix}/payroll/*.parquet')",
            f"FROM read_text('s3://{world.store.bucket}/{world.prefix}/payroll/part.parquet')",
            f"FROM read_csv('{tmp_path}/private.csv')",
            f"FROM glob('{tmp_path}/*')",
            f"COPY (SELECT 1) TO '{tmp_path}/written.csv'",
            f"COPY (SELECT 1) TO '{world.home}/secrets/written.csv'",
            "FROM read_csv('http://127.0.0.1:9/x.csv')",
            f"ATTACH '{tmp_path}/other.db' AS other",
            f"ATTACH '{world.owner_url}' AS other (TYPE postgres)",
            "INSTALL spatial",
            "LOAD tpch",
        ):
            assert '"exception_type":"Permission"' in _refusal(instance, statement), statement
    finally:
        instance.close()
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "part.parquet", "private.csv"}


def test_an_instances_configuration_is_locked_and_keeps_no_secret(world: _World) -> None:
    instance = world.instance(world.store.reader)
    try:
        for statement in (
            "SET memory_limit = '1TB'",
            "SET threads = 64",
            "SET max_temp_directory_size = '1TB'",
            "SET enable_external_access = true",
            "SET allowed_directories = ['/']",
            "SET lock_configuration = false",
            "RESET memory_limit",
            "SET errors_as_json = false",
            "SET profiling_output = '/tmp/profile'",
        ):
            assert "locked" in _refusal(instance, statement), statement
        _refusal(instance, "CREATE PERSISTENT SECRET kept (TYPE s3, KEY_ID 'a', SECRET 'b')")
    finally:
        instance.close()
    assert list((world.home / "secrets").iterdir()) == []


def test_spilling_ends_at_its_limit(world: _World) -> None:
    instance = world.instance(world.store.reader, max_scratch_bytes=16 * _MIB)
    spilling = "SELECT repeat('x', 900) || range AS s FROM range(2000000) ORDER BY hash(range)"
    try:
        with pytest.raises(duckdb.OutOfMemoryException) as caught:
            instance.connection.execute(spilling).fetchall()
        assert _told(spilling, caught.value).code is ErrorCode.MEMORY_LIMIT_EXCEEDED
    finally:
        instance.close()
    assert sum(entry.stat().st_size for entry in (world.home / "spill").rglob("*") if entry.is_file()) <= 16 * _MIB


def test_the_role_reads_what_was_granted_to_it_and_nothing_else(world: _World) -> None:
    attached = "__queryd_datasets"
    instance = world.instance(world.store.reader)
    try:
        assert instance.connection.execute("FROM shops").fetchall() == [(1,)]
        assert "permission denied" in _refusal(instance, f"FROM {attached}.public.payroll")
        assert "permission denied" in _refusal(instance, f"FROM postgres_query('{attached}', 'SELECT s FROM payroll')")
        for statement in (
            f"INSERT INTO {attached}.public.shops VALUES (2)",
            f"DELETE FROM {attached}.public.shops",
            f"CREATE TABLE {attached}.public.new AS SELECT 1",
            f"CALL postgres_execute('{attached}', 'INSERT INTO shops VALUES (2)')",
            f"FROM postgres_query('{attached}', 'DELETE FROM shops RETURNING id')",
            f"FROM postgres_query('{attached}', 'COPY shops TO PROGRAM ''true''')",
        ):
            _refusal(instance, statement)
    finally:
        instance.close()
    with psycopg.connect(world.owner_url) as connection:
        assert connection.execute("SELECT id FROM shops").fetchall() == [(1,)]
        found = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        assert found == (2,)
