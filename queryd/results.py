"""Reading a result, from its event or from S3: whole, as an Arrow table, as record batches, or by links.

What is handed out was checked before: a file has the size and the SHA-256 that its event says. A large one goes through
a temporary file for that, so that a result needs disk, and not memory, for its size.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import IO, Any

import boto3
import pyarrow as pa
from botocore.config import Config
from botocore.exceptions import ClientError

from queryd.errors import ResultDamaged, ResultExpired, ResultInline
from queryd.events import QueryStatusChanged, ResultFile
from queryd.tables import open_batches

_LINK_SECONDS = 3600
# With three tries a read of an unreachable store fails within about a minute; boto3's defaults take five minutes.
_CONNECT_SECONDS = 5
_READ_SECONDS = 20
# As much as a boto3 client copies at a time without being slowed by the number of its calls.
_CHUNK_BYTES = 1024 * 1024
# Read a result of up to this size into memory. The size is that of a single PUT.
_MEMORY_BYTES = 16 * 1024 * 1024


class ResultReader:
    """Reads results from S3 by the standard `AWS_*` settings. Safe for several threads."""

    def __init__(self) -> None:
        # A session of its own: the one that boto3 shares keeps the credentials of its first client for good, and is not
        # for several threads. Version 4 is the only signature that S3 takes in newer regions, and boto3 still signs
        # links with version 2. It signs the region too, which boto3 itself takes from AWS_DEFAULT_REGION alone.
        config = Config(
            signature_version="s3v4",
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"total_max_attempts": 3, "mode": "standard"},
        )
        self._s3 = boto3.session.Session().client("s3", region_name=os.environ.get("AWS_REGION"), config=config)

    def read_object(self, location: str, key: str) -> bytes:
        """One object, whole. `location` is any URL of its bucket, such as an event's `output_location`."""
        body: bytes = self._s3.get_object(Bucket=_bucket(location), Key=key)["Body"].read()
        return body

    def link(self, location: str, key: str, *, expires_at: datetime | None = None, file_name: str | None = None) -> str:
        """Return a presigned URL, valid for one hour or until `expires_at`, whichever is earlier.

        Args:
            location: Any URL of the object's bucket.
            key: The object's key.
            expires_at: When retention deletes the object; a timezone-aware time.
            file_name: The name under which a browser saves the file: printable ASCII without `"`.

        Raises:
            ResultExpired: `expires_at` has passed.
        """
        seconds = _LINK_SECONDS
        if expires_at is not None:
            seconds = min(seconds, int((expires_at - datetime.now(UTC)).total_seconds()))
            if seconds <= 0:
                raise ResultExpired(f"the result expired at {expires_at.isoformat(timespec='seconds')}")
        target = {"Bucket": _bucket(location), "Key": key}
        if file_name is not None:
            target["ResponseContentDisposition"] = f'attachment; filename="{file_name}"'
        url: str = self._s3.generate_presigned_url("get_object", Params=target, ExpiresIn=seconds)
        return url

    def links(self, event: QueryStatusChanged) -> list[str]:
        """Return a presigned URL for each of the result's files. Makes no request to the store.

        The URLs are valid for one hour, or until the result expires if that is earlier. A browser saves the files under
        the names from `download_names`.

        Raises `ResultInline` for a result that lies in its event, and `ResultExpired`.
        """
        if event.inline_result is not None:
            raise ResultInline(
                f"the result of {event.query_id} is in its event: read it with result(), or take the bytes of the "
                "file from event.inline_result"
            )
        return [
            self.link(location, file.key, expires_at=event.expires_at, file_name=name)
            for (location, file), name in zip(_files(event), download_names(event), strict=True)
        ]

    def read_table(self, event: QueryStatusChanged) -> pa.Table:
        """The result that a `Succeeded` event announces; raises as `read_batches` does."""
        tables = []
        for body in self.open_files(event):
            with body:
                tables.append(open_batches(body, event).read_all())
        return pa.concat_tables(tables)

    def read_batches(self, event: QueryStatusChanged) -> Iterator[pa.RecordBatch]:
        """The same, batch by batch, never all of it in memory.

        Raises `ResultExpired`, `ResultDamaged`, `ResultUnreadable` for a CSV or JSON file that is no table, and
        botocore's errors where the store can't be read.
        """
        for body in self.open_files(event):
            with body:
                yield from open_batches(body, event)

    def open_files(self, event: QueryStatusChanged) -> Iterator[IO[bytes]]:
        """Each file, whole and checked, at its beginning; the caller closes it. Raises as `read_batches` does, but for
        `ResultUnreadable`."""
        if event.inline_result is not None:
            yield io.BytesIO(event.inline_result)
            return
        for location, file in _files(event):
            yield self._fetch(event, location, file)

    def _fetch(self, event: QueryStatusChanged, location: str, file: ResultFile) -> IO[bytes]:
        try:
            source: Any = self._s3.get_object(Bucket=_bucket(location), Key=file.key)["Body"]
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") not in ("NoSuchKey", "NoSuchBucket", "404"):
                raise
            raise _missing(event, file) from None
        body: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115 — the caller closes it
        try:
            _copy_checked(source, body, file)
        except BaseException:
            body.close()
            raise
        body.seek(0)
        return body


def download_names(event: QueryStatusChanged) -> list[str]:
    """Return a distinct name for each of the result's files, such as `query-2026-11-30-0c7f3a52.csv`.

    It contains the day (UTC) on which the query ended and the beginning of the query's id.
    """
    stem = f"query-{event.occurred_at.astimezone(UTC):%Y-%m-%d}-{event.query_id[:8]}"
    many = len(event.files) > 1
    return [
        f"{stem}{f'-{number}' if many else ''}{PurePosixPath(file.key).suffix}"
        for number, file in enumerate(event.files, 1)
    ]


def _bucket(location: str) -> str:
    return location.removeprefix("s3://").partition("/")[0]


def _files(event: QueryStatusChanged) -> list[tuple[str, ResultFile]]:
    """Where the files lie; an event that has neither files nor an inline result has lost the latter at its expiry."""
    if event.output_location is None:
        raise _expired(event)
    return [(event.output_location, file) for file in event.files]


def _copy_checked(source: Any, body: IO[bytes], file: ResultFile) -> None:
    hashed, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        hashed.update(chunk)
        size += body.write(chunk)
    if size != file.bytes:
        raise ResultDamaged(f"{file.key} has {size} bytes, and {file.bytes} were announced: submit the query again")
    if file.sha256 is not None and hashed.hexdigest() != file.sha256:
        raise ResultDamaged(f"{file.key} has another SHA-256 than was announced: submit the query again")


def _missing(event: QueryStatusChanged, file: ResultFile) -> ResultExpired | ResultDamaged:
    if event.expires_at is not None and event.expires_at <= datetime.now(UTC):
        return _expired(event)
    return ResultDamaged(f"{file.key} was removed before it had expired: submit the query again")


def _expired(event: QueryStatusChanged) -> ResultExpired:
    when = "" if event.expires_at is None else f" at {event.expires_at.isoformat(timespec='seconds')}"
    return ResultExpired(f"the result of {event.query_id} expired{when}: submit the query again, under another id")
