"""Describe a dependency's failure in one sentence. Only this module of the command line knows the libraries' errors.

A command does not catch such an error, unless it adds something to the sentence.
"""

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from botocore.exceptions import BotoCoreError, ClientError
from confluent_kafka import KafkaException

from db.connection import DatabaseUnavailable
from db.health import SchemaMissing
from queryd.codec import NoRegistry
from queryd.errors import ClientStopped, NotSubmitted
from queryd.kafka.bounded_reader import EndNotReached
from queryd.kafka.producer import NotDelivered
from queryd.registry import RegistryAway, RegistryRefused
from queryd.topics import TopicUnknown
from results.store import StoreRefused, StoreUnavailable
from service.bucket import BucketRefused
from service.diagnosis import explain_kafka, explain_store
from service.settings import load_settings
from service.topics import NoBroker, TopicsRefused

if TYPE_CHECKING:
    from service.doctor import Finding

DATABASE_FAILURES = (DatabaseUnavailable, SchemaMissing, psycopg.Error)
KAFKA_FAILURES = (
    KafkaException,
    TopicUnknown,
    TopicsRefused,
    NoBroker,
    EndNotReached,
    NotDelivered,
    NotSubmitted,
    ClientStopped,
)
STORE_FAILURES = (BotoCoreError, ClientError, StoreUnavailable, StoreRefused, BucketRefused)
REGISTRY_FAILURES = (RegistryAway, RegistryRefused, NoRegistry)
FAILURES = (*DATABASE_FAILURES, *KAFKA_FAILURES, *STORE_FAILURES, *REGISTRY_FAILURES)


def describe_failure(error: Exception) -> str:
    """Describe which dependency failed and what to do, by the checks of `queryd doctor`.

    If the checks find no problem, return the error's own text.
    """
    # Imported here, since the engine and boto3 take half a second to import.
    from service.doctor import examine_data, examine_kafka, examine_state, examine_store  # noqa: PLC0415

    settings = load_settings()
    match error:
        case DatabaseUnavailable() | SchemaMissing() | psycopg.Error():
            what, found = "a database", [*examine_data(settings), *examine_state(settings)]
        case NotSubmitted(__cause__=RegistryAway() | RegistryRefused() as cause):
            return describe_failure(cause)
        case RegistryAway() | RegistryRefused() | NoRegistry():
            return f"{error}; see QUERYD_SCHEMA_REGISTRY_URL and QUERYD_SCHEMA_REGISTRY_OPTIONS"
        case BotoCoreError() | ClientError():
            return f"s3: {explain_store(error)}"
        case NoBroker():
            return f"kafka: {explain_kafka(error.codes)}"
        case StoreUnavailable() | StoreRefused() | BucketRefused():
            what, found = "s3", list(examine_store(settings))
        case _:
            what, found = "kafka", list(examine_kafka(settings))
    wrong = _first_wrong(found)
    return f"{what}: {_describe_error(error)}" if wrong is None else f"{wrong.what}: {wrong.advice}"


def describe_defect(error: Exception) -> str:
    """Describe an error in queryd's own code, by its class and place: its text may contain SQL or credentials."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f" in {'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"
    return (
        f"this is a defect of queryd: {type(error).__name__}{place}. Please report it; with QUERYD_LOG_LEVEL=DEBUG the "
        "command prints its traceback, which may contain SQL and credentials"
    )


def _first_wrong(findings: "Iterable[Finding]") -> "Finding | None":
    return next((finding for finding in findings if finding.state == "wrong"), None)


def _describe_error(error: Exception) -> str:
    match error:
        case KafkaException():
            sentence: str = error.args[0].str()
            return sentence
        case psycopg.Error():
            return f"{type(error).__name__} {error.sqlstate or ''}".rstrip()
        case _:
            return str(error)
