"""The names of metrics, defined once, and the one place where each is told what happened.

A label's value comes from a short list: never an id, an org, SQL or other data of a query. A process creates the series
of every value at its start. `increase()` ignores the first sample of a new series, so an alert would miss the first
events. A process has one `METRICS`; a test may create another. A call takes a few microseconds, and each query makes
about ten.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from queryd.dead_letters import DeadCode
from queryd.events import ErrorCode, Mode

# Every label that a metric may have.
LABELS = frozenset({"lane", "outcome", "topic", "partition", "code", "child"})

SUCCEEDED = "Succeeded"

# The values of each label, except `topic` and `partition`, which are unknown until partitions are assigned.
LANES = tuple(lane.value for lane in Mode)
OUTCOMES = (SUCCEEDED, *(code.value for code in ErrorCode))
CHILDREN = ("duckdb",)
DEAD_CODES = tuple(code.value for code in DeadCode)
# The values of `CancelOutcome`, which this package must not import; a test checks that they are equal.
CANCEL_OUTCOMES = ("accepted", "early", "finished", "other_org")

# A small query takes 10 ms, an export hours: steps of 2 to 4 across all of it.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
# An event is published within milliseconds, or something is wrong.
_LAG_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_BYTES = tuple(10.0**power for power in range(2, 12))
_ROWS = tuple(10.0**power for power in range(10))

Lags = Mapping[tuple[str, int], int]


class Metrics:
    """Every metric of every service; a service tells those that are its own, and the others stay at zero or away."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # Of this process: CPU seconds, memory, open files.
        ProcessCollector(registry=registry)
        self._read = _ReadAtScrape()
        registry.register(self._read)
        # Terminal statuses that this process brought about; outcome is Succeeded or the error code.
        self._queries = Counter(
            "queryd_queries", "Queries that ended, by lane and outcome", ["lane", "outcome"], registry=registry
        )
        self._running = Gauge("queryd_queries_running", "Attempts under way here now", ["lane"], registry=registry)
        # From the broker's append to the first claim.
        self._queue_seconds = Histogram(
            "queryd_query_queue_seconds", "Queued time", ["lane"], buckets=_SECONDS, registry=registry
        )
        # From the claim to the end of the attempt that ended the query, its storing included.
        self._run_seconds = Histogram(
            "queryd_query_run_seconds", "Running time", ["lane"], buckets=_SECONDS, registry=registry
        )
        # From the request's append to the terminal status: what a caller waits for.
        self._total_seconds = Histogram(
            "queryd_query_seconds", "Time from request to end", ["lane"], buckets=_SECONDS, registry=registry
        )
        self._result_bytes = Histogram(
            "queryd_result_bytes", "Sizes of results as stored", ["lane"], buckets=_BYTES, registry=registry
        )
        self._result_rows = Histogram(
            "queryd_result_rows", "Rows of results", ["lane"], buckets=_ROWS, registry=registry
        )
        # More attempts than queries: workers died, or queries were handed back.
        self._attempts = Counter("queryd_attempts", "Attempts started", ["lane"], registry=registry)
        # The worker stood still for longer than a lease, or the database's answer did.
        self._lease_losses = Counter("queryd_lease_losses", "Leases lost to another worker", registry=registry)
        # A new DuckDB child that replaced one that died, was stopped or was recycled.
        self._child_restarts = Counter(
            "queryd_child_restarts", "Child processes started in another's place", ["child"], registry=registry
        )
        self._dead_letters = Counter("queryd_dead_letters", "Dead letters written", ["code"], registry=registry)
        self._cancellations = Counter(
            "queryd_cancellations", "Cancel requests, by what became of them", ["outcome"], registry=registry
        )
        self._published = Counter("queryd_events_published", "Events that Kafka acknowledged", registry=registry)
        self._batches = Counter("queryd_publish_batches", "Batches in which they went", registry=registry)
        # From the outbox row's creation to Kafka's acknowledgement, by the database's clock.
        self._relay_lag = Histogram(
            "queryd_relay_lag_seconds", "Time of an event in the outbox", buckets=_LAG_SECONDS, registry=registry
        )
        self._projected = Counter("queryd_events_projected", "Events read into Postgres state", registry=registry)
        self._make_series()

    def _make_series(self) -> None:
        for lane in LANES:
            for outcome in OUTCOMES:
                self._queries.labels(lane, outcome)
            for histogram in (
                self._queue_seconds,
                self._run_seconds,
                self._total_seconds,
                self._result_bytes,
                self._result_rows,
            ):
                histogram.labels(lane)
            self._running.labels(lane)
            self._attempts.labels(lane)
        for family, values in (
            (self._child_restarts, CHILDREN),
            (self._dead_letters, DEAD_CODES),
            (self._cancellations, CANCEL_OUTCOMES),
        ):
            for value in values:
                family.labels(value)

    # One query's way.

    def start_attempt(self, lane: str, queued_seconds: float | None) -> None:
        """An attempt was claimed; of a query's first one, how long after the broker took its request."""
        self._attempts.labels(lane).inc()
        if queued_seconds is not None:
            self._queue_seconds.labels(lane).observe(max(0.0, queued_seconds))

    @contextmanager
    def running(self, lane: str) -> Iterator[None]:
        """An attempt is under way for as long as the context lasts."""
        gauge = self._running.labels(lane)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def end_query(
        self,
        lane: str,
        code: str | None,
        *,
        total_seconds: float,
        run_ms: int | None = None,
        result_bytes: int | None = None,
        rows: int | None = None,
    ) -> None:
        """This process brought a query to its terminal status. `code` is None where it has succeeded."""
        self._queries.labels(lane, code or SUCCEEDED).inc()
        self._total_seconds.labels(lane).observe(max(0.0, total_seconds))
        if run_ms is not None:
            self._run_seconds.labels(lane).observe(run_ms / 1000)
        if result_bytes is not None:
            self._result_bytes.labels(lane).observe(result_bytes)
        if rows is not None:
            self._result_rows.labels(lane).observe(rows)

    def lose_lease(self) -> None:
        """Another worker may have taken over."""
        self._lease_losses.inc()

    def restart_child(self, child: str) -> None:
        """`child` is `duckdb`."""
        self._child_restarts.labels(child).inc()

    def bury(self, code: str) -> None:
        """A dead letter is in its topic."""
        self._dead_letters.labels(code).inc()

    def cancel(self, outcome: str) -> None:
        """A cancel request was looked at: `accepted`, `early`, `finished` or `other_org`."""
        self._cancellations.labels(outcome).inc()

    # Events.

    def publish(self, lags: Iterable[float]) -> None:
        """A batch of events is in Kafka; of each, how long it lay in the outbox, in seconds."""
        events = 0
        for lag in lags:
            self._relay_lag.observe(max(0.0, lag))
            events += 1
        self._published.inc(events)
        self._batches.inc(events > 0)

    def project(self, events: int) -> None:
        """So many events are in Postgres state."""
        self._projected.inc(events)

    def tell_outbox(self, events: int | None, age_seconds: float | None) -> None:
        """How many events wait in the outbox, and for how long the oldest has. Both None: nobody knows."""
        self._read.outbox = None if events is None else (events, age_seconds or 0.0)

    # What is read only when somebody looks.

    @contextmanager
    def reading_lags(self, source: Callable[[], Lags]) -> Iterator[None]:
        """Take consumer lags, by topic and partition, from `source` for as long as the context lasts."""
        self._read.lags.append(source)
        try:
            yield
        finally:
            self._read.lags.remove(source)

    @contextmanager
    def reading_queues(self, source: Callable[[], Mapping[str, int]]) -> Iterator[None]:
        """Take the number of waiting queries, by lane, from `source` for as long as the context lasts."""
        self._read.queues.append(source)
        try:
            yield
        finally:
            self._read.queues.remove(source)


