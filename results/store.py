"""Puts results into the bucket: each key once, from the executor's own event loop.

A file of up to 16 MiB is one conditional PUT. A larger one is a multipart upload, which becomes visible when it is
complete. Every key holds its attempt's token, so that only one process ever writes it; a repeated put after a lost
answer finds its own object and returns it.
"""

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import obstore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import S3Store

from processes.failpoints import Failpoint, failpoint

# One PUT up to here: it is whole or it is not there.
_SINGLE_PUT_BYTES = 16 * 1024 * 1024
_PART_BYTES = 8 * 1024 * 1024
# Four parts at once, of 8 MiB each in memory, fill a network.
_PARTS_AT_ONCE = 4
# Reading and hashing up to this size takes less than a millisecond; larger files are read in a thread.
_INSTANT_BYTES = 256 * 1024

# A live endpoint accepts at once; an overloaded one is better asked again later.
_CONNECT_SECONDS = 3
# The store answers a PUT when the bytes are durable: a few seconds for 16 MiB on a slow disk, never this long.
_REQUEST_SECONDS = 30
# One quick retry for a connection that was cut; the caller waits and retries for the rest.
_RETRIES = 1
# obstore asks for credentials again 5 minutes before they expire; botocore returns some that are valid for at least 10.
_CREDENTIALS_VALID = timedelta(minutes=10)

_BOTO_CONFIG = Config(
    connect_timeout=_CONNECT_SECONDS,
    read_timeout=_REQUEST_SECONDS,
    retries={"total_max_attempts": _RETRIES + 1, "mode": "standard"},
    # Some stores know no checksums but Content-MD5.
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

_SHA256 = "sha256"
# What obstore says of an answer that is no success: the status, and the body, of which only S3's code is used.
_ANSWER = re.compile(r"non-2xx status code: (?P<status>\d{3})[^:]*:?(?:.*?<Code>(?P<code>\w+)</Code>)?", re.DOTALL)
_NOT_IMPLEMENTED = 501
# Failures that pass by waiting; from 520 on it is a proxy that reports the store behind it. Others are refusals.
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 531)})
_TRANSIENT_CODES = frozenset({"NoSuchUpload", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"})
# A signature carries the time, and a store refuses one that is a quarter of an hour off.
_CLOCK_WRONG = "RequestTimeTooSkewed"
_REFUSALS = {
    "AccessDenied": "the store denies the writer access to the key",
    "NoSuchBucket": "the bucket does not exist",
    "InvalidAccessKeyId": "the store does not know the writer's access key",
    "SignatureDoesNotMatch": "the store does not accept the writer's secret key",
}


class StoreUnavailable(Exception):
    """The store can't be reached, or did not answer: the object may be there or not. Wait and store again."""


class StoreRefused(Exception):
    """The store will not take the object, however often it is asked; the sentence says why. Stop."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that is there, whole: its key, its size, the store's ETag without quotes, and its SHA-256 in hex."""

    key: str
    bytes: int
    etag: str
    sha256: str


class StoreAccess:
    """Where S3 is and by which credentials, as boto3 finds both: variables, profiles, roles, refreshed tokens."""

    def __init__(self, *, endpoint_url: str | None = None, session: boto3.session.Session | None = None) -> None:
        """Raises botocore's errors for a profile or region that can't be found. Takes some 0.1 s."""
        # boto3 itself takes the region from AWS_DEFAULT_REGION alone.
        session = session or boto3.session.Session(region_name=os.environ.get("AWS_REGION"))
        self.client: Any = session.client("s3", endpoint_url=endpoint_url, config=_BOTO_CONFIG)
        self._credentials = session.get_credentials()

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> "StoreAccess":
        """Access by `AWS_*` variables given here instead of in the environment."""
        session = boto3.session.Session(
            aws_access_key_id=variables.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=variables.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=variables.get("AWS_SESSION_TOKEN"),
            region_name=variables.get("AWS_REGION"),
        )
        return cls(endpoint_url=variables.get("AWS_ENDPOINT_URL"), session=session)

    def open_bucket(self, bucket: str) -> S3Store:
        """obstore's view of a bucket, at the endpoint and region that boto3 has resolved."""
        endpoint = str(self.client.meta.endpoint_url)
        return S3Store(
            bucket,
            endpoint=endpoint,
            region=self.client.meta.region_name or "us-east-1",
            virtual_hosted_style_request=False,
            checksum_algorithm="SHA256",
            credential_provider=self._get_credentials,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                "timeout": timedelta(seconds=_REQUEST_SECONDS),
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_REQUEST_SECONDS)},
        )

    def _get_credentials(self) -> Any:
        if self._credentials is None:
            raise ValueError("there are no credentials")
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_VALID,
        }


