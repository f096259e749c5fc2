"""Compares two results with DuckDB: the same columns and the same rows in any order, floats to 12 digits.

docs/operations.md states the rule under *Replaying*.
"""

import tempfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from engines.duckdb.sql_text import literal
from queryd.errors import ResultUnreadable
from queryd.events import Column

_ABSOLUTE_TOLERANCE = 1e-12
# Two comparisons run at a time; what does not fit is spilled to disk.
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": "512MB",
    "threads": 2,
    "enable_external_access": False,
}

_MACROS = f"""
CREATE MACRO to_12_digits(x) AS CASE WHEN x = 0 THEN 0 WHEN isfinite(x) THEN format('{{:.11e}}', x)::DOUBLE ELSE x END;
CREATE MACRO is_near(a, b) AS a = b OR (isfinite(a) AND isfinite(b) AND abs(a - b) <=
    greatest({_ABSOLUTE_TOLERANCE}, 1.5 * pow(10, floor(log10(greatest(abs(a), abs(b), 1e-300))) - 11)));
"""

# `balance` is how often a row is in the first result, less how often it is in the second one. So the table holds what
# EXCEPT ALL would find in both directions, and each result is read once.
_COUNT_ROWS = """
CREATE TABLE surplus AS SELECT {values}, sum(side) AS balance
FROM (SELECT *, 1 AS side FROM before UNION ALL SELECT *, -1 FROM after) GROUP BY ALL HAVING balance <> 0
"""
# Sorted floats that are near to each other become one value, the number of larger steps below it.
_MERGE_NEAR = """
WITH steps AS (SELECT *, {steps} FROM surplus), merged AS (SELECT {values}, balance FROM steps)
SELECT 1 FROM (SELECT * EXCLUDE (balance) FROM merged GROUP BY ALL HAVING sum(balance) <> 0) LIMIT 1
"""
_STEP = "NOT coalesce(is_near({name}, lag({name}) OVER (ORDER BY {name})), TRUE) AS step_{name}"
_MERGED = "CASE WHEN {name} IS NOT NULL THEN count_if(step_{name}) OVER (ORDER BY {name}) END AS {name}"


class Difference(StrEnum):
    """What differs between two queries, or their results."""

    STATUS = "status"
    ERROR_CODE = "error code"
    FORMAT = "output format"
    SCHEMA = "schema"
    ROWS = "row count"
    VALUES = "values"
    # The query's text, which an edited saved query changes. It is reported only beside another difference.
    SQL = "sql"
    # An object is not what its event announces.
    DAMAGED = "damaged"


class ResultRows:
    """The rows of one result, which can be read once. `columns` are those of its event."""

    def __init__(self, parts: Sequence[pa.RecordBatchReader], columns: Sequence[Column] = ()) -> None:
        schema = parts[0].schema
        if any(part.schema != schema for part in parts):
            raise ResultUnreadable("the files of one result have different columns")
        self.names = tuple(schema.names)
        self.told_types = tuple(column.type for column in columns)
        self.count = 0
        self.is_damaged = False
        self._parts = parts
        self._schema = pa.schema([(f"c{number}", _importable(field.type)) for number, field in enumerate(schema)])

    def open(self) -> pa.RecordBatchReader:
        """The batches as DuckDB reads them, the columns named by their places."""
        return pa.RecordBatchReader.from_batches(self._schema, self._read())

    def _read(self) -> Iterator[pa.RecordBatch]:
        try:
            for part in self._parts:
                for batch in part:
                    self.count += batch.num_rows
                    arrays = [
                        pc.cast(each, field.type) for each, field in zip(batch.columns, self._schema, strict=True)
                    ]
                    yield pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        except (ResultUnreadable, ValueError, pa.ArrowException, OSError):
            # DuckDB replaces the exception by its own.
            self.is_damaged = True
            raise


