"""A result's file as record batches, with the types that its event says.

Parquet has its own types. In CSV and JSON every value is text: what the event says of a column decides its type, not
what the first values look like. A type that has no counterpart stays text, times of day in JSON too; lists, structs and
maps are text in CSV. Of columns beyond the 200 that an event names the type is guessed from the first rows.
"""

import csv as text_csv
import io
import json as text_json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
from pyarrow import csv, json, parquet

from queryd.column_types import DATE, TIME, NoCounterpart, holds_map, is_nested, parse_or_text, parse_type, replace
from queryd.errors import ResultUnreadable
from queryd.events import Column, OutputFormat, QueryStatusChanged

# A row must fit into a block; queries make rows of megabytes at times, and a block costs its size in memory.
_BLOCK_BYTES = 16 * 1024 * 1024
# How much of a file with maps is taken apart at once: as Python's own objects it is ten times larger.
_LINES_BYTES = 1024 * 1024


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


def _open_csv(body: IO[bytes], columns: Sequence[Column]) -> pa.RecordBatchReader:
    names = _read_header(body)
    types = {
        name: pa.string() if is_nested(column.type) else parse_or_text(column.type)
        for name, column in zip(names, columns, strict=False)
    }
    return csv.open_csv(
        body,
        read_options=csv.ReadOptions(block_size=_BLOCK_BYTES),
        # In a file of one column an empty line is a NULL.
        parse_options=csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        # NULL is an empty field without quotes, and nothing else is: not the text `NULL`, not `nan`.
        convert_options=csv.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )


def _read_header(body: IO[bytes]) -> list[str]:
    """The names of the columns, which are what the event says only where they quote nothing of the SQL."""
    text = io.TextIOWrapper(body, encoding="utf-8", newline="")
    names = next(text_csv.reader(text), [])
    text.detach()
    body.seek(0)
    return names


def _open_json(body: IO[bytes], columns: Sequence[Column]) -> pa.RecordBatchReader:
    first = body.readline()
    body.seek(0)
    if not first:
        # No rows, so not even names: the event's.
        empty = pa.schema([(column.name, replace(parse_or_text(column.type), TIME, pa.string())) for column in columns])
        return pa.RecordBatchReader.from_batches(empty, [])
    # Every row of DuckDB's has all of them.
    names = list(text_json.loads(first))
    known = zip(names, columns, strict=False)
    named = {name: _type_in_json(column, number) for number, (name, column) in enumerate(known, start=1)}
    if any(map(holds_map, named.values())):
        if len(named) < len(names):
            raise _unreadable("a result of so many columns, with maps among them,")
        target = pa.schema(list(named.items()))
        return pa.RecordBatchReader.from_batches(target, _read_rows(body, target))
    # pyarrow's reader takes dates as text only, from which they can be cast.
    taken = [(name, replace(type_, DATE, pa.string())) for name, type_ in named.items()]
    reader = json.open_json(
        body,
        read_options=json.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=json.ParseOptions(
            explicit_schema=pa.schema(taken),
            unexpected_field_behavior="infer" if len(named) < len(names) else "error",
        ),
    )
    # The reader puts columns of known types first.
    order = sorted(reader.schema.names, key=names.index)
    target = pa.schema([(name, named.get(name) or reader.schema.field(name).type) for name in order])
    return pa.RecordBatchReader.from_batches(target, (batch.select(order).cast(target) for batch in reader))


def _type_in_json(column: Column, number: int) -> pa.DataType:
    """The type of the column of that number. What the reader would have to guess would change with the values."""
    try:
        # A time of day is text: there is one more of it than Arrow has, 24:00:00.
        return replace(parse_type(column.type), TIME, pa.string())
    except NoCounterpart:
        if is_nested(column.type) or column.type == "JSON":
            raise _unreadable(f"column {number}, whose type JSON does not tell,") from None
        return pa.string()


def _read_rows(body: IO[bytes], target: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows with maps, which are objects in DuckDB's JSON: pyarrow's reader has none."""
    while lines := body.readlines(_LINES_BYTES):
        # Numbers stay the text that they are, and lose nothing on their way to their type.
        rows = [text_json.loads(line, parse_int=str, parse_float=str) for line in lines]
        columns = [_build([row[field.name] for row in rows], field.type) for field in target]
        yield pa.RecordBatch.from_arrays(columns, schema=target)


def _build(values: list[Any], type_: pa.DataType) -> pa.Array:
    """An array of that type, from what JSON has for it."""
    if pa.types.is_struct(type_):
        _check_all(values, dict)
        parts = [
            _build([None if value is None else value[field.name] for value in values], field.type) for field in type_
        ]
        nulls = pa.array([value is None for value in values], pa.bool_())
        return pa.StructArray.from_arrays(parts, fields=list(type_), mask=nulls)
    if pa.types.is_list(type_):
        _check_all(values, list)
        flat = [part for value in values if value is not None for part in value]
        return pa.ListArray.from_arrays(_offsets(values), _build(flat, type_.value_type))
    if pa.types.is_map(type_):
        _check_all(values, dict)
        entries = [entry for value in values if value is not None for entry in value.items()]
        keys, items = [key for key, _ in entries], [item for _, item in entries]
        return pa.MapArray.from_arrays(_offsets(values), _build(keys, type_.key_type), _build(items, type_.item_type))
    return pa.array([_to_text(value) for value in values], pa.string()).cast(type_)


def _check_all(values: list[Any], kind: type) -> None:
    """A map's key is text in JSON, even one that is a list."""
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


def _read_each(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with _Reading():
        yield from reader


class _Reading:
    """What pyarrow raises for a file that is no table becomes one of ours; its own words quote values."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, raised: BaseException | None, _trace: object) -> None:
        if isinstance(raised, pa.ArrowInvalid | pa.ArrowNotImplementedError | ValueError | KeyError | TypeError):
            raise _unreadable(
                "the file, with values that are not of its columns' types (NaN in JSON and years before Christ in CSV "
                "are such cases),"
            ) from None


def _unreadable(what: str) -> ResultUnreadable:
    return ResultUnreadable(
        f"{what} can't be read as a table of one type a column: ask for parquet, or read the file itself by its link"
    )
