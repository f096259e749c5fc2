"""What Postgres's state does to small queries: ten million stored rows, and a snapshot that holds back vacuum."""

import time
from collections.abc import Callable

import psycopg

from bench.cpu import measure_burst
from bench.load import Site, make_small
from bench.rows import Bound, Row, compare_medians
from bench.world import World

_FILL = """
INSERT INTO query_results (id, org_id, user_id, mode, status, sql_hash, output_format, output_location, row_count,
    bytes, duration_ms, created_at, updated_at)
SELECT gen_random_uuid(), md5((i %% 1000)::text)::uuid, md5((i %% 5000)::text)::uuid, 'interactive', 'Succeeded',
    md5(i::text), 'parquet', 's3://queryd/results/' || i, 100, 2000, 20,
    now() - i * interval '1 second', now() - i * interval '1 second'
FROM generate_series(1, %s) AS t(i)
"""


def measure_stored(world: World) -> list[Row]:
    """The row of CPU per query with a full `query_results`. Runs cannot alternate, so CPU is compared."""
    count = world.sizes.stored_rows
    with world.run_fresh() as site:
        empty = _repeat(world, lambda: measure_burst(site, world.sizes.queries))
        with psycopg.connect(site.stack.servers.data_url, autocommit=True) as connection:
            connection.execute(_FILL, [count])
            connection.execute("VACUUM ANALYZE query_results")
            connection.execute("CHECKPOINT")
        world.report(f"{count} rows are stored")
        full = _repeat(world, lambda: measure_burst(site, world.sizes.queries))
    detail = {"empty_ms": [round(ms, 2) for ms in empty], "full_ms": [round(ms, 2) for ms in full]}
    what = f"CPU per small query with {count:,} rows in query_results"
    return [Row("stored", what, "empty tables", Bound.AT_MOST, 1.15, "×", compare_medians(full, empty), detail=detail)]


def measure_snapshot(world: World) -> list[Row]:
    """The row of small queries/s while a snapshot is held, after it was held under load for its whole time."""
    with world.run_fresh() as site:
        without = _repeat(world, lambda: _measure_rate(site, world))
        with psycopg.connect(site.stack.servers.data_url) as connection:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            # The first statement takes the snapshot.
            connection.execute("SELECT 1 FROM query_results LIMIT 1")
            latest = time.monotonic() + world.sizes.snapshot_seconds
            while time.monotonic() < latest:
                _measure_rate(site, world)
            held = _repeat(world, lambda: _measure_rate(site, world))
    detail = {"without": [round(rate, 1) for rate in without], "held": [round(rate, 1) for rate in held]}
    world.report(f"queries/s with a snapshot: {detail}")
    what = f"small queries/s with a snapshot held for {world.sizes.snapshot_seconds:.0f} s"
    return [Row("snapshot", what, "without", Bound.AT_LEAST, 0.85, "×", compare_medians(held, without), detail=detail)]


def _measure_rate(site: Site, world: World) -> float:
    return site.queryd.measure_rate(make_small(world.sizes.queries))


def _repeat(world: World, measure: Callable[[], float]) -> list[float]:
    return [measure() for _ in range(world.sizes.runs)]
