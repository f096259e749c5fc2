"""The columns of a dataset's Parquet files, and a view that reads them as one table.

Files with the same schema have one shape. A view reads each shape with a separate `read_parquet` and unites them by
name. So no value is cast to a narrower type, and queryd reads only unknown footers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb
from duckdb.sqltypes import DuckDBPyType

from engines.duckdb.gate.names import fold
from engines.duckdb.snapshot import Snapshot
from engines.duckdb.sql_text import literal, quote
from engines.duckdb.storage_errors import REFUSED
from engines.duckdb.unifying import unify
from engines.protocol import QueryFailed
from queryd.events import ErrorCode

_MAX_TOLD_NAME = 128
_MAX_DIGITS = 38
_NO_FILES_FAULT = (
    duckdb.HTTPException,
    duckdb.InterruptException,
    duckdb.OutOfMemoryException,
    duckdb.PermissionException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
    duckdb.FatalException,
)
# A hash of everything in which two schemas can differ, in the order of the columns.
_FINGERPRINTS = """
SELECT file_name, md5(string_agg(
    row(name, type, repetition_type = 'REPEATED', num_children, converted_type, scale, precision, logical_type,
        duckdb_type)::VARCHAR, chr(10) ORDER BY column_id))
FROM parquet_schema({files}) GROUP BY file_name
"""
_FIELDS = """
SELECT name, coalesce(num_children, 0), coalesce(precision, 0), duckdb_type FROM parquet_schema({files})
ORDER BY column_id
"""


@dataclass(frozen=True, slots=True)
class ShapeColumn:
    """One column. `trouble` is why it can't be read, as the predicate of a sentence."""

    name: str
    type: DuckDBPyType
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """The columns of all files with one schema; `key` is one of those files."""

    key: str
    columns: tuple[ShapeColumn, ...]


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    children: "tuple[_Field, ...]"
    digits: int
    type: str | None

    def leaves(self) -> "Iterable[_Field]":
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


def read_fingerprints(connection: duckdb.DuckDBPyConnection, urls: Sequence[str]) -> dict[str, str | None]:
    """Return each file's schema hash; None for an unreadable file.

    Raises DuckDB's exceptions if the store fails.
    """
    if not urls:
        return {}
    try:
        rows = connection.execute(_FINGERPRINTS.format(files=file_list(urls))).fetchall()
    except (duckdb.Error, UnicodeError) as error:
        if isinstance(error, _NO_FILES_FAULT) or is_failed_transfer(error):
            raise
        if len(urls) == 1:
            return {urls[0]: None}
        half = len(urls) // 2
        return read_fingerprints(connection, urls[:half]) | read_fingerprints(connection, urls[half:])
    return dict(rows)


def is_failed_transfer(error: Exception) -> bool:
    """True for a failed transfer, which does not mean that a file is bad."""
    text = str(error)
    return " error for HTTP " in text or "Short read for HTTP" in text


def read_shape(connection: duckdb.DuckDBPyConnection, url: str, key: str) -> Shape:
    """Return the columns of one file, as DuckDB reads them. Raises DuckDB's exceptions, and `QueryFailed`."""
    listed = file_list([url])
    rows = connection.execute(_FIELDS.format(files=listed)).fetchall()
    fields, _ = _gather(rows, 1, int(rows[0][1]))
    check_names([field.name for field in fields])
    for field in fields:
        _check_nested(field)
    described = connection.sql(f"SELECT * FROM read_parquet({listed}, hive_partitioning = false)")  # noqa: S608
    return Shape(key, tuple(_to_column(*each) for each in zip(fields, described.columns, described.types, strict=True)))


def check_names(names: Iterable[str]) -> None:
    """Raises `QueryFailed` if two names are equal or differ only in case."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(fold(name), name)
        if other is not name:
            both = _name([other, name])
            differ = "have the same name" if other == name else "differ only in case"
            sentence = f"The dataset's columns{both} {differ}, so SQL can't distinguish them."
            raise QueryFailed(ErrorCode.QUERY_ERROR, sentence, f"{quote(other)} and {quote(name)} {differ}.")


def unite(shapes: Sequence[Shape], registered: Sequence[ShapeColumn], snapshot: Snapshot) -> tuple[ShapeColumn, ...]:
    """Unite the shapes' columns, without partition columns. Raises `QueryFailed` if types are incompatible."""
    united: dict[str, tuple[ShapeColumn, str | None]] = {fold(each.name): (each, None) for each in registered}
    for shape in shapes:
        for column in shape.columns:
            before, where = united.get(fold(column.name), (None, None))
            if before is None or before.trouble or column.trouble:
                united[fold(column.name)] = (before if before and before.trouble else column, shape.key)
                continue
            type_ = unify(before.type, column.type)
            if type_ is None:
                raise _differ(before, where, column, shape.key, snapshot)
            united[fold(column.name)] = (ShapeColumn(before.name, type_), where or shape.key)
    partitions = {fold(name): name for name, _ in snapshot.partitions}
    for folded, (column, _) in united.items():
        if folded in partitions and partitions[folded] != column.name:
            check_names([column.name, partitions[folded]])
    return tuple(column for folded, (column, _) in united.items() if folded not in partitions)


