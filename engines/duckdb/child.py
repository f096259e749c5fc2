"""The process in which DuckDB runs, one query at a time: gate, warm instance, export. Run as a module by the pool."""

import shutil
import threading
from pathlib import Path
from typing import Any

import duckdb

from engines.duckdb import errors
from engines.duckdb.export import Exported, export
from engines.duckdb.gate import Gate, Judged
from engines.duckdb.instance import Instance, WarmInstances, empty
from engines.duckdb.sandbox import address_space_used, allow_cpu, enter_sandbox
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import EngineUnavailable, QueryFailed, Relation, RelationKind
from processes.failpoints import Failpoint, failpoint
from processes.frames import Message
from processes.serving import serve
from queryd.events import ErrorCode, OutputFormat

# memory_limit bounds DuckDB's buffers only; its other allocations, the threads' arenas and the mapped libraries (1 GB
# of address space alone) need room beside them.
_ADDRESS_SPACE_FACTOR = 4
_LEAST_ADDRESS_SPACE = 3 * 1024**3

# From here on the caches of idle instances may starve the next query of address space.
_CROWDED_SHARE = 0.6

# What a query may burn beyond its threads' share of its time: the parent's deadline comes first, this is the belt.
_CPU_SLACK_SECONDS = 5.0

# After these nothing inside the process can be relied on.
_TAINTING = frozenset({ErrorCode.MEMORY_LIMIT_EXCEEDED, ErrorCode.INTERNAL})


class _Progress:
    """Which run is going on and how to interrupt it, shared by the main thread and the one that reads the pipe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run = 0
        self._interrupted = False
        self._connection: duckdb.DuckDBPyConnection | None = None

    def begin(self, run: int) -> None:
        """A run has started, and nothing of it can be interrupted by DuckDB's own means yet."""
        with self._lock:
            self._run, self._interrupted, self._connection = run, False, None

    def end(self) -> None:
        """No run is going on."""
        self.begin(0)

    def enter(self, connection: duckdb.DuckDBPyConnection | None) -> None:
        """From now on an interrupt goes to `connection`. Raises `Interrupted` if one has come already."""
        with self._lock:
            self._connection = connection
            if self._interrupted:
                raise errors.Interrupted("the query was interrupted")

    def interrupt(self, run: int) -> None:
        """Interrupt that run if it is still going on."""
        with self._lock:
            if run != self._run:
                return
            self._interrupted = True
            if self._connection is not None:
                self._connection.interrupt()


class _Runner:
    """Runs one query after another in a home of its own, which has `out`, `spill` and `secrets` (that stays empty)."""

    def __init__(self, settings: DuckDBSettings, home: Path, progress: _Progress) -> None:
        self._progress = progress
        self._threads = settings.threads
        self._out = home / "out"
        for folder in (self._out, home / "spill", home / "secrets"):
            folder.mkdir(mode=0o700)
        address_space = max(settings.memory_bytes * _ADDRESS_SPACE_FACTOR, _LEAST_ADDRESS_SPACE)
        self._crowded = address_space * _CROWDED_SHARE
        enter_sandbox(address_space, settings.max_scratch_bytes)
        self._gate = Gate()
        # The first statement of a parser costs 0.3 s, so it is one of ours.
        self._gate.judge("SELECT 1", (), {})
        self._instances = WarmInstances(settings, home)

    def run(self, message: Message) -> Message:
        """Run one query and say how it ended."""
        try:
            exported = self._execute(message)
        except QueryFailed as failure:
            return {"failed": failure.code, "message": failure.message, "tainted": failure.code in _TAINTING}
        except EngineUnavailable as failure:
            return {"unavailable": str(failure)}
        except errors.Interrupted:
            return {"interrupted": True}
        finally:
            empty(self._out)
        columns = [[column.name, column.type] for column in exported.columns]
        return {"rows": exported.rows, "bytes": exported.bytes, "columns": columns}

    def _execute(self, message: Message) -> Exported:
        """Judge and run the query, and move its file to where the parent wants it."""
        allow_cpu(message["seconds"] * (self._threads + 1) + _CPU_SLACK_SECONDS)
        relations = frozenset(_relation(fields) for fields in message["relations"])
        judged = self._gate.judge(message["sql"], [relation.name for relation in relations], message["parameters"])
        instance, was_warm = self._take(message["org"], relations, judged)
        try:
            exported = self._export(instance, judged, message)
        except EngineUnavailable:
            if not was_warm:
                raise
            # A connection that went stale while idle says nothing about the server now.
            instance, _ = self._take(message["org"], relations, judged)
            exported = self._export(instance, judged, message)
        if address_space_used() > self._crowded:
            self._instances.keep_only(instance)
        return exported

    def _take(self, org: str, relations: frozenset[Relation], judged: Judged) -> tuple[Instance, bool]:
        self._progress.enter(None)
        kinds = frozenset(relation.kind for relation in relations if relation.name in judged.references)
        try:
            return self._instances.take(org, relations, kinds)
        except (duckdb.Error, MemoryError) as error:
            raise errors.translate(error) from None

    def _export(self, instance: Instance, judged: Judged, message: Message) -> Exported:
        target = self._out / f"result.{message['format']}"
        try:
            self._progress.enter(instance.connection)
            instance.expose(judged.references)
            exported = export(
                instance.connection,
                judged.text,
                message["parameters"],
                target,
                OutputFormat(message["format"]),
                max_rows=message["max_rows"],
                max_bytes=message["max_bytes"],
            )
            self._progress.enter(None)
        except (duckdb.Error, MemoryError, UnicodeError) as error:
            self._progress.enter(None)
            ours = errors.translate(error)
            if isinstance(ours, EngineUnavailable) or (isinstance(ours, QueryFailed) and ours.code in _TAINTING):
                self._instances.drop(instance)
            raise ours from None
        _hand_over(target, Path(message["target"]))
        return exported


class _Child:
    """Answers `{"settings": …, "home": …}`, which comes first, and `{"run": number, …}`; obeys `{"interrupt": …}`."""

    def __init__(self) -> None:
        self._progress = _Progress()
        self._runner: _Runner | None = None

    def handle(self, message: Message) -> Message:
        """Answer one message of the pool's."""
        if self._runner is None:
            settings = DuckDBSettings.from_message(message["settings"])
            self._runner = _Runner(settings, Path(message["home"]), self._progress)
            return {"ready": True}
        self._progress.begin(message["run"])
        failpoint(Failpoint.CHILD_BEFORE)
        try:
            answer = self._runner.run(message)
            failpoint(Failpoint.CHILD_AFTER)
            return answer
        finally:
            self._progress.end()

    def notice(self, message: Message) -> None:
        """Obey an interrupt."""
        self._progress.interrupt(message["interrupt"])


def _hand_over(written: Path, wanted: Path) -> None:
    """Move a finished file to the attempt's directory. Raises `Interrupted` if nobody wants it any more, and
    `EngineUnavailable` if the disk is full."""
    try:
        shutil.move(written, wanted)
    except FileNotFoundError:
        raise errors.Interrupted("the attempt's directory is gone") from None
    except OSError:
        raise EngineUnavailable("the engine's scratch disk is full") from None


def _relation(fields: list[Any]) -> Relation:
    name, kind, location, version = fields
    return Relation(name, RelationKind(kind), location, version)


if __name__ == "__main__":
    child = _Child()
    serve(child.handle, child.notice)
