"""The servers that the rows share, and how large the runs are."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.load import Site, make_small, open_site
from service.embedded.servers import Lifeline
from tests.acceptance.stack import run_stack
from tests.servers import kafka as brokers


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run. The defaults are those of the table; `--small` only shows that every row runs."""

    runs: int = 3
    # In a run. With fewer, its beginning and its end would take more than 5% of it.
    queries: int = 3000
    # Enough to start every child, to fill the pools, and to import what is imported late.
    warm_up: int = 200
    # Of one query after another.
    probes: int = 200
    idle_seconds: float = 20.0
    # At half of the maximum rate.
    steady_seconds: float = 20.0
    # 1.7 gives 10 million rows of lineitem.
    export_scale: float = 1.7
    export_runs: int = 2
    tpch_scale: float = 1.0
    memory_rows: int = 50_000_000
    stored_rows: int = 10_000_000
    snapshot_seconds: float = 600.0
    backlog: int = 10_000
    in_flight: int = 1_000


SMALL = Sizes(
    runs=1,
    queries=100,
    warm_up=20,
    probes=10,
    idle_seconds=3.0,
    steady_seconds=3.0,
    export_scale=0.01,
    export_runs=1,
    tpch_scale=0.01,
    memory_rows=1_000_000,
    stored_rows=10_000,
    snapshot_seconds=3.0,
    backlog=300,
    in_flight=100,
)


class World:
    """Starts a stack when the first row needs it, and ends all of them."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, at)

    @cached_property
    def embedded(self) -> Site:
        """`queryd up` with its embedded broker, warm."""
        site = self._opened.enter_context(open_site(self._opened.enter_context(run_stack())))
        self.report("a stack is up, with the embedded broker")
        site.queryd.measure_rate(make_small(self.sizes.warm_up))
        return site

    @contextmanager
    def run_fresh(self) -> Iterator[Site]:
        """Another `queryd up`, warm, for a row that leaves work behind."""
        with run_stack() as stack, open_site(stack) as site:
            site.queryd.measure_rate(make_small(self.sizes.warm_up))
            yield site

    @contextmanager
    def run_apache(self) -> Iterator[Site]:
        """`queryd up` on a one-node Apache Kafka, warm. Raises `ToolMissing` or `EmbeddedError`."""
        kind = brokers.choose("apache")
        brokers.prepare(kind)
        # Not below a folder that is closed to the user whom an embedded Postgres runs as.
        folder = Path(tempfile.mkdtemp(prefix="queryd-kafka-"))
        try:
            with (
                Lifeline() as lifeline,
                brokers.run(kind, folder, lifeline) as broker,
                run_stack(broker.bootstrap) as stack,
                open_site(stack) as site,
            ):
                self.report("a stack is up, on Apache Kafka")
                site.queryd.measure_rate(make_small(self.sizes.warm_up))
                yield site
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def report(self, line: str) -> None:
        """Print progress to stderr."""
        print(line, file=sys.stderr, flush=True)
