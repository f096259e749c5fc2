"""DuckDB's exceptions as ours. Its texts quote SQL, names and values: nothing of them leaves but a position in the SQL.

The text itself goes along as a failure's `detail`, for the statement's author alone, and only where the fault lies in
the statement: what storage says may quote servers, keys and other people's names.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import duckdb

from engines.duckdb.storage_errors import (
    FILE_UNREADABLE,
    REFUSED,
    Ours,
    read_disk_error,
    read_file_error,
    read_postgres_error,
    read_store_error,
)
from engines.protocol import QueryFailed, RelationKind
from queryd.events import ErrorCode


class Interrupted(Exception):
    """The query was told to stop, by its deadline or by a cancel; the parent knows which."""


# What a message may take of `error.json`: DuckDB lists every candidate of a function, and quotes whole values.
MAX_DETAIL_BYTES = 16 * 1024

# Of other kinds the position is missing, or counted in another unit (the parser counts characters).
_PLACED = (duckdb.BinderException, duckdb.CatalogException, duckdb.ConversionException)

# An unknown error of a statement of queryd's own, which creates a dataset's view.
DATASET_UNREADABLE = "The dataset can't be read."
NO_TABLE = "The dataset's table or view is missing."

_SYNTAX = "The SQL has a syntax error."
_ARGUMENT = "A function or a subquery got a value that it can't use."
_CANT = "The SQL uses a feature that the engine does not support."

# Errors of these classes are the author's mistakes, whatever their text. The first match decides, so subclasses come
# before their bases.
_MISTAKES: tuple[tuple[type[Exception], str], ...] = (
    (duckdb.ParserException, _SYNTAX),
    (duckdb.SyntaxException, _SYNTAX),
    (duckdb.CatalogException, "The SQL names a function, type or relation that does not exist."),
    (duckdb.BinderException, "The SQL names a column that does not exist, or uses values of types that don't fit."),
    (duckdb.ConversionException, "A value can't be converted to the type that the SQL asks for."),
    (duckdb.OutOfRangeException, "A value lies outside the range of its type."),
    (duckdb.TypeMismatchException, "The SQL uses values of types that don't fit."),
    (duckdb.ConstraintException, "A value breaks a constraint."),
    (duckdb.PermissionException, "The SQL reads something without permission."),
)
# For these classes only the texts below are known to be the author's mistakes. Any other text may come from a corrupt
# process.
_BY_TEXT: tuple[tuple[type[Exception], str], ...] = (
    (duckdb.InvalidTypeException, "The SQL uses a type that can't be used here."),
    (duckdb.InvalidInputException, _ARGUMENT),
    (duckdb.NotImplementedException, _CANT),
    (duckdb.SequenceException, "The SQL uses a sequence, which can't be used here."),
    (duckdb.SerializationException, FILE_UNREADABLE),
    # A check inside a function or cast failed. Only DuckDB's developers understand the text, so it is left out.
    (duckdb.InternalException, "The engine can't run this SQL: a function or cast in it fails inside the engine."),
)
_KNOWN_TEXTS = re.compile(
    "|".join(
        (
            r"More than one row returned by a subquery",
            r"Could not parse string \"",
            r"Failed to parse format specifier",
            r"Malformed JSON at byte",
            r"JSON path error",
            r"Map keys (?:must be unique|can not be NULL)",
            # RE2's errors about regular expressions.
            r"missing (?:\)|closing \]|argument to repetition operator)|unexpected \)",
            r"no argument for repetition operator",
            r"invalid (?:escape sequence|character class|perl operator|named capture group|repetition|UTF-8)",
            r"bad repetition operator|trailing \\|pattern too large|Unrecognized Regex option",
            r"Invalid type specifier|invalid format string|argument (?:index out of range|not found)",
            r"Invalid input for (?:hex|binary) digit",
            r"Invalid UTF8 Codepoint",
            r"Insufficient padding in [LR]PAD",
            r"Failed to decode string \".*\" using URL decoding",
            r"Slice step cannot be zero",
            r"Argument for ntile must be greater than zero",
            r"Type \w+ with value .* can't be cast",
            r"Values were not provided for the following prepared statement parameters",
            r"Cannot (?:AND|OR|XOR) bit strings of different sizes|The new bit must be 1 or 0",
            r"SETSEED accepts seed values",
            r"Mismatch Function: Strings must be of equal length",
            r"Cannot subtract infinite timestamps",
            r"'to_base' ",
            r"\w+ is undefined outside",
            r"Cannot perform list_reduce on an empty input list",
            r"Unknown TimeZone",
            r"Unimplemented type for cast",
            r"Cannot combine types",
            r"\"?(?:interval|date|time|timestamp)\"? units \"",
            r"Slice with steps|Enum value: unrecognized value",
            # Functions' errors about their arguments.
            r"(?:The first argument to|First argument of) ",
            r"(?:struct|list|array)_\w+(?:\(\))?:? ",
            r"MAP_CONCAT only takes map arguments|The provided amount of arguments is incorrect",
            r"Can't insert nothing into a STRUCT",
            r"Invalid input for (?:arg_min/arg_max|MIN/MAX|approx_top_k)",
            r"Sorting order must be a constant|Regex options field must be a constant",
            r"Memory must have a number",
            # Values that a format can't store.
            r"Parquet files do not support negative intervals",
            r"Parquet writer: map key column is not allowed to contain NULL values",
        )
    ),
    re.DOTALL,
)
_FORMAT_LACKS = re.compile(r"Parquet (?:files do not support|writer: )")
_SPILL_LIMIT = "max_temp_directory_size"

# The classes by DuckDB's names, for errors whose text is not UTF-8: Python raises UnicodeDecodeError for these.
_KINDS: dict[str, type[Exception]] = {
    "Parser": duckdb.ParserException,
    "Syntax": duckdb.SyntaxException,
    "Catalog": duckdb.CatalogException,
    "Binder": duckdb.BinderException,
    "Conversion": duckdb.ConversionException,
    "Out of Range": duckdb.OutOfRangeException,
    "Mismatch Type": duckdb.TypeMismatchException,
    "Invalid Input": duckdb.InvalidInputException,
    "Not implemented": duckdb.NotImplementedException,
    "IO": duckdb.IOException,
    "HTTP": duckdb.HTTPException,
}

# Addresses. An author may see those that the statement contains.
_ADDRESS = re.compile(r"""\b(?:s3|https?|postgres(?:ql)?)://[^\s'"]*|"?\b__queryd_\w+"?(?:\."?[^\s'".;,()]+"?){0,2}""")


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a statement stands: `sql` is what its author wrote, `text` the part of it that runs, and `offset` how many
    bytes of ours stand before it in what DuckDB was given. `values` are the author's parameters that are texts."""

    sql: str
    text: str
    offset: int
    values: tuple[str, ...] = ()

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

    def has_written(self, text: str) -> bool:
        """Whether the author wrote that text, in the statement or in a parameter."""
        return any(text in written for written in (self.sql, *self.values))


