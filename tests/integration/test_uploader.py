"""Storing results on a real S3 server: whole, once, and told apart from what was not ours."""

import asyncio
import hashlib
import os
import signal
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import boto3
import botocore.auth
import pytest
from botocore.exceptions import ClientError

from queryd.events import OrgId, OutputFormat, QueryId
from results.formats import content_type
from results.location import file_name, prefix
from results.uploader import StoredObject, StoreRefused, StoreUnavailable, Uploader
from results.uploader_process import _classify
from service.embedded.object_store import Credentials, ObjectStore
from tests.faults.s3_proxy import Mode as S3Mode
from tests.faults.s3_proxy import S3Proxy

_MIB = 1024 * 1024


def _variables(store: ObjectStore, credentials: Credentials) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_REGION": store.region,
        "AWS_DEFAULT_REGION": store.region,
        "AWS_ACCESS_KEY_ID": credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
    }


@pytest.fixture
async def uploader(object_store: ObjectStore) -> AsyncIterator[Uploader]:
    made = Uploader(object_store.bucket, _variables(object_store, object_store.writer), quiet=False)
    await made.start()
    yield made
    await made.close()


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


@pytest.mark.parametrize("size", [0, 4_096, 16 * _MIB, 16 * _MIB + 1, 37 * _MIB])
async def test_a_stored_object_is_whole(
    uploader: Uploader, s3: Any, object_store: ObjectStore, tmp_path: Path, size: int
) -> None:
    path, key = tmp_path / "result", _key()
    body = _write(path, size)
    stored = await uploader.store(path, key, content_type(OutputFormat.CSV))
    assert (stored.key, stored.bytes, stored.sha256) == (key, size, hashlib.sha256(body).hexdigest())
    found = s3.get_object(Bucket=object_store.bucket, Key=key)
    assert found["Body"].read() == body
    assert found["ETag"].strip('"') == stored.etag
    assert found["ContentType"] == "text/csv; charset=utf-8; header=present"


async def test_a_store_without_conditional_writes_refuses_at_once(object_store: ObjectStore, tmp_path: Path) -> None:
    proxy = S3Proxy(int(object_store.endpoint_url.rpartition(":")[2]))
    proxy.start()
    proxy.enter(S3Mode.UNCONDITIONAL)
    variables = _variables(object_store, object_store.writer) | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    uploader = Uploader(object_store.bucket, variables, quiet=False)
    (tmp_path / "small").write_bytes(b"x")
    try:
        with pytest.raises(StoreRefused, match="If-None-Match"):
            await uploader.store(tmp_path / "small", _key(), content_type(OutputFormat.PARQUET))
        proxy.enter(S3Mode.UNAVAILABLE)
        with pytest.raises(StoreUnavailable):
            await uploader.store(tmp_path / "small", _key(), content_type(OutputFormat.PARQUET))
    finally:
        await uploader.close()
        proxy.stop()


@pytest.mark.parametrize(("status", "later"), [(500, True), (503, True), (507, True), (501, False), (505, False)])
def test_only_answers_that_pass_by_waiting_are_waited_for(status: int, later: bool) -> None:
    answer = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "X"}}
    assert ("unavailable" in _classify(ClientError(cast(Any, answer), "PutObject"))) is later


@pytest.mark.parametrize("size", [4_096, 17 * _MIB])
async def test_storing_the_same_file_again_is_the_same_as_once(uploader: Uploader, tmp_path: Path, size: int) -> None:
    path, key = tmp_path / "result", _key()
    _write(path, size)
    first = await uploader.store(path, key, content_type(OutputFormat.PARQUET))
    assert await uploader.store(path, key, content_type(OutputFormat.PARQUET)) == first


@pytest.mark.parametrize("size", [4_096, 17 * _MIB])
async def test_another_object_is_never_overwritten(
    uploader: Uploader, s3: Any, object_store: ObjectStore, tmp_path: Path, size: int
) -> None:
    path, key = tmp_path / "result", _key()
    theirs = _write(path, 4_096)
    await uploader.store(path, key, content_type(OutputFormat.JSON))
    _write(path, size)
    with pytest.raises(StoreRefused, match="another object"):
        await uploader.store(path, key, content_type(OutputFormat.JSON))
    assert s3.get_object(Bucket=object_store.bucket, Key=key)["Body"].read() == theirs