def find_differences(before: ResultRows, after: ResultRows) -> tuple[Difference, ...]:
    """What differs in the content of two results: schema, row count, values; empty if they are the same.

    Values are compared only if the schemas and the numbers of rows are the same. Raises `duckdb.Error` if the disk or
    the memory is full.
    """
    with (
        tempfile.TemporaryDirectory(prefix="queryd-compare-") as folder,
        duckdb.connect(config=_SETTINGS | {"temp_directory": folder}) as connection,
    ):
        connection.register("before", before.open())
        connection.register("after", after.open())
        try:
            return _find_differences(connection, before, after)
        except duckdb.Error:
            if before.is_damaged or after.is_damaged:
                return (Difference.DAMAGED,)
            raise


def _find_differences(
    connection: duckdb.DuckDBPyConnection, before: ResultRows, after: ResultRows
) -> tuple[Difference, ...]:
    types = connection.view("before").types
    if (before.names, before.told_types, types) != (after.names, after.told_types, connection.view("after").types):
        connection.execute("SELECT (SELECT count(*) FROM before), (SELECT count(*) FROM after)").fetchone()
        return (Difference.SCHEMA, *_compare_counts(before, after))
    names = [f"c{number}" for number in range(len(types))]
    connection.execute(_MACROS)
    rounded = [f"{_round(name, type_)} AS {name}" for name, type_ in zip(names, types, strict=True)]
    connection.execute(_COUNT_ROWS.format(values=", ".join(rounded)))
    if counts := _compare_counts(before, after):
        return counts
    floats = {name for name, type_ in zip(names, types, strict=True) if _is_float(type_)}
    if not connection.execute("SELECT 1 FROM surplus LIMIT 1").fetchone():
        return ()
    if not floats:
        return (Difference.VALUES,)
    merged = _MERGE_NEAR.format(
        steps=", ".join(_STEP.format(name=name) for name in sorted(floats)),
        values=", ".join(_MERGED.format(name=name) if name in floats else name for name in names),
    )
    return (Difference.VALUES,) if connection.execute(merged).fetchone() else ()


def _compare_counts(before: ResultRows, after: ResultRows) -> tuple[Difference, ...]:
    return () if before.count == after.count else (Difference.ROWS,)


def _importable(type_: pa.DataType) -> pa.DataType:
    """Return the type that DuckDB can import: it has no decimals of more than 38 digits."""
    if pa.types.is_decimal256(type_):
        return pa.string()
    if pa.types.is_list(type_):
        return pa.list_(_importable(type_.value_type))
    if pa.types.is_map(type_):
        return pa.map_(_importable(type_.key_type), _importable(type_.item_type))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _importable(field.type)) for field in type_])
    return type_


def _is_float(type_: Any) -> bool:
    return type_.id in ("double", "float")


def _round(value: str, type_: Any, depth: int = 0) -> str:
    """SQL that rounds all floats in a value of that type."""
    if _is_float(type_):
        return f"to_12_digits({value}::DOUBLE)"
    is_nested = type_.id in ("list", "array", "struct", "map")
    if not is_nested or not any(name in str(type_) for name in ("DOUBLE", "FLOAT")):
        return value
    part = f"v{depth}"
    if type_.id == "struct":
        return f"CASE WHEN {value} IS NOT NULL THEN {_round_fields(value, type_, depth)} END"
    if type_.id == "map":
        # A map is a list of entries.
        return f"list_transform(map_entries({value}), lambda {part}: {_round_fields(part, type_, depth + 1)})"
    _, element = type_.children[0]
    return f"list_transform({value}, lambda {part}: {_round(part, element, depth + 1)})"


def _round_fields(value: str, type_: Any, depth: int) -> str:
    names = [(literal(name), field) for name, field in type_.children]
    fields = (f"{name}: {_round(f'struct_extract({value}, {name})', field, depth)}" for name, field in names)
    return f"{{{', '.join(fields)}}}"
