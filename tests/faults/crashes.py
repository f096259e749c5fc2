"""Which queries may have ended `ENGINE_CRASHED` by the faults' doing: three deaths of what ran one end it, and nobody
can tell ours from its own.

Who ran what is read in the executors' logs. This only ever lets an end pass that a query's own SQL could not explain.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tests.faults.evidence import Fault, SentQuery

CRASHED = "ENGINE_CRASHED"
# As many as end a query.
_CRASHES = 3
# Faults that can kill an executor, its lease or its child. They name the executor as their target; those at a child's
# failpoint can't.
_DEADLY = ("executor", "child", "file descriptors", "rebalance")
_NAMELESS = "failpoint child"
# A fault is noted when it begins; what it kills may have started a moment before or after.
_SLACK_SECONDS = 5.0
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Start:
    """An attempt of a query began in an executor, at that time of `time.time()`."""

    executor: str
    at: float


def read_starts(logs: Mapping[str, Path]) -> dict[str, list[Start]]:
    """The attempts of all queries by query id, from the logs of executors by their names."""
    starts: dict[str, list[Start]] = {}
    for executor, log in logs.items():
        for line in log.read_text(errors="replace").splitlines():
            if '"query_started"' not in line:
                continue
            said = json.loads(line)
            at = datetime.fromisoformat(said["timestamp"]).timestamp()
            starts.setdefault(said["query_id"], []).append(Start(executor, at))
    return starts


def allow_crashes(
    queries: Sequence[SentQuery], faults: Sequence[Fault], starts: Mapping[str, Sequence[Start]]
) -> tuple[SentQuery, ...]:
    """The queries, those of which three attempts met a deadly fault with one more end that they may have."""
    deadly = [fault for fault in faults if any(word in fault.kind for word in _DEADLY)]

    def may_have_crashed(query: SentQuery) -> bool:
        return _count_deaths(_in_order(query, starts.get(query.query_id, ())), deadly) >= _CRASHES

    return tuple(
        replace(query, outcomes=query.outcomes | {CRASHED}) if may_have_crashed(query) else query for query in queries
    )


def _in_order(query: SentQuery, starts: Iterable[Start]) -> list[Start]:
    """The attempts by time; a clock that was an hour off when it was noted is put right."""

    def put_right(start: Start) -> Start:
        hours = round((start.at - query.sent_at) / _HOUR)
        return replace(start, at=start.at - hours * _HOUR) if abs(hours) == 1 else start

    return sorted(map(put_right, starts), key=lambda start: start.at)


def _count_deaths(attempts: Sequence[Start], deadly: Sequence[Fault]) -> int:
    """How many attempts may have died by a fault; each fault is the end of one at most."""
    ends = [*(attempt.at for attempt in attempts[1:]), float("inf")][: len(attempts)]
    left = sorted(deadly, key=lambda fault: fault.started)
    deaths = 0
    for attempt, end in zip(attempts, ends, strict=True):
        met = next((fault for fault in left if _meets(attempt, end, fault)), None)
        if met is not None:
            left.remove(met)
            deaths += 1
    return deaths


def _meets(attempt: Start, end: float, fault: Fault) -> bool:
    return (
        (attempt.executor in fault.target or fault.kind.startswith(_NAMELESS))
        and fault.started <= end + _SLACK_SECONDS
        and fault.ended >= attempt.at - _SLACK_SECONDS
    )
