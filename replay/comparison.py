"""What came of comparing queries with their repetitions, for people and for machines. No value of a result is in it."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from replay.result_difference import Difference

# As many lines of one verdict as a person reads; the JSON has them all.
_LISTED = 50


class Verdict(StrEnum):
    """What is to be said of a query and its repetition."""

    SAME = "same"
    DIFFERENT = "different"
    # A result has expired or was deleted, or the original never had a row.
    GONE = "gone"
    # One of the two has not ended while somebody waited.
    UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class Judged:
    """A query and its repetition. An outcome is `Succeeded` or an error code, None of what has not ended or is gone.

    `differences` says what makes them different; the durations, in milliseconds, are those of the attempts that ended
    the queries.
    """

    original: str
    new: str
    verdict: Verdict
    differences: tuple[Difference, ...] = ()
    original_outcome: str | None = None
    new_outcome: str | None = None
    original_ms: int | None = None
    new_ms: int | None = None

    def to_text(self) -> str:
        """One line."""
        line = f"{self.verdict:<10} {self.original} → {self.new}"
        if self.differences:
            line += f": {', '.join(self.differences)}"
        if self.original_outcome != self.new_outcome:
            line += f" ({self.original_outcome or 'nothing'} → {self.new_outcome or 'nothing'})"
        return line


@dataclass(frozen=True, slots=True)
class Durations:
    """Of some queries, in milliseconds. Nothing was measured where `count` is 0."""

    count: int
    total_ms: int
    median_ms: float
    p95_ms: int

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: value for name, value in asdict(self).items() if name != "count"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """All pairs, in the order in which they were asked for."""

    judged: tuple[Judged, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many there are of each verdict."""
        found = Counter(each.verdict for each in self.judged)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def durations(self) -> tuple[Durations, Durations]:
        """Of the originals and of their repetitions, where both have succeeded: a failure's time says little."""
        pairs = [
            (each.original_ms, each.new_ms)
            for each in self.judged
            if each.original_ms is not None
            and each.new_ms is not None
            and each.original_outcome == each.new_outcome == "Succeeded"
        ]
        return _measure([before for before, _ in pairs]), _measure([after for _, after in pairs])

    @property
    def all_same(self) -> bool:
        """Whether every pair was compared and none differs; of none at all that can't be said."""
        return bool(self.judged) and all(each.verdict is Verdict.SAME for each in self.judged)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: counts, durations, and every pair."""
        before, after = self.durations
        return {
            "counts": {verdict.value: count for verdict, count in self.counts.items()},
            "durations": {
                "count": before.count,
                "original": before.to_json(),
                "new": after.to_json(),
                "ratio": _divide(after.total_ms, before.total_ms),
            },
            "queries": [asdict(each) for each in self.judged],
        }

    def to_text(self) -> str:
        """A line for each pair that is not the same, and a summary."""
        lines: list[str] = []
        for verdict in (Verdict.DIFFERENT, Verdict.GONE, Verdict.UNFINISHED):
            found = [each for each in self.judged if each.verdict is verdict]
            lines += [each.to_text() for each in found[:_LISTED]]
            if len(found) > _LISTED:
                lines.append(f"{verdict:<10} … and {len(found) - _LISTED} more")
        told = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        lines.append(f"{len(self.judged)} queries compared: {told}")
        return "\n".join(lines + _write_durations(*self.durations))


def _measure(millis: Sequence[int]) -> Durations:
    if not millis:
        return Durations(0, 0, 0.0, 0)
    # By nearest rank: a duration that some query has had.
    p95 = sorted(millis)[math.ceil(0.95 * len(millis)) - 1]
    return Durations(len(millis), sum(millis), statistics.median(millis), p95)


def _write_durations(before: Durations, after: Durations) -> list[str]:
    if not before.count:
        return []
    figures = (
        ("in all", before.total_ms, after.total_ms),
        ("median", before.median_ms, after.median_ms),
        ("95th percentile", before.p95_ms, after.p95_ms),
    )
    told = "; ".join(f"{name} {old:g} → {new:g} ms{_write_ratio(new, old)}" for name, old, new in figures)
    return [f"durations of the {before.count} that succeeded both times: {told}"]


def _write_ratio(new: float, old: float) -> str:
    ratio = _divide(new, old)
    return "" if ratio is None else f" (×{ratio:.2f})"


def _divide(new: float, old: float) -> float | None:
    """None where nothing took any time."""
    return round(new / old, 4) if old else None
