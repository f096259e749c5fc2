"""A result's columns: their names in its file, and the names and types that an event may contain.

An event contains names that the author or the owner of a dataset wrote: aliases, columns and fields. It contains no
values. These count as values: the text of an expression without an alias, names that PIVOT makes from values, the
values of an ENUM, and a parameter's text that became a name.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from engines.protocol import QueryFailed
from queryd.column_types import ColumnType, NoCounterpart, make_unique, parse_type, write_type
from queryd.events import Column, ErrorCode, OutputFormat

_WORD = r"[^\W\d]\w*"
_NAME = rf"{_WORD}(?: \w+)*"
# A name, or a call with at most one name as its argument. For any other expression DuckDB's name quotes the SQL.
_TELLABLE = re.compile(rf"{_NAME}|{_WORD}\((?:{_NAME})?\)")
_NUMBERED = re.compile(r"(.+)_\d+", re.DOTALL)
_MAX_TOLD_NAME = 128
# Many names contain a shorter text by chance.
_LEAST_PART = 4

# A CSV or JSON file has no types, so the event must contain all of them; otherwise the query fails. An event has at
# most 512 KiB, and an inline result takes 64 KiB of them.
_MAX_TOLD_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ResultColumn:
    """A result's column: its name in the file, its name in the statement, and its type as DuckDB's text and parsed."""

    name: str
    own_name: str
    described: str
    type: ColumnType


@dataclass(frozen=True)
class Naming:
    """Decides which names an event may contain.

    `written` are the names that the statement gives, `texts` its parameters' texts; `read_sources` reads the names of
    its datasets' columns and fields.
    """

    written: Collection[str] = frozenset()
    has_pivot: bool = False
    texts: Sequence[str] = ()
    read_sources: Callable[[], Collection[str]] = frozenset

    @cached_property
    def _sources(self) -> Collection[str]:
        return self.read_sources()

    def is_public(self, name: str) -> bool:
        """Whether the name contains neither data nor a piece of the SQL."""
        if name in self.written:
            return True
        if self.has_pivot:
            return name in self._sources
        if _is_name_or_simple_call(name) and not self.has_parameter_text(name):
            return True
        # DuckDB itself makes names unique in a subquery.
        own = _NUMBERED.fullmatch(name)
        return name in self._sources or (own is not None and (own[1] in self.written or own[1] in self._sources))

    def is_public_field(self, name: str) -> bool:
        """Whether an event may contain the name of a struct's field or a union's member."""
        return not self.has_parameter_text(name) or name in self.written or name in self._sources

    def has_parameter_text(self, name: str) -> bool:
        """Whether the name contains a parameter's text."""
        folded = name.casefold()
        return any(
            text.casefold() == folded or (len(text) >= _LEAST_PART and text.casefold() in folded) for text in self.texts
        )


def read_columns(described: Sequence[Sequence[object]]) -> list[ResultColumn]:
    """Parse the answer to DESCRIBE. Raises `QueryFailed` for a type that no result can have."""
    names = make_unique([str(name) for name, *_ in described])
    return [
        ResultColumn(name, str(own_name), str(type_), _parse(str(type_), number))
        for number, (name, (own_name, type_, *_)) in enumerate(zip(names, described, strict=True), 1)
    ]


def _parse(described: str, number: int) -> ColumnType:
    try:
        return parse_type(described)
    except NoCounterpart:
        raise QueryFailed(
            ErrorCode.QUERY_ERROR, f"Column {number} has a type that no result can have: cast it to VARCHAR."
        ) from None


def redact_columns(columns: Sequence[ResultColumn], naming: Naming, output_format: OutputFormat) -> tuple[Column, ...]:
    """The columns for an event. `column_N` replaces a name that it may not contain, `field_N` a field's; N is from 1.

    Raises `QueryFailed` with RESULT_TOO_LARGE if the types of a CSV or JSON file do not fit into an event.
    """
    told = tuple(
        Column(column.name if naming.is_public(column.own_name) else f"column_{number}", _redact_type(column, naming))
        for number, column in enumerate(columns, 1)
    )
    if output_format is not OutputFormat.PARQUET:
        size = sum(len(column.name.encode()) + len(column.type.encode()) for column in told)
        if size > _MAX_TOLD_BYTES:
            raise QueryFailed(
                ErrorCode.RESULT_TOO_LARGE,
                "The columns' names and types are larger than 256 KiB: select fewer columns, or ask for parquet.",
            )
    return told


def _redact_type(column: ResultColumn, naming: Naming) -> str:
    def name_field(name: str, number: int) -> str:
        return name if naming.is_public_field(name) else f"field_{number}"

    # Rewrite the type only if it contains something that the event must not.
    if column.type.holds("ENUM", "GEOMETRY") or (naming.texts and column.type.holds("STRUCT", "UNION")):
        return write_type(column.type, name_field)
    return column.described


def _is_name_or_simple_call(name: str) -> bool:
    return len(name) <= _MAX_TOLD_NAME and _TELLABLE.fullmatch(name) is not None
