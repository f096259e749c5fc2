"""A run: workers over all mutants, each restarted behind the mutant that killed it."""

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.fuzz.worker import JUDGING, Told, work

# A fresh process imports DuckDB and makes its world in 2 s; a busy machine takes ten times as long.
_START_SECONDS = 60.0

# How often a worker that says nothing is looked at.
_LOOK_SECONDS = 0.5


@dataclass(slots=True)
class Counts:
    """What a run did. `findings` are numbers of mutants and what was found with them."""

    mutants: int = 0
    parsed: int = 0
    allowed: int = 0
    executed: int = 0
    faults: int = 0
    seconds: float = 0.0
    trees: set[bytes] = field(default_factory=set)
    findings: list[tuple[int, str]] = field(default_factory=list)

    def add(self, told: Told) -> None:
        """Add what a worker has told."""
        self.mutants += told.mutants
        self.parsed += told.parsed
        self.allowed += told.allowed
        self.executed += told.executed
        self.faults += told.faults
        self.trees |= told.trees
        self.findings += told.findings


class Run:
    """One run over `mutants` mutants of a seed. `stuck_seconds` is how long one may take in the gate or beyond its
    interrupt; `sabotage` names a check to take out, and ends the run with the first finding."""

    def __init__(
        self,
        seed: int,
        mutants: int,
        *,
        workers: int = 2,
        stuck_seconds: float = 30.0,
        sabotage: str | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self._seed = seed
        self._sabotage = sabotage
        self._stuck_seconds = stuck_seconds
        self._max_seconds = max_seconds
        self._counts = Counts()
        share = -(-mutants // workers)
        self._lanes = [_Lane(range(start, min(start + share, mutants))) for start in range(0, mutants, share)]

    def go(self) -> Counts:
        """Run to the end, or to `max_seconds`."""
        started = time.monotonic()
        for lane in self._lanes:
            lane.start(self._seed, self._sabotage)
        try:
            while running := [lane for lane in self._lanes if lane.is_running]:
                wait([lane.pipe for lane in running], timeout=_LOOK_SECONDS)
                for lane in running:
                    self._look_at(lane)
                if self._is_over(time.monotonic() - started):
                    break
        finally:
            for lane in self._lanes:
                lane.stop()
        self._counts.seconds = time.monotonic() - started
        return self._counts

    def _is_over(self, seconds: float) -> bool:
        if self._sabotage and self._counts.findings:
            return True
        return self._max_seconds is not None and seconds > self._max_seconds

    def _look_at(self, lane: "_Lane") -> None:
        for told in lane.heard():
            self._counts.add(told)
        if not lane.is_running:
            return
        number, phase, since = lane.progress
        if not lane.is_alive:
            self._counts.findings.append((int(number), "the worker died " + _where(phase)))
        elif time.monotonic() - since > (self._stuck_seconds if phase else _START_SECONDS):
            self._counts.findings.append((int(number), "the worker hangs, stuck " + _where(phase)))
        else:
            return
        lane.stop()
        lane.skip(int(number))
        lane.start(self._seed, self._sabotage)


class _Lane:
    """A stretch of mutants and the process that goes through it."""

    def __init__(self, numbers: range) -> None:
        self._left = numbers
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self.pipe: Connection
        self.progress: Any = self._context.Array("d", 3, lock=False)
        self.is_running = False

    @property
    def is_alive(self) -> bool:
        """Whether the process is there; one that is done is none that died."""
        return bool(self._process.is_alive())

    def start(self, seed: int, sabotage: str | None) -> None:
        """Start a process over what is left."""
        if not self._left:
            return
        self.progress[0], self.progress[1], self.progress[2] = self._left[0], 0.0, time.monotonic()
        self.pipe, theirs = self._context.Pipe(duplex=False)
        arguments = (theirs, self.progress, seed, self._left, sabotage)
        self._process = self._context.Process(target=work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.is_running = True

    def heard(self) -> Iterator[Told]:
        """What the process has told; afterwards it may have ended."""
        try:
            while self.is_running and self.pipe.poll():
                told: Told | None = self.pipe.recv()
                if told is None:
                    self.stop()
                    return
                self._left = self._left[told.mutants :]
                yield told
        except EOFError:
            self._process.join()

    def skip(self, number: int) -> None:
        """Go on behind that mutant."""
        self._left = range(max(number + 1, self._left.start), self._left.stop)

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self.is_running:
            self.is_running = False
            self._process.kill()
            self._process.join()
            self.pipe.close()


def _where(phase: float) -> str:
    return "in the gate" if phase == JUDGING else "while it ran what the gate let through"
