"""Large queries: exports, TPC-H and memory, against DuckDB alone on the same files with the child's own limits."""

import importlib.util
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import duckdb
import obstore
import psutil
import psycopg

from bench.load import Site, ask
from bench.peers.common import open_bucket
from bench.rows import Bound, Row, compare_medians
from bench.world import World
from tests.acceptance import tpch

# The defaults of QUERYD_CHILD_MEMORY and QUERYD_CHILD_THREADS.
_CHILD_BYTES, _CHILD_THREADS = 1024**3, 2
_MIB = 1024**2
# A reading of a process of 1 GB takes some 10 ms.
_SAMPLE_SECONDS = 0.2
# The plain COPY of each format.
_COPY_OPTIONS = {
    "parquet": "FORMAT parquet, COMPRESSION zstd",
    "csv": "FORMAT csv, HEADER",
    "json": "FORMAT json, ARRAY true",
}
_WIDE = "SELECT i AS id, hash(i) AS hashed, i % 1000 AS class, 'row ' || i AS label FROM range({count}) AS t(i)"


def measure_exports(world: World) -> list[Row]:
    """A row for each format: wall time over that of a local COPY and a multipart upload of its file."""
    site, scale = world.embedded, world.sizes.export_scale
    with (
        tempfile.TemporaryDirectory(prefix="bench-export-") as name,
        _open_tpch(site, scale, Path(name)) as org,
        _open_duckdb(site, org) as alone,
    ):
        return [
            _compare_exports(world, org, alone, Path(name) / "export", format_name) for format_name in _COPY_OPTIONS
        ]


def _compare_exports(world: World, org: str, alone: duckdb.DuckDBPyConnection, file: Path, output_format: str) -> Row:
    site = world.embedded
    ours: list[float] = []
    theirs: list[float] = []
    for is_first_ours in [number % 2 == 0 for number in range(world.sizes.export_runs)]:
        for is_ours in (is_first_ours, not is_first_ours):
            if is_ours:
                ours.append(_ask(site, org, "SELECT * FROM lineitem", output_format))
            else:
                theirs.append(_export_alone(site, alone, file, _COPY_OPTIONS[output_format]))
    detail = {"queryd_s": [round(s, 2) for s in ours], "alone_s": [round(s, 2) for s in theirs]}
    world.report(f"export as {output_format}: {detail}")
    what, ratio = (
        f"export of lineitem, scale {world.sizes.export_scale}, as {output_format}",
        compare_medians(ours, theirs),
    )
    against = "local COPY + multipart upload"
    return Row(f"export-{output_format}", what, against, Bound.AT_MOST, 1.2, "×", ratio, detail=detail)


def measure_tpch(world: World) -> list[Row]:
    """The row of the 22 queries, one after another, over those of DuckDB alone."""
    site, scale = world.embedded, world.sizes.tpch_scale
    with tempfile.TemporaryDirectory(prefix="bench-tpch-") as name, _open_tpch(site, scale, Path(name)) as org:
        with tpch.open_tpch() as source:
            questions = tpch.read_questions(source, scale)
        totals: dict[str, list[float]] = {"queryd": [], "alone": []}
        with _open_duckdb(site, org) as alone:
            # The first round fills both caches.
            for number in range(world.sizes.runs + 1):
                round_totals = {
                    "queryd": sum(_ask(site, org, question.sql, "parquet") for question in questions),
                    "alone": sum(_time_alone(alone, question.sql) for question in questions),
                }
                world.report(f"TPC-H, round {number}: {round_totals}")
                for who, seconds in round_totals.items() if number > 0 else ():
                    totals[who].append(seconds)
    detail = {who: [round(seconds, 2) for seconds in measured] for who, measured in totals.items()}
    ratio = compare_medians(totals["queryd"], totals["alone"])
    what = f"TPC-H 22 queries, scale {scale}, from S3"
    return [Row("tpch", what, "DuckDB alone", Bound.AT_MOST, 1.2, "×", ratio, detail=detail)]


