"""What an error of Kafka, Postgres or S3 means to whoever set queryd up, and what to do about it.

Sentences of ours: what the libraries say may quote hosts, roles and values.
"""

import socket
from collections.abc import Set as AbstractSet
from typing import Any

import psycopg
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from confluent_kafka import KafkaError
from psycopg.conninfo import conninfo_to_dict

# Whoever calls has waited once already; a peer that does not answer by now does not answer.
_SECONDS = 5

_KAFKA = (
    ({KafkaError._RESOLVE}, "a broker's name is not known: check the hosts in QUERYD_KAFKA_BOOTSTRAP"),
    (
        {KafkaError._SSL},
        "TLS could not be agreed on: check security.protocol and ssl.* in QUERYD_KAFKA_OPTIONS, and the brokers' port",
    ),
    (
        {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError.ILLEGAL_SASL_STATE},
        "the brokers refuse the login: check security.protocol, sasl.mechanism, sasl.username and sasl.password in "
        "QUERYD_KAFKA_OPTIONS",
    ),
    (
        {KafkaError.CLUSTER_AUTHORIZATION_FAILED, KafkaError.TOPIC_AUTHORIZATION_FAILED},
        "the brokers don't allow it to this user: give it the rights on the topics",
    ),
    (
        {KafkaError._INVALID_ARG},
        "a property in QUERYD_KAFKA_OPTIONS is unknown or has a value that can't be: `queryd run relay` names it",
    ),
)
_NO_BROKER = (
    "no broker answers: is Kafka up, are the ports in QUERYD_KAFKA_BOOTSTRAP right, and does security.protocol in "
    "QUERYD_KAFKA_OPTIONS fit them?"
)


def explain_kafka(codes: AbstractSet[int]) -> str:
    """What the error codes that librdkafka reported during one attempt mean; the most telling one counts."""
    return next((sentence for telling, sentence in _KAFKA if telling & codes), _NO_BROKER)


def explain_postgres(variable: str, url: str, error: psycopg.Error) -> str:
    """Why connecting to `url`, the libpq URI in `variable`, failed with `error`.

    libpq gives no codes of failed connections, so this finds out by further attempts, of 5 s each at most.
    """
    if error.sqlstate is not None:
        return _explain_statement(variable, error)
    unreached = _unreached(variable, url)
    if unreached is not None:
        return unreached
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return f"the host takes connections and does not answer them: is it Postgres that {variable} names, and well?"
    pgconn = error.pgconn
    if pgconn is not None and pgconn.needs_password:
        return f"the server requires a password, and {variable} has none"
    if _is_entered(url, dbname="postgres"):
        return f"the server has no such database, or the role may not enter it: create it, or check {variable}"
    what = "password or the role" if pgconn is not None and pgconn.used_password else "role"
    return f"the server refuses the {what}: check them, and sslmode, in {variable}, and the server's pg_hba.conf"


def _explain_statement(variable: str, error: psycopg.Error) -> str:
    """Explain the server's error for a statement."""
    match error:
        case psycopg.errors.InsufficientPrivilege():
            return f"the role lacks a privilege: grant it, or name the tables' owner in {variable}"
        case psycopg.errors.ReadOnlySqlTransaction():
            return f"the server is read-only: name the primary, not a replica, in {variable}"
        case _:
            return f"the server refuses a statement: {type(error).__name__} {error.sqlstate}"


def _unreached(variable: str, url: str) -> str | None:
    """Why not even TCP gets there; None when it does, or when the URI names a socket or several hosts."""
    parts = conninfo_to_dict(url)
    host, port = str(parts.get("host") or ""), str(parts.get("port") or "5432")
    if not host or host.startswith(("/", "@")) or "," in host:
        return None
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except socket.gaierror:
        return f"the host's name is not known: check {variable}"
    except TimeoutError:
        return f"the host does not answer: check the host in {variable}, and firewalls on the way"
    except OSError:
        return f"nobody listens there: is the server up, and are host and port in {variable} right?"
    return None


def _is_entered(url: str, **instead: Any) -> bool:
    try:
        psycopg.connect(url, connect_timeout=_SECONDS, **instead).close()
    except psycopg.Error:
        return False
    return True


_WRONG_KEYS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"})


def explain_store(error: BotoCoreError | ClientError) -> str:
    """What S3's refusal of something about the results bucket means."""
    match error:
        case NoCredentialsError() | PartialCredentialsError():
            return "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case EndpointConnectionError():
            return "nobody listens there: is the S3 server up, and is AWS_ENDPOINT_URL right?"
        case ConnectTimeoutError() | HTTPClientError():
            return "the S3 server does not answer: check AWS_ENDPOINT_URL, and firewalls on the way"
        case ClientError():
            return _explain_refusal(error)
        case _:
            return f"the S3 client can't be used as it is set ({type(error).__name__}): check the AWS_* variables"


def _explain_refusal(error: ClientError) -> str:
    status = status_of(error)
    if error.response.get("Error", {}).get("Code") == "NoSuchKey":
        return "the object does not exist: it has expired, or another program deleted it"
    if error.response.get("Error", {}).get("Code") in _WRONG_KEYS:
        return "the keys are wrong: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if status == 403:
        return "the keys may not use the bucket: allow them to list, read, write and delete in it"
    if status == 404:
        return "there is no such bucket: `queryd bucket apply` makes it, or check QUERYD_RESULTS_URL"
    return f"the S3 server answers {status}: check QUERYD_RESULTS_URL, AWS_REGION and AWS_ENDPOINT_URL"


PRECONDITION_FAILED = 412
OVERWRITES = (
    "the S3 server ignores If-None-Match and overwrites existing objects, so a late attempt could replace a result: "
    "use a server with conditional writes"
)


def explain_write(error: ClientError) -> str:
    """Explain S3's error for a conditional PUT into the results bucket."""
    if status_of(error) == 501 or error.response.get("Error", {}).get("Code") == "NotImplemented":
        return (
            "the S3 server does not support conditional writes (If-None-Match), so queryd can't store results: use a "
            "server with conditional writes"
        )
    return explain_store(error)


def status_of(error: ClientError) -> int:
    """The HTTP status of an answer of S3's; 0 where it has none."""
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status
