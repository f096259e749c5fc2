"""Stops a running query that writes or reads more than it may, long before it would have ended."""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engines.duckdb.traffic import Traffic
from engines.protocol import QueryFailed
from processes.serving import FAULTY_HANDLER
from queryd.events import ErrorCode

# A disk writes some 100 MB in that time and a network brings as much: that is how far a query can overstep its limits.
# A look costs 0.1 ms.
_TICK_SECONDS = 0.05

# What comes over the wire is more than what is scanned: headers, TLS, footers and Postgres's protocol. Only DuckDB's
# own figure, at the end, decides on the last few percent.
_WIRE_FACTOR, _WIRE_BYTES = 1.05, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query may write and read, in bytes; None is no limit."""

    max_bytes: int | None
    max_bytes_scanned: int | None

    def judge_written(self, count: int) -> None:
        """Raises `QueryFailed` with RESULT_TOO_LARGE for more than may be written."""
        if self.max_bytes is not None and count > self.max_bytes:
            raise QueryFailed(ErrorCode.RESULT_TOO_LARGE, f"The result is larger than {self.max_bytes} bytes.")

    def judge_scanned(self, count: int) -> None:
        """Raises `QueryFailed` with SCAN_LIMIT_EXCEEDED for more than may be scanned."""
        if self.max_bytes_scanned is not None and count > self.max_bytes_scanned:
            message = f"The query scans more than {self.max_bytes_scanned} bytes."
            raise QueryFailed(ErrorCode.SCAN_LIMIT_EXCEEDED, message)


@dataclass(slots=True)
class _Run:
    limits: Limits
    folder: Path
    interrupt: Callable[[], None]
    # From the first look on: a query that ends before it has none.
    traffic: Traffic | None = None
    verdict: QueryFailed | None = field(default=None)


class Watch:
    """One thread that looks at whichever query runs. A query that is over before the first look costs it nothing."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._run: _Run | None = None
        self._asleep = False
        threading.Thread(target=self._look_on, name="watch", daemon=True).start()

    def begin(self, limits: Limits, folder: Path, interrupt: Callable[[], None]) -> None:
        """A query starts that writes into `folder`; `interrupt` is called until `end`, once it has overstepped."""
        if limits.max_bytes is None and limits.max_bytes_scanned is None:
            return
        with self._changed:
            self._run = _Run(limits, folder, interrupt)
            if self._asleep:
                self._changed.notify()

    def end(self) -> QueryFailed | None:
        """The query has ended: why it was interrupted, if it was. From here on `interrupt` is not called any more."""
        with self._changed:
            run, self._run = self._run, None
        return None if run is None else run.verdict

    def _look_on(self) -> None:
        try:
            self._look_at_runs()
        finally:
            # Only an exception leads here. Without a watch no limit would hold, so the process ends.
            sys.excepthook(*sys.exc_info())
            os._exit(FAULTY_HANDLER)

    def _look_at_runs(self) -> None:
        while True:
            run = self._wait()
            if run.verdict is None:
                run.verdict = _judge(run)
            with self._changed:
                # An interrupt that comes between two of DuckDB's statements is lost, so it is said at every look.
                if run is self._run and run.verdict is not None:
                    run.interrupt()

    def _wait(self) -> _Run:
        """The run that goes on after the next tick."""
        with self._changed:
            while (run := self._run) is None or not self._ticked():
                if run is None:
                    self._asleep = True
                    self._changed.wait()
                    self._asleep = False
            return run

    def _ticked(self) -> bool:
        """Let a tick pass, in which nobody notifies: a run that begins meanwhile is looked at a little earlier."""
        before = self._run
        self._changed.wait(_TICK_SECONDS)
        return self._run is before


def _judge(run: _Run) -> QueryFailed | None:
    try:
        run.limits.judge_written(_bytes_in(run.folder))
        if run.limits.max_bytes_scanned is not None:
            if run.traffic is None:
                run.traffic = Traffic()
            run.limits.judge_scanned(int((run.traffic.received() - _WIRE_BYTES) / _WIRE_FACTOR))
    except QueryFailed as verdict:
        return verdict
    return None


def _bytes_in(folder: Path) -> int:
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total
