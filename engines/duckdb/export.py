"""Writing a judged statement's result to a file by `COPY`, typed as faithfully as the format allows.

CSV: header, lines end in CR LF, NULL is an empty field without quotes and the empty string is `""`. So in a file of one
column a NULL is an empty line, which some readers skip: ask for such results in another format.
JSON: one object a line; NaN and the infinities, which JSON does not have, become strings.
Parquet: HUGEINT (what a sum of integers is) becomes DECIMAL(38,0), for DuckDB would write it as a rounded DOUBLE.
Names that occur twice get `_1`, `_2` and so on, in all formats.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import duckdb
from duckdb.sqltypes import DuckDBPyType

from engines.duckdb.statement import Wrapped
from engines.duckdb.watch import Limits
from engines.protocol import QueryFailed
from queryd.events import Column, ErrorCode, OutputFormat, Parameter

_COPY_OPTIONS = {
    OutputFormat.PARQUET: "FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v2",
    OutputFormat.CSV: r"FORMAT csv, HEADER, NULLSTR '', NEW_LINE '\r\n'",
    OutputFormat.JSON: "FORMAT json",
}

_WORD = r"[^\W\d]\w*"
_NAME = rf"{_WORD}(?: \w+)*"
# A name, or a call of at most one name: what DuckDB makes of anything else quotes the SQL.
_TELLABLE = re.compile(rf"{_NAME}|{_WORD}\((?:{_NAME})?\)")
_MAX_TOLD_NAME = 128

# How deep types are taken apart to find numbers that the format can't say; deeper ones are written as DuckDB does.
_MAX_TYPE_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Exported:
    """A written file: its rows, its size in bytes and its columns as an event may name them.

    `bytes_read` is what DuckDB has fetched from files for it; what lay in its cache, and what Postgres sent, is not in.
    """

    rows: int
    bytes: int
    columns: tuple[Column, ...]
    bytes_read: int


def export(
    connection: duckdb.DuckDBPyConnection,
    text: str,
    parameters: dict[str, Parameter],
    target: Path,
    output_format: OutputFormat,
    *,
    max_rows: int | None,
    limits: Limits,
    strings: Collection[str] = (),
) -> Exported:
    """Run a judged statement and write its rows to `target`, in its own order.

    `text` must have passed the gate: it stands between brackets here, on lines of its own; `strings` are those that it
    writes. Raises `QueryFailed` with
    RESULT_TOO_LARGE or SCAN_LIMIT_EXCEEDED above a limit, and `StatementFailed`; `target` may then hold a part of the
    result.
    """
    values = parameters or None
    described = Wrapped("DESCRIBE (\n", text, "\n)").run(connection, values)
    columns = [(str(name), str(type_)) for name, type_, *_ in described]
    source = _faithful(text, columns, output_format)
    copy = source.at_most(max_rows).within("COPY (", f") TO {literal(str(target))} ({_COPY_OPTIONS[output_format]})")
    [[counted, *_]] = copy.run(connection, values)
    rows, size, read = int(str(counted)), target.stat().st_size, _bytes_read(connection)
    if max_rows is not None and rows > max_rows:
        raise QueryFailed(ErrorCode.RESULT_TOO_LARGE, f"The result has more than {max_rows} rows.")
    limits.judge_written(size)
    limits.judge_scanned(read)
    return Exported(rows, size, told_columns(columns, strings), read)


def _bytes_read(connection: duckdb.DuckDBPyConnection) -> int:
    """What the connection's last statement has read, by its profile."""
    return int(json.loads(connection.get_profiling_information(format="json"))["total_bytes_read"])


def told_columns(columns: list[tuple[str, str]], strings: Collection[str] = ()) -> tuple[Column, ...]:
    """Names and types as an event may have them. A name that could quote the SQL, or that was made of one of its
    `strings`, as PIVOT does, becomes `column_N`, N from 1."""
    secret = [string for string in strings if string]
    return tuple(
        Column(
            name if _tellable(name) and not _names_one(name, secret) else f"column_{number}",
            # The fields of a struct may be strings of the statement.
            type_ if _tellable_type(type_) and not _has_field(type_, secret) else type_.split("(")[0],
        )
        for number, (name, type_) in enumerate(columns, 1)
    )


def _has_field(type_: str, strings: Collection[str]) -> bool:
    return "(" in type_ and any(re.search(rf"[(\s]{re.escape(string)} ", type_) for string in strings)


def _names_one(name: str, strings: Collection[str]) -> bool:
    """Whether a name was made of one of the strings: `value`, or `value_sum` where PIVOT has several aggregates."""
    return any(name == string or name.startswith(f"{string}_") for string in strings)


def quote(name: str) -> str:
    """An identifier in SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string in SQL."""
    return "'" + text.replace("'", "''") + "'"


