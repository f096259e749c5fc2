"""The results bucket: made where it is missing, and tried by a PUT."""

import os
import time
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from service.diagnosis import explain_store, status_of

# A server that has just started answers before the part of it that holds the bytes has come; SeaweedFS takes some 5 s.
_SECONDS = 60.0
# So ten tries pass in that time.
_PAUSE_SECONDS = 0.5
# One try waits no longer for a server that hangs.
_TRY_SECONDS = 5
_KEY = ".ready"
# What no waiting mends: the request, the keys, or what they may do is wrong.
_FINAL = frozenset({400, 401, 403, 405})
# Where S3 puts a bucket by default, it takes no word for it.
_DEFAULT_REGION = "us-east-1"


class BucketRefused(Exception):
    """The bucket can't be made or takes no object; the sentence says why."""


def make_s3_client(seconds: float) -> Any:
    """Return a client that tries each request once, and waits `seconds` for a connection and for an answer."""
    config = Config(connect_timeout=seconds, read_timeout=seconds, retries={"total_max_attempts": 1})
    return boto3.client("s3", region_name=os.environ.get("AWS_REGION"), config=config)


def apply_bucket(name: str, seconds: float = _SECONDS) -> str:
    """Make the bucket where it is missing, and wait until it takes an object: `created` or `kept`. Safe to repeat.

    `seconds` is how long a server is waited for that does not answer or is not ready. Raises `BucketRefused`.
    """
    client = make_s3_client(_TRY_SECONDS)
    deadline = time.monotonic() + seconds
    done = "kept"
    while True:
        try:
            if _is_missing(client, name):
                _create(client, name)
                done = "created"
            client.put_object(Bucket=name, Key=_KEY, Body=b"ready")
            client.delete_object(Bucket=name, Key=_KEY)
        except (BotoCoreError, ClientError) as error:
            if _is_final(error) or time.monotonic() > deadline:
                raise BucketRefused(f"{name}: {explain_store(error)}") from error
            time.sleep(_PAUSE_SECONDS)
        else:
            return done


def _is_missing(client: Any, name: str) -> bool:
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if status_of(error) != 404:
            raise
        return True
    return False


def _create(client: Any, name: str) -> None:
    region = client.meta.region_name
    if region in {None, _DEFAULT_REGION}:
        client.create_bucket(Bucket=name)
    else:
        client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": region})


def _is_final(error: BotoCoreError | ClientError) -> bool:
    if isinstance(error, ClientError):
        return status_of(error) in _FINAL
    return isinstance(error, NoCredentialsError | PartialCredentialsError)
