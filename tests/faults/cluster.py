"""The whole service as production has it: three brokers, two Postgres, S3, and each service as a process of its own.

Whatever is started here ends with this process, however that ends. The service reaches Postgres and S3 through proxies
that faults work on; whoever judges reaches the servers themselves.
"""

import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg

from db.datasets_server import READER, prepare_datasets_database
from db.state.platform import create_platform_tables
from queryd.__main__ import room_command
from service.embedded.object_store import ObjectStore
from service.embedded.ports import pick_ports
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.faults.collector import TraceCollector, scrape
from tests.faults.evidence import Place
from tests.faults.s3_proxy import S3Proxy
from tests.servers.apache_kafka import ApacheKafka
from tests.servers.kafka_proxy import KafkaProxy
from tests.servers.tcp_proxy import TcpProxy

# Short, so that a stopped worker outlives it in a run of minutes; renewed every 2 s, which a busy machine still keeps.
LEASE_SECONDS = 6.0
# Shorter than a slow query, so that a SIGTERM now and then hands one back.
DRAIN_SECONDS = 2.0
# A dead member's partitions move after 6 s, not 15, so that there are many rebalances in a run.
SESSION_SECONDS = 6
# A service that dies at once would otherwise be started as fast as the machine can.
_RESTART_SECONDS = 0.5
# A command is an interpreter with its imports and a database round trip; the machine may be very busy.
_COMMAND_SECONDS = 90.0
# Three JVMs, two Postgres, S3 and five interpreters on two cores.
_READY_SECONDS = 120.0
# What SIGTERM may take: the drain, the hand-back, the flush of a producer whose broker is away; then it is killed.
_STOP_SECONDS = 30.0
# Ready files are made by processes that announce nothing else: look this often.
_LOOK_SECONDS = 0.05

_FAULTS = Path(__file__).resolve().parent
_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Ending:
    """One end of a service's process: when, and with which exit code (128 + signal where a signal ended it)."""

    service: str
    at: float
    lived: float
    code: int


