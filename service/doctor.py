"""`queryd doctor`: can everything be reached, and what is to be fixed?"""

import asyncio
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from botocore.exceptions import BotoCoreError, ClientError

from db.health import DATA, STATE, Schema, find_problem, same_server
from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.sandbox import Layers
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import EngineUnavailable, Outage
from queryd.events import OrgId, QueryId, Topic
from queryd.registry import EVENT_OF_TOPIC, RegistryAway, RegistryRefused, registry_in_use
from results.location import prefix
from service.bucket import make_s3_client
from service.diagnosis import (
    OVERWRITES,
    PRECONDITION_FAILED,
    explain_kafka,
    explain_postgres,
    explain_store,
    explain_write,
    status_of,
)
from service.kafka_features import read_finalized_features
from service.settings import Settings, are_of_the_embedded_stack, describe_unknown, find_unknown_variables
from service.topics import NoBroker, find_missing, find_topics

_SECONDS = 5
# KIP-890.
_TRANSACTION_VERSION = 2
_SEVERITY = ("wrong", "warning", "well")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `well`, `warning` or `wrong`, and what to do."""

    what: str
    state: str
    advice: str


def examine(settings: Settings) -> list[Finding]:
    """Run all checks, even if one fails. Problems come first."""
    checks: list[Callable[[Settings], Iterator[Finding]]] = [
        _examine_environment,
        examine_kafka,
        _examine_relay,
        examine_registry,
        examine_data,
        examine_state,
        examine_datasets,
        examine_store,
        _examine_engine,
        _examine_sandbox,
    ]
    findings = [finding for check in checks for finding in check(settings)]
    return sorted(findings, key=lambda finding: _SEVERITY.index(finding.state))


def _examine_environment(_settings: Settings) -> Iterator[Finding]:
    for name, meant in find_unknown_variables().items():
        yield Finding("settings", "warning", f"{describe_unknown(name, meant)}: it is ignored")


def examine_kafka(settings: Settings) -> Iterator[Finding]:
    """Check that a broker accepts the connection, and that the topics exist."""
    try:
        missing = find_missing(find_topics(settings.kafka))
    except NoBroker as error:
        yield Finding("kafka", "wrong", explain_kafka(error.codes))
        return
    yield Finding("kafka", "well", f"{len(Topic)} topics") if missing is None else Finding("kafka", "wrong", missing)


def _examine_relay(settings: Settings) -> Iterator[Finding]:
    if settings.relay_transactions:
        yield from examine_transactions(settings)
    # The file has it only where the broker is the embedded one, which another bootstrap is not.
    elif are_of_the_embedded_stack("QUERYD_RELAY_TRANSACTIONS", "QUERYD_KAFKA_BOOTSTRAP"):
        advice = "QUERYD_RELAY_TRANSACTIONS is false, as it must be with the embedded broker"
        yield Finding("relay", "well", advice)
    else:
        yield Finding("relay", "warning", "QUERYD_RELAY_TRANSACTIONS is false: only for a broker without transactions")


def examine_transactions(settings: Settings) -> Iterator[Finding]:
    """Check that the cluster has the second version of transactions. A cluster with TLS is not asked."""
    if str(settings.kafka.get("security.protocol", "")).lower().endswith("ssl"):
        return
    host, _, port = settings.kafka_bootstrap.split(",")[0].strip().rpartition(":")
    try:
        level = read_finalized_features(host.strip("[]"), int(port)).get("transaction.version", 0)
    # Whether the broker is in reach is another check's to say.
    except (OSError, EOFError, ValueError):
        return
    if level >= _TRANSACTION_VERSION:
        yield Finding("relay", "well", f"transaction.version {level}")
    else:
        yield Finding(
            "relay",
            "warning",
            f"the cluster has transaction.version {level}, which a network fault can tear: "
            "use Kafka 4.0 or newer and run `kafka-features.sh upgrade --feature transaction.version=2`",
        )


def examine_registry(_settings: Settings) -> Iterator[Finding]:
    """Check that the schema registry accepts queryd's schemas."""
    registry = registry_in_use()
    if registry is None:
        return
    try:
        registry.announce()
    except RegistryAway as error:
        advice = f"{error}; look at QUERYD_SCHEMA_REGISTRY_URL"
    except RegistryRefused as error:
        advice = f"{error}; run `queryd topics apply` with credentials that may register schemas"
    else:
        yield Finding("schema registry", "well", f"{len(EVENT_OF_TOPIC)} subjects")
        return
    yield Finding("schema registry", "wrong", advice)


def examine_data(settings: Settings) -> Iterator[Finding]:
    """Check the login to Postgres data, and the version of its tables."""
    yield _examine_database("postgres data", "QUERYD_DATA_URL", settings.data_url.get_secret_value(), DATA)


def examine_state(settings: Settings) -> Iterator[Finding]:
    """Check the login to Postgres state, and the version of its tables."""
    yield _examine_database("postgres state", "QUERYD_STATE_URL", settings.state_url.get_secret_value(), STATE)


def _examine_database(what: str, variable: str, url: str, schema: Schema) -> Finding:
    try:
        problem = asyncio.run(find_problem(url, schema))
    except psycopg.Error as error:
        return Finding(what, "wrong", explain_postgres(variable, url, error))
    if problem is not None:
        return Finding(what, "wrong", problem)
    return Finding(what, "well", "reached, schema in place")


