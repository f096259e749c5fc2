"""How queryd reads the columns of a Postgres table: exactly, by a cast, or not at all.

The scanner of DuckDB 1.5.5 rounds numerics that do not fit a DECIMAL, reads NaN as 0 and reads domains as text. It also
pushes comparisons with text down to columns that are text in DuckDB but not in Postgres.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from engines.duckdb.errors import NO_TABLE
from engines.duckdb.shapes import check_names, refusal
from engines.duckdb.sql_text import literal, quote
from engines.protocol import QueryFailed
from queryd.events import ErrorCode

_MAX_DIGITS = 38

# Types that the scanner reads exactly, by Postgres's names. A domain over one of them is cast to DuckDB's type.
_PLAIN = {
    "bool": "BOOLEAN",
    "int2": "SMALLINT",
    "int4": "INTEGER",
    "int8": "BIGINT",
    "float4": "FLOAT",
    "float8": "DOUBLE",
    "oid": "UINTEGER",
    "date": "DATE",
    "time": "TIME",
    "timetz": "TIMETZ",
    "timestamp": "TIMESTAMP",
    "timestamptz": "TIMESTAMPTZ",
    "interval": "INTERVAL",
    "uuid": "UUID",
    "text": "VARCHAR",
    "varchar": "VARCHAR",
    "bpchar": "VARCHAR",
    "char": "VARCHAR",
    "name": "VARCHAR",
    "bytea": "BLOB",
    # Points, paths and the like become structs and lists of doubles.
    "point": "STRUCT(x DOUBLE, y DOUBLE)",
    "line": "DOUBLE[]",
    "lseg": "DOUBLE[]",
    "box": "DOUBLE[]",
    "circle": "DOUBLE[]",
    "path": "STRUCT(x DOUBLE, y DOUBLE)[]",
    "polygon": "STRUCT(x DOUBLE, y DOUBLE)[]",
}
# Types whose text in Postgres DuckDB would parse differently, so a domain over them can't be cast.
_NO_DOMAINS = frozenset({"bytea", "interval", "point", "line", "lseg", "box", "circle", "path", "polygon"})

# One row per column, with its domains resolved to base types. `parts` is the other metadata that the scanner caches.
_CATALOG = """
WITH RECURSIVE traced AS (
    SELECT c.oid AS relation, a.attnum, a.attname, a.attndims, format_type(a.atttypid, a.atttypmod) AS declared,
           a.atttypid AS type, a.atttypmod AS modifier, 0 AS depth
    FROM pg_catalog.pg_attribute a
    JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = {schema} AND c.relname = {table} AND c.relkind IN ('r', 'v', 'm', 'f', 'p')
      AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT d.relation, d.attnum, d.attname, d.attndims, d.declared, t.typbasetype, t.typtypmod, d.depth + 1
    FROM traced d JOIN pg_catalog.pg_type t ON t.oid = d.type WHERE t.typtype = 'd'
)
SELECT d.relation::text, d.attname::text, d.declared, d.depth, d.modifier, t.typname::text, t.typtype::text,
       coalesce(e.typname::text, '') AS element, coalesce(e.typtype::text, '') AS element_kind,
       coalesce((SELECT string_agg(l.enumlabel, ',' ORDER BY l.enumsortorder)
                 FROM pg_catalog.pg_enum l WHERE l.enumtypid IN (t.oid, e.oid)), '')
       || coalesce((SELECT string_agg(concat_ws(' ', p.attname, p.atttypid, p.atttypmod), ',' ORDER BY p.attnum)
                    FROM pg_catalog.pg_attribute p WHERE t.typrelid <> 0 AND p.attrelid = t.typrelid
                      AND p.attnum > 0 AND NOT p.attisdropped), '') AS parts,
       EXISTS (SELECT FROM pg_catalog.pg_attribute p JOIN pg_catalog.pg_type pt ON pt.oid = p.atttypid
               WHERE t.typrelid <> 0 AND p.attrelid = t.typrelid AND p.attnum > 0 AND NOT p.attisdropped
                 AND (pt.typname = 'numeric' OR pt.typtype = 'd')) AS numeric_parts
