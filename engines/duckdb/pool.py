"""The DuckDB engine: pre-started child processes, one query at a time each, replaced when one can't be trusted."""

import asyncio
import base64
import contextlib
import errno
import itertools
import shutil
import signal
import stat
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from engines.duckdb.sandbox import LOCAL_SOCKETS, Layers
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import (
    EngineCrashed,
    EngineUnavailable,
    Execution,
    Inspected,
    Looked,
    Outage,
    Output,
    QueryFailed,
    Read,
    Relation,
)
from processes.child import ChildDied, ChildProcess, minimal_environment
from processes.frames import Message
from processes.scratch import ScratchFolder, sweep
from queryd.__main__ import room_command
from queryd.events import Column, ErrorCode, OrgId
from telemetry.metrics import METRICS

# DuckDB's operators stop within 20 ms of an interrupt and some scalar calls after seconds or never: a second is long
# enough for the first kind and too long to wait for the second.
_INTERRUPT_GRACE_SECONDS = 1.0

# An interrupt that comes between two of DuckDB's statements is lost, so it is said again, ten times within the grace.
_INTERRUPT_AGAIN_SECONDS = 0.1

# DuckDB and its extensions keep a little of every query's memory; a fresh process every few hours costs nothing.
_QUERIES_PER_CHILD = 10_000

# As many warm instances as a child keeps, see engines.duckdb.instance.
_WARM_PER_CHILD = 8

# A start takes 0.25 s on an idle machine; on a starved one it may take many times that, and waiting beats giving up.
_START_SECONDS = 60.0

# After a failed start (no memory, no disk) another try makes sense soon, but not at once.
_RESTART_PAUSE_SECONDS = 1.0

# A snapshot held open stops vacuum on a server that has other work, so no scan of one may last longer.
_SCAN_MILLISECONDS = 600_000

# The gate takes milliseconds and refuses what it knows to take longer: one that takes this long hangs.
_INSPECT_SECONDS = 10.0

_POSTGRES_PORT = 5432
_POSTGRES_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "sslcrldir", "passfile")

# A server that does not even answer a connection attempt for this long is down as far as a query is concerned.
_CONNECT_SECONDS = 5

FOLDER_PREFIX = "child-"

_Warmth = tuple[OrgId, frozenset[Relation]]


class _Worker:
    """A child and what the pool knows of it."""

    def __init__(self, process: ChildProcess, home: ScratchFolder) -> None:
        self.process = process
        self.home = home
        self.queries = 0
        # It can't be trusted any more; `killed` if that is because it would not stop.
        self.retired = False
        self.killed = False
        self._runs = itertools.count(1)
        self._warm: OrderedDict[_Warmth, None] = OrderedDict()

    @property
    def usable(self) -> bool:
        """True while it may be given another query."""
        return self.process.alive and not self.retired and self.queries < _QUERIES_PER_CHILD

    def is_warm_for(self, warmth: _Warmth | None) -> bool:
        """True if it probably has an instance for that org and those relations."""
        return warmth in self._warm

    def begin(self, warmth: _Warmth) -> int:
        """Note that a query starts; returns the run's number."""
        self.queries += 1
        self._warm[warmth] = None
        self._warm.move_to_end(warmth)
        if len(self._warm) > _WARM_PER_CHILD:
            self._warm.popitem(last=False)
        return next(self._runs)

    async def end(self) -> int:
        """Kill the child, wait for it and remove its directory; returns its exit code."""
        self.process.kill()
        code = await self.process.wait()
        self.home.remove()
        return code


