"""Rows of a result, a chunk at a time, whichever its format.

CSV and JSON have no types: there a column's is the one that the event tells, and everything but a float is compared as
the text that it is. Floats in a list that CSV writes are text too.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import IO, Any, Protocol, Self

import pyarrow as pa
from pyarrow import csv, parquet

from producers.replay.cells import WriteFloat, holds_floats, name_type, write_rows
from queryd.events import Column, OutputFormat

# Some megabytes of a usual result, and enough for Arrow's cost of a call to vanish.
_CHUNK_ROWS = 16_384
# A row must fit into a block of the CSV reader; a cell may hold a long list.
_CSV_BLOCK_BYTES = 32 * 1024 * 1024
_CONSTANTS = {None: "~", True: "t", False: "f"}
_FLOATS = frozenset({"DOUBLE", "FLOAT"})


class Chunk(Protocol):
    """Some rows of a result."""

    @property
    def size(self) -> int:
        """About how many bytes it takes in memory."""
        ...

    def write(self, write_float: WriteFloat) -> list[bytes]:
        """One text for each row, equal for equal rows; raises `ValueError` where the file is broken."""
        ...

    def take(self, places: Sequence[int]) -> Self:
        """The rows at those places."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """A file's rows: `columns` are names and types, `has_floats` says whether any value is or may hold a float.

    `read` reads the file from its beginning, each time that it is called.
    """

    columns: tuple[tuple[str, str], ...]
    has_floats: bool
    read: Callable[[], Iterator[Chunk]]


def open_rows(file: IO[bytes], output_format: OutputFormat, columns: Sequence[Column]) -> Rows:
    """The rows of a whole, seekable file. `columns` are those of its event: names and DuckDB's types.

    Raises `ValueError` (of which Arrow's error is one) for a file that is not of that format, as reading the rows does.
    """
    match output_format:
        case OutputFormat.PARQUET:
            return _open_parquet(file)
        case OutputFormat.CSV:
            return _open_csv(file, columns)
        case OutputFormat.JSON:
            return _open_json(file, columns)


def join_parts(parts: Sequence[Rows]) -> Rows:
    """The rows of a result of several files, at least one; raises `ValueError` where they don't belong together."""
    if len({part.columns for part in parts}) != 1:
        raise ValueError("the files of one result have different columns, or there is none")

    def read() -> Iterator[Chunk]:
        return chain.from_iterable(part.read() for part in parts)

    return Rows(parts[0].columns, any(part.has_floats for part in parts), read)


@dataclass(frozen=True, slots=True)
class _ArrowChunk:
    batch: pa.RecordBatch

    @property
    def size(self) -> int:
        return int(self.batch.nbytes)

    def write(self, write_float: WriteFloat) -> list[bytes]:
        return write_rows(self.batch, write_float)

    def take(self, places: Sequence[int]) -> Self:
        return type(self)(self.batch.take(pa.array(places, pa.int64())))


@dataclass(frozen=True, slots=True)
class _JsonChunk:
    # `rounded` says of each column whether its numbers with a fraction are floats.
    lines: list[bytes]
    rounded: tuple[bool, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.lines))

    def write(self, write_float: WriteFloat) -> list[bytes]:
        return [_write_line(line, self.rounded, write_float) for line in self.lines]

    def take(self, places: Sequence[int]) -> Self:
        return type(self)([self.lines[place] for place in places], self.rounded)


class _Fraction(str):
    """A JSON number that is no integer, as it stands in the file."""

    __slots__ = ()


class _Integer(str):
    __slots__ = ()


def _open_parquet(file: IO[bytes]) -> Rows:
    schema = parquet.ParquetFile(file).schema_arrow

    def read() -> Iterator[Chunk]:
        file.seek(0)
        return map(_ArrowChunk, parquet.ParquetFile(file).iter_batches(_CHUNK_ROWS))

    return Rows(
        tuple((field.name, name_type(field.type)) for field in schema),
        any(holds_floats(field.type) for field in schema),
        read,
    )


def _open_csv(file: IO[bytes], columns: Sequence[Column]) -> Rows:
    names = _stream_csv(file, {}).schema.names
    # By place, for the event has another name for some. Beyond what it tells, 200 columns, a value is text.
    told = [column.type for column in columns[: len(names)]] + ["VARCHAR"] * (len(names) - len(columns))
    types = {name: pa.float64() if type_ in _FLOATS else pa.string() for name, type_ in zip(names, told, strict=True)}

    def read() -> Iterator[Chunk]:
        return map(_ArrowChunk, _stream_csv(file, types))

    return Rows(tuple(zip(names, told, strict=True)), any(type_ in _FLOATS for type_ in told), read)


def _stream_csv(file: IO[bytes], types: dict[str, pa.DataType]) -> csv.CSVStreamingReader:
    file.seek(0)
    return csv.open_csv(
        file,
        read_options=csv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        # An empty line is the NULL of a file with one column.
        parse_options=csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert_options=csv.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )


def _open_json(file: IO[bytes], columns: Sequence[Column]) -> Rows:
    rounded = tuple(_is_rounded(column.type) for column in columns)

    def read() -> Iterator[Chunk]:
        file.seek(0)
        return (_JsonChunk(lines, rounded) for lines in _slice(file))

    return Rows(tuple((column.name, column.type) for column in columns), any(rounded), read)


def _is_rounded(type_: str) -> bool:
    """Whether every fraction in a column of that type is a float. A decimal, too, has a fraction, and is exact."""
    return any(float_ in type_ for float_ in _FLOATS) and "DECIMAL" not in type_


def _slice(file: Iterable[bytes]) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    for line in file:
        lines.append(line)
        if len(lines) == _CHUNK_ROWS:
            yield lines
            lines = []
    if lines:
        yield lines


def _write_line(line: bytes, rounded: tuple[bool, ...], write_float: WriteFloat) -> bytes:
    row = json.loads(line, parse_float=_Fraction, parse_int=_Integer)
    if not isinstance(row, dict):
        raise ValueError("a line is no JSON object")  # noqa: TRY004 - the file is wrong, not the program
    # Beyond what the event tells, 200 columns, a fraction is exact.
    known = chain(rounded, repeat(False))
    cells = (
        _frame("k", name) + _write_value(value, write_float if rounds else None)
        for (name, value), rounds in zip(row.items(), known, strict=False)
    )
    # A JSON string may escape half a pair.
    return "".join(cells).encode("utf-8", "surrogatepass")


def _write_value(value: Any, write_float: WriteFloat | None) -> str:
    """Tagged and with its length, so that no two values look alike."""
    match value:
        case None | True | False:
            return _CONSTANTS[value]
        case _Fraction() | _Integer():
            rounded = write_float(float(value)) if write_float and isinstance(value, _Fraction) else value
            return _frame("n", rounded)
        case str():
            return _frame("s", value)
        case list():
            return _frame("a", "".join(_write_value(part, write_float) for part in value))
        case dict():
            parts = (_frame("k", name) + _write_value(part, write_float) for name, part in value.items())
            return _frame("o", "".join(parts))
        case _:
            # `NaN` and its like, which Python's parser takes and JSON does not have.
            raise ValueError("a line holds what JSON does not have")


def _frame(tag: str, text: str) -> str:
    return f"{tag}{len(text)}:{text}"
