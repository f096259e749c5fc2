"""The readiness check counts S3 as present if it answers and accepts our credentials."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.auth
import pytest
from botocore.stub import Stubber

from db.connection import DatabaseUnavailable, DataPool, make_pool, transaction
from db.health import DATA, require_schema
from service.dependencies import _has_bucket
from service.embedded.object_store import Credentials, ObjectStore
from service.embedded.postgres import Postgres


def _client(store: ObjectStore, credentials: Credentials) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
    )


def test_a_store_that_accepts_our_credentials_is_present(object_store: ObjectStore) -> None:
    for credentials in (object_store.writer, object_store.reader):
        assert _has_bucket(_client(object_store, credentials), object_store.bucket)
    assert not _has_bucket(_client(object_store, object_store.writer), "another")


@pytest.mark.parametrize(
    "credentials",
    [lambda store: Credentials("stranger", "stranger"), lambda store: Credentials(store.writer.access_key, "wrong")],
)
def test_a_store_that_refuses_our_keys_is_missing(
    object_store: ObjectStore, credentials: Callable[[ObjectStore], Credentials]
) -> None:
    assert not _has_bucket(_client(object_store, credentials(object_store)), object_store.bucket)


@pytest.mark.parametrize("body", [b"<html>default backend - 404", b"<found>nothing</found>", b""])
def test_a_404_of_another_server_is_not_a_store(body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{server.server_port}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        assert not _has_bucket(client, "bucket")
        server.shutdown()


def test_a_store_is_there_for_a_client_that_may_only_write(object_store: ObjectStore) -> None:
    client = _client(object_store, object_store.writer)
    with Stubber(client) as stubbed:
        stubbed.add_client_error("get_object", "AccessDenied", http_status_code=403)
        assert _has_bucket(client, object_store.bucket)
        # An expired token is a rejected credential, not a missing permission.
        stubbed.add_client_error("get_object", "ExpiredToken", http_status_code=400)
        assert not _has_bucket(client, object_store.bucket)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_store_that_refuses_our_clock_is_missing(
    object_store: ObjectStore, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _client(object_store, object_store.writer)
    true_now, true_time = botocore.auth.get_current_datetime, time.time
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: true_now() + timedelta(hours=hours))
    monkeypatch.setattr(time, "time", lambda: true_time() + hours * 3600)
    assert not _has_bucket(client, object_store.bucket)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("userinfo", "port", "database", "reason"),
    [
        ("queryd:canary4711", None, "postgres", "the server refuses the login"),
        ("canary4711:canary4711", None, "postgres", "the server refuses the login"),
        ("queryd", None, "postgres", "the server requires a password"),
        (None, None, "canary4711", "the server refuses the login: the password, the role or the database is wrong"),
        (None, 1, "postgres", "no answer from a server"),
    ],
)
async def test_the_log_distinguishes_a_refused_login_from_a_dead_network(
    postgres_server: Postgres,
    userinfo: str | None,
    port: int | None,
    database: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = urlsplit(postgres_server.url(database))
    login = userinfo or f"{parts.username}:{parts.password}"
    url = parts._replace(netloc=f"{login}@{parts.hostname}:{port or parts.port}").geturl()
    with pytest.raises(DatabaseUnavailable, match=reason) as at_once:
        await require_schema(url, DATA)
    # And by a pool, whose own error says only that there was no connection.
    monkeypatch.setattr("db.connection._POOL_SECONDS", 2.0)
    pool = DataPool(make_pool(url, "test", 1))
    await pool.open()
    try:
        with pytest.raises(DatabaseUnavailable, match=f"no connection within 10 s: .*{reason}") as later:
            async with transaction(pool):
                pass
    finally:
        await pool.close()
    assert "canary4711" not in f"{at_once.value}{later.value}"
