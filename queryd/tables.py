"""A result's file as record batches, with the types that its event says.

A Parquet file contains its types. For CSV and JSON the event's types decide, never the look of the values;
docs/results.md lists the Arrow type of each. A type without a matching Arrow type stays text. In CSV lists, structs,
maps and unions are text.
"""

import csv as text_csv
import io
import json as text_json
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, json, parquet

from queryd import moments
from queryd.arrow_types import to_arrow
from queryd.column_types import ColumnType, NoCounterpart, name_fields, parse_type
from queryd.errors import ResultUnreadable
from queryd.events import Column, OutputFormat, QueryStatusChanged

# A row must fit into a block; queries make rows of megabytes at times, and a block costs its size in memory.
_BLOCK_BYTES = 16 * 1024 * 1024
# Read files of lines in blocks of this size; as Python objects a block is ten times larger.
_LINES_BYTES = 1024 * 1024

_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE = re.compile(rb"\\x([0-9A-Fa-f]{2})")


def open_batches(body: IO[bytes], event: QueryStatusChanged) -> pa.RecordBatchReader:
    """The batches of a result's file, which stands at its beginning; it is read as they are, and not closed.

    Raises `ResultUnreadable`, also while the batches are read.
    """
    with _Reading():
        match event.output_format:
            case OutputFormat.CSV:
                reader = _open_csv(body, event.columns)
            case OutputFormat.JSON:
                reader = _open_json(body, event.columns)
            case _:
                file = parquet.ParquetFile(body)
                # By row groups, of which one at a time is in memory.
                return pa.RecordBatchReader.from_batches(file.schema_arrow, file.iter_batches())
    return pa.RecordBatchReader.from_batches(reader.schema, _read_each(reader))


# CSV.


