"""Store results on a real S3 server: completely, once, and never over another object."""

import asyncio
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import pytest
from botocore.exceptions import ClientError, CredentialRetrievalError

from queryd.events import OrgId, OutputFormat, QueryId
from results.formats import content_type
from results.location import file_name, prefix
from results.retention.bucket import Bucket
from results.store import ResultStore, StoreAccess, StoreRefused, StoreUnavailable, classified, classify_answer
from service.embedded.object_store import Credentials, ObjectStore

_MIB = 1024 * 1024


def _variables(store: ObjectStore, credentials: Credentials) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_REGION": store.region,
        "AWS_ACCESS_KEY_ID": credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
    }


@pytest.fixture
def results(object_store: ObjectStore) -> ResultStore:
    return _open(object_store, object_store.writer)


def _open(store: ObjectStore, credentials: Credentials) -> ResultStore:
    return ResultStore(store.bucket, StoreAccess.from_variables(_variables(store, credentials)))


@pytest.fixture
def s3(object_store: ObjectStore) -> Any:
    """A client that only reads."""
    return boto3.client(
        "s3",
        endpoint_url=object_store.endpoint_url,
        region_name=object_store.region,
        aws_access_key_id=object_store.reader.access_key,
        aws_secret_access_key=object_store.reader.secret_key,
    )


# No store knows these: for one that refuses everybody.
_ANYBODY = {"AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}


@contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    """The endpoint of a store that gives one answer to everything; HEAD has no body, as S3's has none."""
    body = f"<Error><Code>{code}</Code><Message>hunter2</Message></Error>".encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 — the base class names them so

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _key(output_format: OutputFormat = OutputFormat.PARQUET) -> str:
    org, query = OrgId(str(uuid.uuid4())), QueryId(str(uuid.uuid4()))
    return prefix(org, query, 1, str(uuid.uuid4())) + file_name(output_format)


def _write(path: Path, size: int) -> bytes:
    body = os.urandom(size)
    path.write_bytes(body)
    return body


def test_a_prefix_is_the_attempts_own() -> None:
    org, query = OrgId(str(uuid.UUID(int=1))), QueryId(str(uuid.UUID(int=2)))
    made = prefix(org, query, 3, "0123456789abcdef")
    assert made == f"results/{org}/{query}/3-01234567/"
    with pytest.raises(ValueError, match="token"):
        prefix(org, query, 3, "0123")


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 4_096, 16 * _MIB, 16 * _MIB + 1, 37 * _MIB])
async def test_a_stored_object_is_whole(
    results: ResultStore, s3: Any, object_store: ObjectStore, tmp_path: Path, size: int
) -> None:
    path, key = tmp_path / "result", _key()
    body = _write(path, size)
    stored = await results.put(key, path, content_type(OutputFormat.CSV))
    assert (stored.key, stored.bytes, stored.sha256) == (key, size, hashlib.sha256(body).hexdigest())
    found = s3.get_object(Bucket=object_store.bucket, Key=key)
    assert found["Body"].read() == body
    assert found["ETag"].strip('"') == stored.etag
    assert found["ContentType"] == "text/csv; charset=utf-8; header=present"


@pytest.mark.parametrize("size", [4_096, 17 * _MIB])
async def test_storing_the_same_file_again_is_the_same_as_once(results: ResultStore, tmp_path: Path, size: int) -> None:
    path, key = tmp_path / "result", _key()
    _write(path, size)
    first = await results.put(key, path, content_type(OutputFormat.PARQUET))
    assert await results.put(key, path, content_type(OutputFormat.PARQUET)) == first


@pytest.mark.parametrize("size", [4_096, 17 * _MIB])
async def test_another_object_is_never_overwritten(
    results: ResultStore, s3: Any, object_store: ObjectStore, tmp_path: Path, size: int
) -> None:
    path, key = tmp_path / "result", _key()
    theirs = _write(path, 4_096)
    await results.put(key, path, content_type(OutputFormat.JSON))
    _write(path, size)
    with pytest.raises(StoreRefused, match="another object"):
        await results.put(key, path, content_type(OutputFormat.JSON))
    assert s3.get_object(Bucket=object_store.bucket, Key=key)["Body"].read() == theirs


