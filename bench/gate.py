"""What the gate costs of each TPC-H query on a warm instance: judging against running and writing the result.

Eight tables of the given scale as Parquet in an S3 server of its own, an instance as a child makes it, whose cache is
warm. Each query runs `--runs` times, judged before each run as in a child. The ratio of the medians is the gate's
share; at scale 1 no query's is to be above a tenth.

Run it from the checkout: `python -m bench.gate [--scale 1] [--runs 5] [--json]`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3

from engines.duckdb.export import export
from engines.duckdb.gate import Gate
from engines.duckdb.instance import Instance
from engines.duckdb.settings import DuckDBSettings
from engines.duckdb.watch import Limits
from engines.protocol import Relation, RelationKind
from queryd.events import OutputFormat
from service.embedded.object_store import ObjectStore
from service.embedded.servers import Lifeline
from tests.acceptance import tpch

_MEMORY = 4 * 1024**3
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Share:
    """One query's medians in ms."""

    number: int
    judging: float
    running: float

    @property
    def ratio(self) -> float:
        """The gate's time against the run's."""
        return self.judging / self.running


def measure(scale: float, runs: int) -> list[Share]:
    """The share of each of the 22 queries."""
    with tempfile.TemporaryDirectory(prefix="bench-gate-") as name, tpch.open_tpch() as source:
        folder = Path(name)
        folder.chmod(0o755)
        tpch.make_tables(source, scale)
        questions = tpch.read_questions(source, scale)
        with _opened_store(folder) as store:
            relations = _upload(store, tpch.write_parquet(source, folder))
            instance = _open_instance(store, relations, folder)
            gate = Gate()
            return [_measure(gate, instance, relations, question, folder, runs) for question in questions]


def _measure(
    gate: Gate,
    instance: Instance,
    relations: frozenset[Relation],
    question: tpch.Question,
    folder: Path,
    runs: int,
) -> Share:
    judging, running = [], []
    # The first fills the caches.
    for _ in range(runs + 1):
        start = time.perf_counter()
        judged = gate.judge(question.sql, relations, {}, frozenset())
        between = time.perf_counter()
        instance.expose(judged.references)
        target = folder / "out" / "result.parquet"
        export(
            instance.connection,
            judged.text,
            {},
            target,
            OutputFormat.PARQUET,
            max_rows=None,
            limits=Limits(None, None),
        )
        judging.append((between - start) * 1000)
        running.append((time.perf_counter() - between) * 1000)
        target.unlink()
    return Share(question.number, statistics.median(judging[1:]), statistics.median(running[1:]))


@contextmanager
def _opened_store(folder: Path) -> Iterator[ObjectStore]:
    with Lifeline() as lifeline:
        store = ObjectStore(folder / "s3", folder / "s3.log", lifeline)
        try:
            store.start()
            yield store
        finally:
            store.stop()


def _upload(store: ObjectStore, files: dict[str, Path]) -> frozenset[Relation]:
    s3 = boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=store.writer.access_key,
        aws_secret_access_key=store.writer.secret_key,
    )
    for table, file in files.items():
        s3.upload_file(str(file), store.bucket, f"datasets/{table}.parquet")
    return frozenset(
        Relation(table, RelationKind.PARQUET, f"s3://{store.bucket}/datasets/{table}.parquet", "1") for table in files
    )


def _open_instance(store: ObjectStore, relations: frozenset[Relation], folder: Path) -> Instance:
    settings = DuckDBSettings(
        memory_bytes=_MEMORY,
        threads=_THREADS,
        scratch_root=folder,
        endpoint_url=store.endpoint_url,
        region=store.region,
        access_key=store.reader.access_key,
        secret_key=store.reader.secret_key,
    )
    for name in ("out", "spill", "secrets"):
        (folder / name).mkdir()
    return Instance(settings, folder, relations, frozenset({RelationKind.PARQUET}))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1, choices=(0.01, 0.1, 1))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    shares = measure(given.scale, given.runs)
    worst = max(shares, key=lambda share: share.ratio)
    if given.json:
        figures = [{"query": s.number, "gate_ms": s.judging, "run_ms": s.running, "ratio": s.ratio} for s in shares]
        print(json.dumps({"scale": given.scale, "queries": figures, "worst": worst.ratio}))
        return
    for share in shares:
        print(f"q{share.number:02}  gate {share.judging:7.2f} ms  run {share.running:9.1f} ms  {share.ratio:7.2%}")
    print(f"the gate's largest share is {worst.ratio:.2%}, of q{worst.number}")


if __name__ == "__main__":
    main()
