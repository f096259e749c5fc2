"""The process in which DuckDB runs, one query at a time: gate, warm instance, export. Run as a module by the pool."""

import base64
import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from engines.duckdb import errors
from engines.duckdb.bad_files import find_file
from engines.duckdb.columns import Naming
from engines.duckdb.errors import DATASET_UNREADABLE
from engines.duckdb.export import Exported, export
from engines.duckdb.forecast import forecast_scan
from engines.duckdb.gate import Gate, Judged
from engines.duckdb.instance import Instance, WarmInstances, empty
from engines.duckdb.sandbox import LOCAL_SOCKETS, Layers, address_space_used, allow_cpu, confine, enter_sandbox
from engines.duckdb.settings import DuckDBSettings
from engines.duckdb.statement import StatementFailed, Wrapped
from engines.duckdb.watch import Limits, Watch
from engines.protocol import EngineUnavailable, QueryFailed, Read, Relation, RelationKind
from processes.failpoints import Failpoint, failpoint
from processes.frames import Message
from processes.garbage import collect_garbage_less_often
from processes.serving import Tell, serve
from queryd.events import ErrorCode, OutputFormat, Parameter

# memory_limit bounds DuckDB's buffers only; its other allocations, the threads' arenas and the mapped libraries (1 GB
# of address space alone) need room beside them.
_ADDRESS_SPACE_FACTOR = 4
_LEAST_ADDRESS_SPACE = 3 * 1024**3

# From here on the caches of idle instances may starve the next query of address space.
_CROWDED_SHARE = 0.6

# Statements that the gate has let through, by the relations granted, and the longest in characters with its parameters.
_MAX_REMEMBERED_RELATIONS = 8
_MAX_REMEMBERED = 64
_MAX_REMEMBERED_CHARACTERS = 16_384

# Results up to this size travel over the pipe; larger ones are a file.
_PIPED_BYTES = 256 * 1024

# What a query may burn beyond its threads' share of its time: the parent's deadline comes first, this is the belt.
_CPU_SLACK_SECONDS = 5.0


