"""What `queryd watch` shows: for people on a terminal, for a pipe, and for machines."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from db.data.activity import RATE_SECONDS, Activity, SeenQuery
from queryd.events import Mode, Status

# As many columns as the whole org id, the lane and the error code take besides.
_WIDE = 138
_ID_DIGITS = 8
_STYLES = {Status.RUNNING: "cyan", Status.SUCCEEDED: "green", Status.FAILED: "red"}
# From how many of a unit on the next larger one says enough.
_ENOUGH = 100
_UNITS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"))
_DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane now. Rates are means of the last 10 s, `failed_per_second` a part of `finished_per_second`."""

    waiting: int
    running: int
    oldest_waiting_seconds: float | None
    finished_per_second: float
    failed_per_second: float


@dataclass(frozen=True, slots=True)
class Frame:
    """One look. `org_id` says whose queries these are, if not all; `counted_all` is false when even more wait than the
    lanes say; `trouble` is why there was nothing to be seen."""

    time: datetime
    org_id: str | None
    lanes: dict[str, Lane]
    queries: Sequence[SeenQuery]
    counted_all: bool = True
    trouble: str | None = None


def make_frame(activity: Activity, org_id: str | None) -> Frame:
    """The activity by lanes; both are there, whether something happens or not."""
    lanes = {mode.value: _make_lane(activity, mode) for mode in Mode}
    return Frame(_now(), org_id, lanes, activity.seen, activity.counted_all)


def make_trouble(sentence: str, org_id: str | None) -> Frame:
    """A look that has seen nothing."""
    return Frame(_now(), org_id, {}, (), trouble=sentence)


def _now() -> datetime:
    return datetime.now(UTC)


def _make_lane(activity: Activity, mode: Mode) -> Lane:
    waiting = next((each for each in activity.waiting if each.topic == mode.topic), None)
    ended = next((each for each in activity.ended if each.topic == mode.topic), None)
    return Lane(
        waiting=0 if waiting is None else waiting.waiting,
        running=activity.running.get(mode.topic, 0),
        oldest_waiting_seconds=None if waiting is None else waiting.oldest_seconds,
        finished_per_second=0.0 if ended is None else ended.ended / RATE_SECONDS,
        failed_per_second=0.0 if ended is None else ended.failed / RATE_SECONDS,
    )


# For machines.


def to_json(frame: Frame) -> dict[str, Any]:
    """The frame as one JSON value."""
    if frame.trouble is not None:
        return {"time": frame.time, "org_id": frame.org_id, "trouble": frame.trouble}
    return {
        "time": frame.time,
        "org_id": frame.org_id,
        "counted_all": frame.counted_all,
        "lanes": {name: asdict(lane) for name, lane in frame.lanes.items()},
        "queries": [asdict(query) for query in frame.queries],
    }


# For a pipe.

_HEADINGS = ("query", "org", "lane", "status", "error", "age", "ran")


def to_line(frame: Frame) -> str:
    """The lanes in one line."""
    lanes = (_say_lane(name, lane, _more(frame)) for name, lane in frame.lanes.items())
    return f"{_clock(frame)} {frame.trouble or '; '.join(lanes)}"


def to_lines(frame: Frame) -> Iterator[str]:
    """The lanes in one line, and one for each query, for grep and cut."""
    yield to_line(frame)
    if frame.queries:
        yield "\t".join(_HEADINGS)
    for query in frame.queries:
        yield "\t".join(_show_query(query, wide=True))


def _say_lane(name: str, lane: Lane, more: str) -> str:
    oldest = lane.oldest_waiting_seconds
    waiting = f"{lane.waiting}{more} waiting" + ("" if oldest is None else f" (oldest {_show_span(oldest)})")
    rates = f"{lane.finished_per_second:.1f}/s finished, {lane.failed_per_second:.1f}/s failed"
    return f"{name}: {waiting}, {lane.running} running, {rates}"


# For people.


def to_view(frame: Frame, width: int, height: int) -> RenderableType:
    """The frame on a terminal of so many columns and lines; no line is broken."""
    title = Text(f"queryd  {_clock(frame)}  {frame.org_id or 'all orgs'}", style="bold", no_wrap=True)
    if frame.trouble is not None:
        return Group(title, Text(frame.trouble, style="red"))
    # Beside the queries: the title, two heads of tables, the lanes, and a line free above and below the queries.
    rows = frame.queries[: max(0, height - 5 - len(frame.lanes))]
    return Group(title, _draw_lanes(frame), Text(), _draw_queries(rows, wide=width >= _WIDE))


def _draw_lanes(frame: Frame) -> Table:
    table = _make_table("lane", "waiting", "oldest", "running", "finished/s", "failed/s")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, lane in frame.lanes.items():
        oldest = lane.oldest_waiting_seconds
        failed = f"{lane.failed_per_second:.1f}"
        table.add_row(
            name,
            f"{lane.waiting:,}{_more(frame)}",
            "" if oldest is None else _show_span(oldest),
            f"{lane.running:,}",
            f"{lane.finished_per_second:.1f}",
            Text(failed, style="red" if lane.failed_per_second else ""),
        )
    return table


def _draw_queries(queries: Sequence[SeenQuery], *, wide: bool) -> Table:
    table = _make_table("query", "org", *(("lane", "status", "error") if wide else ("status",)), "age", "ran")
    for column in table.columns[-2:]:
        column.justify = "right"
    for query in queries:
        table.add_row(*_show_query(query, wide=wide), style=_STYLES.get(Status(query.status), ""))
    return table


def _make_table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _show_query(query: SeenQuery, *, wide: bool) -> list[str]:
    ran = "" if query.run_seconds is None else _show_span(query.run_seconds)
    times = [_show_span(query.age_seconds), ran]
    if not wide:
        # The longest error code does not fit into 80 columns.
        return [query.query_id, query.org_id[:_ID_DIGITS], query.status, *times]
    return [query.query_id, query.org_id, query.mode, query.status, query.error_code or "", *times]


def _more(frame: Frame) -> str:
    """What stands behind a number of waiting queries that may be larger."""
    return "" if frame.counted_all else "+"


def _show_span(seconds: float) -> str:
    """A span in its largest unit of which there are some: 0.4 s, 42 s, 12 min, 5 h, 9 d."""
    if seconds < _ENOUGH / 10:
        return f"{max(0.0, seconds):.1f} s"
    for length, unit in _UNITS:
        if seconds < _ENOUGH * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / _DAY_SECONDS:.0f} d"


def _clock(frame: Frame) -> str:
    return f"{frame.time:%H:%M:%S}Z"
