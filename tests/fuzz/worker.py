"""The process that judges and runs mutants; whatever they do to it costs the run one process."""

import json
import re
import resource
import tempfile
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Protocol

import duckdb

from engines.duckdb import errors
from engines.duckdb.gate import Gate
from engines.protocol import QueryFailed
from queryd.events import Parameter
from tests.fuzz.mutations import Mutant, Mutator
from tests.fuzz.sabotage import SABOTAGES
from tests.fuzz.world import RELATIONS, World
from tests.sql_trees import runs_as_judged

# Enough for DuckDB, Python and the gate's largest trees; what needs more has escaped every threshold.
_ADDRESS_SPACE = 4 * 1024**3

# Counts are told that often, so that a process that dies takes few with it.
_TELL_EVERY = 100

# Which phase a mutant is in, as the parent sees it.
JUDGING, RUNNING = 1.0, 2.0

# Internal errors of DuckDB 1.5.5 that the gate keeps statements from. After any other the engine replaces the child.
_PREVENTED_FAULTS = ("Attempted to dereference shared_ptr that is NULL", "Memory allocation failure")

_LOCATION = re.compile(r'"query_location":\d+,?')


class Progress(Protocol):
    """Shared memory: the number of the mutant under way, its phase, and since when it is in it (monotonic)."""

    def __setitem__(self, index: int, value: float) -> None: ...

    def __getitem__(self, index: int) -> float: ...


@dataclass(slots=True)
class Told:
    """What the process has to say since it last did. `faults` are DuckDB's own, which cost an instance."""

    mutants: int = 0
    parsed: int = 0
    allowed: int = 0
    executed: int = 0
    faults: int = 0
    trees: set[bytes] = field(default_factory=set)
    findings: list[tuple[int, str]] = field(default_factory=list)


class _ObservedGate(Gate):
    """A gate that remembers what its parser said."""

    said: str | None = None

    def _serialize(self, text: str) -> str:
        self.said = None
        self.said = super()._serialize(text)
        return self.said