class _Failed(Exception):
    """A statement failed. After an unknown error the process may be corrupt and must not be used again."""

    def __init__(self, ours: QueryFailed, *, known: bool) -> None:
        super().__init__()
        self.ours = ours
        self.known = known


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
    """Runs one query after another in a home of its own, which has `out`, `spill` and `secrets` (that stays empty).

    `inspect`, `look` and `run` raise `QueryFailed`, `_Failed`, `EngineUnavailable` and `Interrupted`.
    """

    def __init__(self, settings: DuckDBSettings, home: Path, progress: _Progress) -> None:
        self._progress = progress
        self._settings = settings
        self._home = home
        self._out = home / "out"
        for folder in (self._out, home / "spill", home / "secrets"):
            folder.mkdir(mode=0o700)
        address_space = max(settings.memory_bytes * _ADDRESS_SPACE_FACTOR, _LEAST_ADDRESS_SPACE)
        self._crowded = address_space * _CROWDED_SHARE
        enter_sandbox(address_space, settings.max_scratch_bytes)
        self._gate = Gate()
        # A parser's first statement is slow, so parse one here, before any query arrives.
        self._gate.judge("SELECT 1", (), {})
        self._judged: OrderedDict[frozenset[Relation], OrderedDict[tuple[str, str, frozenset[str]], Judged]] = (
            OrderedDict()
        )
        self._instances = WarmInstances(settings, home)
        self._watch = Watch()

    def inspect(self, message: Message) -> Message:
        """Judge a statement without running it."""
        # Of what the query before has left nothing may be taken.
        allow_cpu(_CPU_SLACK_SECONDS)
        inspected = self._gate.inspect(message["inspect"])
        return {"relations": sorted(inspected.relations), "parameters": sorted(inspected.parameters)}

    def look(self, message: Message) -> Message:
        """Return what a relation holds, and how each of its columns is read."""
        relation = _relation(message["look"])
        allow_cpu(message["seconds"] * (self._settings.threads + 1) + _CPU_SLACK_SECONDS)
        kinds = frozenset({relation.kind})
        try:
            # No org: a cache that this look fills is useless to any query.
            instance = Instance(self._settings, self._home, frozenset({relation}), kinds)
            try:
                instance.pin([relation.name])
                return {"looked": asdict(instance.look(relation.name))}
            finally:
                instance.close()
        except (duckdb.Error, MemoryError, UnicodeError) as error:
            raise _to_exception(errors.translate(error, kinds=kinds)) from None

    def run(self, message: Message, tell: Tell) -> Message:
        """Run one query and return its outcome, with the result's bytes if it is small.

        A large result stays in `out` as a file, which the parent takes.

        Before the query runs, `tell` reports which personal data it will read: a query that is killed may have read it.
        """
        exported: Exported | None = None
        try:
            # What the parent has left there, because nobody wanted it any more.
            empty(self._out)
            allow_cpu(message["seconds"] * (self._settings.threads + 1) + _CPU_SLACK_SECONDS)
            relations = frozenset(_relation(fields) for fields in message["relations"])
            denied = frozenset(message["denied"])
            judged = self._judge(message["sql"], relations, message["parameters"], denied)
            if judged.reads:
                tell({"reads": [_to_message(read) for read in judged.reads]})
            exported = self._execute(message, relations, judged)
        finally:
            if exported is None:
                empty(self._out)
        # What Postgres sends is not counted, so that of a statement that reads from it nothing is known.
        known = all(each.kind is RelationKind.PARQUET for each in relations if each.name in judged.references)
        content = None
        if exported.bytes <= _PIPED_BYTES:
            file = self._out / f"result.{message['format']}"
            content = base64.b64encode(file.read_bytes()).decode()
            file.unlink()
        return {
            "content": content,
            "rows": exported.rows,
            "bytes": exported.bytes,
            "columns": [[column.name, column.type] for column in exported.columns],
            "bytes_scanned": exported.bytes_read if known else None,
        }

    def _judge(
        self, sql: str, relations: frozenset[Relation], parameters: dict[str, Parameter], denied: frozenset[str]
    ) -> Judged:
        """Judge a statement as the gate does; what it has let through is remembered with all that it was judged by."""
        values = json.dumps(parameters, sort_keys=True)
        if len(sql) + len(values) > _MAX_REMEMBERED_CHARACTERS:
            return self._gate.judge(sql, relations, parameters, denied)
        # By relations first: an org may have hundreds, and they are kept once for all of its statements.
        known = self._judged.setdefault(relations, OrderedDict())
        self._judged.move_to_end(relations)
        if len(self._judged) > _MAX_REMEMBERED_RELATIONS:
            self._judged.popitem(last=False)
        key = (sql, values, denied)
        judged = known.get(key)
        if judged is None:
            judged = known[key] = self._gate.judge(sql, relations, parameters, denied)
            if len(known) > _MAX_REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(key)
        return judged

    def _execute(self, message: Message, relations: frozenset[Relation], judged: Judged) -> Exported:
        """Run a judged query on an instance for exactly what its caller was granted."""
        instance, was_warm = self._take(message["org"], relations, judged)
        try:
            exported = self._export(instance, judged, message, relations)
        except (EngineUnavailable, _Failed) as failure:
            # A connection that was stale or is cut says nothing about the server now, and DuckDB has many words for it.
            if not (was_warm if isinstance(failure, EngineUnavailable) else failure.ours.message == DATASET_UNREADABLE):
                raise
            instance, _ = self._take(message["org"], relations, judged)
            exported = self._export(instance, judged, message, relations)
        if address_space_used() > self._crowded:
            self._instances.keep_only(instance)
        return exported

    def _take(self, org: str, relations: frozenset[Relation], judged: Judged) -> tuple[Instance, bool]:
        self._progress.enter(None)
        kinds = frozenset(relation.kind for relation in relations if relation.name in judged.references)
        try:
            instance, was_warm = self._instances.take(org, relations, kinds)
            while not instance.pin(judged.references):
                # A file was replaced, and this instance would read the old file's cached metadata.
                self._instances.drop(instance)
                instance, was_warm = self._instances.take(org, relations, kinds)
        except (duckdb.Error, MemoryError, UnicodeError) as error:
            raise _to_exception(errors.translate(error, kinds=kinds)) from None
        return instance, was_warm

    def _export(self, instance: Instance, judged: Judged, message: Message, relations: frozenset[Relation]) -> Exported:
        """Let the instance write the result into `out`, for as long as it stays within its limits."""
        limits = Limits(message["max_bytes"], message["max_bytes_scanned"])
        try:
            self._progress.enter(instance.connection)
            self._watch.begin(limits, self._out, instance.connection.interrupt)
            instance.expose(judged.references)
            self._forecast(instance, judged, message, limits)
            exported = export(
                instance.connection,
                judged.text,
                message["parameters"],
                self._out / f"result.{message['format']}",
                OutputFormat(message["format"]),
                max_rows=message["max_rows"],
                limits=limits,
                naming=Naming(
                    judged.names,
                    judged.has_pivot,
                    _texts(message["parameters"]),
                    partial(instance.names_in, judged.references),
                ),
                plans=instance.plans,
            )
        except (duckdb.Error, MemoryError, UnicodeError, StatementFailed) as error:
            raise self._clean_up_after(error, instance, judged, message, relations) from None
        except QueryFailed:
            self._leave()
            raise
        self._leave()
        return exported

    def _clean_up_after(
        self, error: Exception, instance: Instance, judged: Judged, message: Message, relations: Collection[Relation]
    ) -> Exception:
        """Clean up after DuckDB's error and return the exception to raise.

        The caller must not store it in a variable: its traceback refers to the caller's frame, so both would stay in
        memory as a cycle.
        """
        meaning = self._explain(error, instance, judged, message, relations)
        verdict = self._leave()
        if isinstance(meaning.ours, EngineUnavailable) or not meaning.known:
            self._instances.drop(instance)
        return verdict if verdict and isinstance(meaning.ours, errors.Interrupted) else _to_exception(meaning)

    def _leave(self) -> QueryFailed | None:
        """Nothing of DuckDB's runs any more: why the watch has interrupted it, if it has."""
        verdict = self._watch.end()
        try:
            self._progress.enter(None)
        except errors.Interrupted:
            if verdict is None:
                raise
        return verdict

    def _forecast(self, instance: Instance, judged: Judged, message: Message, limits: Limits) -> None:
        """Raises `QueryFailed` with SCAN_LIMIT_EXCEEDED for a statement that is certain to scan too much."""
        if limits.max_bytes_scanned is None:
            return
        statement = Wrapped("\n", judged.text, "\n").at_most(message["max_rows"])
        values = message["parameters"] or None
        limits.judge_scanned(forecast_scan(instance, statement, values, judged.references, limits.max_bytes_scanned))

    def _explain(
        self,
        error: Exception,
        instance: Instance,
        judged: Judged,
        message: Message,
        relations: Collection[Relation],
    ) -> errors.Meaning:
        """Translate an error; if a dataset's file caused it, the detail names the file."""
        read = [relation for relation in relations if relation.name in judged.references]
        kinds = frozenset(relation.kind for relation in read)
        placed, cause = None, error
        if isinstance(error, StatementFailed):
            texts = _texts(message["parameters"])
            placed, cause = errors.Placed(message["sql"], judged.text, error.offset, texts), error.error
        meaning = errors.translate(cause, placed, self._confidential(), kinds)
        if RelationKind.PARQUET in kinds and errors.is_file_suspected(meaning):
            return find_file(instance, read, cause, meaning)
        return meaning

    def _confidential(self) -> list[str]:
        """Texts that an author must not see: the path of this process's folder, and credentials."""
        settings = self._settings
        credentials = (settings.postgres_password, settings.access_key, settings.secret_key)
        ours = (str(self._home), settings.postgres_url, *credentials)
        return sorted((text for text in ours if text), key=len, reverse=True)