def write_view(
    columns: Sequence[ShapeColumn], groups: Sequence[tuple[Shape, Sequence[str]]], snapshot: Snapshot
) -> str:
    """Return the SELECT that reads the files of all shapes as the united columns; each shape comes with its URLs."""
    return " UNION ALL ".join(_write_part(columns, shape, urls, snapshot) for shape, urls in groups)


def file_list(urls: Iterable[str]) -> str:
    """Write a list of files for DuckDB's table functions, in SQL."""
    return f"[{', '.join(map(literal, urls))}]"


def refusal(name: str, trouble: str) -> str:
    """Return an expression that raises a sentence about its column, only if the statement uses the column."""
    sentence = f"{REFUSED}The dataset's column{_name([name])} {trouble}."
    return f"CAST(error({literal(sentence)}) AS VARCHAR)"


def _write_part(columns: Sequence[ShapeColumn], shape: Shape, urls: Sequence[str], snapshot: Snapshot) -> str:
    own = {fold(column.name): column for column in shape.columns}
    listed = [_write_column(column, own.get(fold(column.name))) for column in columns]
    listed += [quote(name) for name, _ in snapshot.partitions]
    options = "hive_partitioning = false"
    if snapshot.partitions:
        types = ", ".join(f"{literal(name)}: {type_}" for name, type_ in snapshot.partitions)
        options = f"hive_partitioning = true, hive_types = {{{types}}}, hive_types_autocast = false"
    return f"SELECT {', '.join(listed)} FROM read_parquet({file_list(urls)}, {options})"  # noqa: S608 - names are quoted


def _write_column(wanted: ShapeColumn, own: ShapeColumn | None) -> str:
    if wanted.trouble:
        return f"{refusal(wanted.name, wanted.trouble)} AS {quote(wanted.name)}"
    type_ = "INTEGER" if wanted.type.id == "null" else str(wanted.type)
    if own is None:
        return f"CAST(NULL AS {type_}) AS {quote(wanted.name)}"
    if str(own.type) == type_ and own.name == wanted.name:
        return quote(own.name)
    return f"CAST({quote(own.name)} AS {type_}) AS {quote(wanted.name)}"


def _differ(before: ShapeColumn, where: str | None, column: ShapeColumn, key: str, snapshot: Snapshot) -> QueryFailed:
    relative = snapshot.place.relative
    one, other = _format_type(before.type), _format_type(column.type)
    name = _name([before.name])
    if where is None:
        message = f"The dataset's files differ from what was registered: column{name} was {one} and is {other}."
        detail = f"Column {quote(before.name)} was registered as {before.type} and is {column.type} in {relative(key)}."
    else:
        message = f"The dataset's files differ: column{name} is {one} in one file and {other} in another."
        detail = (
            f"Column {quote(before.name)} is {before.type} in {relative(where)} and {column.type} in {relative(key)}."
        )
    return QueryFailed(ErrorCode.QUERY_ERROR, message, detail)


def _gather(rows: Sequence[tuple[str, int, int, str | None]], start: int, count: int) -> tuple[list[_Field], int]:
    """Read `count` fields and their nested fields from a depth-first schema; also return the index of the next row."""
    fields = []
    for _ in range(count):
        name, children, digits, type_ = rows[start]
        own, start = _gather(rows, start + 1, children)
        fields.append(_Field(name, tuple(own), digits, type_))
    return fields, start


def _check_nested(field: _Field) -> None:
    check_names([child.name for child in field.children])
    for child in field.children:
        _check_nested(child)


def _to_column(field: _Field, name: str, type_: DuckDBPyType) -> ShapeColumn:
    if has_variant(type_):
        return ShapeColumn(name, type_, "is a VARIANT, which can't be read")
    if any(leaf.digits > _MAX_DIGITS for leaf in field.leaves()):
        return ShapeColumn(name, type_, f"has more than {_MAX_DIGITS} digits, which can't be read exactly")
    # pyarrow writes a column of only NULLs with an arbitrary type, so any type fits it.
    if all(leaf.type == '"NULL"' for leaf in field.leaves()):
        return ShapeColumn(name, duckdb.sqltype('"NULL"'))
    return ShapeColumn(name, type_)


def has_variant(type_: DuckDBPyType) -> bool:
    """True for a VARIANT, and for a type that contains one."""
    if type_.id == "variant":
        return True
    if type_.id not in ("list", "array", "map", "struct", "union"):
        return False
    return any(has_variant(part) for _, part in type_.children if isinstance(part, DuckDBPyType))


def _format_type(type_: DuckDBPyType) -> str:
    """Format a type for a sentence: a nested type as its kind only."""
    return type_.id.upper() if type_.id in ("struct", "list", "map") else str(type_)


def _name(names: Sequence[str]) -> str:
    """Format columns' names for a sentence, with a leading space; empty if a name is not one or two plain words."""
    if all(name.isprintable() and len(name) <= _MAX_TOLD_NAME for name in names):
        return f" {' and '.join(names)}"
    return ""
