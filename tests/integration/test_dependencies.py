"""What counts as S3 being there: an answer, unless it refuses whatever our clock signs."""

import time
from datetime import timedelta
from typing import Any

import boto3
import botocore.auth
import pytest

from service.dependencies import _has_bucket
from service.embedded.object_store import Credentials, ObjectStore


def _client(store: ObjectStore, credentials: Credentials) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
    )


def test_a_store_that_answers_is_there_whatever_it_lets_us_see(object_store: ObjectStore) -> None:
    for credentials in (object_store.writer, Credentials("stranger", "stranger")):
        assert _has_bucket(_client(object_store, credentials), object_store.bucket)
    assert not _has_bucket(_client(object_store, object_store.writer), "another")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_store_that_refuses_our_clock_is_missing(
    object_store: ObjectStore, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _client(object_store, object_store.writer)
    true_now, true_time = botocore.auth.get_current_datetime, time.time
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: true_now() + timedelta(hours=hours))
    monkeypatch.setattr(time, "time", lambda: true_time() + hours * 3600)
    assert not _has_bucket(client, object_store.bucket)
