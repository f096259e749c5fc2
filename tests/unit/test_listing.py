"""Listing objects: what the lister takes for a page, and how it signs its requests."""

import datetime
import http.client
from pathlib import Path

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from engines.duckdb.listing import ObjectLister
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import QueryFailed
from queryd.events import ErrorCode

_ENTRY = (
    "<Contents><Key>d/1+%C3%BC%2B.parquet</Key><LastModified>2026-11-30T10:00:00.000Z</LastModified>"
    "<ETag>&quot;e&quot;</ETag><Size>7</Size></Contents>"
)
_PAGE = "<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>{}</ListBucketResult>"


def _open(**options: str) -> ObjectLister:
    return ObjectLister(DuckDBSettings(1, 1, Path("/nowhere"), access_key="key", secret_key="secret", **options))  # type: ignore[arg-type]


def _answer(
    monkeypatch: pytest.MonkeyPatch, body: str, headers: http.client.HTTPMessage | None = None
) -> list[tuple[object, ...]]:
    asked: list[tuple[object, ...]] = []

    def request(_: ObjectLister, *arguments: object) -> tuple[int, http.client.HTTPMessage, bytes]:
        asked.append(arguments)
        return 200, headers or http.client.HTTPMessage(), body.encode()

    monkeypatch.setattr(ObjectLister, "_request", request)
    return asked


def test_a_listed_key_is_decoded_as_its_store_encoded_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, key in (("<EncodingType>url</EncodingType>", "d/1 ü+.parquet"), ("", "d/1+%C3%BC%2B.parquet")):
        _answer(monkeypatch, _PAGE.format(_ENTRY + encoding))
        [file] = _open().list("bucket", "d/")
        assert (file.key, file.size, file.etag) == (key, 7, '"e"')


@pytest.mark.parametrize(
    "body",
    [
        _PAGE.format(_ENTRY + "<IsTruncated>true</IsTruncated>"),
        _PAGE.format(_ENTRY + "<IsTruncated>true</IsTruncated><NextContinuationToken/>"),
        _PAGE.format(_ENTRY.replace("7", "")),
        _PAGE.format(_ENTRY.replace("2026", "")),
        "<html><body>Sign in</body></html>",
        "<ListBucketResult>",
        "",
    ],
    ids=["no token", "an empty token", "no size", "no date", "another document", "half a page", "nothing"],
)
def test_a_listing_is_whole_or_an_error(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    _answer(monkeypatch, body)
    with pytest.raises(QueryFailed) as caught:
        list(_open().list("bucket", "d/"))
    assert caught.value.code is ErrorCode.INTERNAL


def test_an_object_without_size_or_date_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"Content-Length": "7", "Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"}
    for missing in whole:
        headers = http.client.HTTPMessage()
        for name in whole.keys() - {missing}:
            headers[name] = whole[name]
        _answer(monkeypatch, "", headers)
        with pytest.raises(QueryFailed) as caught:
            _open().find("bucket", "d/1.parquet")
        assert caught.value.code is ErrorCode.INTERNAL


@pytest.mark.parametrize("key", ["a/1.parquet", "a b+c%2F=&?#'\"~*()!$,;:@/ü€/{x}[y]|^`\\.parquet", "//x"])
@pytest.mark.parametrize(
    "options",
    [
        {"region": "eu-central-1"},
        {"endpoint_url": "https://store.example:9000", "session_token": "a token/+="},
        {"endpoint_url": "http://store.example/below/", "region": "us-west-2"},
    ],
    ids=["AWS", "a port and a token", "a path"],
)
def test_requests_are_signed_as_botocore_signs_them(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], key: str
) -> None:
    lister = _open(**options)
    scheme, host, path = lister._locate("bucket", key)
    query = "encoding-type=url&list-type=2&prefix=a%20b%2B%2F~"
    headers = lister._sign("GET", host, path, query)
    moment = datetime.datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda **_: moment.replace(tzinfo=None))
    request = AWSRequest("GET", f"{scheme}://{host}{path}?{query}")
    credentials = Credentials("key", "secret", options.get("session_token"))
    S3SigV4Auth(credentials, "s3", options.get("region", "us-east-1")).add_auth(request)
    assert headers["authorization"] == request.headers["Authorization"]