class DuckDBEngine:
    """Runs queries in `children` processes. Implements `engines.protocol.Engine`."""

    def __init__(self, settings: DuckDBSettings, children: int, *, quiet: bool = True) -> None:
        """`quiet` sends what the children print, which may quote SQL, nowhere; tests may want to see it."""
        if children < 1:
            raise ValueError("an engine needs at least one child")
        self.name = f"duckdb {version('duckdb')}"
        # What the kernel holds the children to, as the last one that started says; None before `start`.
        self.layers: Layers | None = None
        self._settings = prepare_for_children(settings)
        self._children = children
        self._quiet = quiet
        # The least recently used child stands first.
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._returned = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start all children at once. Raises `EngineUnavailable` if one can't be started."""
        self._settings.scratch_root.mkdir(parents=True, exist_ok=True)
        sweep(self._settings.scratch_root, FOLDER_PREFIX)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._children):
                    group.create_task(self._add_worker())
        except* (OSError, ChildDied, TimeoutError) as failures:
            await self.close()
            raise EngineUnavailable(Outage.ENGINE) from failures

    async def execute(self, execution: Execution) -> Output:
        """Run one query on the child that suits it best; see `engines.protocol.Engine.execute`.

        Waits for a child if all are busy. The time limit counts from the call; at its end the query is interrupted,
        and the child killed a second later if it has not stopped.
        """
        deadline = asyncio.get_running_loop().time() + execution.timeout_seconds
        warmth = (execution.org_id, frozenset(execution.relations))
        worker = await self._take_until(deadline, warmth)
        run = worker.begin(warmth)

        def note_reads(told: Message) -> None:
            execution.reads.update(_to_reads(told["reads"]))

        async with self._asking(worker, _to_message(execution, run), run, deadline, note_reads) as answering:
            answer = await _read_answer(answering, worker)
            if (content := answer["content"]) is not None:
                return _to_output(answer, base64.b64decode(content))
            target = execution.scratch / f"result.{execution.output_format}"
            await _move(worker.home.path / "out" / target.name, target)
            return _to_output(answer, target)

    async def inspect(self, sql: str) -> Inspected:
        """Check a statement on any child as `execute` does, with every relation granted.

        Raises `QueryFailed`, `EngineCrashed` or `EngineUnavailable`.
        """
        deadline = asyncio.get_running_loop().time() + _INSPECT_SECONDS
        worker = await self._take_until(deadline, None)
        async with self._asking(worker, {"inspect": sql}, 0, deadline) as answering:
            answer = await _read_answer(answering, worker)
            return Inspected(frozenset(answer["relations"]), frozenset(answer["parameters"]))

    async def look(self, relation: Relation, timeout_seconds: float) -> Looked:
        """Return what a relation holds and how its columns are read. Raises the errors of `execute`."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        worker = await self._take_until(deadline, None)
        message = {"look": _relation_fields(relation), "seconds": timeout_seconds}
        async with self._asking(worker, message, 0, deadline) as answering:
            return Looked.from_fields((await _read_answer(answering, worker))["looked"])

    async def close(self) -> None:
        """Kill all children and remove their directories. What still runs raises `EngineCrashed`."""
        self._closed = True
        self._returned.set()
        workers = list(self._all)
        for worker in workers:
            worker.process.kill()
        while self._background:
            await asyncio.wait(set(self._background))
        for worker in list(self._all):
            await self._remove(worker)

    async def _take_until(self, deadline: float, warmth: _Warmth | None) -> _Worker:
        try:
            async with asyncio.timeout_at(deadline):
                return await self._take(warmth)
        except TimeoutError:
            raise _timed_out() from None

    @asynccontextmanager
    async def _asking(
        self,
        worker: _Worker,
        message: Message,
        run: int,
        deadline: float,
        on_told: Callable[[Message], None] | None = None,
    ) -> AsyncIterator[asyncio.Task[Message]]:
        """Ask a child that was taken: the request, which is done inside. Afterwards the child is given back."""
        answering = asyncio.create_task(worker.process.request(message, on_told))
        try:
            # Unlike wait_for and timeout, wait leaves the request alone when time is up.
            await asyncio.wait({answering}, timeout=deadline - asyncio.get_running_loop().time())
            if not answering.done():
                await self._interrupt(worker, run, answering)
            yield answering
        finally:
            if answering.done():
                self._take_back(worker, answering)
            else:
                # A cancelled query must not keep its caller, nor a killed child: it is stopped in the background.
                self._spawn(self._stop(worker, run, answering))

    async def _take(self, warmth: _Warmth | None) -> _Worker:
        """An idle child: one that is warm for the query, else the least recently used. Waits until there is one."""
        while not self._closed:
            for gone in [worker for worker in self._idle if not worker.process.alive]:
                self._idle.remove(gone)
                self._spawn(self._replace(gone))
            if self._idle:
                chosen = next((worker for worker in self._idle if worker.is_warm_for(warmth)), self._idle[0])
                self._idle.remove(chosen)
                return chosen
            self._returned.clear()
            await self._returned.wait()
        raise EngineUnavailable(Outage.ENGINE)

    async def _interrupt(self, worker: _Worker, run: int, answering: asyncio.Task[Message]) -> None:
        """Stop a run: ask first, and kill the child if it has not answered within a second.

        A killed child is not waited for: the kernel needs its time to take back gigabytes, and the query is over.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + _INTERRUPT_GRACE_SECONDS
        while not answering.done() and clock() < end:
            with contextlib.suppress(ChildDied):
                worker.process.send_notice({"interrupt": run})
            await asyncio.wait({answering}, timeout=_INTERRUPT_AGAIN_SECONDS)
        if not answering.done():
            worker.killed = True
            worker.process.kill()

    async def _stop(self, worker: _Worker, run: int, answering: asyncio.Task[Message]) -> None:
        if not worker.killed:
            await self._interrupt(worker, run, answering)
        await asyncio.wait({answering})
        self._take_back(worker, answering)

    def _take_back(self, worker: _Worker, answering: asyncio.Task[Message]) -> None:
        """Make a child that has answered, or died, idle again or replace it."""
        if answering.exception() is not None or answering.result().get("tainted"):
            worker.retired = True
        if self._closed or not worker.usable:
            self._spawn(self._replace(worker))
        else:
            self._offer(worker)

    def _offer(self, worker: _Worker) -> None:
        self._idle.append(worker)
        self._returned.set()

    async def _replace(self, worker: _Worker) -> None:
        await self._remove(worker)
        while not self._closed:
            try:
                await self._add_worker()
            except (OSError, ChildDied, TimeoutError):
                await asyncio.sleep(_RESTART_PAUSE_SECONDS)
            else:
                METRICS.restart_child("duckdb")
                return

    async def _add_worker(self) -> None:
        home = ScratchFolder.make(self._settings.scratch_root, FOLDER_PREFIX)
        try:
            environment = minimal_environment(home.path)
            needed = (*map(str, sorted(set(_ports(self._settings)))), *_files(self._settings))
            if _uses_local_socket(self._settings):
                needed = (*needed, LOCAL_SOCKETS)
            command = room_command("engines.duckdb.child", *needed)
            process = await ChildProcess.start(command, environment, quiet=self._quiet)
        except BaseException:
            home.remove()
            raise
        worker = _Worker(process, home)
        self._all.add(worker)
        try:
            async with asyncio.timeout(_START_SECONDS):
                answer = await process.request({"settings": self._settings.to_message(), "home": str(home.path)})
        except BaseException:
            await asyncio.shield(self._remove(worker))
            raise
        self.layers = Layers(answer["landlock"], answer["seccomp"])
        self._offer(worker)

    async def _remove(self, worker: _Worker) -> None:
        if worker in self._all:
            self._all.remove(worker)
            if worker in self._idle:
                self._idle.remove(worker)
            await worker.end()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _timed_out() -> QueryFailed:
    return QueryFailed(ErrorCode.QUERY_TIMEOUT, "The query ran longer than its time limit.")


