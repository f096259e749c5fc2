"""CPU per small query, by process, under load and while idle, beside the budget that performance.md gives.

A run publishes small queries at once to a warm `queryd up` and waits for their terminal events. CPU is user plus system
time of every process of the stack, as the kernel counts it; a process that ends meanwhile is counted with its parent.
The load generator is not in.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum

import psutil

from bench.load import Site, make_small
from bench.rows import Bound, Row
from bench.world import World
from tests.acceptance.stack import Stack

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

# ms of CPU per query, from the design's section on performance. The relay's includes broker and projector.
BUDGET: Mapping[Part, float] = {
    Part.EXECUTOR: 1.2,
    Part.CHILDREN: 1.6,
    Part.STORE: 1.0,
    Part.POSTGRES: 0.4,
    Part.RELAY: 1.2,
}


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


def measure_cpu(world: World) -> list[Row]:
    """The row of CPU per query; every server is in it."""
    runs = []
    for number in range(world.sizes.runs):
        runs.append(_burst(world.embedded, world.sizes.queries))
        world.report(f"run {number + 1} of {world.sizes.runs}: {sum(runs[-1].values()):.2f} ms of CPU a query")
    used = {part: statistics.median(run[part] for run in runs) for part in Part}
    world.report(_to_table(used, BUDGET))
    total = statistics.median(sum(run.values()) for run in runs)
    detail = {part.value: round(value, 2) for part, value in used.items()}
    return [Row("cpu", "CPU per small query, all servers", "", Bound.AT_MOST, 5.8, " ms", total, 9.0, detail)]


def measure_burst(site: Site, queries: int) -> float:
    """Milliseconds of CPU per query, all servers included, of one burst."""
    return sum(_burst(site, queries).values())


def _burst(site: Site, queries: int) -> dict[Part, float]:
    time.sleep(_SETTLE_SECONDS)
    before = read_cpu(site.stack)
    site.queryd.measure_rate(make_small(queries))
    time.sleep(_SETTLE_SECONDS)
    after = read_cpu(site.stack)
    return {part: (after[part] - before[part]) * 1000 / queries for part in Part}


def measure_idle(world: World) -> list[Row]:
    """The row of CPU while nothing is asked."""
    stack = world.embedded.stack
    # The reader of events is a client: what it asks the broker for is not queryd's.
    with world.embedded.queryd.told.paused():
        time.sleep(_SETTLE_SECONDS)
        before, started = read_cpu(stack), time.monotonic()
        time.sleep(world.sizes.idle_seconds)
        after, seconds = read_cpu(stack), time.monotonic() - started
    used = {part: (after[part] - before[part]) * 100 / seconds for part in Part}
    world.report(_to_table(used, {}))
    detail = {part.value: round(value, 2) for part, value in used.items()}
    total = sum(used.values())
    return [Row("idle", "idle CPU of `queryd up`", "one core", Bound.AT_MOST, 8.0, " %", total, detail=detail)]


def _to_table(used: Mapping[Part, float], budget: Mapping[Part, float]) -> str:
    lines = [
        f"  {part.value:18}{value:8.2f}{f'{budget[part]:8.1f} budget' if part in budget else ''}"
        for part, value in used.items()
    ]
    return "\n".join([*lines, f"  {'together':18}{sum(used.values()):8.2f}"])
