"""Rows of a result as bytes: equal if, and only if, the rows are equal, whatever batches they came in.

A cell is its length, a colon and its text, a NULL is `~`; what has parts (a list, a struct, a map, a row) is the text
of its parts one after the other. So no two values look alike, whatever bytes they hold. Only the float is left to
the caller, who decides what is to be the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

WriteFloat = Callable[[float], str]

# With offsets of 64 bits: the texts of a batch may be longer than 2 GiB together.
_BYTES = pa.large_binary()

# Stored as a number since some beginning, which is exact; their texts depend on a calendar and a zone.
_TIMES_64 = (pa.types.is_timestamp, pa.types.is_time64, pa.types.is_date64, pa.types.is_duration)
_TIMES_32 = (pa.types.is_time32, pa.types.is_date32)
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)


@cache
def _constant(text: bytes) -> "pa.Scalar[Any]":
    """Made at its first use: pyarrow's first scalar imports pandas, and every command would wait for that."""
    return pa.scalar(text, _BYTES)


def write_rows(batch: pa.RecordBatch, write_float: WriteFloat) -> list[bytes]:
    """One text for each row."""
    if not batch.num_columns:
        return [b""] * batch.num_rows
    cells = [_write_cells(column, write_float) for column in batch.columns]
    texts: list[bytes] = pc.binary_join_element_wise(*cells, _constant(b"")).to_pylist()
    return texts


def holds_floats(kind: pa.DataType) -> bool:
    """Whether values of that type are floats or have floats in them."""
    if pa.types.is_floating(kind):
        return True
    return any(holds_floats(part) for part in _parts(kind))


def name_type(kind: pa.DataType) -> str:
    """A type as it matters to whoever reads the values: how they are laid out in memory is left out.

    So are the names of a list's element and of a time zone: what has a zone is a moment, whichever zone shows it.
    """
    if pa.types.is_dictionary(kind):
        return name_type(kind.value_type)
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {name_type(field.type)}' for field in kind)}>"
    if pa.types.is_map(kind):
        return f"map<{name_type(kind.key_type)}, {name_type(kind.item_type)}>"
    if _is_list(kind):
        return f"list<{name_type(kind.value_type)}>"
    if pa.types.is_timestamp(kind):
        return f"timestamp[{kind.unit}{', with zone' if kind.tz else ''}]"
    return str(kind).removeprefix("large_").removesuffix("_view")


def _write_cells(array: pa.Array, write_float: WriteFloat) -> pa.Array:
    """The cells of a column, none of them null any more."""
    lengths = pc.binary_length(texts := _write_texts(array, write_float)).cast(pa.large_string()).cast(_BYTES)
    return pc.fill_null(pc.binary_join_element_wise(lengths, texts, _constant(b":")), _constant(b"~"))


def _write_texts(array: pa.Array, write_float: WriteFloat) -> pa.Array:
    """The values of a column as bytes; null where they are."""
    array = _unwrap(array)
    kind = array.type
    if pa.types.is_floating(kind):
        return pa.array([None if value is None else write_float(value).encode() for value in array.to_pylist()], _BYTES)
    if pa.types.is_struct(kind):
        return _write_structs(array, write_float)
    if pa.types.is_map(kind):
        entries = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return _write_lists(array.cast(pa.list_(entries)), write_float)
    if _is_list(kind):
        return _write_lists(array, write_float)
    return _write_plain(array)


def _unwrap(array: pa.Array) -> pa.Array:
    """The values themselves of an extension's array, or of a dictionary's."""
    if isinstance(array.type, pa.BaseExtensionType):
        return _unwrap(array.storage)
    return _unwrap(array.cast(array.type.value_type)) if pa.types.is_dictionary(array.type) else array


def _write_plain(array: pa.Array) -> pa.Array:
    kind = array.type
    if _is_text(kind):
        return array.cast(_BYTES)
    if any(is_time(kind) for is_time in _TIMES_64):
        array = array.cast(pa.int64())
    elif any(is_time(kind) for is_time in _TIMES_32):
        array = array.cast(pa.int32())
    return array.cast(pa.large_string()).cast(_BYTES)


def _write_structs(array: pa.StructArray, write_float: WriteFloat) -> pa.Array:
    fields = [_write_cells(field, write_float) for field in array.flatten()]
    texts = pc.binary_join_element_wise(*fields, _constant(b"")) if fields else pa.array([b""] * len(array), _BYTES)
    return pc.if_else(array.is_valid(), texts, pa.scalar(None, _BYTES))


def _write_lists(array: pa.Array, write_float: WriteFloat) -> pa.Array:
    elements = _write_cells(pc.list_flatten(array), write_float)
    lengths = pc.fill_null(pc.list_value_length(array).cast(pa.int64()), 0)
    ends = pc.cumulative_sum(lengths)
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    texts = pc.binary_join(pa.LargeListArray.from_arrays(offsets, elements), _constant(b""))
    return pc.if_else(array.is_valid(), texts, pa.scalar(None, _BYTES))


def _parts(kind: pa.DataType) -> list[pa.DataType]:
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    if pa.types.is_dictionary(kind):
        return [kind.value_type]
    return [kind.field(number).type for number in range(kind.num_fields)]


def _is_list(kind: pa.DataType) -> bool:
    return any(is_list(kind) for is_list in _LISTS)


def _is_text(kind: pa.DataType) -> bool:
    return any(is_text(kind) for is_text in _TEXTS)
