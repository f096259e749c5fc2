"""Metrics: what each call adds, what nobody knows is left out, and no label that could name a query or its owner."""

import re
import time
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric

from db.data.cancellations import CancelOutcome
from queryd.dead_letters import DeadCode
from queryd.events import ErrorCode, Mode
from telemetry.metrics import CANCEL_OUTCOMES, CHILDREN, LABELS, METRICS, SUCCEEDED, Metrics

# What a query may spend on being counted.
_QUERY_SECONDS = 0.0001
# Labels of the exposition format itself.
_FORMAT = {"le"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def _fill(metrics: Metrics) -> None:
    """Everything once."""
    _count_query(metrics)
    metrics.lose_lease()
    metrics.restart_child("duckdb")
    metrics.bury("UNDECODABLE")
    metrics.cancel("accepted")
    metrics.publish([0.1, 0.2])
    metrics.project(3)
    metrics.tell_outbox(4, 5.0)


def _count_query(metrics: Metrics) -> None:
    metrics.start_attempt("batch", 0.5)
    with metrics.running("batch"):
        metrics.end_query("batch", None, total_seconds=1.0, run_ms=250, result_bytes=1_000, rows=10)


def _families(metrics: Metrics) -> Iterator[Metric]:
    with (
        metrics.reading_lags(lambda: {("query.requests.batch", 0): 7}),
        metrics.reading_queues(lambda: {"batch": 2}),
    ):
        yield from (each for each in metrics.registry.collect() if not each.name.startswith("process_"))


def _read(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"queryd_{name}", labels)


def test_no_metric_has_a_label_outside_the_list(metrics: Metrics) -> None:
    _fill(metrics)
    seen = {label for family in _families(metrics) for sample in family.samples for label in sample.labels}
    assert seen == LABELS | _FORMAT


def test_no_label_is_an_id_an_org_or_sql() -> None:
    assert not [label for label in LABELS if re.search(r"id|org|user|task|sql|key|name|host|worker", label)]


def test_every_series_whose_labels_are_known_exists_from_the_start(metrics: Metrics) -> None:
    """`increase()` does not see the first count of a series that appears with it."""
    before = _series(metrics)
    for mode in Mode:
        metrics.start_attempt(mode, 0.5)
        with metrics.running(mode):
            for code in (None, *ErrorCode):
                metrics.end_query(mode, code, total_seconds=1.0, run_ms=250, result_bytes=1_000, rows=10)
    for code in DeadCode:
        metrics.bury(code)
    for outcome in CancelOutcome:
        metrics.cancel(outcome)
    for child in CHILDREN:
        metrics.restart_child(child)
    metrics.lose_lease()
    metrics.publish([0.1])
    metrics.project(1)
    assert _series(metrics) == before


def test_the_words_that_telemetry_repeats_are_those_of_their_packages() -> None:
    assert set(CANCEL_OUTCOMES) == {outcome.value for outcome in CancelOutcome}


def _series(metrics: Metrics) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.startswith("process_")
    }


def test_every_name_is_ours_and_is_explained(metrics: Metrics) -> None:
    names = [family.name for family in _families(metrics)]
    assert len(names) == len(set(names)) >= 18
    for family in _families(metrics):
        assert re.fullmatch(r"queryd_[a-z_]+", family.name), family.name
        assert family.documentation[0].isupper(), family.name


def test_a_query_is_counted_by_lane_and_outcome(metrics: Metrics) -> None:
    _count_query(metrics)
    metrics.end_query("batch", "QUERY_TIMEOUT", total_seconds=3.0)
    assert _read(metrics, "queries_total", lane="batch", outcome=SUCCEEDED) == 1
    assert _read(metrics, "queries_total", lane="batch", outcome="QUERY_TIMEOUT") == 1
    assert _read(metrics, "attempts_total", lane="batch") == 1
    assert _read(metrics, "query_seconds_sum", lane="batch") == 4.0
    assert _read(metrics, "query_queue_seconds_sum", lane="batch") == 0.5
    # What did not run has no running time, and what failed no result.
    assert _read(metrics, "query_run_seconds_count", lane="batch") == 1
    assert _read(metrics, "query_run_seconds_sum", lane="batch") == 0.25
    assert _read(metrics, "result_bytes_sum", lane="batch") == 1_000
    assert _read(metrics, "result_rows_sum", lane="batch") == 10


