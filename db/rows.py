"""Rows to arrays: a batch goes to the server as one array for each column, and `unnest` makes rows of them again."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any


def to_arrays(row_type: type[Any], rows: Iterable[Any]) -> dict[str, list[Any]]:
    """One list for each field of a dataclass, by the field's name."""
    rows = list(rows)
    return {field.name: [getattr(row, field.name) for row in rows] for field in fields(row_type)}