async def _read_answer(answering: asyncio.Task[Message], worker: _Worker) -> Message:
    """What a child said that has done what it was asked. Raises what `Engine.execute` raises."""
    if worker.killed and not answering.done():
        raise _timed_out()
    try:
        answer = await answering
    except ChildDied:
        if worker.killed:
            raise _timed_out() from None
        if await worker.process.wait() == -signal.SIGXCPU:
            message = "The query used more CPU time than its time limit allows."
            raise QueryFailed(ErrorCode.QUERY_TIMEOUT, message) from None
        raise EngineCrashed("the DuckDB process died under the query") from None
    if "interrupted" in answer:
        raise _timed_out()
    if "failed" in answer:
        raise QueryFailed(ErrorCode(answer["failed"]), answer["message"], answer["detail"])
    if "unavailable" in answer:
        raise EngineUnavailable(Outage[answer["unavailable"]])
    return answer


def _to_output(answer: Message, content: bytes | Path) -> Output:
    return Output(
        content,
        answer["rows"],
        answer["bytes"],
        tuple(Column(name, type_) for name, type_ in answer["columns"]),
        answer["bytes_scanned"],
    )


def _to_reads(told: Iterable[tuple[str, list[str] | None]]) -> Iterator[Read]:
    return (Read(name, None if columns is None else frozenset(columns)) for name, columns in told)