def measure_memory(world: World) -> list[Row]:
    """The row of the largest PSS of the executor and its largest child, above the child's limit."""
    site, count = world.embedded, world.sizes.memory_rows
    done, peaks = threading.Event(), [0]
    executor = psutil.Process(site.stack.pid_of("executor"))

    def sample() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            children = [_read_pss(child) for child in executor.children(recursive=True)]
            peaks.append(_read_pss(executor) + max(children, default=0))

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        seconds = _ask(site, str(uuid.uuid4()), _WIDE.format(count=count), "parquet")
    finally:
        done.set()
        sampling.join()
    reached = (max(peaks) - _CHILD_BYTES) / _MIB
    detail = {"peak_mib": round(max(peaks) / _MIB), "seconds": round(seconds, 1), "samples": len(peaks) - 1}
    world.report(f"memory: {detail}")
    what, against = f"PSS of executor and child, {count:,} rows exported", "child's memory limit"
    return [Row("memory", what, against, Bound.AT_MOST, 400, " MiB above", reached, detail=detail)]


def _read_pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def _ask(site: Site, org: str, sql: str, output_format: str) -> float:
    """Seconds of one query, from its publish to its terminal event read."""
    query = ask(org, sql, mode="batch", output_format=output_format)
    return 1 / site.queryd.measure_rate([query])


def _export_alone(site: Site, alone: duckdb.DuckDBPyConnection, file: Path, options: str) -> float:
    start = time.perf_counter()
    alone.execute(f"COPY (SELECT * FROM lineitem) TO '{file}' ({options})")
    obstore.put(open_bucket(site.stack.servers), "bench/export", file, use_multipart=True)
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def _time_alone(alone: duckdb.DuckDBPyConnection, sql: str) -> float:
    start = time.perf_counter()
    alone.execute(sql).fetchall()
    return time.perf_counter() - start


@contextmanager
def _open_tpch(site: Site, scale: float, folder: Path) -> Iterator[str]:
    """An org with the eight tables of that scale as Parquet in S3, under a prefix of its own; its id."""
    org, servers = str(uuid.uuid4()), site.stack.servers
    with tpch.open_tpch() as source:
        tpch.make_tables(source, scale)
        files = tpch.write_parquet(source, folder)
    for table, file in files.items():
        servers.s3().upload_file(str(file), servers.bucket, f"datasets/{org}/{table}.parquet")
        file.unlink()
    with psycopg.connect(servers.data_url) as connection:
        for table in tpch.TABLES:
            connection.execute(
                "INSERT INTO datasets (org_id, name, kind, location, visibility) VALUES (%s, %s, 'parquet', %s, 'org')",
                [org, table, _locate(site, org, table)],
            )
    yield org


def _locate(site: Site, org: str, table: str) -> str:
    return f"s3://{site.stack.servers.bucket}/datasets/{org}/{table}.parquet"


@contextmanager
def _open_duckdb(site: Site, org: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB alone, with the org's tables as views over the same files and with a child's threads and memory."""
    settings = site.stack.servers.settings
    package = importlib.util.find_spec("duckdb_extension_httpfs")
    assert package is not None and package.submodule_search_locations
    [file] = Path(package.submodule_search_locations[0]).glob("extensions/*/httpfs.duckdb_extension")
    config: dict[str, str | bool | int | float | list[str]] = {
        "threads": _CHILD_THREADS,
        "memory_limit": f"{_CHILD_BYTES // _MIB}MiB",
    }
    with duckdb.connect(":memory:", config=config) as connection:
        connection.execute(f"LOAD '{file}'")
        # As in a child: without it every query sends a HEAD per file.
        connection.execute("SET enable_http_metadata_cache = true")
        connection.execute(
            f"CREATE SECRET (TYPE s3, KEY_ID '{settings['AWS_ACCESS_KEY_ID']}', "
            f"SECRET '{settings['AWS_SECRET_ACCESS_KEY']}', REGION '{settings['AWS_REGION']}', "
            f"ENDPOINT '{urlsplit(settings['AWS_ENDPOINT_URL']).netloc}', URL_STYLE 'path', USE_SSL false)"
        )
        for table in tpch.TABLES:
            connection.execute(f"CREATE VIEW {table} AS FROM read_parquet('{_locate(site, org, table)}')")
        yield connection
