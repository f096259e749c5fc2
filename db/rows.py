"""Rows to arrays: a batch goes to the server as one array for each column, and `unnest` makes rows of them again.

The arrays are literals, as in https://www.postgresql.org/docs/current/arrays.html#ARRAYS-INPUT. psycopg writes a list
as well, but element by element through its adapters: 65 to 130 µs for a row of ours, where this takes 5.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb


def to_arrays(row_type: type[Any], rows: Iterable[Any]) -> dict[str, str]:
    """One array literal for each field of a dataclass, by the field's name. The statement casts it to the array's type.

    Fields are None, str, int, float, bool, bytes, datetime or Jsonb. Raises KeyError for other types.
    """
    rows = list(rows)
    return {field.name: _to_literal([getattr(row, field.name) for row in rows]) for field in fields(row_type)}


def _to_literal(values: Sequence[Any]) -> str:
    return "{" + ",".join(["NULL" if value is None else _WRITERS[type(value)](value) for value in values]) + "}"


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_WRITERS: dict[type[Any], Callable[[Any], str]] = {
    str: _quote,
    int: str,
    bool: str,
    float: repr,
    bytes: lambda value: f'"\\\\x{value.hex()}"',
    datetime: lambda value: f'"{value.isoformat()}"',
    Jsonb: lambda value: _quote(json.dumps(value.obj)),
}