async def _move(written: Path, wanted: Path) -> None:
    """Take a finished file out of a child's home, which the child itself can't: it may write nowhere else."""
    try:
        wanted.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _rename(written, wanted):
            await asyncio.to_thread(shutil.move, written, wanted)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EngineUnavailable(Outage.SCRATCH) from None
        raise QueryFailed(ErrorCode.INTERNAL, "The engine's scratch folder can't be used.") from None


def _rename(written: Path, wanted: Path) -> bool:
    """False where they lie on two file systems, so that moving means copying, which may take seconds."""
    found = written.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        # A child's word is not enough: what it has put there may be a way to another file.
        raise EngineCrashed("the DuckDB process left something else than a result")
    try:
        written.rename(wanted)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _to_message(execution: Execution, run: int) -> Message:
    return {
        "run": run,
        "org": execution.org_id,
        "sql": execution.sql,
        "parameters": execution.parameters,
        "relations": [_relation_fields(relation) for relation in execution.relations],
        "denied": sorted(execution.denied),
        "format": execution.output_format,
        "seconds": execution.timeout_seconds,
        "max_rows": execution.max_rows,
        "max_bytes": execution.max_bytes,
        "max_bytes_scanned": execution.max_bytes_scanned,
    }


def _relation_fields(relation: Relation) -> list[Any]:
    pii_columns = sorted(relation.pii_columns)
    return [relation.name, relation.kind, relation.location, relation.version, pii_columns, relation.registered]


def _ports(settings: DuckDBSettings) -> Iterator[int]:
    """The TCP ports of the store and of the datasets' Postgres: nothing else is within a child's reach."""
    endpoint = urlsplit(settings.endpoint_url or "https://")
    yield endpoint.port or (80 if endpoint.scheme == "http" else 443)
    if settings.postgres_url is not None:
        given = str(conninfo_to_dict(settings.postgres_url).get("port") or _POSTGRES_PORT)
        yield from (int(port or _POSTGRES_PORT) for port in given.split(","))


def _uses_local_socket(settings: DuckDBSettings) -> bool:
    """Whether the engine reaches the datasets' Postgres by a Unix socket, which is also libpq's default."""
    if settings.postgres_url is None:
        return False
    given = conninfo_to_dict(settings.postgres_url)
    hosts = str(given.get("hostaddr") or given.get("host") or "").split(",")
    return any(not host or host.startswith(("/", "@")) for host in hosts)


def _files(settings: DuckDBSettings) -> Iterator[str]:
    """The absolute paths of the files that libpq reads for this connection: certificates, keys, passwords."""
    if settings.postgres_url is not None:
        given = conninfo_to_dict(settings.postgres_url)
        # `system` and `disable` are no files.
        yield from (str(given[name]) for name in _POSTGRES_FILES if str(given.get(name, "")).startswith("/"))


def prepare_for_children(settings: DuckDBSettings) -> DuckDBSettings:
    """The settings with limits on what a query may ask of the datasets' Postgres, and with its password by itself."""
    if settings.postgres_url is None:
        return settings
    given = conninfo_to_dict(settings.postgres_url)
    password = given.pop("password", None)
    given["options"] = f"{given.get('options') or ''} -c statement_timeout={_SCAN_MILLISECONDS}".strip()
    given["connect_timeout"] = _CONNECT_SECONDS
    return replace(
        settings,
        postgres_url=make_conninfo("", **given),
        postgres_password=None if password is None else str(password),
    )
