"""DuckDB's exceptions as ours. Its texts quote SQL, names and values: nothing of them leaves but a position in the SQL.

The text itself goes along as a failure's `detail`, for the statement's author alone, and only where the fault lies in
the statement: what storage says may quote servers, keys and other people's names.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import duckdb

from engines.protocol import EngineUnavailable, QueryFailed
from queryd.events import ErrorCode


class Interrupted(Exception):
    """The query was told to stop, by its deadline or by a cancel; the parent knows which."""


# What a message may take of `error.json`: DuckDB lists every candidate of a function, and quotes whole values.
MAX_DETAIL_BYTES = 16 * 1024

# Of other kinds the position is missing, or counted in another unit (the parser counts characters).
_PLACED = (duckdb.BinderException, duckdb.CatalogException, duckdb.ConversionException)

# These quote values, which may say whatever storage might.
_QUOTING = (duckdb.ConversionException, duckdb.OutOfRangeException)

# The first match decides, so subclasses stand before their bases.
_SENTENCES: tuple[tuple[type[Exception], str], ...] = (
    (duckdb.ParserException, "The SQL has a syntax error."),
    (duckdb.SyntaxException, "The SQL has a syntax error."),
    (duckdb.CatalogException, "The SQL names a function, type or relation that does not exist."),
    (duckdb.BinderException, "The SQL names a column that does not exist, or uses values of types that don't fit."),
    (duckdb.ConversionException, "A value can't be converted to the type that the SQL asks for."),
    (duckdb.OutOfRangeException, "A value lies outside the range of its type."),
    (duckdb.TypeMismatchException, "The SQL uses values of types that don't fit."),
    (duckdb.InvalidTypeException, "The SQL uses a type that can't be used here."),
    (duckdb.ConstraintException, "A value breaks a constraint."),
    (duckdb.InvalidInputException, "A function or a subquery was given something that it can't work with."),
    (duckdb.NotImplementedException, "The SQL uses something that the engine can't do."),
    (duckdb.SequenceException, "The SQL uses a sequence, which can't be used here."),
    (duckdb.SerializationException, "A file of the dataset can't be read."),
)

_Ours = QueryFailed | EngineUnavailable

# What storage says, by signs in the text; the first match decides. Some are the query's or the dataset's own, the rest
# pass by waiting.
_STORAGE: tuple[tuple[tuple[str, ...], Callable[[], _Ours]], ...] = (
    (
        (
            "Unable to connect to Postgres",
            "server closed the connection",
            "terminating connection",
            "connection to server",
            "the database system is",
            "no connection to the server",
            "SSL connection has been closed",
        ),
        lambda: EngineUnavailable("the datasets' Postgres can't be reached"),
    ),
    (
        ("canceling statement due to statement timeout",),
        lambda: QueryFailed(ErrorCode.QUERY_TIMEOUT, "A scan of the datasets' Postgres took longer than it may."),
    ),
    (
        # A 403 as well, and nobody's but a clock's.
        ("RequestTimeTooSkewed",),
        lambda: EngineUnavailable("the clocks of the datasets' store and of this machine are too far apart"),
    ),
    (
        ("HTTP 401", "HTTP 403", "permission denied for", "password authentication failed"),
        lambda: QueryFailed(ErrorCode.ENGINE_UNAVAILABLE, "The engine's credentials may not read the dataset."),
    ),
    (
        ("No files found that match", "HTTP 404"),
        lambda: QueryFailed(ErrorCode.QUERY_ERROR, "The dataset's files are missing."),
    ),
)
_DISK: tuple[tuple[tuple[str, ...], Callable[[], _Ours]], ...] = (
    (
        ("File too large",),
        lambda: QueryFailed(ErrorCode.RESULT_TOO_LARGE, "The result is larger than a result may be."),
    ),
    (
        ("No space left on device", "Disk quota exceeded"),
        lambda: EngineUnavailable("the engine's scratch disk is full"),
    ),
    (
        ("No magic bytes found", "too small to be a Parquet file", "corrupt"),
        lambda: QueryFailed(ErrorCode.QUERY_ERROR, "A file of the dataset can't be read."),
    ),
)
# Postgres's own word on a scan: a view that divides by zero is the dataset's error, and no outage.
_POSTGRES: tuple[tuple[tuple[str, ...], Callable[[], _Ours]], ...] = (
    (
        ("ERROR: ",),
        lambda: QueryFailed(ErrorCode.QUERY_ERROR, "The datasets' Postgres could not read the dataset."),
    ),
)
_SCANS = ("Failed to prepare COPY", "Failed to execute query", "Failed to prepare query")
_SPILL_LIMIT = "max_temp_directory_size"


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a statement stands: `sql` is what its author wrote, `text` the part of it that runs, and `offset` how many
    bytes of ours stand before it in what DuckDB was given."""

    sql: str
    text: str
    offset: int

    def locate(self, position: int) -> tuple[int, int] | None:
        """Line and column, in characters and from 1, in the author's SQL of a byte in what DuckDB was given.

        None where that byte is none of the author's, or where `text` can't be found again for certain.
        """
        text, within = self.text.encode(), position - self.offset
        start = self.sql.find(self.text)
        if not 0 <= within < len(text) or start < 0 or start != self.sql.rfind(self.text):
            return None
        before = self.sql[:start] + text[:within].decode(errors="ignore")
        return before.count("\n") + 1, len(before) - before.rfind("\n")