class Service:
    """One service, kept alive: whenever its process ends, another takes its place until `stop`.

    Its warden ends it, and whatever it left behind, when this process is gone: even what is stopped by SIGSTOP.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        folder: Path,
        environment: dict[str, str],
        lifeline: Lifeline,
        module: Sequence[str] = ("queryd", "run"),
    ) -> None:
        """`module` is what Python runs, and its first arguments; the kind is the last."""
        self.name = name
        self.kind = kind
        self._module = tuple(module)
        self.log = folder / "service.log"
        self.endings: list[Ending] = []
        self._folder = folder
        self._lifeline = lifeline
        self._metrics = folder / "metrics.txt"
        [self._http_port] = pick_ports(1)
        self._clock = folder / "clock"
        self._ready = folder / "ready"
        self._lock = folder / "lock"
        self._stopping = threading.Event()
        self._warden: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        self.shift_clock(0.0)
        self._environment = environment | {
            "QUERYD_READY_FILE": str(self._ready),
            "QUERYD_HTTP_PORT": str(self._http_port),
            "FAULTS_CLOCK": str(self._clock),
            "PYTHONPATH": str(_FAULTS / "clock"),
        }
        self._keeper = threading.Thread(target=self._keep, name=f"keep {name}", daemon=True)

    def start(self) -> None:
        """Start it, and keep it."""
        self._keeper.start()

    def await_ready(self, seconds: float) -> None:
        """Wait until it does its work; raises TimeoutError."""
        latest = time.monotonic() + seconds
        while not self._ready.exists():
            if time.monotonic() > latest:
                raise TimeoutError(f"{self.name} is not ready after {seconds:.0f} s\n{self.log_tail()}")
            time.sleep(_LOOK_SECONDS)

    @property
    def ready(self) -> bool:
        """True once the process that runs now has said so."""
        return self._ready.exists()

    @property
    def pid(self) -> int | None:
        """The service's own process, the warden's child; None while there is none."""
        warden = self._warden
        if warden is None or warden.poll() is not None:
            return None
        with suppress(OSError, psutil.Error):
            children = [child.pid for child in psutil.Process(warden.pid).children()]
            # Orphans of the service come to the warden as well; the service is the oldest.
            return min(children) if children else None
        return None

    def children(self, module: str) -> list[int]:
        """The service's own children that run a module, such as `engines.duckdb.child`."""
        pid = self.pid
        if pid is None:
            return []
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(pid).children():
                with suppress(psutil.Error):
                    if module in child.cmdline():
                        found.append(child.pid)
        return sorted(found)

    def processes(self) -> list[int]:
        """The service and everything below it."""
        pid = self.pid
        with suppress(psutil.Error):
            return [] if pid is None else [pid, *(each.pid for each in psutil.Process(pid).children(recursive=True))]
        return []

    def shift_clock(self, seconds: float) -> None:
        """Let the wall clock of its Python process be off by so many seconds from now on."""
        if not self._clock.exists():
            self._clock.write_bytes(struct.pack("d", seconds))
            return
        # In place: the processes have the file mapped.
        with self._clock.open("r+b") as opened:
            opened.write(struct.pack("d", seconds))

    @property
    def logs(self) -> list[Path]:
        """Everything that it has told of itself: its log, and its metrics at every `scrape`."""
        return [path for path in (self.log, self._metrics) if path.exists()]

    def scrape(self) -> bool:
        """Keep what its metrics say now; whether it answered."""
        return scrape(self._http_port, self._metrics)

    def abandon(self) -> None:
        """Start it no more once it has ended."""
        self._stopping.set()

    def stop(self) -> int | None:
        """SIGTERM, and wait for its end; its exit code, None where it had none to give. SIGKILL after 30 s."""
        self._stopping.set()
        warden = self._warden
        code = None
        if warden is not None and warden.poll() is None:
            warden.send_signal(signal.SIGTERM)
            code = warden.wait(_STOP_SECONDS + 5)
        if self._keeper.is_alive():
            self._keeper.join(_RESTART_SECONDS + 5)
        return code

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _keep(self) -> None:
        while not self._stopping.is_set():
            started = time.time()
            self._ready.unlink(missing_ok=True)
            self._warden = self._spawn()
            code = self._warden.wait()
            ended = time.time()
            self.endings.append(Ending(self.name, ended, ended - started, code))
            self._stopping.wait(_RESTART_SECONDS)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        options = [
            f"--lifeline={self._lifeline.read_end}",
            f"--lock={lock}",
            f"--stop=SIGTERM:{_STOP_SECONDS}",
            "--orphaned=SIGKILL:1.0",
        ]
        command = [sys.executable, "-m", *self._module, self.kind]
        try:
            with self.log.open("ab") as log:
                return subprocess.Popen(
                    room_command("service.embedded.warden", *options, "--", *command),
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(self._lifeline.read_end, lock),
                    # Ctrl-C is for us alone: we end them in order.
                    start_new_session=True,
                )
        finally:
            os.close(lock)