async def test_many_uploads_are_in_flight_at_once(uploader: Uploader, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(64)]
    for path in paths:
        _write(path, 1_024)
    keys = [_key() for _ in paths]
    uploads = (uploader.store(path, key, "text/csv") for path, key in zip(paths, keys, strict=True))
    stored = await asyncio.gather(*uploads)
    assert [each.key for each in stored] == keys


async def test_a_dead_process_is_started_again(uploader: Uploader, tmp_path: Path) -> None:
    path = tmp_path / "result"
    _write(path, 64 * _MIB)
    storing = asyncio.create_task(uploader.store(path, _key(), "text/csv"))
    while uploader._process is None or not uploader._process._waiting:  # noqa: ASYNC110 - a moment of the event loop
        await asyncio.sleep(0)
    os.kill(uploader._process.pid, signal.SIGKILL)
    with pytest.raises(StoreUnavailable):
        await storing
    _write(path, 1_024)
    assert isinstance(await uploader.store(path, _key(), "text/csv"), StoredObject)


async def test_a_reader_can_not_store(object_store: ObjectStore, tmp_path: Path) -> None:
    reader = Uploader(object_store.bucket, _variables(object_store, object_store.reader))
    for size in (1_024, 17 * _MIB):
        _write(tmp_path / "result", size)
        with pytest.raises(StoreRefused, match="denies"):
            await reader.store(tmp_path / "result", _key(), "text/csv")
    await reader.close()


async def test_unknown_credentials_are_refused(object_store: ObjectStore, tmp_path: Path) -> None:
    stranger = Uploader(object_store.bucket, _variables(object_store, Credentials("stranger", "stranger")))
    _write(tmp_path / "result", 1_024)
    with pytest.raises(StoreRefused, match="access key"):
        await stranger.store(tmp_path / "result", _key(), "text/csv")
    await stranger.close()


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
    ],
)
def test_an_error_answer_says_whether_to_try_again(code: str, status: int, kind: str) -> None:
    answer = {"Error": {"Code": code, "Message": "hunter2"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    told = _classify(ClientError(answer, "PutObject"))
    assert list(told) == [kind]
    assert "hunter2" not in told[kind]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_signature_that_a_wrong_clock_spoils_is_no_refusal(
    object_store: ObjectStore, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = object_store.writer
    s3 = boto3.client(
        "s3",
        endpoint_url=object_store.endpoint_url,
        region_name=object_store.region,
        aws_access_key_id=writer.access_key,
        aws_secret_access_key=writer.secret_key,
    )
    true_now = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: true_now() + timedelta(hours=hours))
    with pytest.raises(ClientError) as refused:
        s3.put_object(Bucket=object_store.bucket, Key=_key(), Body=b"x")
    assert _classify(refused.value) == {"unavailable": "the store's clock and this machine's are too far apart"}


async def test_a_store_that_does_not_answer_is_unavailable(object_store: ObjectStore, tmp_path: Path) -> None:
    # Port 9 is "discard": nobody listens there.
    variables = _variables(object_store, object_store.writer) | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    lonely = Uploader(object_store.bucket, variables)
    for size in (1_024, 17 * _MIB):
        _write(tmp_path / "result", size)
        with pytest.raises(StoreUnavailable):
            await lonely.store(tmp_path / "result", _key(), "text/csv")
    await lonely.close()
    with pytest.raises(StoreUnavailable):
        await lonely.store(tmp_path / "result", _key(), "text/csv")


async def test_only_aws_variables_reach_the_process() -> None:
    with pytest.raises(ValueError, match="AWS_"):
        Uploader("bucket", {"QUERYD_DATA_URL": "postgresql://"})


async def test_the_process_can_not_write_outside_what_it_was_given(s3: Any, object_store: ObjectStore) -> None:
    with pytest.raises(ClientError):
        s3.put_object(Bucket=object_store.bucket, Key=_key(), Body=b"x")
