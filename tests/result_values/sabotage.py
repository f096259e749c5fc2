"""Faults of the writer and the reader, each of which once was, or might be, and that the cases have to find."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from pyarrow import csv

from engines.duckdb import columns, export, json_lines, parquet_values
from queryd import arrow_types, moments, tables
from queryd.column_types import ColumnType
from queryd.events import OutputFormat

_PARQUET, _CSV, _JSON = OutputFormat.PARQUET, OutputFormat.CSV, OutputFormat.JSON


@dataclass(frozen=True, slots=True)
class Sabotage:
    """A fault, and the format in which it shows."""

    output_format: OutputFormat
    commit: Callable[[], AbstractContextManager[Any]]


def _scalar(module: Any, type_name: str, write: Callable[[str], str]) -> Callable[[], AbstractContextManager[Any]]:
    """Write the values of one type another way."""
    original = module._write_scalar

    def write_scalar(place: str, type_: Any) -> str:
        own = type_.name if isinstance(type_, ColumnType) else type_
        return write(place) if own == type_name else str(original(place, type_))

    return lambda: patch.object(module, "_write_scalar", write_scalar)


def _option(output_format: OutputFormat, old: str, new: str) -> Callable[[], AbstractContextManager[Any]]:
    changed = export._COPY_OPTIONS[output_format].replace(old, new)
    return lambda: patch.dict(export._COPY_OPTIONS, {output_format: changed})


def _swap(module: Any, name: str, value: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(module, name, value)


def _without_nulls(values: list[Any]) -> pa.Array:
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value or ()))
    return pa.array(ends, pa.int32())


_convert_options = csv.ConvertOptions
_count_days = moments._count_days
_redact_columns = columns.redact_columns


def _quote_nulls(**options: Any) -> csv.ConvertOptions:
    return _convert_options(**options | {"quoted_strings_can_be_null": True})


SABOTAGES = {
    # The writer.
    "whole numbers are rounded": Sabotage(_PARQUET, _swap(parquet_values, "_WHOLE_NUMBERS", frozenset())),
    "an offset is lost": Sabotage(
        _PARQUET, _swap(parquet_values, "_TEXTS", parquet_values._TEXTS - {"TIME WITH TIME ZONE"})
    ),
    "an interval is cut": Sabotage(_PARQUET, _swap(parquet_values, "_TEXTS", parquet_values._TEXTS - {"INTERVAL"})),
    "24:00:00 is written": Sabotage(_PARQUET, _scalar(parquet_values, "TIME", lambda place: place)),
    "deltas of 33 bits": Sabotage(_PARQUET, _option(_PARQUET, "v1", "v2")),
    "no zero before the point": Sabotage(
        _JSON, _scalar(json_lines, "DECIMAL", lambda place: f"CAST({place} AS VARCHAR)")
    ),
    "NaN is a number": Sabotage(_JSON, _scalar(json_lines, "DOUBLE", lambda place: f"CAST({place} AS VARCHAR)")),
    "JSON is embedded as it is": Sabotage(_JSON, _swap(json_lines, "_write_embedded", lambda text: text)),
    "JSON is written anew": Sabotage(
        _JSON, _swap(json_lines, "_write_embedded", lambda text: f"CAST(json_merge_patch('{{}}', {text}) AS VARCHAR)")
    ),
    "fields without names": Sabotage(
        _JSON, _swap(json_lines, "name_fields", lambda type_: [name for name, _ in type_.parts])
    ),
    "a union's member is not told": Sabotage(
        _JSON,
        lambda: patch.dict(json_lines._NESTED, UNION=lambda place, _type, _depth: f"CAST(to_json({place}) AS VARCHAR)"),
    ),
    "names that collide": Sabotage(_PARQUET, _swap(columns, "make_unique", list)),
    "200 columns are told": Sabotage(
        _CSV, _swap(export, "redact_columns", lambda *arguments: _redact_columns(*arguments)[:200])
    ),
    "a type loses its parts": Sabotage(_JSON, _swap(columns, "write_type", lambda type_, _: type_.name)),
    "values that look alike in CSV": Sabotage(_CSV, _swap(export, "_write_in_csv", lambda place, _: place)),
    "NULL is a text": Sabotage(_CSV, _option(_CSV, "NULLSTR ''", "NULLSTR 'NULL'")),
    # The reader.
    "the year 0 before Christ": Sabotage(
        _CSV, _swap(moments, "_count_days", lambda year, *date: _count_days(year - (year <= 0), *date))
    ),
    "an infinity is no moment": Sabotage(_JSON, _swap(moments, "_INFINITIES", {})),
    "bytes are their text": Sabotage(_CSV, _swap(tables, "_to_bytes", str.encode)),
    "an empty text is NULL": Sabotage(_CSV, lambda: patch.object(csv, "ConvertOptions", _quote_nulls)),
    "whole numbers as floats": Sabotage(_JSON, lambda: patch.dict(arrow_types._SCALARS, HUGEINT=pa.float64())),
    "a text that looks like a number": Sabotage(_CSV, _swap(tables, "_type_in_csv", lambda column: pa.string())),
    "digits are lost": Sabotage(
        _JSON,
        _swap(tables, "_DECODER", json.JSONDecoder(parse_int=lambda digits: str(int(float(digits))), parse_float=str)),
    ),
    "a NULL is an empty list": Sabotage(_JSON, _swap(tables, "_offsets", _without_nulls)),
}
