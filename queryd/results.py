"""Reading a result: the whole file, or an Arrow table."""

import io
import os

import boto3
import pyarrow as pa
from botocore.config import Config
from pyarrow import csv, json, parquet

from queryd.events import OutputFormat, QueryStatusChanged

_LINK_SECONDS = 3600


class ResultDamaged(Exception):
    """The object is not what its event says: it was changed or removed behind queryd's back."""


class ResultReader:
    """Reads results from S3 by the standard `AWS_*` settings."""

    def __init__(self) -> None:
        # Version 4 is the only signature that S3 takes in newer regions, and boto3 still signs links with version 2. It
        # signs the region too, which boto3 itself takes from AWS_DEFAULT_REGION alone.
        self._s3 = boto3.client("s3", region_name=os.environ.get("AWS_REGION"), config=Config(signature_version="s3v4"))

    def read_object(self, location: str, key: str) -> bytes:
        """One object, whole. `location` is any URL of its bucket, such as an event's `output_location`."""
        body: bytes = self._s3.get_object(Bucket=_bucket(location), Key=key)["Body"].read()
        return body

    def link(self, location: str, key: str) -> str:
        """A presigned URL, good for one hour."""
        url: str = self._s3.generate_presigned_url(
            "get_object", Params={"Bucket": _bucket(location), "Key": key}, ExpiresIn=_LINK_SECONDS
        )
        return url

    def read_table(self, event: QueryStatusChanged) -> pa.Table:
        """The result that a `Succeeded` event announces; raises `ResultDamaged`.

        Parquet keeps every type; in CSV and JSON types are guessed anew from the text.
        """
        tables = []
        for file in event.files:
            body = self.read_object(event.output_location or "", file.key)
            if len(body) != file.bytes:
                raise ResultDamaged(f"{file.key} has {len(body)} bytes, and {file.bytes} were announced")
            tables.append(_parse(body, event.output_format))
        return pa.concat_tables(tables)


def _bucket(location: str) -> str:
    return location.removeprefix("s3://").partition("/")[0]


def _parse(body: bytes, output_format: OutputFormat | None) -> pa.Table:
    match output_format:
        case OutputFormat.CSV:
            return csv.read_csv(
                io.BytesIO(body),
                convert_options=csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False),
            )
        case OutputFormat.JSON:
            return json.read_json(io.BytesIO(body)) if body else pa.table({})
        case _:
            return parquet.read_table(io.BytesIO(body))
