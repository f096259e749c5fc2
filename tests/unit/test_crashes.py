"""When a fault run lets a query end `ENGINE_CRASHED`: only when three of its attempts met a deadly fault."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults.crashes import CRASHED, Start, allow_crashes, read_starts
from tests.faults.evidence import Fault, SentQuery

NOON = 1_800_000_000.0
QUERY = SentQuery(
    query_id="query",
    org_id="org",
    task_id=None,
    mode="interactive",
    output_format="csv",
    canary="canary",
    sent_at=NOON,
    deadline_seconds=60.0,
    outcomes=frozenset({"Succeeded"}),
)
STARTS = [Start("executor-1", NOON + 1), Start("executor-2", NOON + 20), Start("executor-1", NOON + 40)]
KILLS = [
    Fault("SIGKILL child", 1, "a child of executor-1", NOON + 2, NOON + 2),
    Fault("SIGKILL executor", 1, "executor-2", NOON + 21, NOON + 25),
    Fault("failpoint child.after", 1, "KILL by child.after", NOON + 41, NOON + 42),
]


def may_crash(faults: list[Fault], starts: list[Start]) -> bool:
    [judged] = allow_crashes([QUERY], faults, {"query": starts})
    assert judged.outcomes - {CRASHED} == QUERY.outcomes
    return CRASHED in judged.outcomes


def test_three_attempts_that_met_a_deadly_fault_may_have_crashed() -> None:
    assert may_crash(KILLS, STARTS)


@pytest.mark.parametrize("missing", range(3))
def test_two_are_too_few(missing: int) -> None:
    assert not may_crash([fault for index, fault in enumerate(KILLS) if index != missing], STARTS)
    assert not may_crash(KILLS, [start for index, start in enumerate(STARTS) if index != missing])


def test_a_query_that_never_started_did_not_crash() -> None:
    assert not may_crash(KILLS, [])


def test_another_executors_fault_does_not_count() -> None:
    assert not may_crash([replace(KILLS[0], target="a child of executor-2"), *KILLS[1:]], STARTS)


def test_a_fault_that_kills_nobody_does_not_count() -> None:
    assert not may_crash([replace(KILLS[0], kind="S3 hung"), *KILLS[1:]], STARTS)


def test_a_clock_that_was_an_hour_off_is_put_right() -> None:
    assert may_crash(KILLS, [STARTS[0], replace(STARTS[1], at=STARTS[1].at - 3600), STARTS[2]])


def test_starts_are_read_from_logs(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    told = {"query_id": "query", "event": "query_started", "timestamp": datetime.fromtimestamp(NOON, UTC).isoformat()}
    log.write_text(f"no json\n{json.dumps(told)}\n{json.dumps(told | {'event': 'query_finished'})}\n")
    assert read_starts({"executor-1": log}) == {"query": [Start("executor-1", NOON)]}
