"""The rows of the table: what was reached, what is to be reached, and whether it holds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any


class Bound(Enum):
    """On which side of the target a figure holds."""

    AT_LEAST = "≥"
    AT_MOST = "≤"


class Verdict(StrEnum):
    """The table's last column."""

    HOLDS = "yes"
    # Missed, but above the floor: performance.md has to say what bounds it.
    ABOVE_FLOOR = "no, but its floor holds"
    MISSED = "no"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `reached` is None if it could not be measured; `detail` then has the reason.

    Without a floor the target is the floor.
    """

    name: str
    what: str
    against: str
    bound: Bound
    target: float
    unit: str
    reached: float | None
    floor: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether the figure holds."""
        if self.reached is None:
            return Verdict.NOT_MEASURED
        if self._is_within(self.target):
            return Verdict.HOLDS
        return Verdict.ABOVE_FLOOR if self.floor is not None and self._is_within(self.floor) else Verdict.MISSED

    def _is_within(self, limit: float) -> bool:
        assert self.reached is not None
        return self.reached >= limit if self.bound is Bound.AT_LEAST else self.reached <= limit

    def to_json(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {
            "name": self.name,
            "what": self.what,
            "against": self.against,
            "bound": self.bound.value,
            "target": self.target,
            "floor": self.floor,
            "unit": self.unit,
            "reached": self.reached,
            "verdict": self.verdict.value,
            "detail": self.detail,
        }


def compare_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The ratio of the medians of two series that were measured alternately."""
    return statistics.median(ours) / statistics.median(theirs)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which `percent` of the values lie, by linear interpolation; of a single value, itself."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def find_failures(rows: Sequence[Row]) -> list[str]:
    """The names of the rows that do not hold. A row that was not measured does not hold."""
    return [row.name for row in rows if row.verdict is not Verdict.HOLDS]


def to_table(rows: Sequence[Row]) -> str:
    """The rows in columns: row, what, against, to reach, reached, holds."""
    cells = [("row", "what", "against", "to reach", "reached", "holds?"), *(_to_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _to_cells(row: Row) -> tuple[str, ...]:
    floor = "" if row.floor is None else f" (floor {_show(row.floor)})"
    reached = f"{row.detail.get('why', '')}" if row.reached is None else f"{_show(row.reached)}{row.unit}"
    target = f"{row.bound.value} {_show(row.target)}{row.unit}{floor}"
    return row.name, row.what, row.against, target, reached, row.verdict.value


def _show(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
