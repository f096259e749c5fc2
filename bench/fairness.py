"""How long one org's single query takes while another org's ten thousand wait, against an idle service.

One query after another is timed: from its publish to its terminal event as a reader of the status topic sees it, of
which the embedded broker alone takes some 200 ms, and, by its events, from its admission to its end. There are three
phases of one run on one stack: alone; with the slot kept busy by another org that has never more than one query
waiting; and with another org's whole crowd waiting. The second says what a busy machine costs, so that what is left in
the third is the crowd's waiting. All queries come by the interactive lane, and the crowd's are all alike. Its queries
are admitted, and their events read, before the third phase begins; how long that takes is reported too, and how long a
query takes that was published right behind them.

Run it from the checkout: `python -m bench.fairness [--crowd N] [--probes N] [--bootstrap HOST:PORT] [--json]`.
"""

import argparse
import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.acceptance.checker import Valid
from tests.acceptance.stack import Stack, run_stack
from tests.acceptance.stranger import Contract, Publisher, StatusTail
from tests.acceptance.workload import make_fields, to_outgoing

# What a person's dashboard asks.
_PROBE = "SELECT 42 AS answer"
# Some 20 ms of one core: long enough that a crowd of them lasts for minutes, short enough that the wait for the one
# that runs does not hide everything else.
_CROWD = "SELECT sum(sqrt(i)) AS total FROM range(2000000) AS t(i)"
_PROBE_ORG, _CROWD_ORG = (str(uuid.uuid5(uuid.NAMESPACE_URL, f"queryd:bench:{name}")) for name in ("probe", "crowd"))

# Enough to load what is loaded late, and to make both orgs' instances.
_WARM_UP = 20
# One runs and one waits: the slot is never idle.
_KEPT_BUSY = 2
# Guards against hanging only.
_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds from the publish to the terminal event as a reader sees it, and of them from the admission to the end."""

    whole: float
    inside: float


class Bench:
    """One stack, one producer and one reader."""

    def __init__(self, publisher: Publisher, told: StatusTail, contract: Contract) -> None:
        self._publisher = publisher
        self._told = told
        self._contract = contract
        # The crowd's queries that were published and are not over, as far as was read.
        self._open: set[str] = set()

    def time_probes(self, count: int, kept_busy: int = 0) -> list[Timed]:
        """What each probe took, one after another.

        With `kept_busy` so many of the crowd's queries are under way all the time.
        """
        return [self._time_probe(kept_busy) for _ in range(count)]

    def _time_probe(self, kept_busy: int) -> Timed:
        probe = _ask(_PROBE_ORG, _PROBE)
        self._keep_busy(kept_busy)
        start = time.perf_counter()
        self._publish([probe])

        def is_over() -> bool:
            self._keep_busy(kept_busy)
            return probe.query_id in self._told.terminal

        self._told.read_until(is_over, _PATIENCE_SECONDS, "a probe's end")
        story = self._told.events[probe.query_id]
        # In milliseconds.
        first, last = (event.fields["occurred_at"] for event in (story[0], story[-1]))
        return Timed(time.perf_counter() - start, (last - first) / 1000)

    def gather_crowd(self, count: int) -> tuple[float, float]:
        """Publish the crowd and a probe behind it: the seconds until all of it was admitted, and the probe's."""
        crowd, probe = [_ask(_CROWD_ORG, _CROWD) for _ in range(count)], _ask(_PROBE_ORG, _PROBE)
        ids = {query.query_id for query in crowd}
        start = time.perf_counter()
        self._publish(crowd)
        asked = time.perf_counter()
        self._publish([probe])
        took: float | None = None

        def is_admitted() -> bool:
            nonlocal took
            if took is None and probe.query_id in self._told.terminal:
                took = time.perf_counter() - asked
            return took is not None and ids <= self._told.events.keys()

        self._told.read_until(is_admitted, _PATIENCE_SECONDS, "the crowd's admission")
        assert took is not None
        self._open |= ids
        return time.perf_counter() - start, took

    def count_crowd(self) -> int:
        """How many of the crowd's queries are not over."""
        self._open -= self._told.terminal
        return len(self._open)

    def finish(self) -> None:
        """Wait until nothing is under way."""
        self._told.read_until(lambda: self.count_crowd() == 0, _PATIENCE_SECONDS, "the last of those that were busy")

    def _keep_busy(self, count: int) -> None:
        if (missing := count - self.count_crowd()) > 0:
            more = [_ask(_CROWD_ORG, _CROWD) for _ in range(missing)]
            self._open |= {query.query_id for query in more}
            self._publish(more)

    def _publish(self, queries: Sequence[Valid]) -> None:
        self._publisher.publish([to_outgoing(self._contract, query) for query in queries])