class _Child:
    """Answers `{"inspect": sql}`, `{"look": relation, …}` and `{"run": number, …}`; obeys `{"interrupt": …}`.

    The first message is `{"settings": …, "home": …}`.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._progress = _Progress()
        self._runner: _Runner | None = None

    def handle(self, message: Message, tell: Tell) -> Message:
        """Answer one message of the pool's."""
        if self._runner is None:
            settings = DuckDBSettings.from_message(message["settings"])
            self._runner = _Runner(settings, Path(message["home"]), self._progress)
            return {"landlock": self._layers.landlock, "seccomp": self._layers.seccomp}
        if "inspect" in message:
            return _answer(partial(self._runner.inspect, message))
        if "look" in message:
            return _answer(partial(self._runner.look, message))
        self._progress.begin(message["run"])
        failpoint(Failpoint.CHILD_BEFORE)
        try:
            answer = _answer(partial(self._runner.run, message, tell))
            failpoint(Failpoint.CHILD_AFTER)
            return answer
        finally:
            self._progress.end()

    def notice(self, message: Message) -> None:
        """Obey an interrupt."""
        self._progress.interrupt(message["interrupt"])


def _answer(work: Callable[[], Message]) -> Message:
    """Return what one of the runner's methods returns, or a message for what it raises."""
    try:
        return work()
    except QueryFailed as failure:
        return _to_failure_message(failure, known=failure.code is not ErrorCode.INTERNAL)
    except _Failed as failure:
        return _to_failure_message(failure.ours, known=failure.known)
    except EngineUnavailable as failure:
        return {"unavailable": failure.outage.name}
    except errors.Interrupted:
        return {"interrupted": True}


