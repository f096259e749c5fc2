"""Milliseconds from a request's publish to its `Succeeded` event, as a reader of the status topic sees it.

Idle: one query after another, on the embedded broker and on a one-node Apache Kafka, queryd and the naive peer in turn.
Loaded: queries at half of the rate that the service has just reached, at even intervals.
"""

import threading
import time
from collections.abc import Sequence

from bench.load import Peer, Site, make_small
from bench.rows import Bound, Row, compare_medians, percentile
from bench.world import World
from service.embedded.servers import EmbeddedError
from tests.acceptance.checker import Valid
from tests.servers.kafka import ToolMissing

_WHAT = "submit → Succeeded, idle"
_EMBEDDED, _APACHE = "embedded broker", "Apache Kafka"
# p50 and its floor; p99; p50 against that of the naive peer.
_P50 = {_EMBEDDED: 60.0, _APACHE: 45.0}
_FLOOR_P50, _P99, _NAIVE_RATIO, _LOADED_RATIO = 100.0, 150.0, 2.5, 6.0
_POLL_SECONDS = 0.05


def measure_latency(world: World) -> list[Row]:
    """Three rows for each broker."""
    rows = _measure_idle(world, world.embedded, _EMBEDDED)
    try:
        with world.run_apache() as site:
            rows += _measure_idle(world, site, _APACHE)
    except (ToolMissing, EmbeddedError) as error:
        rows += _to_rows(_APACHE, [], [], str(error))
    return rows


def _measure_idle(world: World, site: Site, broker: str) -> list[Row]:
    probes = max(2, world.sizes.probes // world.sizes.runs)
    ours: list[float] = []
    naive: list[float] = []
    for _ in range(world.sizes.runs):
        # The first few load what is loaded late.
        site.queryd.time_each(make_small(2))
        ours += site.queryd.time_each(make_small(probes))
        with site.run_peer(Peer.NAIVE) as peer:
            peer.time_each(make_small(2))
            naive += peer.time_each(make_small(probes))
    rows = _to_rows(broker, ours, naive, "")
    world.report(f"idle, {broker}: {', '.join(f'{row.name} {row.reached:.1f}' for row in rows if row.reached)}")
    return rows


def _to_rows(broker: str, ours: Sequence[float], naive: Sequence[float], why: str) -> list[Row]:
    name = "latency-" + broker.partition(" ")[0].lower()
    p50 = percentile(ours, 50) if ours else None
    p99 = percentile(ours, 99) if ours else None
    ratio = compare_medians(ours, naive) if ours else None
    detail = {"why": why} if why else {"queryd": _summarize(ours), "naive": _summarize(naive)}
    return [
        Row(f"{name}-p50", f"{_WHAT}: p50", broker, Bound.AT_MOST, _P50[broker], " ms", p50, _FLOOR_P50, detail),
        Row(f"{name}-p99", f"{_WHAT}: p99", broker, Bound.AT_MOST, _P99, " ms", p99, detail=detail),
        Row(
            f"{name}-naive", f"{_WHAT}: p50", f"naive, {broker}", Bound.AT_MOST, _NAIVE_RATIO, "×", ratio, detail=detail
        ),
    ]


def measure_loaded(world: World) -> list[Row]:
    """The p99 at half of the maximum rate, over the idle p50."""
    target, sizes = world.embedded.queryd, world.sizes
    idle = target.time_each(make_small(sizes.probes))
    rate = target.measure_rate(make_small(sizes.queries)) / 2
    loaded = _time_steadily(world.embedded, make_small(int(rate * sizes.steady_seconds)), rate)
    detail = {"rate": round(rate, 1), "idle": _summarize(idle), "loaded": _summarize(loaded)}
    world.report(f"at {rate:.1f} queries/s: {detail['loaded']}, idle {detail['idle']}")
    ratio = percentile(loaded, 99) / percentile(idle, 50)
    what, against = "submit → Succeeded at half rate: p99", "own idle p50"
    return [Row("latency-loaded", what, against, Bound.AT_MOST, _LOADED_RATIO, "×", ratio, detail=detail)]


def _time_steadily(site: Site, queries: Sequence[Valid], rate: float) -> list[float]:
    """Milliseconds of each query, published one at a time at even intervals."""
    sends = [site.queryd.prepare([query]) for query in queries]
    sent: dict[str, float] = {}
    ended: dict[str, float] = {}

    def publish() -> None:
        begin = time.perf_counter()
        for number, (query, send) in enumerate(zip(queries, sends, strict=True)):
            time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            sent[query.query_id] = time.perf_counter()
            send()

    publishing = threading.Thread(target=publish)
    publishing.start()
    told, open_ids = site.queryd.told, {query.query_id for query in queries}
    while open_ids:
        told.poll(_POLL_SECONDS)
        now = time.perf_counter()
        for query_id in open_ids & told.terminal:
            ended[query_id] = now
        open_ids -= told.terminal
        if not publishing.is_alive() and len(sent) < len(queries):
            raise RuntimeError("the publisher failed")
    publishing.join()
    site.queryd.check(queries)
    return [(ended[query.query_id] - sent[query.query_id]) * 1000 for query in queries]


def _summarize(taken: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": round(percentile(taken, percent), 1) for percent in (50, 90, 99)} if taken else {}
