"""`queryd up`: the embedded servers, then each service as a process of its own, started again if it dies."""

import asyncio
import fcntl
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

import structlog

from db.datasets_server import READER, prepare_datasets_database
from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from processes.lifeline import LIFELINE_VARIABLE
from queryd.__main__ import room_command
from service.embedded.postgres import read_or_make_password
from service.embedded.servers import Lifeline
from service.embedded.stack import EmbeddedStack
from service.environment import write_env_lines
from service.http import check_ports
from service.readiness import READY_VARIABLE
from service.run import Service, http_variables
from service.settings import load_settings
from service.topics import apply_topics
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.up")

# Everything must have ended 15 s after SIGTERM: this long for the services' drain, and the rest for the servers.
_DRAIN_SECONDS = 5.0
_SERVICES_SECONDS = 9.0
# A group member joins the embedded broker after half its session timeout.
_SESSION_SECONDS = 6.0
# Half of it passes before the embedded broker answers a fetch that found nothing. Each answer costs it 0.4 ms of CPU.
_FETCH_WAIT_SECONDS = 0.06
# A service's exit code for a wrong setting.
_WRONG_SETTING = 2
# A service that dies at once would otherwise be started as fast as the machine can.
_RESTART_SECONDS = 0.5
# A cold start on two busy cores takes some 10 s; without an answer for this long something is wrong.
_READY_SECONDS = 120.0


class UpFailed(Exception):
    """`queryd up` can't start; the sentence says why and what to do."""


class Stack:
    """The embedded servers with queryd's databases, bucket and topics in them, and `.queryd/env` to find them by."""

    def __init__(self, directory: Path) -> None:
        # An absolute path, so that services and shells in other folders find it too.
        self.directory = directory.resolve()
        self._lock: int | None = None
        self._outside_kafka = os.environ.get("QUERYD_KAFKA_BOOTSTRAP")
        self.servers: EmbeddedStack | None = None

    def start(self) -> None:
        """Start the servers and set this process's environment to them; raises `UpFailed`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.directory / "lock")
        if self._lock is None:
            raise UpFailed(
                f"another queryd runs in {_shorten(self.directory)}: stop it first, or work in another directory"
            )
        (self.directory / "env").unlink(missing_ok=True)
        self.servers = EmbeddedStack(self.directory, broker=self._outside_kafka is None)
        self.servers.start()
        variables = self._prepare(self.servers)
        os.environ.update(variables)
        settings = load_settings()
        apply_topics(settings.kafka, settings.partitions, settings.replication)
        _write_atomically(self.directory / "env", write_env_lines(variables))

    async def run_start(self) -> None:
        """Call `start` on a thread. If the task is cancelled, kill the started servers first."""
        starting = asyncio.create_task(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            if self.servers is not None:
                self.servers.kill()
            await asyncio.wait({starting})
            # Retrieve the error, which the kill caused, so that asyncio does not log it.
            starting.exception()
            raise

    def stop(self) -> None:
        """Stop the servers; their data stays. Without the lock nothing here is ours."""
        if self._lock is None:
            return
        (self.directory / "env").unlink(missing_ok=True)
        if self.servers is not None:
            self.servers.stop()
        os.close(self._lock)
        self._lock = None

    def _prepare(self, servers: EmbeddedStack) -> dict[str, str]:
        postgres, store = servers.postgres, servers.object_store
        for database in ("data", "state", "datasets"):
            postgres.create_database(database)
        upgrade_data(postgres.url("data"))
        upgrade_state(postgres.url("state"))
        create_platform_tables(postgres.url("state"))
        # Restarts keep the credentials and addresses, so that a shell's variables stay valid.
        password = read_or_make_password(self.directory / "postgres" / "reader-password")
        prepare_datasets_database(postgres.url("datasets"), password)
        variables = {
            "QUERYD_KAFKA_BOOTSTRAP": self._outside_kafka or _bootstrap(servers),
            "QUERYD_DATA_URL": postgres.url("data"),
            "QUERYD_STATE_URL": postgres.url("state"),
            "QUERYD_DATASETS_PG_URL": _as_reader(postgres.url("datasets"), password),
            "QUERYD_RESULTS_URL": f"s3://{store.bucket}",
            "AWS_ENDPOINT_URL": store.endpoint_url,
            "AWS_REGION": store.region,
            "AWS_ACCESS_KEY_ID": store.writer.access_key,
            "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
            "QUERYD_DATASETS_ACCESS_KEY_ID": store.reader.access_key,
            "QUERYD_DATASETS_SECRET_ACCESS_KEY": store.reader.secret_key,
        }
        profile = {
            "QUERYD_DRAIN_SECONDS": str(_DRAIN_SECONDS),
            "QUERYD_KAFKA_SESSION_TIMEOUT": str(_SESSION_SECONDS),
            "QUERYD_SCRATCH": str(self.directory / "scratch"),
        }
        if self._outside_kafka is None:
            # The embedded broker accepts transactions and shows aborted records all the same.
            profile["QUERYD_RELAY_TRANSACTIONS"] = "false"
            profile["QUERYD_KAFKA_FETCH_WAIT"] = str(_FETCH_WAIT_SECONDS)
        return variables | {name: os.environ.get(name, value) for name, value in profile.items()}


class Supervisor:
    """The services' processes. Everything it starts ends with it, however it ends."""

    def __init__(self, directory: Path, log: IO[bytes] | None = None) -> None:
        """`log` takes what the services write; without one it goes to our stderr."""
        self._run_directory = directory / "run"
        self._services = tuple(Service)
        self._log = log
        self._lifeline = Lifeline()
        self._stopping = asyncio.Event()
        self._processes: dict[Service, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the services, wait until all are ready, and stop them at the end of the context; raises `UpFailed`.

        Poll `raise_failure` inside the context: a service that can't be restarted does not end the context.
        """
        self._run_directory.mkdir(parents=True, exist_ok=True)
        for service in self._services:
            self._ready_file(service).unlink(missing_ok=True)
        self._keepers = [asyncio.create_task(self._keep(service), name=service.value) for service in self._services]
        try:
            await self._wait_ready()
            yield
        finally:
            await self._stop()

    def raise_failure(self) -> None:
        """Raise the error of the first service that can't be started again, if there is one."""
        for keeper in self._keepers:
            if keeper.done():
                keeper.result()

    async def _keep(self, service: Service) -> None:
        while not self._stopping.is_set():
            try:
                process = await self._start(service)
            except OSError as error:
                raise UpFailed(f"{service.value} can't be started: {error.strerror}") from error
            code = await process.wait()
            if self._stopping.is_set():
                return
            if code == _WRONG_SETTING:
                # The service's log names the setting; a restart would fail again.
                raise UpFailed(
                    f"{service.value} can't start with these settings: correct the setting that its log above names"
                )
            _log.warning(LogEvent.SERVICE_RESTARTED, service=service.value, exit_code=code)
            await asyncio.sleep(_RESTART_SECONDS)

    async def _start(self, service: Service) -> asyncio.subprocess.Process:
        environment = os.environ | {
            LIFELINE_VARIABLE: str(self._lifeline.read_end),
            READY_VARIABLE: str(self._ready_file(service).resolve()),
            **http_variables(service, load_settings().http_port),
        }
        process = await asyncio.create_subprocess_exec(
            *room_command("service.run", service.value),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            # Logs go to stderr, and nothing of a service's may get between the lines of ours.
            stdout=self._log or sys.stderr,
            stderr=self._log,
            pass_fds=(self._lifeline.read_end,),
            # Ctrl-C in a terminal must reach only `up`: it would kill a service that is still importing.
            start_new_session=True,
        )
        self._processes[service] = process
        _write_atomically(self._run_directory / f"{service.value}.pid", f"{process.pid}\n")
        return process

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        waiting = set(self._services)
        while waiting:
            waiting = {service for service in waiting if not self._ready_file(service).exists()}
            self.raise_failure()
            if time.monotonic() > deadline:
                raise UpFailed(
                    f"not ready after {_READY_SECONDS:.0f} s: {', '.join(sorted(waiting))}; see the log above"
                )
            await asyncio.sleep(0.05)

    async def _stop(self) -> None:
        self._stopping.set()
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()
        if self._processes:
            await asyncio.wait(
                [asyncio.create_task(process.wait()) for process in self._processes.values()], timeout=_SERVICES_SECONDS
            )
        # Whatever still runs is killed by the end of its lifeline.
        self._lifeline.close()
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(process.wait() for process in self._processes.values()))
        for service in self._services:
            self._ready_file(service).unlink(missing_ok=True)
            (self._run_directory / f"{service.value}.pid").unlink(missing_ok=True)

    def _ready_file(self, service: Service) -> Path:
        return self._run_directory / f"{service.value}.ready"


