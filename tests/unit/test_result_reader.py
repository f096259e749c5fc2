"""How a result is read: by whose credentials."""

import pytest

from queryd.results import ResultReader


def test_a_reader_takes_the_credentials_that_stand_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process there may be readers of several stores."""
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in ("first", "second"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
        assert f"X-Amz-Credential={name}%2F" in ResultReader().link("s3://bucket/results/", "key")
