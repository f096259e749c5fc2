"""Put results into the bucket, each key once, from the executor's event loop.

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
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from processes.failpoints import Failpoint, failpoint

# Files up to this size are one PUT, which is atomic.
_SINGLE_PUT_BYTES = 16 * 1024 * 1024
_PART_BYTES = 8 * 1024 * 1024
# Four concurrent parts of 8 MiB each, in memory, are enough to use a network's full bandwidth.
_PARTS_AT_ONCE = 4
# Reading and hashing up to this size takes less than a millisecond; larger files are read in a thread.
_INSTANT_BYTES = 256 * 1024

# A healthy endpoint accepts a connection immediately; retry an overloaded one later.
_CONNECT_SECONDS = 3
# The store answers a PUT when the bytes are durable: a few seconds for 16 MiB on a slow disk, never this long.
_REQUEST_SECONDS = 30
# One quick retry for a broken connection. For other failures the caller waits and retries.
_RETRIES = 1
# obstore asks for credentials again 5 minutes before they expire; botocore returns some that are valid for at least 10.
_CREDENTIALS_VALID = timedelta(minutes=10)

_BOTO_CONFIG = Config(
    connect_timeout=_CONNECT_SECONDS,
    read_timeout=_REQUEST_SECONDS,
    retries={"total_max_attempts": _RETRIES + 1, "mode": "standard"},
    # Some stores support no checksum except Content-MD5.
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

_SHA256 = "sha256"
# obstore's text for an error response: the status and the body. Only S3's code in the body is used.
_ANSWER = re.compile(r"non-2xx status code: (?P<status>\d{3})[^:]*:?(?:.*?<Code>(?P<code>\w+)</Code>)?", re.DOTALL)
_NOT_IMPLEMENTED = 501
# Statuses after which a retry may succeed. From 520 on a proxy reports a failure of the store. Others are refusals.
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 531)})
_TRANSIENT_CODES = frozenset({"NoSuchUpload", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"})
# A signature contains the time; a store refuses one that is 15 minutes off.
_CLOCK_WRONG = "RequestTimeTooSkewed"
_REFUSALS = {
    "AccessDenied": "the store denies the writer access to the key",
    "NoSuchBucket": "the bucket does not exist",
    "InvalidAccessKeyId": "the store does not know the writer's access key",
    "SignatureDoesNotMatch": "the store does not accept the writer's secret key",
}


class StoreUnavailable(Exception):
    """The store is unreachable or did not answer, so the object may or may not exist. Wait and retry."""


class StoreRefused(Exception):
    """The store refuses the object and retries do not help; the message says why. Stop."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A complete object in the store: its key, its size, the store's ETag without quotes, and its SHA-256 in hex."""

    key: str
    bytes: int
    etag: str
    sha256: str


class StoreAccess:
    """The S3 endpoint and credentials, as boto3 finds them: variables, profiles, roles, refreshed tokens."""

    def __init__(self, *, endpoint_url: str | None = None, session: boto3.session.Session | None = None) -> None:
        """Raises botocore's errors for an unknown profile or region. Takes about 0.1 s."""
        # boto3 reads the region only from AWS_DEFAULT_REGION.
        session = session or boto3.session.Session(region_name=os.environ.get("AWS_REGION"))
        self.client: Any = session.client("s3", endpoint_url=endpoint_url, config=_BOTO_CONFIG)
        self._credentials = session.get_credentials()

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> "StoreAccess":
        """Create access from the given `AWS_*` variables instead of the environment."""
        session = boto3.session.Session(
            aws_access_key_id=variables.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=variables.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=variables.get("AWS_SESSION_TOKEN"),
            region_name=variables.get("AWS_REGION"),
        )
        return cls(endpoint_url=variables.get("AWS_ENDPOINT_URL"), session=session)

    def open_bucket(self, bucket: str) -> S3Store:
        """Return obstore's client of a bucket, with the endpoint and region that boto3 resolved."""
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

    def require_credentials(self) -> None:
        """Raises `StoreRefused` if there are none, which obstore can't tell from a failure to renew them."""
        if self._credentials is None:
            raise StoreRefused("there are no credentials for it: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")

    def _get_credentials(self) -> Any:
        self.require_credentials()
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
        """Put bytes or a file at a free key. A repeated call with the same content changes nothing.

        Raises `StoreUnavailable` and `StoreRefused`; it never replaces another object at that key.
        """
        failpoint(Failpoint.PUT_BEFORE)
        with classified():
            self.access.require_credentials()
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
                # Another request for this key was running: our own earlier PUT, since only this process writes the key.
                raise StoreUnavailable("the store is busy with the key") from None
            return found
        return StoredObject(key, len(body), _strip(answer["e_tag"]), sha256)

    async def _put_in_parts(self, key: str, content: bytes | Path, size: int, content_type: str) -> StoredObject:
        """Upload in parts. obstore can't complete an upload conditionally, so check the key first."""
        sha256 = await asyncio.to_thread(_hash_file, content) if isinstance(content, Path) else await _hash(content)
        # If the writer may not read, the upload reports the reason; its answer has more detail than that of a HEAD.
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
        """Return the object at the key if it has this content, None if there is none; else raises `StoreRefused`."""
        try:
            found = await obstore.get_async(self._store, key, options={"head": True})
        except FileNotFoundError:
            return None
        if found.meta["size"] != size or found.attributes.get(_SHA256) != sha256:
            raise StoreRefused("the key already has another object")
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
        raise _classify_text(str(error)) or StoreRefused("the file to store does not exist") from None
    except UnauthenticatedError as error:
        raise _classify_text(str(error)) or StoreUnavailable("the store's credentials could not be renewed") from None
    except BaseError as error:
        raise _classify_text(str(error)) or StoreUnavailable("the store can't be reached or does not answer") from None
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        raise classify_answer(int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), code) from None
    except (BotoConnectionError, HTTPClientError):
        raise StoreUnavailable("the store can't be reached or does not answer") from None
    except (BotoCoreError, ValueError) as error:
        raise StoreRefused(
            f"the request to the store can't be sent ({type(error).__name__}): check the endpoint and the credentials"
        ) from None


def _classify_text(text: str) -> StoreUnavailable | StoreRefused | None:
    found = _ANSWER.search(text)
    return None if found is None else classify_answer(int(found["status"]), found["code"] or "")


def classify_answer(status: int, code: str) -> StoreUnavailable | StoreRefused:
    """Classify an error response of the store by its HTTP status and S3's code, which may be ""."""
    if status == _NOT_IMPLEMENTED or code == "NotImplemented":
        return StoreRefused("the store does not support conditional writes (If-None-Match): use a store that does")
    if code == _CLOCK_WRONG:
        return StoreUnavailable("the store's clock and this machine's are too far apart")
    if status in _TRANSIENT_STATUSES or code in _TRANSIENT_CODES:
        return StoreUnavailable(f"the store is busy or failing (HTTP {status})")
    return StoreRefused(_REFUSALS.get(code, f"the store refused the object (HTTP {status})"))
