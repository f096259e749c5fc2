"""How fast is it, against what, and is that fast enough? Prints one table; exits 1 and names the rows that are missed.

Run it from the checkout: `make bench`, or `python -m bench [ROW ...]`.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.analytics import measure_exports, measure_memory, measure_tpch
from bench.backlog import measure_backlog, measure_restart
from bench.cpu import measure_cpu, measure_idle
from bench.latency import measure_latency, measure_loaded
from bench.plots import write_plots
from bench.rows import Bound, Row, find_failures, to_table
from bench.small_queries import measure_inline, measure_small
from bench.stored import measure_snapshot, measure_stored
from bench.world import SMALL, Sizes, World

# In the order of the table. Each makes one row or several that are measured together.
MEASURES: Mapping[str, Callable[[World], list[Row]]] = {
    "small": measure_small,
    "cpu": measure_cpu,
    "idle": measure_idle,
    "inline": measure_inline,
    "latency": measure_latency,
    "loaded": measure_loaded,
    "export": measure_exports,
    "tpch": measure_tpch,
    "memory": measure_memory,
    "stored": measure_stored,
    "snapshot": measure_snapshot,
    "backlog": measure_backlog,
    "restart": measure_restart,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows that are named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(MEASURES)}; all by default")
    parser.add_argument("--runs", type=int, help="runs of each")
    parser.add_argument("--queries", type=int, help="small queries in a run")
    parser.add_argument("--small", action="store_true", help="small runs, which show only that every row runs")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the plots there")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    given = parser.parse_args(argv)
    if unknown := set(given.rows) - MEASURES.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    sizes = SMALL if given.small else Sizes()
    sizes = replace(sizes, runs=given.runs or sizes.runs, queries=given.queries or sizes.queries)
    with World(sizes) as world:
        rows = [row for name in given.rows or MEASURES for row in _measure(name, world)]
    if given.plots is not None:
        write_plots(rows, given.plots)
    print(json.dumps([row.to_json() for row in rows]) if given.json else to_table(rows), flush=True)
    if failures := find_failures(rows):
        print(f"missed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


def _measure(name: str, world: World) -> list[Row]:
    """Measure one entry of `MEASURES`. A failure must not lose the half hour that the other rows took."""
    try:
        return MEASURES[name](world)
    except (RuntimeError, TimeoutError) as error:
        world.report(traceback.format_exc())
        why = {"why": str(error).partition("\n")[0]}
        return [Row(name, "failed", "", Bound.AT_MOST, 0.0, "", None, detail=why)]


if __name__ == "__main__":
    sys.exit(main())
