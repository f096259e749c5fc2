"""Statements with the verdict that the gate must give: those it was built by, and siblings of them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILES = ("statements.jsonl", "siblings.jsonl")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; what is not allowed must be rejected."""

    id: str
    sql: str
    allowed: bool


@cache
def read_statements() -> tuple[Statement, ...]:
    """All statements of `tests/data/sql`."""
    folder = Path(__file__).parent / "data" / "sql"
    # A statement may hold signs that Python, unlike JSON, takes for the end of a line.
    lines = [line for file in _FILES for line in (folder / file).read_text(encoding="utf-8").split("\n") if line]
    return tuple(Statement(entry["id"], entry["sql"], entry["must"] == "allow") for entry in map(json.loads, lines))
