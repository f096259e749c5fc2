"""The table as pictures: SVG, written by hand, because bars need no library."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench.rows import Bound, Row, Verdict

_COLORS = {Verdict.HOLDS: "#2a7f4f", Verdict.ABOVE_FLOOR: "#c98a1b", Verdict.MISSED: "#b23a3a"}
_LABEL, _BARS, _NOTE, _LINE = 200, 460, 140, 24
# A bar this many times as long as the target is cut.
_LONGEST = 2.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; `length` is a share of the longest."""

    label: str
    length: float
    note: str
    color: str


def write_plots(rows: Sequence[Row], folder: Path) -> None:
    """Write `bench-targets.svg`, and `bench-small.svg` if small queries were measured."""
    bars = [
        Bar(row.name, score / _LONGEST, f"{row.reached:.3g}{row.unit}", _COLORS[row.verdict])
        for row in rows
        if (score := find_score(row)) is not None
    ]
    title = "Reached against the target (line); longer is better"
    (folder / "bench-targets.svg").write_text(draw(title, bars, mark=1 / _LONGEST))
    rates: dict[str, float] = {}
    for row in rows:
        if row.name.startswith("small-") and row.reached is not None:
            rates |= {name: statistics.median(measured) for name, measured in row.detail.items()}
    if rates:
        fastest = max(rates.values())
        bars = [Bar(name, rate / fastest, f"{rate:.0f}/s", "#3b6ea5") for name, rate in rates.items()]
        (folder / "bench-small.svg").write_text(draw("Small queries/s, median", bars))


def find_score(row: Row) -> float | None:
    """How much of the target was reached: 1 is the target, more is better, at most `_LONGEST`. None if not measured."""
    if row.reached is None:
        return None
    if row.bound is Bound.AT_LEAST:
        return min(_LONGEST, row.reached / row.target)
    # What is at or below zero, such as memory beneath the limit, could not be better.
    return _LONGEST if row.reached <= 0 else min(_LONGEST, row.target / row.reached)


def draw(title: str, bars: Sequence[Bar], mark: float | None = None) -> str:
    """Horizontal bars, and a vertical line at `mark`."""
    width, height = _LABEL + _BARS + _NOTE, _LINE * (len(bars) + 2)
    parts = [f'<text x="8" y="17" font-weight="bold">{escape(title)}</text>']
    for number, bar in enumerate(bars, 1):
        y = number * _LINE + 4
        parts += [
            f'<text x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{bar.length * _BARS:.1f}" height="{_LINE - 6}" fill="{bar.color}"/>',
            f'<text x="{_LABEL + bar.length * _BARS + 6:.1f}" y="{y + 14}">{escape(bar.note)}</text>',
        ]
    if mark is not None:
        x = _LABEL + mark * _BARS
        parts.append(f'<line x1="{x}" y1="{_LINE}" x2="{x}" y2="{height - _LINE // 2}" stroke="black"/>')
    size = f'width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect {size} fill="white"/>', *parts, "</svg>\n"])