class _ReadAtScrape(Collector):
    """Gauges whose values others know. One that nobody knows is left out: zero would be a claim."""

    def __init__(self) -> None:
        self.lags: list[Callable[[], Lags]] = []
        self.queues: list[Callable[[], Mapping[str, int]]] = []
        self.outbox: tuple[int, float] | None = None

    def describe(self) -> Iterator[Metric]:
        """The names alone."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """What is known now."""
        queued, lag, events, age = self._families()
        for queues in self.queues:
            for lane, waiting in queues().items():
                queued.add_metric([lane], waiting)
        for lags in self.lags:
            for (topic, partition), records in lags().items():
                lag.add_metric([topic, str(partition)], records)
        if self.outbox is not None:
            events.add_metric([], self.outbox[0])
            age.add_metric([], self.outbox[1])
        yield from (queued, lag, events, age)

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            # Admitted, and waiting for a slot of this process.
            GaugeMetricFamily("queryd_queries_queued", "Queries that wait for a slot here now", labels=["lane"]),
            # Records in the topic that are not finished, those in this process's memory included.
            GaugeMetricFamily(
                "queryd_consumer_lag", "Records not finished yet, by partition", labels=["topic", "partition"]
            ),
            GaugeMetricFamily("queryd_outbox_events", "Events committed and not published"),
            GaugeMetricFamily("queryd_outbox_age_seconds", "Age of the oldest of them"),
        )


METRICS = Metrics()