@dataclass(frozen=True, slots=True)
class Told:
    """An error of DuckDB: its class, its usual text, and the other facts that `errors_as_json` adds."""

    kind: type[Exception]
    text: str
    facts: dict[str, Any]

    @property
    def message(self) -> str:
        """The text without the leading name of its class."""
        return str(self.facts.get("exception_message", self.text))

    @classmethod
    def by(cls, error: Exception) -> "Told":
        # DuckDB cut a character in two, so Python could not decode the message; read its bytes.
        text = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
        start = text.find("{")
        try:
            # A stack trace may follow, and what stands before may be missing.
            facts, _ = json.JSONDecoder().raw_decode(text, max(start, 0))
            text = f"{text[: max(start, 0)]}{facts['exception_message']}"
        except (ValueError, KeyError, TypeError):
            return cls(type(error), text, {})
        if isinstance(error, UnicodeDecodeError):
            return cls(_KINDS.get(str(facts.get("exception_type")), duckdb.Error), text, facts)
        return cls(type(error), text, facts)


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of an exception. If it is not `known`, the process may be corrupt and must not be used again."""

    ours: Ours | Interrupted
    known: bool


def translate(
    error: Exception,
    placed: Placed | None = None,
    confidential: Collection[str] = (),
    kinds: Collection[RelationKind] = frozenset(RelationKind),
) -> Meaning:
    """Translate an exception of DuckDB or of Python's allocator. Only the `detail` quotes the original text.

    Args:
        error: The exception.
        placed: The author's statement that ran; None if queryd's own statement failed.
        confidential: Texts that a detail contains only if the author wrote them.
        kinds: The storages that the statement reads. Only these can be the cause.
    """
    told = Told.by(error)
    match error:
        case UnicodeEncodeError():
            return Meaning(QueryFailed(ErrorCode.QUERY_ERROR, "A parameter is not valid Unicode."), known=True)
        case duckdb.InterruptException():
            return Meaning(Interrupted("the query was interrupted"), known=True)
        case MemoryError() | duckdb.OutOfMemoryException():
            return Meaning(_out_of_memory(told.text), known=False)
    if told.message.startswith(REFUSED):
        return Meaning(QueryFailed(ErrorCode.QUERY_ERROR, told.message.removeprefix(REFUSED)), known=True)
    return _translate(told, placed, confidential, kinds)


def _translate(
    told: Told, placed: Placed | None, confidential: Collection[str], kinds: Collection[RelationKind]
) -> Meaning:
    by_storage = _read_storage_error(told, kinds)
    if by_storage is not None:
        return Meaning(by_storage, known=True)
    if placed is not None:
        return _blame_statement(told, placed, confidential)
    return _blame_dataset(told) if kinds else Meaning(_unknown(), known=False)


def is_file_suspected(meaning: Meaning) -> bool:
    """Whether a dataset's file may have caused the error."""
    if not isinstance(meaning.ours, QueryFailed) or meaning.ours.code is ErrorCode.MEMORY_LIMIT_EXCEEDED:
        return False
    return meaning.ours.message == FILE_UNREADABLE or not meaning.known


