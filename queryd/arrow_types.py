"""Map the DuckDB types of an event's columns to Arrow types."""

import pyarrow as pa

from queryd.column_types import ColumnType, name_fields

_SCALARS: dict[str, pa.DataType] = {
    "BOOLEAN": pa.bool_(),
    "TINYINT": pa.int8(),
    "SMALLINT": pa.int16(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "UTINYINT": pa.uint8(),
    "USMALLINT": pa.uint16(),
    "UINTEGER": pa.uint32(),
    "UBIGINT": pa.uint64(),
    # The type of a sum of integers. It has up to 39 digits; decimal128 has 38.
    "HUGEINT": pa.decimal256(39, 0),
    "UHUGEINT": pa.decimal256(39, 0),
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
    "DATE": pa.date32(),
    "TIMESTAMP": pa.timestamp("us"),
    "TIMESTAMP_S": pa.timestamp("us"),
    "TIMESTAMP_MS": pa.timestamp("ms"),
    "TIMESTAMP_NS": pa.timestamp("ns"),
    "TIMESTAMP WITH TIME ZONE": pa.timestamp("us", "UTC"),
    "BLOB": pa.binary(),
    # Arrow has no matching type, or its type lacks some values: its time of day can't be 24:00:00.
    "VARCHAR": pa.string(),
    "BIT": pa.string(),
    "UUID": pa.string(),
    "ENUM": pa.string(),
    "JSON": pa.string(),
    "BIGNUM": pa.string(),
    "GEOMETRY": pa.string(),
    "INTERVAL": pa.string(),
    "TIME": pa.string(),
    "TIME_NS": pa.string(),
    "TIME WITH TIME ZONE": pa.string(),
}


def to_arrow(type_: ColumnType) -> pa.DataType:
    """Return the Arrow type for the type's values in a JSON result."""
    match type_.name:
        case "LIST" | "ARRAY":
            return pa.list_(to_arrow(type_.element))
        case "MAP":
            return pa.map_(*(to_arrow(part) for _, part in type_.parts))
        case "STRUCT" | "UNION":
            parts = [to_arrow(part) for _, part in type_.parts]
            tag = [pa.string()] if type_.name == "UNION" else []
            return pa.struct(list(zip(name_fields(type_), [*tag, *parts], strict=True)))
        case "DECIMAL":
            return pa.decimal128(*type_.numbers)
        case name:
            return _SCALARS[name]
