"""The process that writes results to S3, and removes them, on several threads. The only one that may do either."""

import base64
import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError

from processes.failpoints import Failpoint, failpoint
from processes.frames import Message
from processes.serving import Tell, serve
from results.retention.bucket_process import BucketSweeper, NotRemoved

# One PUT up to here: it is whole or it is not there.
_SINGLE_PUT_BYTES = 16 * 1024 * 1024
_PART_BYTES = 8 * 1024 * 1024

# Eight small PUTs at once keep one core of Python busy; four parts at once, of 8 MiB each in memory, fill a network.
_WORKERS = 8
_PART_WORKERS = 4

_CONFIG = Config(
    # A live endpoint accepts at once; an overloaded one is better asked again later.
    connect_timeout=3,
    # The store answers a PUT when the bytes are durable: a few seconds for 16 MiB on a slow disk, never this long.
    read_timeout=30,
    # One quick retry for a cut keep-alive connection; whoever called us waits and retries for the rest.
    retries={"total_max_attempts": 2, "mode": "standard"},
    max_pool_connections=_WORKERS + _PART_WORKERS,
    # We send a SHA-256 where it counts; a second checksum would only cost time.
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

_SHA256_METADATA = "sha256"
_PRECONDITION_FAILED = 412
_NOT_IMPLEMENTED = 501
# What passes by waiting; from 520 on it is a proxy's word on the store behind it. Any other answer is a refusal.
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 531)})
_TRANSIENT_CODES = frozenset({"NoSuchUpload", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"})
# A signature carries the time, and a store refuses what is a quarter of an hour off.
_CLOCK_WRONG = "RequestTimeTooSkewed"


class _Refused(Exception):
    """Trying again is of no use."""


class _Store:
    """Answers the uploader's messages."""

    def __init__(self) -> None:
        # A client is safe to share between threads; making one is not, and costs 50 ms.
        self._s3: Any = boto3.session.Session().client("s3", config=_CONFIG)
        self._parts = ThreadPoolExecutor(_PART_WORKERS, thread_name_prefix="part")
        self._sweeper = BucketSweeper(self._s3)

    def handle(self, message: Message, _tell: Tell) -> Message:
        """Store one file and say what is there now; or a step of a sweep, which names itself."""
        if "hello" in message:
            return {"ready": True}
        try:
            if "sweep" in message:
                return self._sweeper.handle(message)
            failpoint(Failpoint.PUT_BEFORE)
            return self._store(message["bucket"], Path(message["path"]), message["key"], message["content_type"])
        except (_Refused, NotRemoved, FileNotFoundError, ClientError, BotoCoreError) as error:
            return _classify(error)

    def _store(self, bucket: str, path: Path, key: str, content_type: str) -> Message:
        size = path.stat().st_size
        target = {"Bucket": bucket, "Key": key}
        small = path.read_bytes() if size <= _SINGLE_PUT_BYTES else None
        digest = _digest(path) if small is None else hashlib.sha256(small)
        described = {"ContentType": content_type, "Metadata": {_SHA256_METADATA: digest.hexdigest()}}
        try:
            if small is None:
                etag = self._put_parts(target, described, path, size)
            else:
                etag = self._put(target, described, small, digest.digest())
        except ClientError as error:
            if _status(error) != _PRECONDITION_FAILED:
                raise
            etag = self._recognize(target, size, digest.hexdigest())
        failpoint(Failpoint.PUT_AFTER)
        return {"bytes": size, "etag": etag.strip('"'), "sha256": digest.hexdigest()}

    def _put(self, target: dict[str, str], described: dict[str, Any], body: bytes, digest: bytes) -> str:
        checksum = base64.b64encode(digest).decode()
        answer = self._s3.put_object(**target, **described, Body=body, ChecksumSHA256=checksum, IfNoneMatch="*")
        return str(answer["ETag"])

    def _put_parts(self, target: dict[str, str], described: dict[str, Any], path: Path, size: int) -> str:
        """A multipart upload, visible only once it is complete; aborted on any error."""
        upload = self._s3.create_multipart_upload(**target, **described)
        target = target | {"UploadId": upload["UploadId"]}
        try:
            parts = self._send_parts(target, path, size)
            answer = self._s3.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
        except BaseException:
            self._abort(target)
            raise
        return str(answer["ETag"])

    def _send_parts(self, target: dict[str, str], path: Path, size: int) -> list[dict[str, Any]]:
        """Send all parts, several at once; the first error stops those that have not begun."""
        numbered = enumerate(range(0, size, _PART_BYTES), 1)
        sent = [self._parts.submit(self._send_part, target, path, number, offset) for number, offset in numbered]
        try:
            return [each.result() for each in sent]
        finally:
            for each in sent:
                each.cancel()
            wait(sent)

    def _send_part(self, target: dict[str, str], path: Path, number: int, offset: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek(offset)
            body = file.read(_PART_BYTES)
        answer = self._s3.upload_part(**target, PartNumber=number, Body=body)
        failpoint(Failpoint.PUT_PART)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _abort(self, target: dict[str, str]) -> None:
        """Free the parts. What the store does not hear now, a lifecycle rule on unfinished uploads tidies away."""
        with contextlib.suppress(ClientError, BotoCoreError):
            self._s3.abort_multipart_upload(**target)

    def _recognize(self, target: dict[str, str], size: int, sha256: str) -> str:
        """The ETag of what stands at the key already, if it is ours: then only the answer to the first try was lost."""
        found = self._s3.head_object(**target)
        if found["ContentLength"] != size or found.get("Metadata", {}).get(_SHA256_METADATA) != sha256:
            raise _Refused("another object stands at the key already")
        return str(found["ETag"])


def _digest(path: Path) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _classify(error: Exception) -> Message:
    """Whether to try again, and a sentence that holds nothing of the store's own text."""
    match error:
        case _Refused():
            return {"refused": str(error)}
        case FileNotFoundError():
            return {"refused": "the file to store is not there"}
        case NotRemoved():
            return {"unavailable": str(error)}
        case ClientError():
            return _classify_answer(error)
        case BotoConnectionError() | HTTPClientError():
            return {"unavailable": "the store can't be reached or does not answer"}
        case _:
            return {"refused": f"the store can't be asked ({type(error).__name__})"}


def _classify_answer(error: ClientError) -> Message:
    """What an error answer of the store means. Its code is one of S3's words; its message might quote anything."""
    code, status = str(error.response.get("Error", {}).get("Code", "")), _status(error)
    if status in _TRANSIENT_STATUSES or code in _TRANSIENT_CODES:
        return {"unavailable": f"the store is busy or failing (HTTP {status})"}
    if code == _CLOCK_WRONG:
        return {"unavailable": "the store's clock and this machine's are too far apart"}
    sentences = {
        "AccessDenied": "the store denies the writer access to the key",
        "NoSuchBucket": "the bucket does not exist",
        "InvalidAccessKeyId": "the store does not know the writer's access key",
        "SignatureDoesNotMatch": "the store does not accept the writer's secret key",
    }
    if status == _NOT_IMPLEMENTED or code == "NotImplemented":
        return {"refused": "the store can't create an object only where none is (If-None-Match); use one that can"}
    return {"refused": sentences.get(code, f"the store refused the object (HTTP {status})")}


if __name__ == "__main__":
    serve(_Store().handle, workers=_WORKERS)
