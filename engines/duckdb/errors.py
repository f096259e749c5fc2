"""DuckDB's exceptions as ours. Its texts quote SQL, names and values: nothing of them leaves but a line number."""

import re
from collections.abc import Callable

import duckdb

from engines.protocol import EngineUnavailable, QueryFailed
from queryd.events import ErrorCode


class Interrupted(Exception):
    """The query was told to stop, by its deadline or by a cancel; the parent knows which."""


# DuckDB shows where in the statement the fault lies: a blank line, then `LINE 3: ` and an excerpt.
_LINE = re.compile(r"\n\nLINE (\d+): ")

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
_SPILL_LIMIT = "max_temp_directory_size"


def translate(error: Exception) -> _Ours | Interrupted:
    """The exception of ours for one that DuckDB (or Python's allocator) raised; it never quotes the original."""
    match error:
        case duckdb.InterruptException():
            return Interrupted("the query was interrupted")
        case MemoryError() | duckdb.OutOfMemoryException():
            return _out_of_memory(str(error))
        case duckdb.PermissionException():
            return QueryFailed(ErrorCode.SQL_REJECTED, "The SQL reads something that it may not read.")
        case UnicodeError():
            return QueryFailed(ErrorCode.QUERY_ERROR, "A parameter is not valid Unicode.")
        case duckdb.IOException():
            return _told_by((*_STORAGE, *_DISK), str(error)) or EngineUnavailable("a dataset can't be reached")
        case _:
            # Postgres's errors come as several kinds of exceptions.
            return _told_by(_STORAGE, str(error)) or _query_error(error, str(error))


def _told_by(table: tuple[tuple[tuple[str, ...], Callable[[], _Ours]], ...], text: str) -> _Ours | None:
    return next((make() for signs, make in table if any(sign in text for sign in signs)), None)


def _query_error(error: Exception, text: str) -> QueryFailed:
    for kind, sentence in _SENTENCES:
        if isinstance(error, kind):
            return QueryFailed(ErrorCode.QUERY_ERROR, sentence + _where(text))
    if isinstance(error, duckdb.InternalException | duckdb.FatalException):
        return QueryFailed(ErrorCode.INTERNAL, "The engine met a fault of its own while it ran the SQL.")
    return QueryFailed(ErrorCode.QUERY_ERROR, "The SQL failed." + _where(text))


def _where(text: str) -> str:
    """The line of the fault, if told. Statements are run with their first line on line 2."""
    found = _LINE.search(text)
    line = int(found[1]) - 1 if found else 0
    return f" Look at line {line}." if line >= 1 else ""


def _out_of_memory(text: str) -> QueryFailed:
    if _SPILL_LIMIT in text:
        return QueryFailed(
            ErrorCode.MEMORY_LIMIT_EXCEEDED, "The query needs more memory and scratch space than it may."
        )
    return QueryFailed(ErrorCode.MEMORY_LIMIT_EXCEEDED, "The query needs more memory than it may have.")