@dataclass(frozen=True, slots=True)
class _Told:
    """What DuckDB says: its text as people know it, and what else it tells with `errors_as_json`."""

    text: str
    facts: dict[str, Any]

    @classmethod
    def by(cls, error: Exception) -> "_Told":
        text = str(error)
        start = text.find("{")
        try:
            # A stack trace may follow, and what stands before may be missing.
            facts, _ = json.JSONDecoder().raw_decode(text, max(start, 0))
            return cls(f"{text[: max(start, 0)]}{facts['exception_message']}", facts)
        except (ValueError, KeyError, TypeError):
            return cls(text, {})


def translate(
    error: Exception, placed: Placed | None = None, confidential: Collection[str] = ()
) -> _Ours | Interrupted:
    """The exception of ours for one that DuckDB (or Python's allocator) raised; only its `detail` quotes the original.

    `placed` is the statement that ran, if it was one of a caller's. No detail holds any of the `confidential` texts.
    """
    told = _Told.by(error)
    match error:
        case duckdb.InterruptException():
            return Interrupted("the query was interrupted")
        case MemoryError() | duckdb.OutOfMemoryException():
            return _out_of_memory(told.text)
        case duckdb.PermissionException():
            return QueryFailed(ErrorCode.SQL_REJECTED, "The SQL reads something that it may not read.")
        case UnicodeError():
            return QueryFailed(ErrorCode.QUERY_ERROR, "A parameter is not valid Unicode.")
        case duckdb.IOException():
            return _told_by((*_STORAGE, *_DISK, *_POSTGRES), told.text) or EngineUnavailable(
                "a dataset can't be reached"
            )
        case _:
            # Postgres's errors come as several kinds of exceptions.
            by_storage = None if isinstance(error, _QUOTING) else _told_by(_STORAGE, told.text)
            return by_storage or _query_error(error, told, placed, confidential)


def _told_by(table: tuple[tuple[tuple[str, ...], Callable[[], _Ours]], ...], text: str) -> _Ours | None:
    return next((make() for signs, make in table if any(sign in text for sign in signs)), None)


def _query_error(error: Exception, told: _Told, placed: Placed | None, confidential: Collection[str]) -> QueryFailed:
    detail = _detail(told.text, confidential)
    if isinstance(error, duckdb.InternalException | duckdb.FatalException):
        return QueryFailed(ErrorCode.INTERNAL, "The engine met a fault of its own while it ran the SQL.", detail)
    sentence = next((sentence for kind, sentence in _SENTENCES if isinstance(error, kind)), "The SQL failed.")
    return QueryFailed(ErrorCode.QUERY_ERROR, sentence + _where(error, told, placed), detail)


def _detail(text: str, confidential: Collection[str]) -> str | None:
    """What the author may know. Where a scan of Postgres fails, its own SQL tells where the dataset lies."""
    if any(sign in text for sign in _SCANS):
        return None
    for hidden in confidential:
        text = text.replace(hidden, "…")
    return text.encode(errors="replace")[:MAX_DETAIL_BYTES].decode(errors="ignore")


def _where(error: Exception, told: _Told, placed: Placed | None) -> str:
    """Where to look, if that is certain."""
    position = str(told.facts.get("position", ""))
    if placed is None or not position.isdecimal() or not isinstance(error, _PLACED):
        return ""
    # The gate has found every relation, so one that is missing is missing inside a view of ours.
    if told.facts.get("type") in ("Table", "View", "Schema") or _calls_macro(placed.text):
        return ""
    found = placed.locate(int(position))
    return f" Look at line {found[0]}, column {found[1]}." if found else ""


def _calls_macro(text: str) -> bool:
    """True if the statement calls one of DuckDB's macros: positions may then count in the macro's own text."""
    return _macro_call().search(text) is not None


@cache
def _macro_call() -> re.Pattern[str]:
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        names = connection.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type IN ('macro', 'table_macro')"
        ).fetchall()
    return re.compile(rf'\b(?:{"|".join(re.escape(name) for (name,) in names)})"?\s*\(', re.IGNORECASE)


def _out_of_memory(text: str) -> QueryFailed:
    if _SPILL_LIMIT in text:
        return QueryFailed(
            ErrorCode.MEMORY_LIMIT_EXCEEDED, "The query needs more memory and scratch space than it may."
        )
    return QueryFailed(ErrorCode.MEMORY_LIMIT_EXCEEDED, "The query needs more memory than it may have.")
