"""What commands print: for people a table, for machines one JSON line, and nothing after it."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from service.sizes import read_size

# Exit codes; 0 is success. docs/operations.md has the table.
FAILED = 1
WRONGLY_ASKED = 2
DEFECT = 70
INTERRUPTED = 130

# Wider than any table, so that what is measured is the table and not the terminal.
_ANY_WIDTH = 100_000


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(value, default=_to_json, ensure_ascii=False), flush=True)


def _to_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def show_rows(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool, shown: Sequence[str] | None = None) -> None:
    """Print rows as JSON, or as a table of the columns `shown` (default: all columns)."""
    if as_json:
        print_json(rows)
    else:
        print_rows(title, rows if shown is None else [{name: row[name] for name in shown} for row in rows])


def show_fields(fields: Mapping[str, Any], as_json: bool) -> None:
    """Print fields as JSON, or one line per field."""
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table on stdout, its columns named as the first row's keys; on a terminal that is too narrow, a line a cell."""
    if not rows:
        print(f"no {title}")
        return
    cells = [[_show(value) for value in row.values()] for row in rows]
    if not sys.stdout.isatty():
        # Through a pipe: one line a row, for grep and cut.
        for line in ([name.replace("_", " ") for name in rows[0]], *cells):
            print("\t".join(line))
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        # An id that is broken over lines can't be copied.
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=name.endswith("id"))
    for row in cells:
        table.add_row(*row)
    console = Console()
    if console.measure(table, options=console.options.update_width(_ANY_WIDTH)).maximum <= console.width:
        console.print(table)
        return
    # Folded columns can't be read: one below the other instead.
    print(f"{title}:")
    for each in rows:
        print()
        print_fields(each)


def print_fields(fields: Mapping[str, Any]) -> None:
    """One thing, a line a field."""
    for name, value in fields.items():
        if value is not None:
            print(f"{name.replace('_', ' ')}: {_show(value)}")


def _show(value: Any) -> str:
    match value:
        case None:
            return ""
        case list():
            return ",".join(str(part) for part in value)
        case datetime():
            return value.isoformat(timespec="milliseconds")
        case _:
            return str(value)


def complain(sentence: str, code: int = FAILED) -> NoReturn:
    """One line on stderr and an exit code: 1 for what did not work, 2 for what was asked wrongly."""
    print(f"queryd: {sentence}", file=sys.stderr)
    raise SystemExit(code)


def read_size_option(text: str, name: str) -> int:
    """Parse a size from the command line; exits with 2 if it is invalid."""
    try:
        return read_size(text)
    except ValueError as error:
        complain(f"{name} {error}", WRONGLY_ASKED)


def read_time(text: str | None, name: str) -> datetime | None:
    """Parse a UTC time from the command line; exits with 2 if it is invalid."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        complain(f"{name} must be a time in UTC, such as 2026-11-23T10:00:00Z", 2)
    if moment.tzinfo is None or moment.utcoffset() != UTC.utcoffset(None):
        complain(f"{name} must end with Z for UTC: 2026-11-23T10:00:00Z", 2)
    return moment
