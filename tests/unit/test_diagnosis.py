"""What `doctor` says of errors: sentences of ours that name the variable to look at, and never the library's text."""

import socket

import psycopg
import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
)
from confluent_kafka import KafkaError

from service.diagnosis import explain_kafka, explain_postgres, explain_store
from service.embedded.ports import pick_ports

CANARY = "canary4711"


@pytest.mark.parametrize(
    ("codes", "names"),
    [
        ({KafkaError._TRANSPORT}, "QUERYD_KAFKA_BOOTSTRAP"),
        ({KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN}, "is Kafka up"),
        ({KafkaError._TRANSPORT, KafkaError._RESOLVE}, "name is not known"),
        ({KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION}, "refuse the login"),
        ({KafkaError._TRANSPORT, KafkaError._SSL}, "TLS"),
        ({KafkaError.TOPIC_AUTHORIZATION_FAILED}, "rights"),
        ({KafkaError._INVALID_ARG}, "QUERYD_KAFKA_OPTIONS"),
    ],
)
def test_of_several_errors_of_kafka_the_most_telling_one_counts(codes: set[int], names: str) -> None:
    assert names in explain_kafka(codes)


def _explain(url: str) -> str:
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(url, connect_timeout=2)
    return explain_postgres("QUERYD_DATA_URL", url, caught.value)


def test_a_port_where_no_postgres_listens() -> None:
    (port,) = pick_ports(1)
    said = _explain(f"postgresql://{CANARY}:{CANARY}@127.0.0.1:{port}/{CANARY}")
    assert said == "nobody listens there: is the server up, and are host and port in QUERYD_DATA_URL right?"


def test_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def know_nobody(*_: object, **__: object) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", know_nobody)
    said = _explain(f"postgresql://{CANARY}:{CANARY}@{CANARY}.invalid:5432/data")
    assert said == "the host's name is not known: check QUERYD_DATA_URL"


@pytest.mark.slow
def test_a_listener_that_never_answers() -> None:
    # The kernel takes connections into its backlog, and nobody takes them from there.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = _explain(f"postgresql://{CANARY}@127.0.0.1:{listener.getsockname()[1]}/data")
    assert said.startswith("the host takes connections and does not answer them")


def _refused(status: int, code: str) -> ClientError:
    answer = {
        "Error": {"Code": code, "Message": CANARY},
        "ResponseMetadata": {
            "HTTPStatusCode": status,
            "RequestId": "",
            "HostId": "",
            "HTTPHeaders": {},
            "RetryAttempts": 0,
        },
    }
    return ClientError(answer, "HeadBucket")


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (_refused(403, "InvalidAccessKeyId"), "the keys are wrong"),
        (_refused(403, "SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY"),
        (_refused(403, "AccessDenied"), "may not use the bucket"),
        (_refused(404, "404"), "queryd bucket apply"),
        (_refused(301, "PermanentRedirect"), "AWS_REGION"),
        (EndpointConnectionError(endpoint_url=CANARY), "nobody listens there"),
        (ConnectTimeoutError(endpoint_url=CANARY), "does not answer"),
        (NoCredentialsError(), "no credentials"),
        (NoRegionError(), "AWS_* variables"),
    ],
)
def test_what_s3_refuses_is_told_apart(error: BotoCoreError | ClientError, names: str) -> None:
    said = explain_store(error)
    assert names in said
    assert CANARY not in said