def test_only_a_first_attempt_leaves_the_queue(metrics: Metrics) -> None:
    metrics.start_attempt("interactive", 2.0)
    metrics.start_attempt("interactive", None)
    assert _read(metrics, "attempts_total", lane="interactive") == 2
    assert _read(metrics, "query_queue_seconds_count", lane="interactive") == 1


def test_a_query_runs_until_its_context_ends_however_it_ends(metrics: Metrics) -> None:
    with pytest.raises(KeyError), metrics.running("batch"):
        assert _read(metrics, "queries_running", lane="batch") == 1
        raise KeyError
    assert _read(metrics, "queries_running", lane="batch") == 0


def test_published_events_and_their_batches_are_counted(metrics: Metrics) -> None:
    metrics.publish([0.5, 1.5])
    metrics.publish([])
    assert _read(metrics, "events_published_total") == 2
    assert _read(metrics, "publish_batches_total") == 1
    assert _read(metrics, "relay_lag_seconds_sum") == 2.0


def test_a_clock_that_went_back_makes_no_negative_time(metrics: Metrics) -> None:
    metrics.publish([-1.0])
    metrics.end_query("batch", None, total_seconds=-3.0)
    metrics.start_attempt("batch", -1.0)
    assert _read(metrics, "relay_lag_seconds_sum") == 0.0
    assert _read(metrics, "query_seconds_sum", lane="batch") == 0.0
    assert _read(metrics, "query_queue_seconds_sum", lane="batch") == 0.0


def test_what_nobody_knows_is_left_out_and_is_not_zero(metrics: Metrics) -> None:
    assert _read(metrics, "outbox_events") is None
    metrics.tell_outbox(3, 4.5)
    assert (_read(metrics, "outbox_events"), _read(metrics, "outbox_age_seconds")) == (3, 4.5)
    metrics.tell_outbox(None, None)
    assert (_read(metrics, "outbox_events"), _read(metrics, "outbox_age_seconds")) == (None, None)


def test_lags_and_queues_are_read_as_they_are_when_somebody_looks(metrics: Metrics) -> None:
    lags, queues = {("query.status", 1): 4}, {"batch": 9}
    with metrics.reading_lags(lambda: lags), metrics.reading_queues(lambda: queues):
        assert _read(metrics, "consumer_lag", topic="query.status", partition="1") == 4
        # A partition that was taken away is no longer ours to tell of.
        lags, queues = {("query.status", 2): 0}, {"batch": 0}
        assert _read(metrics, "consumer_lag", topic="query.status", partition="1") is None
        assert _read(metrics, "consumer_lag", topic="query.status", partition="2") == 0
        assert _read(metrics, "queries_queued", lane="batch") == 0
    assert _read(metrics, "consumer_lag", topic="query.status", partition="2") is None


def test_registries_share_nothing(metrics: Metrics) -> None:
    before = METRICS.registry.get_sample_value("queryd_lease_losses_total")
    metrics.lose_lease()
    assert METRICS.registry.get_sample_value("queryd_lease_losses_total") == before
    assert _read(metrics, "lease_losses_total") == 1


def test_counting_a_query_costs_less_than_a_tenth_of_a_millisecond(metrics: Metrics) -> None:
    def measure() -> float:
        start = time.perf_counter()
        for _ in range(200):
            _count_query(metrics)
        return (time.perf_counter() - start) / 200

    # The best of several: the machine may be busy with other things.
    assert min(measure() for _ in range(10)) < _QUERY_SECONDS


def test_the_page_is_prometheus_text(metrics: Metrics) -> None:
    _fill(metrics)
    page = generate_latest(metrics.registry).decode()
    assert 'queryd_queries_total{lane="batch",outcome="Succeeded"} 1.0' in page
    assert "# HELP queryd_outbox_age_seconds Age of the oldest of them" in page
