"""A result's columns: their names in its file, and how much of names and types an event may tell.

An event tells what the author or the owner of a dataset has named: aliases, columns and fields. It tells no value: not
the text of an expression without an alias, nor what PIVOT makes of values, nor the words of an ENUM, nor a text of a
parameter that became a name.
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
# A name, or a call of at most one name: what DuckDB makes of any other expression quotes the SQL.
_TELLABLE = re.compile(rf"{_NAME}|{_WORD}\((?:{_NAME})?\)")
_NUMBERED = re.compile(r"(.+)_\d+", re.DOTALL)
_MAX_TOLD_NAME = 128
# A shorter text stands in half of all names by chance.
_LEAST_PART = 4

# Of a file of text, the event is the only place that tells the types: all of them, or there is no result. An event has
# 512 KiB at most, and an inline result takes 64 of them.
_MAX_TOLD_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ResultColumn:
    """A column of a result: its name in the file, the statement's own for it, and its type, as DuckDB describes it and
    taken apart."""

    name: str
    own_name: str
    described: str
    type: ColumnType


@dataclass(frozen=True)
class Naming:
    """What may be told of names. `written` are those that the statement gives, `texts` its parameters' texts, and
    `read_sources` reads the names of its datasets' columns and fields."""

    written: Collection[str] = frozenset()
    has_pivot: bool = False
    texts: Sequence[str] = ()
    read_sources: Callable[[], Collection[str]] = frozenset

    @cached_property
    def _sources(self) -> Collection[str]:
        return self.read_sources()

    def may_tell(self, name: str) -> bool:
        """Whether the name is nobody's data, nor a piece of SQL."""
        if name in self.written:
            return True
        if self.has_pivot:
            return name in self._sources
        if _is_tellable(name) and not self.is_made_of_text(name):
            return True
        # DuckDB itself makes names unique in a subquery.
        own = _NUMBERED.fullmatch(name)
        return name in self._sources or (own is not None and (own[1] in self.written or own[1] in self._sources))

    def may_tell_field(self, name: str) -> bool:
        """The same of a field of a struct or a member of a union."""
        return not self.is_made_of_text(name) or name in self.written or name in self._sources

    def is_made_of_text(self, name: str) -> bool:
        """Whether a parameter's text stands in the name."""
        folded = name.casefold()
        return any(
            text.casefold() == folded or (len(text) >= _LEAST_PART and text.casefold() in folded) for text in self.texts
        )


def read_columns(described: Sequence[Sequence[object]]) -> list[ResultColumn]:
    """The columns of a result by the answer to DESCRIBE. Raises `QueryFailed` for a type that no result can have."""
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


def tell_columns(columns: Sequence[ResultColumn], naming: Naming, output_format: OutputFormat) -> tuple[Column, ...]:
    """The columns as an event may have them: a name that it may not tell is `column_N`, N from 1, a field `field_N`.

    Raises `QueryFailed` with RESULT_TOO_LARGE where the types of a file of text are more than an event can tell.
    """
    told = tuple(
        Column(column.name if naming.may_tell(column.own_name) else f"column_{number}", _tell_type(column, naming))
        for number, column in enumerate(columns, 1)
    )
    if output_format is not OutputFormat.PARQUET:
        size = sum(len(column.name.encode()) + len(column.type.encode()) for column in told)
        if size > _MAX_TOLD_BYTES:
            raise QueryFailed(
                ErrorCode.RESULT_TOO_LARGE,
                "The names and types of the columns have more than 256 KiB: select fewer columns, or ask for parquet.",
            )
    return told


def _tell_type(column: ResultColumn, naming: Naming) -> str:
    def name_field(name: str, number: int) -> str:
        return name if naming.may_tell_field(name) else f"field_{number}"

    # Only where something has to be left out is the type written anew.
    if column.type.holds("ENUM", "GEOMETRY") or (naming.texts and column.type.holds("STRUCT", "UNION")):
        return write_type(column.type, name_field)
    return column.described


def _is_tellable(name: str) -> bool:
    return len(name) <= _MAX_TOLD_NAME and _TELLABLE.fullmatch(name) is not None