async def run_up(directory: Path) -> None:
    """Start everything, print `ready`, and stay until SIGTERM or SIGINT; raises `UpFailed` and `WrongSetting`."""
    cancel_on_signals()
    stack = Stack(directory)
    try:
        await stack.run_start()
        # Check after the servers' start, since a server may have taken one of these ports.
        check_ports(load_settings(), len(Service))
        supervisor = Supervisor(stack.directory)
        async with supervisor.running():
            print("ready", flush=True)
            await _until_something_ends(stack, supervisor)
    except asyncio.CancelledError:
        # A signal stopped the stack, which is no error.
        return
    finally:
        await asyncio.to_thread(stack.stop)


async def _until_something_ends(stack: Stack, supervisor: Supervisor) -> None:
    """Wait until a server ends or a service can't be started again, and raise why."""
    assert stack.servers is not None
    # A server's end sends no notification, so poll once per second.
    while not stack.servers.ended:
        supervisor.raise_failure()
        await asyncio.sleep(1.0)
    logs = _shorten(stack.directory / "logs")
    raise UpFailed(f"a server has ended: {', '.join(stack.servers.ended)}; its log is in {logs}")


def cancel_on_signals() -> None:
    """Let the first SIGINT or SIGTERM cancel the current task; ignore later ones, so that it can clean up."""
    task = asyncio.current_task()
    assert task is not None
    signalled = False

    def cancel() -> None:
        nonlocal signalled
        if not signalled:
            signalled = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, cancel)


def _bootstrap(servers: EmbeddedStack) -> str:
    assert servers.broker is not None
    return servers.broker.bootstrap


def _as_reader(url: str, password: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{READER}:{quote(password)}@{parts.hostname}:{parts.port}").geturl()


def lock_folder(path: Path) -> int | None:
    """Lock a file and create it if it is missing. Returns a descriptor, or None if another process has the lock."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _shorten(path: Path) -> str:
    """Return the path relative to the working directory if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _write_atomically(path: Path, text: str) -> None:
    """Readers see the whole file or none; only its owner reads it, for it may hold credentials."""
    draft = path.with_name(path.name + ".draft")
    draft.touch(mode=0o600)
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