def _ask(org: str, sql: str) -> Valid:
    return Valid(make_fields("interactive", sql=sql, org_id=org), (), ())


def compare(stack: Stack, crowd: int, probes: int, report: Callable[[str], None]) -> dict[str, Any]:
    """The three phases on a stack; times in ms, ratios of p95 over that of the first phase."""
    contract = Contract()
    timed: dict[str, list[Timed]] = {}
    with Publisher(stack.servers.bootstrap) as publisher, StatusTail(stack.servers.bootstrap, contract) as told:
        bench = Bench(publisher, told, contract)
        bench.time_probes(_WARM_UP, kept_busy=_KEPT_BUSY)
        bench.finish()
        timed["alone"] = bench.time_probes(probes)
        timed["slot busy"] = bench.time_probes(probes, kept_busy=_KEPT_BUSY)
        bench.finish()
        admitted, behind = bench.gather_crowd(crowd)
        report(f"{crowd} admitted, and their events read, in {admitted:.1f} s; one behind them took {behind:.1f} s")
        before = bench.count_crowd()
        timed["crowd waiting"] = bench.time_probes(probes)
        after = bench.count_crowd()
    return {
        "probes": probes,
        "crowd": crowd,
        "crowd_admitted_seconds": round(admitted, 1),
        "behind_the_burst_seconds": round(behind, 1),
        "waiting": [before, after],
        "whole": _summarize({name: [each.whole for each in times] for name, times in timed.items()}),
        "inside": _summarize({name: [each.inside for each in times] for name, times in timed.items()}),
    }


def _summarize(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By phase: median and p95 in ms, and the ratio of its p95 to that of the first phase."""
    unloaded = _p95(seconds["alone"])
    return {
        name: {
            "median_ms": round(statistics.median(times) * 1000, 1),
            "p95_ms": round(_p95(times), 1),
            "p95_ratio": round(_p95(times) / unloaded, 2),
        }
        for name, times in seconds.items()
    }


def _p95(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1] * 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print it; with `--json` as one line on stdout, and nothing after it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--crowd", type=int, default=10_000, help="the other org's queries")
    parser.add_argument("--probes", type=int, default=200, help="queries timed in a phase")
    parser.add_argument("--bootstrap", help="a Kafka to use instead of the embedded broker")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args(argv)
    with run_stack(arguments.bootstrap) as stack:
        found = compare(stack, arguments.crowd, arguments.probes, lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        print(json.dumps(found), flush=True)
        return
    print(f"{found['probes']} single queries in each phase, {found['crowd']} of another org waiting in the last")
    for what, meaning in (("whole", "publish to terminal event read"), ("inside", "admission to end")):
        print(f"  {meaning}")
        for name, found_here in found[what].items():
            median, p95, ratio = found_here["median_ms"], found_here["p95_ms"], found_here["p95_ratio"]
            print(f"    {name:13} median {median:8.1f} ms   p95 {p95:8.1f} ms   {ratio:6.2f} times the unloaded p95")
    print(
        f"  the crowd was admitted in {found['crowd_admitted_seconds']} s, a query right behind it took "
        f"{found['behind_the_burst_seconds']} s; waiting {found['waiting']}"
    )


if __name__ == "__main__":
    main()
