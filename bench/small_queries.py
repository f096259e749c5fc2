"""Small queries a second: queryd against its peers, on the same servers, in alternating runs.

A query makes 100 rows, Parquet, three events and one row. No two statements are alike. A run lasts from the first
publish to the last terminal event that a reader of the status topic sees. While a peer runs, queryd is up and idle;
peers run one at a time. queryd and each peer's process start warm: some unmeasured queries come first. Every
round begins with another one.
"""

import statistics
from collections.abc import Sequence

from bench.load import Peer, make_small
from bench.peers.redis import RedisMissing
from bench.rows import Bound, Row, compare_medians
from bench.world import World

_QUERYD, _INLINE = "queryd", "queryd, inline"
# The target, and the floor below which the issue is not resolved.
_TARGETS: dict[Peer, tuple[float, float | None]] = {
    Peer.NAIVE: (3.5, 2.5),
    Peer.CELERY: (2.0, 1.5),
    Peer.FASTSTREAM: (2.5, None),
    Peer.DIRECT: (0.5, None),
}


def measure_small(world: World) -> list[Row]:
    """The rows against every peer."""
    rates = _alternate(world, [_QUERYD, *Peer])
    return [_compare(f"small-{peer}", rates, _QUERYD, peer, *_TARGETS[peer]) for peer in Peer]


def measure_inline(world: World) -> list[Row]:
    """The row of results that travel in the event."""
    return [_compare("inline", _alternate(world, [_INLINE, Peer.NAIVE]), _INLINE, Peer.NAIVE, 6.0, None)]


def _compare(
    name: str, rates: dict[str, list[float]], ours: str, peer: Peer, target: float, floor: float | None
) -> Row:
    what, against = f"small queries/s, {ours}", peer.value
    if not rates[peer]:
        why = {"why": "redis-server is missing: apt-get install redis-server"}
        return Row(name, what, against, Bound.AT_LEAST, target, "×", None, floor, why)
    detail = {each: [round(rate, 1) for rate in rates[each]] for each in (ours, peer.value)}
    return Row(
        name, what, against, Bound.AT_LEAST, target, "×", compare_medians(rates[ours], rates[peer]), floor, detail
    )


def _alternate(world: World, names: Sequence[str]) -> dict[str, list[float]]:
    """Queries/s of each, by run. A peer that is missing has none."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(world.sizes.runs):
        # Every round begins with another one.
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            try:
                rate = _run(world, name)
            except RedisMissing as error:
                world.report(str(error))
                continue
            rates[name].append(rate)
            world.report(f"run {number + 1} of {world.sizes.runs}: {name:14} {rate:7.1f} queries/s")
    for name, measured in rates.items():
        if measured:
            world.report(f"{name:14} median {statistics.median(measured):7.1f} queries/s")
    return rates


def _run(world: World, name: str) -> float:
    site, sizes = world.embedded, world.sizes
    if name in (_QUERYD, _INLINE):
        return site.queryd.measure_rate(make_small(sizes.queries, inline=name == _INLINE))
    with site.run_peer(Peer(name)) as target:
        target.measure_rate(make_small(sizes.warm_up))
        return target.measure_rate(make_small(sizes.queries))
