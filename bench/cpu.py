"""CPU per small query, by process, under load and while idle, beside the budget that performance.md gives.

A run publishes `--queries` small queries at once to a warm `queryd up` and waits for their terminal events. CPU is user
plus system time of every process of the stack, as the kernel counts it; a process that ends meanwhile is counted with
its parent. The load generator is not in.

Run it from the checkout: `python -m bench.cpu [--queries N] [--idle SECONDS] [--bootstrap HOST:PORT] [--json]`.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum

import psutil

from bench.small_queries import run_queryd
from tests.acceptance.stack import Stack, run_stack
from tests.acceptance.stranger import Contract, Publisher, StatusTail

# Enough to start every child, to fill the pools, and to import what is imported late.
_WARM_UP = 200
# What a burst leaves behind, such as the relay's last batch and the deletion of its rows, takes a second or two.
_SETTLE_SECONDS = 3.0


class Part(Enum):
    """A part of the stack to which a process belongs. The values are what the table prints."""

    EXECUTOR = "executor"
    CHILDREN = "DuckDB children"
    POSTGRES = "Postgres"
    STORE = "S3 server"
    BROKER = "broker"
    RELAY = "relay"
    PROJECTOR = "projector"
    OTHER = "other"


# The first match decides: words of a command line.
_SIGNS: tuple[tuple[str, Part], ...] = (
    ("engines.duckdb.child", Part.CHILDREN),
    ("service.run executor", Part.EXECUTOR),
    ("service.run relay", Part.RELAY),
    ("service.run projector", Part.PROJECTOR),
    ("postgres", Part.POSTGRES),
    ("weed", Part.STORE),
    ("tansu", Part.BROKER),
)

# ms of CPU per query, from the design's section on performance. Relay, broker and projector share one figure.
BUDGET: Mapping[Part, float] = {
    Part.EXECUTOR: 1.2,
    Part.CHILDREN: 1.6,
    Part.STORE: 1.0,
    Part.POSTGRES: 0.4,
    Part.RELAY: 1.2,
}
_TOGETHER = (Part.RELAY, Part.BROKER, Part.PROJECTOR)
TOTAL_BUDGET = 5.4


@dataclass(frozen=True, slots=True)
class CpuUse:
    """What a stack used: `loaded_ms` per query and in all, `idle_percent` of one core, by part."""

    queries: int
    queries_per_second: float
    loaded_ms: dict[str, float]
    total_ms: float
    idle_percent: dict[str, float]
    total_idle_percent: float


def read_cpu(stack: Stack) -> dict[Part, float]:
    """Seconds of CPU that each part of the stack has used since it started."""
    root = psutil.Process(stack.process.pid)
    used: dict[Part, float] = defaultdict(float)
    for process in (root, *root.children(recursive=True)):
        try:
            with process.oneshot():
                part, times = _find_part(process), process.cpu_times()
        except psutil.NoSuchProcess:
            # Its parent has its times from now on.
            continue
        used[part] += times.user + times.system + times.children_user + times.children_system
    return used


def _find_part(process: psutil.Process) -> Part:
    if process.name() == "postgres":
        return Part.POSTGRES
    command = " ".join(process.cmdline())
    if "--room service.embedded.warden" in command:
        # It runs a server as its child; what it uses itself belongs to nobody's budget.
        return Part.OTHER
    return next((part for sign, part in _SIGNS if sign in command), Part.OTHER)


def measure(stack: Stack, queries: int, idle_seconds: float) -> CpuUse:
    """CPU of a warm stack under one burst of `queries`, and then idle for `idle_seconds`."""
    contract = Contract()
    with Publisher(stack.servers.bootstrap) as publisher, StatusTail(stack.servers.bootstrap, contract) as tail:
        run_queryd(publisher, contract, tail, _WARM_UP)
        time.sleep(_SETTLE_SECONDS)
        before = read_cpu(stack)
        rate = run_queryd(publisher, contract, tail, queries)
        time.sleep(_SETTLE_SECONDS)
        after = read_cpu(stack)
    time.sleep(_SETTLE_SECONDS)
    idle_before, started = read_cpu(stack), time.monotonic()
    time.sleep(idle_seconds)
    idle_after, seconds = read_cpu(stack), time.monotonic() - started
    loaded = {part.value: (after[part] - before[part]) * 1000 / queries for part in Part}
    idle = {part.value: (idle_after[part] - idle_before[part]) * 100 / seconds for part in Part}
    return CpuUse(
        queries=queries,
        queries_per_second=round(rate, 1),
        loaded_ms={name: round(value, 2) for name, value in loaded.items()},
        total_ms=round(sum(loaded.values()), 2),
        idle_percent={name: round(value, 2) for name, value in idle.items()},
        total_idle_percent=round(sum(idle.values()), 2),
    )


def to_table(use: CpuUse) -> str:
    """The figures as a table, with the budget beside them."""
    lines = [f"{'':18}{'ms a query':>12}{'budget':>9}{'idle, % of a core':>20}"]
    for part in Part:
        budget = f"{BUDGET[part]:.1f}" if part in BUDGET else ("^" if part in _TOGETHER else "")
        lines.append(f"{part.value:18}{use.loaded_ms[part.value]:12.2f}{budget:>9}{use.idle_percent[part.value]:20.2f}")
    lines.append(f"{'together':18}{use.total_ms:12.2f}{TOTAL_BUDGET:>9.1f}{use.total_idle_percent:20.2f}")
    lines.append(f"{use.queries} queries at {use.queries_per_second} queries/s; ^ is in the relay's budget")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a stack of its own and print the table; with `--json` one line of JSON on stdout instead."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=1000, help="queries in the measured burst")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds for which the idle stack is measured")
    parser.add_argument("--bootstrap", help="a Kafka to use instead of the embedded broker")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args(argv)
    with run_stack(arguments.bootstrap) as stack:
        use = measure(stack, arguments.queries, arguments.idle)
    print(json.dumps(asdict(use)) if arguments.json else to_table(use), flush=True)


if __name__ == "__main__":
    main()
