"""Environment variables that point each dependency at a broken server, one set for each way to be broken."""

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from service.embedded.broker import Broker
from service.embedded.object_store import ObjectStore
from service.embedded.ports import pick_ports
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.integration.records import prepare_topics
from tests.servers.kafka import Kafka

CANARY = "canary4711"
NO_BUCKET = "queryd-no-such-bucket"


class Need(StrEnum):
    """A dependency of a command or a service."""

    KAFKA = "kafka"
    DATA = "data"
    STATE = "state"
    S3 = "s3"
    REGISTRY = "registry"
    DATASETS = "datasets"


# A message must contain one of these, so that a person can tell which dependency failed.
WORDS = {
    Need.KAFKA: ("kafka", "QUERYD_KAFKA"),
    Need.DATA: ("postgres data", "QUERYD_DATA_URL"),
    Need.STATE: ("postgres state", "QUERYD_STATE_URL"),
    Need.S3: (
        "s3",
        "AWS_",
        "QUERYD_RESULTS_URL",
        "credentials for datasets",
        "the datasets' store",
        "reading the dataset takes longer",
    ),
    Need.REGISTRY: ("schema registry", "QUERYD_SCHEMA_REGISTRY"),
    Need.DATASETS: ("datasets' Postgres", "QUERYD_DATASETS_PG_URL"),
}


def _right(kafka: Kafka, data: str, state: str, store: ObjectStore) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "QUERYD_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "QUERYD_DATA_URL": data,
        "QUERYD_STATE_URL": state,
        "QUERYD_DATASETS_PG_URL": data,
        "QUERYD_RESULTS_URL": f"s3://{store.bucket}",
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_REGION": store.region,
        "AWS_ACCESS_KEY_ID": store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _wrong(
    right: dict[str, str], silent: int, other: int, databases: dict[str, str], bare: str
) -> dict[Need, dict[str, dict[str, str]]]:
    """What is wrong with each dependency, as variables."""
    (closed,) = pick_ports(1)

    def kafka(port: int) -> dict[str, str]:
        return {"QUERYD_KAFKA_BOOTSTRAP": f"127.0.0.1:{port}"}

    def postgres(variable: str, schema: dict[str, str]) -> dict[str, dict[str, str]]:
        url = urlsplit(right[variable])
        host = f"{url.hostname}:{url.port}"
        return {
            "away": {variable: f"postgresql://{CANARY}:{CANARY}@127.0.0.1:{silent}/{CANARY}"},
            "refused": {variable: f"postgresql://{CANARY}:{CANARY}@127.0.0.1:{closed}/{CANARY}"},
            "no Postgres": {variable: f"postgresql://{CANARY}:{CANARY}@127.0.0.1:{other}/{CANARY}"},
            "wrong password": {variable: f"postgresql://{url.username}:{CANARY}@{host}{url.path}"},
            "no such database": {variable: f"postgresql://{url.username}:{url.password}@{host}/{CANARY}"},
        } | {state: {variable: database} for state, database in schema.items()}

    def store(port: int) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}

    def registry(port: int) -> dict[str, str]:
        return {"QUERYD_SCHEMA_REGISTRY_URL": f"http://{CANARY}:{CANARY}@127.0.0.1:{port}"}

    sasl = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN"}
    sasl |= {"sasl.username": CANARY, "sasl.password": CANARY}
    return {
        Need.KAFKA: {
            "away": kafka(silent),
            "refused": kafka(closed),
            "no Kafka": kafka(other),
            "wrong login": {"QUERYD_KAFKA_OPTIONS": json.dumps(sasl)},
            "empty": {"QUERYD_KAFKA_BOOTSTRAP": bare},
        },
        Need.DATA: postgres("QUERYD_DATA_URL", {"empty": databases["empty"], "old": databases["old"]}),
        Need.STATE: postgres("QUERYD_STATE_URL", {"empty": databases["empty"], "old": databases["oldstate"]}),
        Need.S3: {
            "away": store(silent),
            "refused": store(closed),
            "no S3": store(other),
            "wrong keys": {"AWS_ACCESS_KEY_ID": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY},
            "wrong secret": {"AWS_SECRET_ACCESS_KEY": CANARY},
            "no bucket": {"QUERYD_RESULTS_URL": f"s3://{NO_BUCKET}"},
        },
        Need.REGISTRY: {"away": registry(silent), "refused": registry(closed), "no registry": registry(other)},
        Need.DATASETS: postgres("QUERYD_DATASETS_PG_URL", {}),
    }


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The variables of a healthy installation, and for each dependency those of each wrong state, by its name."""

    right: dict[str, str]
    wrong: dict[Need, dict[str, dict[str, str]]]


@contextmanager
def dependencies(
    kafka: Kafka, postgres_server: Postgres, store: ObjectStore, lifeline: Lifeline, folder: Path
) -> Iterator[Dependencies]:
    """Right and wrong dependencies; the databases that are right are migrated."""
    names = [f"{CANARY}_{purpose}_{uuid.uuid4().hex[:8]}" for purpose in ("data", "state", "old", "oldstate", "empty")]
    for name in names:
        postgres_server.create_database(name)
    data, state, old, old_state, empty = (postgres_server.url(name) for name in names)
    prepare_topics(kafka)
    bare = Broker(folder / "kafka", folder / "kafka.log", lifeline)
    _migrate(data, state)
    _migrate(old, old_state)
    _make_old(old, old_state)
    with _silent_port() as silent, _other_server() as other:
        bare.start()
        try:
            right = _right(kafka, data, state, store)
            databases = {"empty": empty, "old": old, "oldstate": old_state}
            yield Dependencies(right, _wrong(right, silent, other, databases, bare.bootstrap))
        finally:
            bare.stop()
    for name in names:
        postgres_server.drop_database(name)


def _migrate(data: str, state: str) -> None:
    create_platform_tables(state)
    upgrade_data(data)
    upgrade_state(state)


def _make_old(data: str, state: str) -> None:
    """Let both look like databases of an earlier release."""
    with psycopg.connect(data) as connection:
        connection.execute("UPDATE queryd_data_version SET version_num = 'data0001'")
    with psycopg.connect(state) as connection:
        connection.execute("UPDATE queryd_state_version SET version_num = 'state0000'")


@contextmanager
def _silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    # The kernel takes them into its backlog.
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield listener.getsockname()[1]


class _Refusing(BaseHTTPRequestHandler):
    """Neither Kafka nor Postgres nor S3 nor a registry."""

    def _refuse(self) -> None:
        self.send_response(501)
        self.end_headers()
        self.wfile.write(CANARY.encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _refuse  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def _other_server() -> Iterator[int]:
    """An HTTP server in the place of another."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
