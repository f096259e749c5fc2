"""What a backlog does: to another org's single queries, and to the restart of a killed executor.

Both rows have a stack of their own, which ends with the rest of the backlog unfinished.
"""

import statistics
import time
import uuid

from bench.load import Site, ask
from bench.rows import Bound, Row, percentile
from bench.world import World
from tests.acceptance.checker import Valid

_PROBE_ORG, _CROWD_ORG = (str(uuid.uuid5(uuid.NAMESPACE_URL, f"queryd:bench:{name}")) for name in ("probe", "crowd"))
# Some 20 ms of one core: a backlog lasts for minutes, and the wait for the one that runs does not hide everything else.
_CROWD_SQL = "SELECT sum(sqrt(i)) AS total FROM range(2000000) AS t(i)"
# The default of QUERYD_LEASE_SECONDS, and the time for the process's start.
_LEASE_SECONDS, _START_SECONDS = 15.0, 3.0
# Guards against hanging only.
_PATIENCE_SECONDS = 300.0


def measure_backlog(world: World) -> list[Row]:
    """The p95 of single queries, less one running query, over the p95 without a backlog."""
    with world.run_fresh() as site:
        site.queryd.time_each(_make_probes(5))
        alone = site.queryd.time_each(_make_probes(world.sizes.probes))
        crowd = _admit_crowd(site, world.sizes.backlog)
        beside = site.queryd.time_each(_make_probes(world.sizes.probes))
        ended = [query.query_id for query in crowd if query.query_id in site.queryd.told.terminal]
        if len(ended) == len(crowd):
            raise RuntimeError("the backlog ended before the single queries did")
        running = statistics.median(_find_run_ms(site, query_id) for query_id in ended)
    ratio = (percentile(beside, 95) - running) / percentile(alone, 95)
    detail = {
        "alone_p95_ms": round(percentile(alone, 95), 1),
        "beside_p95_ms": round(percentile(beside, 95), 1),
        "running_query_ms": running,
        "left_of_backlog": len(crowd) - len(ended),
    }
    world.report(f"beside a backlog: {detail}")
    what = f"single query beside a backlog of {len(crowd)}: p95 less one running query"
    return [Row("backlog", what, "unloaded p95", Bound.AT_MOST, 2.0, "×", ratio, detail=detail)]


def measure_restart(world: World) -> list[Row]:
    """Seconds from `kill -9` of the executor to the next query's end."""
    with world.run_fresh() as site:
        crowd = _admit_crowd(site, world.sizes.in_flight)
        told = site.queryd.told
        killed_at, start = time.time_ns() // 1_000_000, time.perf_counter()
        site.stack.kill("executor")
        ids = {query.query_id for query in crowd}

        def has_ended_since() -> bool:
            # What ended before the kill may be published after it.
            last = (told.events[query_id][-1].fields for query_id in ids & told.terminal)
            return any(fields["occurred_at"] > killed_at for fields in last)

        told.read_until(has_ended_since, _PATIENCE_SECONDS, "the first query's end after the kill")
        seconds = time.perf_counter() - start
    what = f"first completion after kill -9 with {len(crowd)} in flight"
    limit = _LEASE_SECONDS + _START_SECONDS
    return [Row("restart", what, "lease + 3 s", Bound.AT_MOST, limit, " s", seconds)]


def _make_probes(count: int) -> list[Valid]:
    return [ask(_PROBE_ORG, "SELECT 42 AS answer") for _ in range(count)]


def _admit_crowd(site: Site, count: int) -> list[Valid]:
    """Publish `count` queries of another org and wait until all are admitted."""
    crowd = [ask(_CROWD_ORG, _CROWD_SQL) for _ in range(count)]
    ids, told = {query.query_id for query in crowd}, site.queryd.told
    site.queryd.prepare(crowd)()
    told.read_until(lambda: ids <= told.events.keys(), _PATIENCE_SECONDS, "the backlog's admission")
    return crowd


def _find_run_ms(site: Site, query_id: str) -> float:
    times = {event.fields["status"]: event.fields["occurred_at"] for event in site.queryd.told.events[query_id]}
    return float(times["Succeeded"] - times["Running"])
