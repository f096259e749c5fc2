"""SQL expressions whose values Parquet stores exactly. docs/results.md lists every type."""

from engines.duckdb.sql_text import literal, quote
from queryd.column_types import ColumnType, make_unique, name_fields

# Types that Parquet lacks, or whose Parquet type loses a part of the value. Text is exact, even for negative intervals.
_TEXTS = frozenset({"INTERVAL", "TIME WITH TIME ZONE", "TIME_NS", "BIT", "BIGNUM", "GEOMETRY"})
_WHOLE_NUMBERS = frozenset({"HUGEINT", "UHUGEINT"})
WHOLE_NUMBER = "DECIMAL(38,0)"

# queryd's own expression raises this text for a value that Parquet can't store.
LAST_MOMENT = "__queryd: 24:00:00 in Parquet"


def write_parquet(place: str, type_: ColumnType, depth: int = 0) -> str:
    """Return an expression whose value Parquet stores exactly; `place` itself if that already is exact.

    In DuckDB it raises an error at an integer of more than 38 digits, and `LAST_MOMENT` at the time 24:00:00.
    """
    match type_.name:
        case "LIST":
            written = _write_each(place, type_.element, depth) or place
        case "ARRAY":
            # Parquet stores arrays as lists, and arrays can't be inside the CASE around a struct.
            written = _write_each(place, type_.element, depth) or f"list_transform({place}, lambda x{depth}: x{depth})"
        case "MAP":
            written = _write_map(place, type_, depth)
        case "STRUCT":
            written = _write_struct(place, type_, depth)
        case "UNION":
            written = _write_union(place, type_, depth)
        case name:
            written = _write_scalar(place, name)
    return written


def _write_scalar(place: str, name: str) -> str:
    if name in _TEXTS:
        return f"CAST({place} AS VARCHAR)"
    if name in _WHOLE_NUMBERS:
        return f"CAST({place} AS {WHOLE_NUMBER})"
    if name == "TIME":
        return f"CASE WHEN {place} = TIME '24:00:00' THEN error({literal(LAST_MOMENT)}) ELSE {place} END"
    if name == "TIMESTAMP_S":
        # DuckDB's own conversion fails at an infinity.
        infinities = " ".join(
            f"WHEN {place} = {word}::TIMESTAMP_S THEN {word}::TIMESTAMP" for word in ("'infinity'", "'-infinity'")
        )
        return f"CASE {infinities} ELSE CAST({place} AS TIMESTAMP) END"
    return place


def _write_map(place: str, type_: ColumnType, depth: int) -> str:
    (_, key), (_, value) = type_.parts
    keys = _write_each(f"map_keys({place})", key, depth)
    values = _write_each(f"map_values({place})", value, depth)
    if keys is None and values is None:
        return place
    return f"map({keys or f'map_keys({place})'}, {values or f'map_values({place})'})"


def _write_union(place: str, type_: ColumnType, depth: int) -> str:
    """Write a struct with the member's name and all members; every member but the set one is NULL."""
    tag = f"CAST(union_tag({place}) AS VARCHAR)"
    members = [write_parquet(f"union_extract({place}, {literal(name)})", part, depth + 1) for name, part in type_.parts]
    return _pack(place, name_fields(type_), [tag, *members])


def _write_each(of_list: str, element: ColumnType, depth: int) -> str | None:
    """Rewrite every element of the list; None if no element needs it."""
    name = f"x{depth}"
    written = write_parquet(name, element, depth + 1)
    return None if written == name else f"list_transform({of_list}, lambda {name}: {written})"


def _write_struct(place: str, type_: ColumnType, depth: int) -> str:
    places = [f"struct_extract_at({place}, {number})" for number in range(1, len(type_.parts) + 1)]
    if all(name for name, _ in type_.parts):
        places = [f"struct_extract({place}, {literal(name)})" for name, _ in type_.parts]
    written = [
        write_parquet(part, part_type, depth + 1) for part, (_, part_type) in zip(places, type_.parts, strict=True)
    ]
    names = name_fields(type_)
    if written == places and names == [name for name, _ in type_.parts]:
        return place
    return _pack(place, make_unique(names), written)


def _pack(place: str, names: list[str], values: list[str]) -> str:
    packed = ", ".join(f"{quote(name)} := {value}" for name, value in zip(names, values, strict=True))
    return f"CASE WHEN {place} IS NULL THEN NULL ELSE struct_pack({packed}) END"