@dataclass(slots=True)
class Cluster:
    """Everything under one folder. `start`, then `stop` however the run went."""

    folder: Path
    lifeline: Lifeline
    executors: int = 2
    kafka: ApacheKafka = field(init=False)
    data: Postgres = field(init=False)
    state: Postgres = field(init=False)
    store: ObjectStore = field(init=False)
    data_proxy: TcpProxy = field(init=False)
    state_proxy: TcpProxy = field(init=False)
    store_proxy: S3Proxy = field(init=False)
    relay_proxy: KafkaProxy = field(init=False)
    traces: TraceCollector = field(init=False)
    services: list[Service] = field(init=False, default_factory=list)
    environment: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("failpoints", "services", "scratch", "commands"):
            (self.folder / name).mkdir()
        self.kafka = ApacheKafka(self.folder / "kafka", self.lifeline, nodes=3)
        self.data = Postgres(self.folder / "data", self.folder / "data.log", self.lifeline)
        self.state = Postgres(self.folder / "state", self.folder / "state.log", self.lifeline)
        self.store = ObjectStore(self.folder / "s3", self.folder / "s3.log", self.lifeline)
        self.traces = TraceCollector(self.folder / "traces.bin")

    @property
    def failpoints(self) -> Path:
        """The folder that arms failpoints in all processes."""
        return self.folder / "failpoints"

    @property
    def place(self) -> Place:
        """The servers themselves."""
        return Place(
            bootstrap=self.kafka.bootstrap,
            data_url=self.data.url("data"),
            state_url=self.state.url("state"),
            bucket=self.store.bucket,
            endpoint_url=self.store.endpoint_url,
            region=self.store.region,
            access_key=self.store.writer.access_key,
            secret_key=self.store.writer.secret_key,
        )

    @property
    def logs(self) -> list[Path]:
        """What the services told, and what the databases wrote."""
        told = [path for service in self.services for path in service.logs]
        return [*told, self.traces.file, self.folder / "data.log", self.folder / "state.log"]

    @property
    def scratch(self) -> list[Path]:
        """Each executor's scratch."""
        return [self.scratch_of(service) for service in self.of_kind("executor")]

    def scratch_of(self, service: Service) -> Path:
        """Where an executor makes its results."""
        return self.folder / "scratch" / service.name

    def of_kind(self, kind: str) -> list[Service]:
        """The services that are executors, relays or projectors."""
        return [service for service in self.services if service.kind == kind]

    def start(self) -> None:
        """Start the servers, prepare databases and topics as an operator would, and start all services."""
        together([self.kafka.start, self.data.start, self.state.start, self.store.start])
        self._put_proxies()
        self._prepare()
        kinds = ["executor"] * self.executors + ["relay"] * 2 + ["projector"]
        numbers: dict[str, int] = {}
        for kind in kinds:
            numbers[kind] = numbers.get(kind, 0) + 1
            self.services.append(self.make_service(f"{kind}-{numbers[kind]}", kind))
        for service in self.services:
            service.start()
        for service in self.services:
            service.await_ready(_READY_SECONDS)

    def make_service(self, name: str, kind: str) -> Service:
        """A service that is not started yet, nor one of `services`."""
        scratch = self.folder / "scratch" / name
        scratch.mkdir(exist_ok=True)
        # Only the relay ends transactions.
        bootstrap = self.relay_proxy.bootstrap if kind == "relay" else self.kafka.bootstrap
        environment = self.environment | {
            "QUERYD_KAFKA_BOOTSTRAP": bootstrap,
            "QUERYD_SCRATCH": str(scratch),
            "QUERYD_FAILPOINTS": str(self.failpoints),
        }
        return Service(name, kind, self.folder / "services" / name, environment, self.lifeline)

    def queryd(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command of queryd against the servers themselves; its stdout. Raises RuntimeError when it fails."""
        direct = {
            "QUERYD_DATA_URL": self.data.url("data"),
            "QUERYD_STATE_URL": self.state.url("state"),
            "AWS_ENDPOINT_URL": self.store.endpoint_url,
            "QUERYD_SCRATCH": str(self.folder / "scratch"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "queryd", *arguments],
            cwd=self.folder / "commands",
            env=self.environment | direct | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"`queryd {' '.join(arguments[:2])}` ended with {done.returncode}\n{done.stderr}")
        return done.stdout

    def stop_services(self) -> dict[str, int | None]:
        """SIGTERM to all services at once; the exit code of each."""
        with ThreadPoolExecutor(len(self.services) or 1) as pool:
            codes = pool.map(Service.stop, self.services)
            return dict(zip([service.name for service in self.services], codes, strict=True))

    def abandon(self) -> None:
        """Start no service any more: the lifeline is about to end."""
        for service in self.services:
            service.abandon()

    def stop(self) -> None:
        """End everything, services first. Each step is reached whatever the one before ran into."""
        steps: list[Callable[[], object]] = [self.stop_services, self.kafka.stop]
        steps += [server.stop for server in (self.data, self.state, self.store)]
        steps += [proxy.stop for proxy in self._proxies()]
        steps.append(self.traces.stop)
        for step in steps:
            # What can't be stopped in order ends with the lifeline a moment later.
            with suppress(Exception):
                step()

    def _proxies(self) -> Iterable[TcpProxy | S3Proxy | KafkaProxy]:
        for name in ("data_proxy", "state_proxy", "store_proxy", "relay_proxy"):
            with suppress(AttributeError):
                yield getattr(self, name)

    def _put_proxies(self) -> None:
        self.data_proxy = TcpProxy("127.0.0.1", self.data.port)
        self.state_proxy = TcpProxy("127.0.0.1", self.state.port)
        self.store_proxy = S3Proxy(int(urlsplit(self.store.endpoint_url).port or 0))
        self.relay_proxy = KafkaProxy(self.kafka.bootstrap)
        for proxy in self._proxies():
            proxy.start()

    def _prepare(self) -> None:
        for server, names in ((self.data, ("data", "datasets")), (self.state, ("state",))):
            for name in names:
                server.create_database(name)
        install_clock(self.data.url("data"))
        install_clock(self.state.url("state"))
        reader = "reader-of-datasets"
        prepare_datasets_database(self.data.url("datasets"), reader)
        datasets = urlsplit(_by(self.data_proxy, self.data.url("datasets")))
        self.environment = _outside() | {
            "QUERYD_KAFKA_BOOTSTRAP": self.kafka.bootstrap,
            "QUERYD_KAFKA_SESSION_TIMEOUT": str(SESSION_SECONDS),
            "QUERYD_DATA_URL": _by(self.data_proxy, self.data.url("data")),
            "QUERYD_STATE_URL": _by(self.state_proxy, self.state.url("state")),
            "QUERYD_DATASETS_PG_URL": datasets._replace(
                netloc=f"{READER}:{reader}@{datasets.hostname}:{datasets.port}"
            ).geturl(),
            "QUERYD_RESULTS_URL": f"s3://{self.store.bucket}",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store_proxy.port}",
            "AWS_REGION": self.store.region,
            "AWS_ACCESS_KEY_ID": self.store.writer.access_key,
            "AWS_SECRET_ACCESS_KEY": self.store.writer.secret_key,
            "QUERYD_DATASETS_ACCESS_KEY_ID": self.store.reader.access_key,
            "QUERYD_DATASETS_SECRET_ACCESS_KEY": self.store.reader.secret_key,
            "QUERYD_LEASE_SECONDS": str(LEASE_SECONDS),
            "QUERYD_DRAIN_SECONDS": str(DRAIN_SECONDS),
            "QUERYD_SLOTS_INTERACTIVE": "2",
            "QUERYD_SLOTS_BATCH": "2",
            "QUERYD_CHILD_MEMORY": str(256 * _MIB),
            "QUERYD_CHILD_THREADS": "1",
            "QUERYD_SCRATCH_BYTES": str(512 * _MIB),
            "QUERYD_PARTITIONS": "6",
            "QUERYD_REPLICATION": "3",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.traces.endpoint,
            # Everything that a service can say, so that a canary has every chance to be found in it.
            "QUERYD_LOG_LEVEL": "DEBUG",
        }
        self.queryd("db", "upgrade")
        create_platform_tables(self.state.url("state"))
        self.queryd("topics", "apply")


def together(calls: Iterable[Callable[[], object]]) -> None:
    """Make all calls at once, wait for all of them, then raise what the first that failed raised."""
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(call) for call in calls]
    for future in futures:
        future.result()


# Before the migrations, so that the defaults of their columns mean these functions as well. A name that is found in
# `public` first is never looked for in `pg_catalog`.
_CLOCK = (
    "CREATE TABLE fault_clock (shift INTERVAL NOT NULL)",
    "INSERT INTO fault_clock VALUES ('0 s')",
    """
    CREATE FUNCTION now() RETURNS timestamptz LANGUAGE sql STABLE
    RETURN pg_catalog.now() + (SELECT shift FROM public.fault_clock)
    """,
    """
    CREATE FUNCTION clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    RETURN pg_catalog.clock_timestamp() + (SELECT shift FROM public.fault_clock)
    """,
)


def install_clock(url: str) -> None:
    """Give an empty database a clock that `shift_database_clock` can move."""
    name = urlsplit(url).path[1:]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" SET search_path = public, pg_catalog')
    with psycopg.connect(url) as connection:
        for statement in _CLOCK:
            connection.execute(statement.encode())
    shift_database_clock(url, 3600.0)
    with psycopg.connect(url) as connection:
        answer = connection.execute("SELECT now() - pg_catalog.now() > '59 min'").fetchone()
    if answer != (True,):
        raise RuntimeError("the database's clock can't be moved")
    shift_database_clock(url, 0.0)


def shift_database_clock(url: str, seconds: float) -> None:
    """Let `now()` and `clock_timestamp()` of a database be off by so many seconds from now on."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        connection.execute("UPDATE public.fault_clock SET shift = make_interval(secs => %s)", (seconds,))


def _by(proxy: TcpProxy, url: str) -> str:
    """The same database through its proxy."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{proxy.port}")).geturl()


def _outside() -> dict[str, str]:
    """What a service may know of our own surroundings."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "TZ", "LD_LIBRARY_PATH") if name in os.environ}


def remove_folder(folder: Path) -> None:
    """Remove a run's folder with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
