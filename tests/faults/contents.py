"""What is in a result file, as text: the three formats must all say the same."""

import csv
import json
from dataclasses import dataclass
from decimal import Decimal
from io import BytesIO, StringIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True, slots=True)
class Content:
    """A result: its columns (None where the format has no place for them), how many rows, and the rows as text.

    `rows` is empty where nobody asked for them.
    """

    columns: tuple[str, ...] | None
    row_count: int
    rows: tuple[tuple[str, ...], ...]


class Unreadable(Exception):
    """The bytes are no whole file of that format."""


def read_content(output_format: str, data: bytes, *, with_rows: bool) -> Content:
    """Read a whole result; raises `Unreadable`.

    A cell's text: NULL is empty, booleans are true and false, numbers as they are written, times as ISO 8601 has them
    with a space.
    """
    try:
        match output_format:
            case "parquet":
                return _read_parquet(data, with_rows)
            case "csv":
                return _read_csv(data, with_rows)
            case "json":
                return _read_json(data, with_rows)
    except (ValueError, csv.Error, pa.ArrowException, OSError) as error:
        raise Unreadable(type(error).__name__) from error
    raise Unreadable("an unknown format")


def _read_parquet(data: bytes, with_rows: bool) -> Content:
    # The whole of it is read in any case: a footer alone would also count the rows of a file with a hole.
    table = pq.ParquetFile(BytesIO(data)).read()
    cells = [[_to_text(cell) for cell in column.to_pylist()] for column in table.columns] if with_rows else []
    return Content(tuple(table.column_names), table.num_rows, tuple(zip(*cells, strict=True)))


def _read_csv(data: bytes, with_rows: bool) -> Content:
    if not data.endswith(b"\r\n"):
        raise Unreadable("the last line has no end")
    header, *records = csv.reader(StringIO(data.decode(), newline=""), strict=True)
    # An empty line is one empty cell.
    rows = tuple(tuple(record) or ("",) for record in records) if with_rows else ()
    return Content(tuple(header), len(records), rows)


def _read_json(data: bytes, with_rows: bool) -> Content:
    if data and not data.endswith(b"\n"):
        raise Unreadable("the last line has no end")
    # Only a line feed ends a line: a JSON string may hold other line separators as they are.
    lines = data.decode().split("\n")[:-1]
    records = [json.loads(line, parse_int=str, parse_float=str, parse_constant=str) for line in lines]
    columns = tuple(records[0]) if records else None
    rows = tuple(tuple(_to_text(cell) for cell in record.values()) for record in records) if with_rows else ()
    return Content(columns, len(records), rows)


def _to_text(cell: Any) -> str:
    match cell:
        case None:
            return ""
        case bool():
            return "true" if cell else "false"
        case Decimal():
            return f"{cell:f}"
        case _:
            return str(cell)