def _to_exception(meaning: errors.Meaning) -> Exception:
    if isinstance(meaning.ours, QueryFailed):
        return _Failed(meaning.ours, known=meaning.known)
    return meaning.ours


def _texts(parameters: Mapping[str, Parameter]) -> tuple[str, ...]:
    """The parameters' values as text, without NULL and booleans, which are not confidential."""
    return tuple(str(value) for value in parameters.values() if value is not None and not isinstance(value, bool))


def _to_failure_message(failure: QueryFailed, *, known: bool) -> Message:
    return {"failed": failure.code, "message": failure.message, "detail": failure.detail, "tainted": not known}


def _to_message(read: Read) -> list[Any]:
    """The message for one relation with PII: its name, and its columns or None."""
    return [read.relation, None if read.columns is None else sorted(read.columns)]


def _relation(fields: list[Any]) -> Relation:
    name, kind, location, version, pii_columns, registered = fields
    return Relation(name, RelationKind(kind), location, version, frozenset(pii_columns), registered)


if __name__ == "__main__":
    # Before `serve` starts a thread. The pool says which TCP ports and which files a query may need.
    arguments = sys.argv[1:]
    local_sockets = LOCAL_SOCKETS in arguments
    ports = tuple(int(argument) for argument in arguments if argument.isdecimal())
    files = tuple(Path(argument) for argument in arguments if argument.startswith("/"))
    collect_garbage_less_often()
    # Block pandas: if installed, DuckDB imports it for the first query parameter (0.3 s, 80 MB); no child needs it.
    sys.modules["pandas"] = None  # type: ignore[assignment]
    child = _Child(confine(Path(os.environ["HOME"]), ports, files, local_sockets=local_sockets))
    serve(child.handle, child.notice)
