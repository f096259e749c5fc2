"""A result's file as record batches, with the types that its event says.

Parquet has its own types. In CSV and JSON every value is text: what the event says of a column decides its type, not
what the first values look like. A type that has no counterpart stays text, times of day in JSON too; lists and structs
are text in CSV. Of columns beyond the 200 that an event names the type is guessed from the first rows.
"""

import csv as text_csv
import io
import json as text_json
import re
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
from pyarrow import csv, json, parquet

from queryd.errors import ResultUnreadable
from queryd.events import Column, OutputFormat, QueryStatusChanged

# A row must fit into a block; queries make rows of megabytes at times, and a block costs its size in memory.
_BLOCK_BYTES = 16 * 1024 * 1024

_TYPES = {
    "BOOLEAN": pa.bool_(),
    "TINYINT": pa.int8(),
    "SMALLINT": pa.int16(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "UTINYINT": pa.uint8(),
    "USMALLINT": pa.uint16(),
    "UINTEGER": pa.uint32(),
    "UBIGINT": pa.uint64(),
    # What a sum of integers is; Parquet has it so too.
    "HUGEINT": pa.decimal128(38, 0),
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
    "DATE": pa.date32(),
    "TIME": pa.time64("us"),
    "TIMESTAMP": pa.timestamp("us"),
    "TIMESTAMP WITH TIME ZONE": pa.timestamp("us", "UTC"),
}
_DECIMAL = re.compile(r"DECIMAL\((\d+),(\d+)\)")
_DATE, _TIME = _TYPES["DATE"], _TYPES["TIME"]
# JSON has these as objects and lists.
_NESTED = re.compile(r"(STRUCT|MAP|UNION)\b.*|.*\[\d*\]", re.DOTALL)


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
    types = {name: type_ for name, type_ in _name_types(names, columns, pa.string()).items() if type_ is not None}
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
        empty = pa.schema([(column.name, _to_arrow(column.type) or pa.string()) for column in columns])
        return pa.RecordBatchReader.from_batches(empty, [])
    # Every row of DuckDB's has all of them.
    names = list(text_json.loads(first))
    named = _name_types(names, columns, None)
    # pyarrow's reader takes both as text only; from there a date can be cast, a time of day can't.
    named = {name: pa.string() if type_ == _TIME else type_ for name, type_ in named.items()}
    taken = {name: pa.string() if type_ == _DATE else type_ for name, type_ in named.items()}
    reader = json.open_json(
        body,
        read_options=json.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=json.ParseOptions(
            explicit_schema=pa.schema([(name, type_) for name, type_ in taken.items() if type_ is not None]),
            unexpected_field_behavior="infer",
        ),
    )
    # The reader puts columns of known types first.
    order = sorted(reader.schema.names, key=names.index)
    target = pa.schema([(name, named.get(name) or reader.schema.field(name).type) for name in order])
    return pa.RecordBatchReader.from_batches(target, (batch.select(order).cast(target) for batch in reader))


def _name_types(
    names: Sequence[str], columns: Sequence[Column], nested: pa.DataType | None
) -> dict[str, pa.DataType | None]:
    """The type of each column by its name in the file; None is for the reader to find out."""
    return {
        name: nested if _NESTED.fullmatch(column.type) else _to_arrow(column.type) or pa.string()
        for name, column in zip(names, columns, strict=False)
    }


def _to_arrow(type_: str) -> pa.DataType | None:
    if found := _DECIMAL.fullmatch(type_):
        return pa.decimal128(int(found[1]), int(found[2]))
    return _TYPES.get(type_)


def _read_each(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with _Reading():
        yield from reader


class _Reading:
    """What pyarrow raises for a file that is no table becomes one of ours; its own words quote values."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, raised: BaseException | None, _trace: object) -> None:
        if isinstance(raised, pa.ArrowInvalid | ValueError):
            raise ResultUnreadable(
                "the file can't be read as a table of one type a column (NaN in JSON and years before Christ in CSV "
                "are such cases): ask for parquet, or read the file itself by its link"
            ) from None