def _tellable(name: str) -> bool:
    return len(name) <= _MAX_TOLD_NAME and _TELLABLE.fullmatch(name) is not None


def _tellable_type(type_: str) -> bool:
    """Enums hold values, and so may the quoted field names of a struct; anything very long holds more than a type."""
    return "ENUM" not in type_ and '"' not in type_ and len(type_) <= 8 * _MAX_TOLD_NAME


def _faithful(text: str, columns: list[tuple[str, str]], output_format: OutputFormat) -> Wrapped:
    """The statement itself, or wrapped so that names are unique and the format can say its values."""
    names = _unique([name for name, _ in columns])
    given = [f"c{number}" for number in range(len(columns))]
    written = [_written(place, type_, output_format) for place, (_, type_) in zip(given, columns, strict=True)]
    if written == given and names == [name for name, _ in columns]:
        return Wrapped("\n", text, "\n")
    listed = ", ".join(f"{expression} AS {quote(name)}" for expression, name in zip(written, names, strict=True))
    return Wrapped(f"SELECT {listed} FROM (\n", text, f"\n) AS result({', '.join(given)})")  # noqa: S608 - judged by the gate


def _unique(names: list[str]) -> list[str]:
    """Names that differ in more than case, each as near to the original as may be."""
    taken = {name.lower() for name in names}
    seen: set[str] = set()
    unique = []
    for name in names:
        candidate, number = name, 0
        while candidate.lower() in seen or (number and candidate.lower() in taken):
            number += 1
            candidate = f"{name}_{number}"
        seen.add(candidate.lower())
        unique.append(candidate)
    return unique


def _written(place: str, type_: str, output_format: OutputFormat) -> str:
    """The expression that writes a column of that type: `place` itself unless the format would falsify it."""
    if output_format is OutputFormat.PARQUET and "HUGEINT" in type_:
        return _cast_whole_numbers(place, type_)
    if output_format is OutputFormat.JSON and ("DOUBLE" in type_ or "FLOAT" in type_):
        parsed = _parse_type(type_)
        return place if parsed is None else _say_not_a_number(place, parsed, 0)
    return place


def _cast_whole_numbers(place: str, type_: str) -> str:
    if "ENUM" in type_ or '"' in type_ or _parse_type(type_) is None:
        return place
    return f"CAST({place} AS {re.sub(r'(?<![A-Za-z0-9_])U?HUGEINT(?![A-Za-z0-9_])', 'DECIMAL(38,0)', type_)})"


def _parse_type(type_: str) -> DuckDBPyType | None:
    """A type as DuckDB describes it; None for one that can't be written out: `row(1, 2)` has fields without names."""
    try:
        return duckdb.sqltype(type_)
    except duckdb.Error:
        return None


def _say_not_a_number(place: str, type_: DuckDBPyType, depth: int) -> str:
    """An expression whose JSON equals that of `place`, but for NaN and infinities, which become strings."""
    if depth == _MAX_TYPE_DEPTH:
        return place
    match type_.id:
        case "double" | "float":
            return f"CASE WHEN isfinite({place}) THEN to_json({place}) ELSE to_json(CAST({place} AS VARCHAR)) END"
        case "list" | "array":
            of_list = place if type_.id == "list" else f"CAST({place} AS {_parts(type_)[0][1]}[])"
            return _each(place, of_list, _parts(type_)[0][1], depth)
        case "map":
            values = _each("", f"map_values({place})", _parts(type_)[1][1], depth)
            return f"map(map_keys({place}), {values})" if values else place
        case "struct":
            return _fields(place, type_, depth)
        case _:
            return place


def _each(unchanged: str, of_list: str, element: DuckDBPyType, depth: int) -> str:
    """The list `of_list` with every element rewritten, or `unchanged` if its elements need nothing."""
    name = f"x{depth}"
    written = _say_not_a_number(name, element, depth + 1)
    return unchanged if written == name else f"list_transform({of_list}, lambda {name}: {written})"


def _fields(place: str, type_: DuckDBPyType, depth: int) -> str:
    """The struct `place` with every field rewritten, or itself if its fields need nothing or have no names."""
    fields = [(name, f"struct_extract({place}, {literal(name)})", part) for name, part in _parts(type_)]
    written = [(name, field, _say_not_a_number(field, part, depth + 1)) for name, field, part in fields]
    if not all(name for name, _, _ in written) or all(before == after for _, before, after in written):
        return place
    packed = ", ".join(f"{quote(name)} := {after}" for name, _, after in written)
    return f"CASE WHEN {place} IS NULL THEN NULL ELSE struct_pack({packed}) END"


def _parts(type_: DuckDBPyType) -> list[tuple[str, DuckDBPyType]]:
    """A nested type's own parts; the size of an array is none."""
    return [(name, part) for name, part in type_.children if isinstance(part, DuckDBPyType)]
