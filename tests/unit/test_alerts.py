"""deploy/alerts.yml fires when it should, by Prometheus's own tool, on series as a fresh process has them."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "alerts.yml"
# Where it is set, the tool must be there: CI sets it, so that these tests are not skipped unseen.
VARIABLE = "QUERYD_TEST_PROMTOOL"

_Act = Callable[[Metrics], None]


def _find_promtool() -> str:
    named = os.environ.get(VARIABLE)
    found = shutil.which(named or "promtool")
    if found is None and named is not None:
        pytest.fail(f"{VARIABLE} names no program: {named}")
    if found is None:
        pytest.skip(f"needs promtool: install Debian's package prometheus, or name the tool in {VARIABLE}")
    return found


def _run(*arguments: str, folder: Path) -> None:
    done = subprocess.run(
        [_find_promtool(), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _nothing(_metrics: Metrics) -> None:
    pass


def _bury(metrics: Metrics) -> None:
    metrics.bury("INVALID_REQUEST")


def _bury_conflict(metrics: Metrics) -> None:
    metrics.bury("CONFLICT")


def _kill_children(metrics: Metrics) -> None:
    for _ in range(10):
        metrics.restart_child("duckdb")


def _kill_one(metrics: Metrics) -> None:
    metrics.restart_child("duckdb")


def _lose(metrics: Metrics) -> None:
    metrics.lose_lease()


def _wait(metrics: Metrics) -> None:
    for _ in range(100):
        metrics.start_attempt("interactive", 20.0)


def _age(metrics: Metrics) -> None:
    metrics.tell_outbox(12, 400.0)


@dataclass(frozen=True, slots=True)
class Case:
    """What a fresh process does in its second minute, and which alert fires for it."""

    act: _Act
    alert: str
    labels: dict[str, str] | None = None
    fires: bool = True
    # Whether the process measures the outbox, as a relay does.
    relay: bool = True
    lag: int = 0
    # Whether it does so every minute from then on.
    again: bool = False


CASES = {
    "the first dead letter": Case(_bury, "QuerydDeadLetters", {"code": "INVALID_REQUEST"}),
    "a first conflict": Case(_bury_conflict, "QuerydDeadLetters", {"code": "CONFLICT"}),
    "no dead letter": Case(_nothing, "QuerydDeadLetters", fires=False),
    "a first burst of dead children": Case(_kill_children, "QuerydChildrenDie", {"child": "duckdb"}),
    "one dead child": Case(_kill_one, "QuerydChildrenDie", fires=False),
    "the first lost lease": Case(_lose, "QuerydLeasesLost"),
    "no lost lease": Case(_nothing, "QuerydLeasesLost", fires=False),
    "a first burst of waiting queries": Case(_wait, "QuerydInteractiveQueriesWait", again=True),
    "no waiting query": Case(_nothing, "QuerydInteractiveQueriesWait", fires=False),
    "an old outbox": Case(_age, "QuerydOutboxOld"),
    "an empty outbox": Case(_nothing, "QuerydOutboxOld", fires=False),
    "no relay": Case(_nothing, "QuerydOutboxUnmeasured", relay=False),
    "a relay": Case(_nothing, "QuerydOutboxUnmeasured", fires=False),
    "a late projector": Case(_nothing, "QuerydProjectorBehind", lag=20_000),
    "a projector on time": Case(_nothing, "QuerydProjectorBehind", fires=False, lag=12),
}


def _scrape(metrics: Metrics, lag: int) -> dict[str, float]:
    """Every sample by its series, as Prometheus stores it."""
    with metrics.reading_lags(lambda: {("query.status", 0): lag}):
        samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {
        _name(sample.name, sample.labels): sample.value for sample in samples if not sample.name.startswith("process_")
    }


def _name(metric: str, labels: Mapping[str, str]) -> str:
    return metric + "{" + ",".join(f'{label}="{value}"' for label, value in sorted(labels.items())) + "}"


def _describe(case: Case) -> dict[str, Any]:
    """A test for promtool: what is scraped of a process that has just started, and of the same after it acts."""
    metrics = Metrics()
    if case.relay:
        metrics.tell_outbox(0, 0.0)
    before = _scrape(metrics, 0)
    case.act(metrics)
    after = _scrape(metrics, case.lag)
    series = [
        # A series that was not there yet has no samples of the first two minutes.
        {
            "series": name,
            "values": (f"{before[name]}x1 " if name in before else "_x2 ")
            + (f"{value}+{value}x9" if case.again else f"{value}x9"),
        }
        for name, value in after.items()
    ]
    [rule] = [each for each in _rules() if each["alert"] == case.alert]
    expected = [{"exp_labels": rule["labels"] | (case.labels or {})}] if case.fires else []
    return {
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [{"eval_time": "9m", "alertname": case.alert, "exp_alerts": expected}],
    }


def _rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    _run("check", "rules", str(RULES), folder=tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_it_fires_when_it_should_and_only_then(name: str, tmp_path: Path) -> None:
    # Annotations are prose: what they say is not compared.
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [_describe(CASES[name])]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    _run("test", "rules", "test.yml", folder=tmp_path)


def test_every_alert_is_tried_both_ways_and_is_explained_in_the_docs() -> None:
    alerts = {rule["alert"] for rule in _rules()}
    assert {case.alert for case in CASES.values() if case.fires} == alerts
    assert {case.alert for case in CASES.values() if not case.fires} == alerts
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert {alert for alert in alerts if f"| `{alert}` |" in page} == alerts


def test_every_metric_of_a_rule_exists() -> None:
    metrics = Metrics()
    metrics.tell_outbox(0, 0.0)
    names = {name.partition("{")[0] for name in _scrape(metrics, 0)}
    told = {word for rule in _rules() for word in _words(rule["expr"]) if word.startswith("queryd_")}
    assert told <= names


def _words(expression: str) -> set[str]:
    return set("".join(letter if letter.isalnum() or letter == "_" else " " for letter in expression).split())