def _open_csv(body: IO[bytes], columns: Sequence[Column]) -> pa.RecordBatchReader:
    names = _read_header(body)
    # Events of old releases list at most 200 columns. Later columns are text.
    types = [_type_in_csv(column) for column in columns[: len(names)]] + [pa.string()] * (len(names) - len(columns))
    reader = csv.open_csv(
        body,
        read_options=csv.ReadOptions(block_size=_BLOCK_BYTES),
        # In a file of one column an empty line is a NULL.
        parse_options=csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        # NULL is an empty field without quotes, and nothing else is: not the text `NULL`, not `nan`.
        convert_options=csv.ConvertOptions(
            column_types={name: _read_as(type_) for name, type_ in zip(names, types, strict=True)},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    target = pa.schema(list(zip(names, types, strict=True)))
    return pa.RecordBatchReader.from_batches(target, (_convert_batch(batch, target) for batch in reader))


def _type_in_csv(column: Column) -> pa.DataType:
    type_ = _parse(column)
    return pa.string() if type_.is_nested else to_arrow(type_)


def _read_header(body: IO[bytes]) -> list[str]:
    """Read the columns' names; the event replaces names that may contain data."""
    text = io.TextIOWrapper(body, encoding="utf-8", newline="")
    names = next(text_csv.reader(text), [])
    text.detach()
    body.seek(0)
    return names


# JSON.


def _open_json(body: IO[bytes], columns: Sequence[Column]) -> pa.RecordBatchReader:
    first = body.readline()
    body.seek(0)
    # Every row has all names. If there are no rows, take the event's names.
    names = list(text_json.loads(first)) if first else [column.name for column in columns]
    if len(names) != len(columns):
        raise _unreadable("a file with more columns than its event lists")
    row = ColumnType("STRUCT", tuple(zip(names, map(_parse, columns), strict=True)))
    target = pa.schema([(name, to_arrow(type_)) for name, type_ in row.parts])
    return pa.RecordBatchReader.from_batches(target, _read_lines(body, row, target))


def _read_lines(body: IO[bytes], row: ColumnType, target: pa.Schema) -> Iterator[pa.RecordBatch]:
    taken = _find_taken(row, target)
    while lines := body.readlines(_LINES_BYTES):
        batch = None if taken is None else _read_plain(lines, taken)
        yield _read_any(lines, row, target) if batch is None else _convert_batch(batch, target)


def _find_taken(row: ColumnType, target: pa.Schema) -> pa.Schema | None:
    """Return types with which pyarrow's JSON reader reads the values exactly; it is 100 times faster than Python.

    Returns None if it can't: it does not read maps, bytes or arbitrary JSON, and it finds fields only by name.
    """
    if any(part.holds("MAP", "UNION", "JSON", "BIGNUM", "BLOB", "HUGEINT", "UHUGEINT") for _, part in row.parts):
        return None
    if any(part.is_nested and not all(map(_is_read_as_is, _leaves(to_arrow(part)))) for _, part in row.parts):
        return None
    if any(name_fields(part) != [name for name, _ in part.parts] for part in row.walk() if part.name == "STRUCT"):
        return None
    return pa.schema([(field.name, _read_as(field.type)) for field in target])


def _leaves(type_: pa.DataType) -> Iterator[pa.DataType]:
    if type_.num_fields == 0:
        yield type_
    for place in range(type_.num_fields):
        yield from _leaves(type_.field(place).type)


def _is_read_as_is(type_: pa.DataType) -> bool:
    return bool(_read_as(type_) == type_)


def _read_as(type_: pa.DataType) -> pa.DataType:
    """Return the type with which pyarrow reads a column: text if pyarrow can't parse every value that DuckDB writes."""
    is_text = moments.is_moment(type_) or pa.types.is_binary(type_) or pa.types.is_decimal256(type_)
    return pa.string() if is_text else type_


def _read_plain(lines: list[bytes], taken: pa.Schema) -> pa.RecordBatch | None:
    """Read lines with pyarrow; None if it can't read a value, such as NaN, which is a JSON string."""
    text = b"".join(lines)
    try:
        table = json.read_json(
            io.BytesIO(text),
            read_options=json.ReadOptions(block_size=len(text) + 1, use_threads=False),
            parse_options=json.ParseOptions(explicit_schema=taken, unexpected_field_behavior="error"),
        )
    except pa.ArrowInvalid:
        return None
    [batch] = table.select(taken.names).combine_chunks().to_batches()
    return batch


def _read_any(lines: list[bytes], row: ColumnType, target: pa.Schema) -> pa.RecordBatch:
    scan = _scan if row.holds("JSON") else _scan_known
    rows = [scan(line.decode(), 0, row)[0] for line in lines]
    built = _build(rows, row)
    return pa.RecordBatch.from_arrays(built.flatten(), schema=target)


def _build(values: list[Any], type_: ColumnType) -> pa.Array:
    """An array of that type, from what JSON has for it."""
    match type_.name:
        case "LIST" | "ARRAY":
            _check_all(values, list)
            flat = [part for value in values if value is not None for part in value]
            return pa.ListArray.from_arrays(_offsets(values), _build(flat, type_.element))
        case "MAP":
            return _build_map(values, type_)
        case "UNION":
            _check_all(values, dict)
            return _build_union(values, type_)
        case "STRUCT":
            _check_all(values, dict)
            if any(value is not None and len(value) != len(type_.parts) for value in values):
                raise ValueError("an object has more or fewer fields than its type")
            # Match fields by position, since an event omits some names.
            rows = [[None] * len(type_.parts) if value is None else list(value.values()) for value in values]
            parts = [_build([row[at] for row in rows], part) for at, (_, part) in enumerate(type_.parts)]
            return _build_struct(values, type_, parts)
        case _:
            return _convert(pa.array([_to_text(value) for value in values], pa.string()), to_arrow(type_))


def _build_map(values: list[Any], type_: ColumnType) -> pa.Array:
    """Build maps from objects, or from arrays of keys and values if keys are nested."""
    (_, key), (_, value) = type_.parts
    _check_all(values, list if key.is_nested else dict)
    given = [each for each in values if each is not None]
    if key.is_nested:
        entries = [(entry["key"], entry["value"]) for each in given for entry in each]
    else:
        entries = [entry for each in given for entry in each.items()]
    keys, items = [key for key, _ in entries], [item for _, item in entries]
    # A key of the type JSON is text.
    return pa.MapArray.from_arrays(_offsets(values), _build(keys, key), _build(items, value))


def _build_union(values: list[Any], type_: ColumnType) -> pa.Array:
    """Build structs from objects with one member: the member's name, then all members; unset members are NULL."""
    members = [name for name, _ in type_.parts]
    if any(value is not None and (len(value) != 1 or next(iter(value)) not in members) for value in values):
        raise ValueError("an object names no member of its union")
    tags = pa.array([None if value is None else next(iter(value)) for value in values], pa.string())
    parts = [_build([value.get(name) if value else None for value in values], part) for name, part in type_.parts]
    return _build_struct(values, type_, [tags, *parts])


def _build_struct(values: list[Any], type_: ColumnType, parts: list[pa.Array]) -> pa.Array:
    nulls = pa.array([value is None for value in values], pa.bool_())
    return pa.StructArray.from_arrays(parts, fields=list(to_arrow(type_)), mask=nulls)


def _check_all(values: list[Any], kind: type) -> None:
    if not all(value is None or isinstance(value, kind) for value in values):
        raise ValueError("a value of another kind than its type")


def _offsets(values: list[Any]) -> pa.Array:
    """Where each value's parts begin, and behind the last; NULL for one that is NULL."""
    offsets: list[int | None] = []
    end = 0
    for value in values:
        offsets.append(None if value is None else end)
        end += len(value or ())
    return pa.array([*offsets, end], pa.int32())


def _to_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, str):
        return value
    raise ValueError("an object where a scalar is expected")


# Keep numbers as text, so that the conversion to their type loses no digits.
_DECODER = text_json.JSONDecoder(parse_int=str, parse_float=str)


def _scan_known(text: str, place: int, _type: ColumnType) -> tuple[Any, int]:
    """Return the value that starts at `place`, and the position of its end."""
    value, end = _DECODER.raw_decode(text, _skip(text, place))
    return value, end


def _scan(text: str, place: int, type_: ColumnType) -> tuple[Any, int]:
    """Like `_scan_known`, but keep values of the type JSON as text."""
    place = _skip(text, place)
    if text.startswith("null", place) or not type_.holds("JSON"):
        return _scan_known(text, place, type_)
    if type_.name == "JSON":
        _, end = _DECODER.raw_decode(text, place)
        return text[place:end], end
    return _scan_parts(text, place, type_)


def _scan_parts(text: str, place: int, type_: ColumnType) -> tuple[Any, int]:
    keys: list[str] = []
    values: list[Any] = []
    is_object, place = text[place] == "{", _skip(text, place + 1)
    while text[place] not in "]}":
        if is_object:
            key, place = _DECODER.raw_decode(text, place)
            keys.append(key)
            place = _skip(text, place) + 1
        value, place = _scan(text, place, _part_of(type_, len(values), keys))
        values.append(value)
        place = _skip(text, place)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return dict(zip(keys, values, strict=True)) if is_object else values, place + 1


def _part_of(type_: ColumnType, place: int, keys: list[str]) -> ColumnType:
    """Return the type of a value's part, by its position; for a union by the last key, which names the member."""
    match type_.name:
        case "LIST" | "ARRAY":
            return type_.element
        case "MAP":
            key, value = (part for _, part in type_.parts)
            return ColumnType("STRUCT", type_.parts) if key.is_nested else value
        case "UNION":
            return dict(type_.parts)[keys[-1]]
        case _:
            return type_.parts[place][1]


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


# Both.


def _convert_batch(batch: pa.RecordBatch, target: pa.Schema) -> pa.RecordBatch:
    arrays = [_convert(array, field.type) for array, field in zip(batch.columns, target, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=target)


def _convert(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Convert values that were read as text to `target`."""
    if array.type == target:
        return array
    if pa.types.is_binary(target):
        return pa.array([None if text is None else _to_bytes(text) for text in array.to_pylist()], target)
    if moments.is_moment(target):
        return moments.parse(array, target)
    return pc.cast(array, target)


def _to_bytes(text: str) -> bytes:
    """Parse DuckDB's text of bytes: `a` or `\\x61`."""
    return _BYTE.sub(lambda found: bytes([int(found[1], 16)]), text.encode())


def _parse(column: Column) -> ColumnType:
    try:
        return parse_type(column.type)
    except NoCounterpart:
        raise _unreadable("a column whose full type is not in its event") from None


def _read_each(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with _Reading():
        yield from reader


class _Reading:
    """What pyarrow raises for a file that is no table becomes one of ours; its own words quote values."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, raised: BaseException | None, _trace: object) -> None:
        wrong = (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, LookupError, TypeError, RecursionError)
        if isinstance(raised, wrong):
            raise _unreadable("a file with values that do not fit its columns' types") from None


def _unreadable(what: str) -> ResultUnreadable:
    return ResultUnreadable(
        f"the result is {what}, so it can't be read as a table: ask for parquet, or read the file by its link"
    )