def _read_storage_error(told: Told, kinds: Collection[RelationKind]) -> Ours | None:
    found = read_disk_error(told.kind, told.message, str(told.facts.get("errno", "")))
    if found is None and RelationKind.PARQUET in kinds:
        found = read_store_error(told.kind, told.message) or read_file_error(told.message)
    if found is None and RelationKind.POSTGRES in kinds:
        found = read_postgres_error(told.message)
    return found


def _blame_dataset(told: Told) -> Meaning:
    """Translate an error of queryd's own statement, which creates a dataset's view."""
    if issubclass(told.kind, duckdb.CatalogException):
        return Meaning(QueryFailed(ErrorCode.QUERY_ERROR, NO_TABLE), known=True)
    return Meaning(QueryFailed(ErrorCode.QUERY_ERROR, DATASET_UNREADABLE), known=False)


def _blame_statement(told: Told, placed: Placed, confidential: Collection[str]) -> Meaning:
    detail = _detail(told.text, placed, confidential)
    sentence = next((sentence for kind, sentence in _MISTAKES if issubclass(told.kind, kind)), None)
    if sentence is not None:
        code = ErrorCode.SQL_REJECTED if issubclass(told.kind, duckdb.PermissionException) else ErrorCode.QUERY_ERROR
        return Meaning(QueryFailed(code, sentence + _where(told, placed), detail), known=True)
    known = _KNOWN_TEXTS.match(told.message) is not None
    sentence = next((sentence for kind, sentence in _BY_TEXT if issubclass(told.kind, kind)), None)
    if _FORMAT_LACKS.match(told.message):
        sentence = "A value of the result can't be written as Parquet: cast it to VARCHAR."
    elif sentence is None and known:
        sentence = _ARGUMENT
    if sentence is not None:
        return Meaning(QueryFailed(ErrorCode.QUERY_ERROR, sentence, detail), known)
    return Meaning(_unknown(), known=False)


def _unknown() -> QueryFailed:
    return QueryFailed(ErrorCode.INTERNAL, "The engine failed with an unknown error while it ran the SQL.")


def mask_addresses(text: str, placed: Placed | None = None) -> str:
    """Mask the addresses in the text, except those that the author wrote."""
    return _ADDRESS.sub(lambda found: found[0] if placed and placed.has_written(found[0]) else "…", text)


def _detail(text: str, placed: Placed, confidential: Collection[str]) -> str:
    """The text without addresses and confidential texts.

    Texts that the author wrote stay: hiding a right guess would confirm it.
    """
    text = mask_addresses(text, placed)
    for hidden in confidential:
        if not placed.has_written(hidden):
            text = text.replace(hidden, "…")
    return cut(text)


def cut(text: str) -> str:
    """Cut the text to the length of a detail."""
    return text.encode(errors="replace")[:MAX_DETAIL_BYTES].decode(errors="ignore")


def _where(told: Told, placed: Placed) -> str:
    """Where to look, if that is certain."""
    position = str(told.facts.get("position", ""))
    if not position.isdecimal() or not issubclass(told.kind, _PLACED):
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
