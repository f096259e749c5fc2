"""SQL expressions that write a value, or a row as a line, in JSON that a strict parser accepts.

docs/results.md lists every type.
"""

import json
from collections.abc import Callable

from engines.duckdb.sql_text import literal
from queryd.column_types import ColumnType, name_fields

_NUMBERS = frozenset(
    {
        "BOOLEAN",
        "TINYINT",
        "SMALLINT",
        "INTEGER",
        "BIGINT",
        "UTINYINT",
        "USMALLINT",
        "UINTEGER",
        "UBIGINT",
        "HUGEINT",
        "UHUGEINT",
        "BIGNUM",
    }
)
# The text of these types needs no escaping.
_BARE_TEXTS = frozenset(
    {
        "DATE",
        "TIME",
        "TIME_NS",
        "TIME WITH TIME ZONE",
        "TIMESTAMP",
        "TIMESTAMP_S",
        "TIMESTAMP_MS",
        "TIMESTAMP_NS",
        "TIMESTAMP WITH TIME ZONE",
        "INTERVAL",
        "UUID",
        "BIT",
    }
)

# Outside of strings: text that DuckDB accepts as JSON and a strict parser does not, or that would break the line.
_SUSPICIOUS = literal(r"(?i)nan|inf|,\s*[\]}]|[\r\n]")
_STRINGS_AND_THE_REST = literal(r'"(?:[^"\\]|\\.)*"|[^"]+')
# Patterns and their replacements.
_MENDED = (
    (literal(r"(?i)-?(?:nan|inf(?:inity)?)"), literal(r'"\0"')),
    (literal(r",(\s*[\]}])"), literal(r"\1")),
    (literal(r"[\r\n]"), literal(" ")),
)


def write_json_row(columns: list[tuple[str, str, ColumnType]]) -> str:
    """Return the expression for a row's line of JSON. `columns` are (SQL reference, name, type)."""
    parts = []
    for number, (place, name, type_) in enumerate(columns):
        begin = "{" if number == 0 else ","
        parts += [literal(f"{begin}{write_string(name)}:"), f"coalesce({write_json(place, type_)}, 'null')"]
    return f"concat({', '.join(parts)}, '}}')"


def write_string(text: str) -> str:
    """Write a text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def write_json(place: str, type_: ColumnType, depth: int = 0) -> str:
    """Return the expression for the value's JSON text, or NULL."""
    write = _NESTED.get(type_.name)
    return _write_scalar(place, type_) if write is None else write(place, type_, depth)


def _write_scalar(place: str, type_: ColumnType) -> str:
    text = f"CAST({place} AS VARCHAR)"
    match type_.name:
        case name if name in _NUMBERS:
            written = text
        case name if name in _BARE_TEXTS:
            written = f"'\"' || {text} || '\"'"
        case "FLOAT" | "DOUBLE":
            written = (
                f"CASE WHEN isfinite({place}) THEN CAST(to_json({place}) AS VARCHAR) ELSE '\"' || {text} || '\"' END"
            )
        case "DECIMAL":
            width, scale = type_.numbers
            # DuckDB omits the zero before the point if the type has no integer digits.
            written = rf"regexp_replace({text}, '^(-?)\.', '\10.')" if width == scale else text
        case "JSON":
            written = _write_embedded(text)
        case _:
            written = f"CAST(to_json({text}) AS VARCHAR)"
    return written


def _write_embedded(text: str) -> str:
    """Write a JSON value on one line, without extensions that only DuckDB accepts."""
    mended = "y"
    for pattern, replacement in _MENDED:
        mended = f"regexp_replace({mended}, {pattern}, {replacement}, 'g')"
    pieces = f"regexp_extract_all({text}, {_STRINGS_AND_THE_REST})"
    joined = f"array_to_string(list_transform({pieces}, lambda y: CASE WHEN y[1] = '\"' THEN y ELSE {mended} END), '')"
    return f"CASE WHEN regexp_matches({text}, {_SUSPICIOUS}) THEN {joined} ELSE {text} END"


def _join(of_list: str, written: str, name: str, ends: str) -> str:
    """Join a list's written elements between an opening and a closing bracket."""
    each = f"list_transform({of_list}, lambda {name}: {written})"
    return f"'{ends[0]}' || array_to_string({each}, ',') || '{ends[1]}'"


def _write_each(of_list: str, element: ColumnType, depth: int) -> str:
    name = f"x{depth}"
    return _join(of_list, f"coalesce({write_json(name, element, depth + 1)}, 'null')", name, "[]")


def _write_struct(place: str, type_: ColumnType, depth: int) -> str:
    parts = []
    for number, (name, (own, part)) in enumerate(zip(name_fields(type_), type_.parts, strict=True), 1):
        begin = "{" if number == 1 else ","
        by = f"struct_extract({place}, {literal(own)})" if own else f"struct_extract_at({place}, {number})"
        parts += [
            literal(f"{begin}{write_string(name)}:"),
            f"coalesce({write_json(by, part, depth + 1)}, 'null')",
        ]
    return f"CASE WHEN {place} IS NOT NULL THEN concat({', '.join(parts)}, '}}') END"


def _write_union(place: str, type_: ColumnType, depth: int) -> str:
    """`{"tag":value}`."""
    cases = " ".join(
        f"WHEN {literal(name)} THEN concat({literal(f'{{{write_string(name)}:')}, "
        f"coalesce({write_json(f'union_extract({place}, {literal(name)})', part, depth + 1)}, 'null'), '}}')"
        for name, part in type_.parts
    )
    return f"CASE CAST(union_tag({place}) AS VARCHAR) {cases} END"


def _write_map(place: str, type_: ColumnType, depth: int) -> str:
    """Write an object; if keys are nested, write an array of keys and values."""
    name = f"x{depth}"
    (_, key), (_, value) = type_.parts
    entries = f"map_entries({place})"
    if key.is_nested:
        return _write_each(entries, ColumnType("STRUCT", type_.parts), depth)
    named = f"CAST(to_json(CAST({name}.key AS VARCHAR)) AS VARCHAR)"
    written = f"concat({named}, ':', coalesce({write_json(f'{name}.value', value, depth + 1)}, 'null'))"
    return _join(entries, written, name, "{}")


def _write_list(place: str, type_: ColumnType, depth: int) -> str:
    return _write_each(place, type_.element, depth)


_NESTED: dict[str, Callable[[str, ColumnType, int], str]] = {
    "LIST": _write_list,
    "ARRAY": _write_list,
    "STRUCT": _write_struct,
    "UNION": _write_union,
    "MAP": _write_map,
}
