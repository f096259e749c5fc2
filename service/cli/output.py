"""What commands print: for people a table, for machines one JSON line, and nothing after it."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(value, default=str, ensure_ascii=False), flush=True)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table on stdout, its columns named as the first row's keys."""
    console = Console()
    if not rows:
        console.print(f"no {title}")
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)


def print_fields(fields: Mapping[str, Any]) -> None:
    """One thing, a line a field."""
    for name, value in fields.items():
        if value is not None:
            print(f"{name.replace('_', ' ')}: {value}")


def complain(sentence: str, code: int = 1) -> NoReturn:
    """One line on stderr and an exit code: 1 for what did not work, 2 for what was asked wrongly."""
    print(f"queryd: {sentence}", file=sys.stderr)
    raise SystemExit(code)
