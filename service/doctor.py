"""`queryd doctor`: can everything be reached, and what is to be fixed?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import boto3
import psycopg
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from db.health import DATA_TABLES, STATE_TABLES, read_missing_tables, same_server
from queryd.events import Topic
from queryd.outages import QUIET
from service.settings import Settings

_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `well`, `warning` or `wrong`, and what to do."""

    what: str
    state: str
    advice: str


def examine(settings: Settings) -> list[Finding]:
    """Look at everything, whatever the first finding is."""
    checks: list[Callable[[Settings], Iterator[Finding]]] = [
        _examine_kafka,
        _examine_data,
        _examine_state,
        _examine_datasets,
        _examine_store,
        _examine_engine,
    ]
    return [finding for check in checks for finding in check(settings)]


def _examine_kafka(settings: Settings) -> Iterator[Finding]:
    try:
        topics = AdminClient(settings.kafka | QUIET).list_topics(timeout=_SECONDS).topics
    except KafkaException as error:
        yield Finding("kafka", "wrong", f"{error.args[0].str()}: check QUERYD_KAFKA_BOOTSTRAP and QUERYD_KAFKA_OPTIONS")
        return
    missing = sorted({topic.value for topic in Topic} - topics.keys())
    if missing:
        yield Finding("kafka", "wrong", f"topics are missing: {', '.join(missing)}; run `queryd topics apply`")
    else:
        yield Finding("kafka", "well", f"{len(Topic)} topics")
    if not settings.relay_transactions:
        yield Finding("relay", "warning", "QUERYD_RELAY_TRANSACTIONS is false: only for a broker without transactions")


def _examine_data(settings: Settings) -> Iterator[Finding]:
    yield _examine_database(
        "postgres data",
        "QUERYD_DATA_URL",
        settings.data_url.get_secret_value(),
        DATA_TABLES,
    )


def _examine_state(settings: Settings) -> Iterator[Finding]:
    yield _examine_database(
        "postgres state",
        "QUERYD_STATE_URL",
        settings.state_url.get_secret_value(),
        STATE_TABLES,
    )


def _examine_database(what: str, variable: str, url: str, tables: tuple[str, ...]) -> Finding:
    try:
        with psycopg.connect(url, connect_timeout=_SECONDS) as connection:
            missing = read_missing_tables(connection, tables)
    except psycopg.Error as error:
        return Finding(what, "wrong", f"{type(error).__name__}: check {variable}")
    if missing:
        return Finding(what, "wrong", f"tables are missing: {', '.join(missing)}; run `queryd db upgrade`")
    return Finding(what, "well", "reached, schema in place")


def _examine_datasets(settings: Settings) -> Iterator[Finding]:
    if settings.datasets_pg_url is None:
        yield Finding("datasets in postgres", "warning", "QUERYD_DATASETS_PG_URL is not set: only parquet can be read")
        return
    url = settings.datasets_pg_url.get_secret_value()
    try:
        with psycopg.connect(url, connect_timeout=_SECONDS):
            pass
    except psycopg.Error as error:
        yield Finding("datasets in postgres", "wrong", f"{type(error).__name__}: check QUERYD_DATASETS_PG_URL")
        return
    if same_server(url, settings.data_url.get_secret_value()):
        yield Finding(
            "datasets in postgres",
            "warning",
            "the same server as QUERYD_DATA_URL: a long scan there stops vacuum and slows the outbox; use a replica",
        )
    else:
        yield Finding("datasets in postgres", "well", "reached")


def _examine_store(settings: Settings) -> Iterator[Finding]:
    client = boto3.client(
        "s3", config=Config(connect_timeout=_SECONDS, read_timeout=_SECONDS, retries={"total_max_attempts": 1})
    )
    try:
        client.head_bucket(Bucket=settings.bucket)
        yield Finding("s3", "well", f"bucket {settings.bucket}")
    except (BotoCoreError, ClientError) as error:
        yield Finding("s3", "wrong", f"{type(error).__name__}: check QUERYD_RESULTS_URL and the AWS_* variables")
    if settings.datasets_access_key_id is None:
        yield Finding(
            "datasets in s3",
            "warning",
            "QUERYD_DATASETS_ACCESS_KEY_ID is not set: queries read with credentials that can also write",
        )


def _examine_engine(_settings: Settings) -> Iterator[Finding]:
    versions = {
        name: version(name) for name in ("duckdb", "duckdb-extension-httpfs", "duckdb-extension-postgres-scanner")
    }
    if len(set(versions.values())) == 1:
        yield Finding("engine", "well", f"duckdb {versions['duckdb']}")
    else:
        yield Finding("engine", "wrong", f"DuckDB and its extensions differ: {versions}; install the pinned versions")