FROM traced d
JOIN pg_catalog.pg_type t ON t.oid = d.type
LEFT JOIN pg_catalog.pg_type e ON t.typcategory = 'A' AND e.oid = t.typelem
WHERE t.typtype <> 'd'
ORDER BY d.attnum
"""


@dataclass(frozen=True, slots=True)
class CatalogColumn:
    """A column in Postgres's catalog.

    `declared` is its type as Postgres writes it. `type`, `kind` and `modifier` are those of the base type, behind any
    domains; `element` is an array's element type.
    """

    relation: str
    name: str
    declared: str
    domains: int
    modifier: int
    type: str
    kind: str
    element: str
    element_kind: str
    parts: str
    has_numeric_parts: bool


@dataclass(frozen=True, slots=True)
class ReadColumn:
    """How a column is read: `expression` in SQL, `how` for people, and `declared`, its type as Postgres writes it.

    `digits` are a numeric's precision and scale, if the view must check it for NaN. `trouble` is the reason why it
    can't be read, as the predicate of a sentence that starts with the column's name.
    """

    name: str
    expression: str
    how: str
    declared: str
    digits: tuple[int, int] | None = None
    trouble: str | None = None


def read_catalog(
    connection: duckdb.DuckDBPyConnection, attached: str, schema: str, table: str
) -> tuple[CatalogColumn, ...]:
    """Return the columns of a table or view; none if it does not exist. Raises DuckDB's exceptions."""
    asked = _CATALOG.format(schema=literal(schema), table=literal(table))
    rows = connection.execute(f"FROM postgres_query({literal(attached)}, {literal(asked)})").fetchall()
    return tuple(CatalogColumn(*row) for row in rows)


def read_columns(catalog: Sequence[CatalogColumn]) -> tuple[ReadColumn, ...]:
    """Decide how to read each column. Raises `QueryFailed` if none is readable or SQL can't distinguish two."""
    if not catalog:
        raise QueryFailed(ErrorCode.QUERY_ERROR, NO_TABLE)
    check_names([column.name for column in catalog])
    return tuple(_read_column(column) for column in catalog)


def write_select(columns: Sequence[ReadColumn], source: str) -> str:
    """The SELECT of these columns from `source`, a table."""
    listed = ", ".join(
        column.expression if column.expression == quote(column.name) else f"{column.expression} AS {quote(column.name)}"
        for column in columns
    )
    return f"SELECT {listed} FROM {source}"  # noqa: S608 - names are quoted


def write_view(columns: Sequence[ReadColumn], source: str) -> str:
    """The SELECT that reads `source` by these columns, and fails on a NaN.

    The scanner reads a NaN as 0. In Postgres NaN is greater than every number. So the view adds one scan per numeric
    column for values above the type's maximum; it finds rows only if there is a NaN. The statement's filters are pushed
    down to these scans too.
    """
    select = write_select(columns, source)
    guards = [
        f"{select} WHERE {quote(column.name)} > {_greatest(*column.digits)}"
        f" AND CAST({refusal(column.name, _HAS_NAN)} AS BOOLEAN)"
        for column in columns
        if column.digits is not None
    ]
    return " UNION ALL ".join([*guards, select])


_HAS_NAN = "holds NaN, which DECIMAL can't store"
_TO_CAST = "; register a view that casts it instead"


def _read_column(column: CatalogColumn) -> ReadColumn:
    if column.type == "numeric":
        return _read_numeric(column)
    if column.domains:
        return _read_domain(column)
    if column.element:
        return _read_array(column)
    if column.kind == "c" and column.has_numeric_parts:
        return _refuse(column, f"is a composite type ({column.declared}) with numerics or domains")
    if column.kind in ("c", "e") or column.type in _PLAIN:
        return ReadColumn(column.name, quote(column.name), f"{column.declared}, as it is", column.declared)
    return _as_text(column)