def work(pipe: Connection, progress: Progress, seed: int, numbers: range, sabotage: str | None) -> None:
    """Judge and run the mutants of these numbers; tell through the pipe, and None when all are done."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sabotage:
        SABOTAGES[sabotage].apply()
    with tempfile.TemporaryDirectory() as folder:
        _Worker(progress, Path(folder), Random(seed)).work(pipe, Mutator(seed), numbers)
    pipe.send(None)


class _Worker:
    def __init__(self, progress: Progress, folder: Path, random: Random) -> None:
        self._progress = progress
        self._folder = folder
        self._random = random
        self._gate = _ObservedGate()
        # The first statement of a parser takes long, and is nobody's fault.
        self._gate.judge("SELECT 1", RELATIONS, {})
        self._parser = duckdb.connect(":memory:")
        self._told = Told()
        self._since_state: list[int] = []
        self._world = self._make_world()
        self._state = self._world.state()

    def _make_world(self) -> World:
        return World(Path(tempfile.mkdtemp(dir=self._folder)), self._random)

    def work(self, pipe: Connection, mutator: Mutator, numbers: range) -> None:
        for number in numbers:
            self._try(number, mutator.make(number))
            if self._told.findings or self._told.mutants == _TELL_EVERY or number == numbers[-1]:
                self._check_state()
                pipe.send(self._told)
                self._told = Told()

    def _enter(self, number: int, phase: float) -> None:
        self._progress[0], self._progress[1], self._progress[2] = number, phase, time.monotonic()

    def _try(self, number: int, mutant: Mutant) -> None:
        self._told.mutants += 1
        mutant = self._place(mutant)
        self._enter(number, JUDGING)
        text = self._judge(number, mutant)
        self._count(self._gate.said)
        if text is not None:
            self._told.allowed += 1
            self._check_text(number, text)
            self._enter(number, RUNNING)
            self._run(number, text, mutant.parameters)
            if self._world.was_called():
                self._find(number, "a connection to another host")
        self._enter(number, 0.0)

    def _place(self, mutant: Mutant) -> Mutant:
        """The mutant with the address of the world's listener."""
        given = mutant.parameters.items()
        parameters = {name: self._world.place(value) if isinstance(value, str) else value for name, value in given}
        return Mutant(self._world.place(mutant.sql), parameters)

    def _judge(self, number: int, mutant: Mutant) -> str | None:
        self._gate.said = None
        try:
            return self._gate.judge(mutant.sql, RELATIONS, mutant.parameters).text
        except QueryFailed as refusal:
            if self._world.canary in refusal.message:
                self._find(number, "the canary in a refusal")
        except Exception as error:  # noqa: BLE001 - any exception but a refusal is what the run looks for
            self._find(number, f"{type(error).__name__} in the gate")
        return None

    def _check_text(self, number: int, text: str) -> None:
        """What the engine runs, the text between brackets, has to be what was judged."""
        try:
            if runs_as_judged(self._parser, json.loads(self._gate.said or "")["statements"][0]["node"], text):
                return
        except (duckdb.Error, ValueError, LookupError):
            # Then it is no SELECT, or none between brackets.
            pass
        self._find(number, "another statement between brackets")

    def _run(self, number: int, text: str, parameters: dict[str, Parameter]) -> None:
        self._since_state.append(number)
        try:
            shown = self._world.run(text, parameters)
        except (duckdb.OutOfMemoryException, MemoryError):
            self._find(number, "more memory than the statement may have")
        except (duckdb.FatalException, duckdb.InternalException) as error:
            # A fault of DuckDB's own, which ends its instance: the engine makes a new one too.
            self._told.faults += 1
            if any(prevented in str(error) for prevented in _PREVENTED_FAULTS):
                self._find(number, "an internal error that the gate prevents")
            self._check_error(number, text, parameters, error)
            self._renew_world()
        except (duckdb.Error, UnicodeError) as error:
            # A statement may fail; that it may not run is another thing.
            self._check_error(number, text, parameters, error)
        except (ValueError, ImportError):
            # Python has no value for what DuckDB gives; the engine fetches no values.
            return
        else:
            self._told.executed += 1
            if self._world.canary in shown:
                self._find(number, "the canary in a result")

    def _check_error(self, number: int, text: str, parameters: dict[str, Parameter], error: Exception) -> None:
        """What the author is told holds no canary, and a child that goes on is sound."""
        texts = tuple(value for value in parameters.values() if isinstance(value, str))
        meaning = errors.translate(error, errors.Placed(text, text, 0, texts))
        if isinstance(meaning.ours, QueryFailed) and self._world.canary in (meaning.ours.detail or ""):
            self._find(number, "the canary in an error's detail")
        if meaning.known and not self._world.is_sound():
            self._find(number, "a corrupt child was not retired")
            self._renew_world()

    def _renew_world(self) -> None:
        # This takes as long as it does at the start, and is no mutant's fault.
        self._progress[1], self._progress[2] = 0.0, time.monotonic()
        self._world.close()
        self._world = self._make_world()
        self._state = self._world.state()

    def _check_state(self) -> None:
        ran, self._since_state = self._since_state, []
        state = self._world.state()
        if state != self._state:
            self._find(ran[-1] if ran else -1, "something changed")
            self._state = state

    def _count(self, said: str | None) -> None:
        """A mutant that the parser takes for SQL, be it a SELECT or not, and its tree if it has one."""
        if said is None:
            return
        if said.startswith('{"error":false'):
            self._told.parsed += 1
            self._told.trees.add(blake2b(_LOCATION.sub("", said).encode(), digest_size=8).digest())
        elif '"error_type":"not implemented"' in said:
            self._told.parsed += 1

    def _find(self, number: int, what: str) -> None:
        self._told.findings.append((number, what))