class ResultStore:
    """Puts objects into one bucket."""

    def __init__(self, bucket: str, access: StoreAccess) -> None:
        self.bucket = bucket
        self.access = access
        self._store = access.open_bucket(bucket)

    async def put(self, key: str, content: bytes | Path, content_type: str) -> StoredObject:
        """Put bytes or a file at a key where nothing is yet. Repeating it with the same content is the same as once.

        Raises `StoreUnavailable` and `StoreRefused`; another object at that key is refused and stays as it is.
        """
        failpoint(Failpoint.PUT_BEFORE)
        with classified():
            size = _size(content)
            if size <= _SINGLE_PUT_BYTES:
                stored = await self._put_at_once(key, await _read(content, size), content_type)
            else:
                stored = await self._put_in_parts(key, content, size, content_type)
        failpoint(Failpoint.PUT_AFTER)
        return stored

    async def _put_at_once(self, key: str, body: bytes, content_type: str) -> StoredObject:
        sha256 = await _hash(body)
        try:
            answer = await obstore.put_async(
                self._store,
                key,
                body,
                mode="create",
                use_multipart=False,
                attributes={"Content-Type": content_type, _SHA256: sha256},
            )
        except AlreadyExistsError:
            found = await self._find(key, len(body), sha256)
            if found is None:
                # Another request for this key was under way: ours, by its key.
                raise StoreUnavailable("the store is busy with the key") from None
            return found
        return StoredObject(key, len(body), _strip(answer["e_tag"]), sha256)

    async def _put_in_parts(self, key: str, content: bytes | Path, size: int, content_type: str) -> StoredObject:
        """A multipart upload. obstore completes one without a condition, so the key is looked at first."""
        sha256 = await asyncio.to_thread(_hash_file, content) if isinstance(content, Path) else await _hash(content)
        # A writer that may not read gets its answer from the upload, which says more than one to HEAD.
        with contextlib.suppress(PermissionDeniedError):
            if (found := await self._find(key, size, sha256)) is not None:
                return found
        answer = await obstore.put_async(
            self._store,
            key,
            content,
            attributes={"Content-Type": content_type, _SHA256: sha256},
            use_multipart=True,
            chunk_size=_PART_BYTES,
            max_concurrency=_PARTS_AT_ONCE,
        )
        return StoredObject(key, size, _strip(answer["e_tag"]), sha256)

    async def _find(self, key: str, size: int, sha256: str) -> StoredObject | None:
        """The object at the key if it is this one; None without any. Raises `StoreRefused` for another one."""
        try:
            found = await obstore.get_async(self._store, key, options={"head": True})
        except FileNotFoundError:
            return None
        if found.meta["size"] != size or found.attributes.get(_SHA256) != sha256:
            raise StoreRefused("another object stands at the key already")
        return StoredObject(key, size, _strip(found.meta["e_tag"]), sha256)


async def _read(content: bytes | Path, size: int) -> bytes:
    if isinstance(content, bytes):
        return content
    read = content.read_bytes
    return read() if size <= _INSTANT_BYTES else await asyncio.to_thread(read)


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


async def _hash(body: bytes) -> str:
    if len(body) <= _INSTANT_BYTES:
        return hashlib.sha256(body).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, body)).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _strip(etag: str | None) -> str:
    return (etag or "").strip('"')


@contextlib.contextmanager
def classified() -> Iterator[None]:
    """Turn obstore's and botocore's errors into `StoreUnavailable` and `StoreRefused`, without the store's own text."""
    try:
        yield
    except FileNotFoundError as error:
        # obstore raises it for an answer of 404 too.
        raise _classify_text(str(error)) or StoreRefused("the file to store is not there") from None
    except BaseError as error:
        raise _classify_text(str(error)) or StoreUnavailable("the store can't be reached or does not answer") from None
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        raise classify_answer(int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), code) from None
    except (BotoConnectionError, HTTPClientError):
        raise StoreUnavailable("the store can't be reached or does not answer") from None
    except (BotoCoreError, ValueError) as error:
        raise StoreRefused(f"the store can't be asked ({type(error).__name__})") from None


def _classify_text(text: str) -> StoreUnavailable | StoreRefused | None:
    found = _ANSWER.search(text)
    return None if found is None else classify_answer(int(found["status"]), found["code"] or "")


def classify_answer(status: int, code: str) -> StoreUnavailable | StoreRefused:
    """What an error answer of the store means: its HTTP status, and S3's code or ""."""
    if status == _NOT_IMPLEMENTED or code == "NotImplemented":
        return StoreRefused("the store can't create an object only where none is (If-None-Match); use one that can")
    if code == _CLOCK_WRONG:
        return StoreUnavailable("the store's clock and this machine's are too far apart")
    if status in _TRANSIENT_STATUSES or code in _TRANSIENT_CODES:
        return StoreUnavailable(f"the store is busy or failing (HTTP {status})")
    return StoreRefused(_REFUSALS.get(code, f"the store refused the object (HTTP {status})"))