def examine_datasets(settings: Settings) -> Iterator[Finding]:
    """Check the login to the datasets' Postgres, and that it is a separate server."""
    if settings.datasets_pg_url is None:
        yield Finding("datasets in postgres", "warning", "QUERYD_DATASETS_PG_URL is not set: only parquet can be read")
        return
    url = settings.datasets_pg_url.get_secret_value()
    try:
        with psycopg.connect(url, connect_timeout=_SECONDS):
            pass
    except psycopg.Error as error:
        yield Finding("datasets in postgres", "wrong", explain_postgres("QUERYD_DATASETS_PG_URL", url, error))
        return
    if not same_server(url, settings.data_url.get_secret_value()):
        yield Finding("datasets in postgres", "well", "reached")
    elif are_of_the_embedded_stack("QUERYD_DATASETS_PG_URL", "QUERYD_DATA_URL"):
        advice = "reached, on the server of QUERYD_DATA_URL, as it is in the embedded stack"
        yield Finding("datasets in postgres", "well", advice)
    else:
        yield Finding(
            "datasets in postgres",
            "warning",
            "the same server as QUERYD_DATA_URL: a long scan there stops vacuum and slows the outbox; use a replica",
        )


def examine_store(settings: Settings) -> Iterator[Finding]:
    """Check that the results bucket exists and that the credentials may use it."""
    try:
        client = _try_bucket(settings.bucket)
        yield Finding("s3", "well", f"bucket {settings.bucket}")
        yield from _try_conditional_put(client, settings.bucket)
    except (BotoCoreError, ClientError) as error:
        yield Finding("s3", "wrong", explain_store(error))
    if settings.datasets_access_key_id is None:
        yield Finding(
            "datasets in s3",
            "warning",
            "QUERYD_DATASETS_ACCESS_KEY_ID is not set: queries read with credentials that can also write",
        )


def _try_conditional_put(client: Any, bucket: str) -> Iterator[Finding]:
    """Put an object at a free key, which must succeed, and again, which must fail; then delete it.

    The key is that of a result of a random query: the credentials may allow only such keys, and retention deletes the
    object if the check is interrupted.
    """
    org, query, token = (str(uuid.uuid4()) for _ in range(3))
    target = {"Bucket": bucket, "Key": f"{prefix(OrgId(org), QueryId(query), 1, token)}doctor"}
    try:
        client.put_object(**target, Body=b"queryd doctor", IfNoneMatch="*")
    except ClientError as error:
        yield Finding("s3 writes", "wrong", explain_write(error))
        return
    try:
        client.put_object(**target, Body=b"queryd doctor", IfNoneMatch="*")
    except ClientError as error:
        if status_of(error) == PRECONDITION_FAILED:
            yield Finding("s3 writes", "well", "an existing object is not overwritten")
        else:
            yield Finding("s3 writes", "wrong", explain_write(error))
    else:
        yield Finding("s3 writes", "wrong", OVERWRITES)
    finally:
        client.delete_object(**target)


def _try_bucket(bucket: str) -> Any:
    """Return a client of the bucket's store, after a first successful request."""
    client = make_s3_client(_SECONDS)
    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if status_of(error) == 403:
            # The answer to a HEAD has no body; this one's says whether the keys or their rights are wrong.
            client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        raise
    return client


def _examine_engine(_settings: Settings) -> Iterator[Finding]:
    versions = {
        name: version(name) for name in ("duckdb", "duckdb-extension-httpfs", "duckdb-extension-postgres-scanner")
    }
    if len(set(versions.values())) == 1:
        yield Finding("engine", "well", f"duckdb {versions['duckdb']}")
    else:
        yield Finding("engine", "wrong", f"DuckDB and its extensions differ: {versions}; install the pinned versions")


def _examine_sandbox(settings: Settings) -> Iterator[Finding]:
    try:
        layers = asyncio.run(_ask_child(settings))
    except EngineUnavailable as error:
        yield Finding("sandbox", "wrong", f"{error} Check the free memory, and the space in the temporary folder")
        return
    lacking = [
        *(["Landlock (Linux 5.13 and newer): files are kept by DuckDB's own settings alone"] * (layers.landlock == 0)),
        *(["Landlock for TCP (Linux 6.7 and newer)"] * (0 < layers.landlock < 4)),
        *(["seccomp: programs can be started by whoever breaks out of DuckDB"] * (not layers.seccomp)),
    ]
    if lacking:
        yield Finding("sandbox", "warning", f"this system lacks {'; '.join(lacking)}")
    else:
        yield Finding("sandbox", "well", f"Landlock {layers.landlock}, seccomp, resource limits")


async def _ask_child(settings: Settings) -> Layers:
    """What a child that has just started says of the kernel's layers. Raises `EngineUnavailable`."""
    with tempfile.TemporaryDirectory() as scratch:
        engine = DuckDBEngine(DuckDBSettings(settings.child_memory, 1, Path(scratch)), 1)
        await engine.start()
        layers = engine.layers
        await engine.close()
    if layers is None:
        raise EngineUnavailable(Outage.ENGINE)
    return layers
