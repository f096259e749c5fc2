"""Find one type for a column whose files have different types."""

import duckdb
from duckdb.sqltypes import DuckDBPyType

_SIGNED = {"tinyint": 8, "smallint": 16, "integer": 32, "bigint": 64, "hugeint": 128}
_UNSIGNED = {"utinyint": 8, "usmallint": 16, "uinteger": 32, "ubigint": 64, "uhugeint": 128}
# The decimal digits that an integer of so many bits needs; 128 bits need more than DECIMAL has.
_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}
_MAX_DIGITS = 38
_FLOATS = ("float", "double")
# Each type can store the instants of the types before it.
_DATES = ("date", "timestamp_s", "timestamp_ms", "timestamp", "timestamp_ns")
# A double stores 15 decimal digits exactly.
_DOUBLE_DIGITS = 15


def unify(one: DuckDBPyType, other: DuckDBPyType) -> DuckDBPyType | None:
    """Return the narrowest type to which both can be cast; None if there is none, as for text and a number.

    An integer and a floating-point type become DOUBLE, which holds integers up to 2**53 exactly.
    """
    if str(one) == str(other) or other.id == "null":
        return one
    if one.id == "null":
        return other
    nested = {"list": _unify_lists, "struct": _unify_structs, "map": _unify_maps}
    if one.id == other.id and one.id in nested:
        return nested[one.id](one, other)
    name = _unify_numbers(one, other) or _unify_dates(one.id, other.id)
    if name is None and one.id == other.id == "varchar":
        # JSON is text.
        name = "VARCHAR"
    return None if name is None else duckdb.sqltype(name)


def _unify_numbers(one: DuckDBPyType, other: DuckDBPyType) -> str | None:
    ids = (one.id, other.id)
    if all(each in _SIGNED or each in _UNSIGNED for each in ids):
        return _unify_integers(*ids)
    if not all(each in _SIGNED or each in _UNSIGNED or each in _FLOATS or each == "decimal" for each in ids):
        return None
    if any(each in _FLOATS for each in ids):
        exact = one if other.id in _FLOATS else other
        return None if exact.id == "decimal" and sum(_digits(exact)) > _DOUBLE_DIGITS else "DOUBLE"
    if any(_bits(each) == 128 for each in ids):
        return None
    (whole, scale), (other_whole, other_scale) = _digits(one), _digits(other)
    whole, scale = max(whole, other_whole), max(scale, other_scale)
    return f"DECIMAL({whole + scale},{scale})" if whole + scale <= _MAX_DIGITS else None


def _unify_integers(one: str, other: str) -> str | None:
    if (one in _SIGNED) == (other in _SIGNED):
        return max(one, other, key=_bits).upper()
    signed, unsigned = (one, other) if one in _SIGNED else (other, one)
    wide = [name for name, bits in _SIGNED.items() if bits > _UNSIGNED[unsigned] and bits >= _SIGNED[signed]]
    return wide[0].upper() if wide else None


def _bits(name: str) -> int:
    return _SIGNED.get(name) or _UNSIGNED.get(name) or 0


def _digits(type_: DuckDBPyType) -> tuple[int, int]:
    """Return the digits before and after the decimal point."""
    if type_.id != "decimal":
        return _DIGITS[_bits(type_.id)], 0
    numbers = dict(type_.children)
    precision, scale = numbers["precision"], numbers["scale"]
    assert isinstance(precision, int)
    assert isinstance(scale, int)
    return precision - scale, scale


def _unify_dates(one: str, other: str) -> str | None:
    if one not in _DATES or other not in _DATES:
        return None
    return max(one, other, key=_DATES.index).upper()


def _unify_lists(one: DuckDBPyType, other: DuckDBPyType) -> DuckDBPyType | None:
    element = unify(_part(one, "child"), _part(other, "child"))
    return None if element is None else duckdb.list_type(element)


def _unify_maps(one: DuckDBPyType, other: DuckDBPyType) -> DuckDBPyType | None:
    key = unify(_part(one, "key"), _part(other, "key"))
    value = unify(_part(one, "value"), _part(other, "value"))
    return None if key is None or value is None else duckdb.map_type(key, value)


def _unify_structs(one: DuckDBPyType, other: DuckDBPyType) -> DuckDBPyType | None:
    """Unify fields by name, as DuckDB casts structs: a missing field is NULL."""
    fields: dict[str, tuple[str, DuckDBPyType]] = {}
    for name, type_ in (*one.children, *other.children):
        assert isinstance(type_, DuckDBPyType)
        before = fields.get(name.lower())
        unified = type_ if before is None else unify(before[1], type_)
        if unified is None:
            return None
        fields[name.lower()] = (name if before is None else before[0], unified)
    return duckdb.struct_type(dict(fields.values()))


def _part(type_: DuckDBPyType, name: str) -> DuckDBPyType:
    part = dict(type_.children)[name]
    assert isinstance(part, DuckDBPyType)
    return part