def _read_numeric(column: CatalogColumn) -> ReadColumn:
    # Decodes as numeric_typmod_precision and _scale in Postgres's numeric.c do; the scale has 11 signed bits.
    packed = column.modifier - 4
    precision, scale = packed >> 16 & 0xFFFF, (packed & 0x7FF ^ 0x400) - 0x400
    if column.modifier < 0:
        return _refuse(column, f"is {column.declared} without a precision, which can't be read exactly")
    if precision > _MAX_DIGITS or not 0 <= scale <= precision:
        return _refuse(
            column,
            f"is {_format_numeric(column, precision, scale)}, which does not fit a DECIMAL of {_MAX_DIGITS} digits",
        )
    name, type_ = quote(column.name), f"DECIMAL({precision},{scale})"
    how = f"{column.declared}; a NaN is an error"
    if not column.domains:
        return ReadColumn(column.name, name, how, column.declared, (precision, scale))
    # The scanner reads a domain as text, so a NaN is visible.
    nan = f"CAST({refusal(column.name, _HAS_NAN)} AS {type_})"
    cast = f"CASE WHEN {name} = 'NaN' THEN {nan} ELSE CAST({name} AS {type_}) END"
    return ReadColumn(column.name, cast, f"{column.declared}, as {type_}; a NaN is an error", column.declared)


def _format_numeric(column: CatalogColumn, precision: int, scale: int) -> str:
    return f"{column.declared} ({f'numeric({precision},{scale})'})" if column.domains else column.declared


def _read_domain(column: CatalogColumn) -> ReadColumn:
    if column.element or column.kind == "c" or column.type in _NO_DOMAINS:
        return _refuse(column, f"is a domain ({column.declared}) over {column.type.lstrip('_')}, which can't be read")
    type_ = _PLAIN.get(column.type, "VARCHAR")
    if type_ == "VARCHAR":
        return _as_text(column)
    cast = f"CAST({quote(column.name)} AS {type_})"
    return ReadColumn(column.name, cast, f"{column.declared}, as {type_}", column.declared)


def _read_array(column: CatalogColumn) -> ReadColumn:
    if column.element == "numeric":
        return _refuse(column, f"is {column.declared}: numerics in arrays can't be read exactly")
    if column.element_kind in ("c", "d"):
        return _refuse(column, f"is {column.declared}: arrays of such types can't be read")
    how = f"{column.declared}; rows with several dimensions are an error"
    return ReadColumn(column.name, quote(column.name), how, column.declared)


def _as_text(column: CatalogColumn) -> ReadColumn:
    """Read a column as text. The concatenation keeps comparisons away from the server, which would not compare text."""
    return ReadColumn(column.name, f"{quote(column.name)} || ''", f"{column.declared}, as text", column.declared)


def _refuse(column: CatalogColumn, trouble: str) -> ReadColumn:
    trouble += _TO_CAST
    return ReadColumn(column.name, refusal(column.name, trouble), "not at all", column.declared, trouble=trouble)


def _greatest(precision: int, scale: int) -> str:
    digits = "9" * precision
    return f"CAST('{digits[: precision - scale] or '0'}.{digits[precision - scale :]}' AS DECIMAL({precision},{scale}))"


def explain_column(error: duckdb.Error) -> str | None:
    """Return why a column can't be read, as the predicate of a sentence; None if no column caused the error."""
    text = str(error)
    if isinstance(error, duckdb.InterruptException | duckdb.OutOfMemoryException) or _NO_COLUMNS_FAULT.search(text):
        return None
    if "Expected an array with" in text:
        return "holds arrays with several dimensions, which can't be read"
    if isinstance(error, duckdb.NotImplementedException):
        return "is of a type that can't be read"
    said = _SERVER_SAID.search(text)
    return f"can't be read: {said[1].strip()}" if said else "can't be read"


# Errors of the connection, the role's rights and the server's time limit.
_NO_COLUMNS_FAULT = re.compile(
    r"Unable to connect|permission denied|statement timeout|FATAL: |server closed|connection", re.IGNORECASE
)
# The text is inside JSON, so a backslash starts an escaped newline.
_SERVER_SAID = re.compile(r"ERROR: +([^\\\"\n]+)")
