"""What small queries feel of resource bombs in the other slots, against what they feel of a plain spin of the CPU.

One slot runs small queries, ten a second at most; as many slots as there are CPUs run the bombs of
`tests/data/resource-bombs.jsonl` that the gate lets through, with a deadline of 3 s, in children of one thread each. In
the runs between, as many processes count upwards for ever instead. A run ends with its last small query; bombs and spin
alternate.

Run it from the checkout: `python -m bench.neighbours [--queries N] [--runs N] [--ungated] [--json]`.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engines.duckdb import pool
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import EngineCrashed, Execution, QueryFailed
from processes.child import minimal_environment
from queryd.events import ErrorCode, OrgId, OutputFormat, QueryId

_ROOT = Path(__file__).parents[1]
_BOMBS = _ROOT / "tests" / "data" / "resource-bombs.jsonl"
_UNGATED_CHILD = _ROOT / "tests" / "integration" / "ungated_child.py"
_SMALL = "SELECT count(*) AS n, sum(i) AS total FROM range(1000) AS t(i)"
_DEADLINE_SECONDS = 3.0
_WARM_UP = 30
# Without it a run would be over before the first bomb meets its deadline: most of what a neighbour might feel, a killed
# child and the start of another, comes after that.
_PAUSE_SECONDS = 0.1
_MEMORY = 512 * 1024 * 1024


class _Bench:
    """The slot whose queries are measured, and what runs beside it."""

    def __init__(self, scratch: Path, neighbours: int) -> None:
        self._scratch = scratch
        self._neighbours = neighbours
        self._numbers = itertools.count()
        self.outcomes: Counter[str] = Counter()
        # From one run to the next it goes on where it was.
        self._turn: Iterator[str] = iter(())
        self.bombs = [json.loads(line)["sql"] for line in _BOMBS.read_text("utf-8").splitlines()]

    def engine(self, children: int) -> DuckDBEngine:
        """An engine whose children have one thread each."""
        return DuckDBEngine(DuckDBSettings(_MEMORY, 1, self._scratch, max_scratch_bytes=_MEMORY), children)

    def prepare(self, sql: str, timeout_seconds: float) -> Execution:
        """An execution with an empty directory of its own."""
        folder = self._scratch / f"attempt-{next(self._numbers)}"
        folder.mkdir()
        org, query = OrgId(str(uuid.UUID(int=7))), QueryId(str(uuid.uuid4()))
        return Execution(query, org, sql, {}, (), OutputFormat.JSON, folder, timeout_seconds)

    async def measure(self, quiet: DuckDBEngine, queries: int) -> list[float]:
        """Milliseconds of each small query."""
        taken = []
        for _ in range(queries):
            execution = self.prepare(_SMALL, 60.0)
            started = time.perf_counter()
            output = await quiet.execute(execution)
            taken.append((time.perf_counter() - started) * 1000)
            output.path.unlink()
            await asyncio.sleep(_PAUSE_SECONDS)
        return taken

    @asynccontextmanager
    async def beside_bombs(self, loud: DuckDBEngine) -> AsyncIterator[None]:
        """Every other slot busy with bombs."""

        async def throw() -> None:
            while True:
                outcome = await _outcome(loud.execute(self.prepare(next(self._turn), _DEADLINE_SECONDS)))
                self.outcomes[outcome] += 1

        throwing = [asyncio.create_task(throw()) for _ in range(self._neighbours)]
        try:
            yield
        finally:
            for task in throwing:
                task.cancel()
            ended = await asyncio.gather(*throwing, return_exceptions=True)
            unexpected = [error for error in ended if not isinstance(error, asyncio.CancelledError)]
            if unexpected:
                raise RuntimeError(f"bombs ended the engine: {unexpected}")

    @contextmanager
    def beside_spin(self) -> Iterator[None]:
        """Every other slot's CPU busy with nothing."""
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(self._neighbours)]
        try:
            yield
        finally:
            for process in spinning:
                process.kill()
                process.wait()

    async def drop_rejected(self, loud: DuckDBEngine) -> None:
        """Leave out the bombs that the gate refuses: they cost a millisecond."""
        outcomes = [(sql, await _outcome(loud.execute(self.prepare(sql, 0.5)))) for sql in self.bombs]
        self.bombs = [sql for sql, outcome in outcomes if outcome != ErrorCode.SQL_REJECTED]
        self._turn = itertools.cycle(self.bombs)


async def _outcome(running: Awaitable[object]) -> str:
    try:
        await running
    except QueryFailed as failure:
        return failure.code
    except EngineCrashed:
        return "crashed"
    return "ended"


async def compare(queries: int, runs: int, report: Callable[[str], None]) -> dict[str, Any]:
    """`runs` pairs of runs; times are milliseconds, ratios bombs over spin."""
    neighbours = os.cpu_count() or 1
    p95s: dict[str, list[float]] = {"bombs": [], "spin": []}
    with tempfile.TemporaryDirectory() as scratch:
        bench = _Bench(Path(scratch), neighbours)
        quiet, loud = bench.engine(1), bench.engine(neighbours)
        try:
            await quiet.start()
            await loud.start()
            await bench.drop_rejected(loud)
            await bench.measure(quiet, _WARM_UP)
            alone = await bench.measure(quiet, queries)
            for name in (name for pair in range(runs) for name in sorted(p95s, reverse=pair % 2 == 0)):
                if name == "bombs":
                    async with bench.beside_bombs(loud):
                        measured = await bench.measure(quiet, queries)
                else:
                    with bench.beside_spin():
                        measured = await bench.measure(quiet, queries)
                p95s[name].append(_p95(measured))
                report(f"run {len(p95s[name])} of {runs}: beside {name:5} p95 {p95s[name][-1]:7.1f} ms")
        finally:
            await quiet.close()
            await loud.close()
    return {
        "queries": queries,
        "bombs": len(bench.bombs),
        "neighbours": neighbours,
        "p95_alone": round(_p95(alone), 1),
        "p95": {name: [round(each, 1) for each in measured] for name, measured in p95s.items()},
        "ratio_of_medians": round(statistics.median(p95s["bombs"]) / statistics.median(p95s["spin"]), 2),
        "outcomes": dict(bench.outcomes),
    }


def without_gate() -> ExitStack:
    """While it is entered, children start with a gate that lets everything through."""
    stack = ExitStack()
    stack.enter_context(
        patch.object(pool, "room_command", lambda _module, *given: [sys.executable, str(_UNGATED_CHILD), *given])
    )
    stack.enter_context(
        patch.object(pool, "minimal_environment", lambda home: minimal_environment(home) | {"PYTHONPATH": str(_ROOT)})
    )
    return stack


def _p95(taken: Sequence[float]) -> float:
    return statistics.quantiles(taken, n=20)[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print it; with `--json` as one line on stdout, and nothing after it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=300, help="small queries in a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each")
    parser.add_argument("--ungated", action="store_true", help="let all bombs through")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args(argv)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with without_gate() if arguments.ungated else nullcontext():
        found = asyncio.run(compare(arguments.queries, arguments.runs, report))
    if arguments.json:
        print(json.dumps(found), flush=True)
        return
    print(f"{found['queries']} small queries on one slot; {found['bombs']} bombs on {found['neighbours']} others")
    print(f"  alone  p95 {found['p95_alone']:7.1f} ms")
    for name, measured in found["p95"].items():
        print(f"  {name:6} p95 {statistics.median(measured):7.1f} ms   of {measured}")
    print(f"  ratio of the medians {found['ratio_of_medians']}; bombs ended as {found['outcomes']}")


if __name__ == "__main__":
    main()