async def test_many_uploads_are_in_flight_at_once(results: ResultStore, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(64)]
    for path in paths:
        _write(path, 1_024)
    keys = [_key() for _ in paths]
    uploads = (results.put(key, path, "text/csv") for path, key in zip(paths, keys, strict=True))
    stored = await asyncio.gather(*uploads)
    assert [each.key for each in stored] == keys


async def test_a_reader_can_not_store(object_store: ObjectStore) -> None:
    reader = _open(object_store, object_store.reader)
    for size in (1_024, 17 * _MIB):
        with pytest.raises(StoreRefused, match="denies"):
            await reader.put(_key(), os.urandom(size), "text/csv")


@pytest.mark.parametrize("size", [1_024, 17 * _MIB])
async def test_unknown_credentials_are_refused(object_store: ObjectStore, size: int) -> None:
    stranger = _open(object_store, Credentials("stranger", "stranger"))
    with pytest.raises(StoreRefused, match="access key"):
        await stranger.put(_key(), os.urandom(size), "text/csv")


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("NoSuchBucket", 404, "refused"),
        ("SignatureDoesNotMatch", 403, "refused"),
        ("InvalidRequest", 400, "refused"),
        ("SlowDown", 503, "unavailable"),
        ("InternalError", 500, "unavailable"),
        ("ConditionalRequestConflict", 409, "unavailable"),
        ("NoSuchUpload", 404, "unavailable"),
        ("RequestTimeTooSkewed", 403, "unavailable"),
        ("NotImplemented", 501, "refused"),
        ("X", 505, "refused"),
        ("X", 507, "unavailable"),
        ("", 501, "refused"),
        ("", 502, "unavailable"),
    ],
)
async def test_an_error_answer_says_whether_to_try_again(code: str, status: int, kind: str) -> None:
    expected = StoreRefused if kind == "refused" else StoreUnavailable
    assert isinstance(classify_answer(status, code), expected)
    answer = {"Error": {"Code": code, "Message": "hunter2"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(expected) as by_boto3, classified():
        raise ClientError(answer, "PutObject")
    with answering(status, code) as endpoint:
        store = ResultStore("bucket", StoreAccess.from_variables(_ANYBODY | {"AWS_ENDPOINT_URL": endpoint}))
        for size in (10, 17 * _MIB):
            with pytest.raises(expected) as by_obstore:
                await store.put(_key(), bytes(size), "text/csv")
            assert str(by_obstore.value) == str(by_boto3.value)
            assert "hunter2" not in str(by_obstore.value)


async def test_no_credentials_are_no_outage_but_credentials_that_can_not_be_renewed_are_one() -> None:
    session = mock.Mock(wraps=boto3.session.Session(region_name="r"))
    session.get_credentials = lambda: None
    keyless = ResultStore("bucket", StoreAccess(endpoint_url="http://127.0.0.1:9", session=session))
    with pytest.raises(StoreRefused, match="no credentials"):
        await keyless.put(_key(), b"x", "text/csv")
    expired = mock.Mock()
    expired.get_frozen_credentials.side_effect = CredentialRetrievalError(provider="role", error_msg="hunter2")
    session.get_credentials = lambda: expired
    locked_out = ResultStore("bucket", StoreAccess(endpoint_url="http://127.0.0.1:9", session=session))
    for size in (1_024, 17 * _MIB):
        with pytest.raises(StoreUnavailable, match="credentials could not be renewed") as caught:
            await locked_out.put(_key(), bytes(size), "text/csv")
        assert "hunter2" not in str(caught.value)


async def test_a_store_that_does_not_answer_is_unavailable(object_store: ObjectStore, tmp_path: Path) -> None:
    # Port 9 is "discard": nobody listens there.
    variables = _variables(object_store, object_store.writer) | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    access = StoreAccess.from_variables(variables)
    lonely = ResultStore(object_store.bucket, access)
    for size in (1_024, 17 * _MIB):
        with pytest.raises(StoreUnavailable):
            await lonely.put(_key(), os.urandom(size), "text/csv")
    with pytest.raises(StoreUnavailable):
        await Bucket(access, object_store.bucket).delete(["key"])


async def test_the_reader_of_datasets_can_not_write(s3: Any, object_store: ObjectStore) -> None:
    with pytest.raises(ClientError):
        s3.put_object(Bucket=object_store.bucket, Key=_key(), Body=b"x")
