"""The parts of a query that all peers share: the row's statements, the events, the object's key."""

import argparse
import hashlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from confluent_kafka import KafkaException, Message
from obstore.store import S3Store

from tests.acceptance.stranger import Contract, Servers, cloud_event_headers

# As wide as a query's status needs, in a schema of its own.
TABLE = """
CREATE SCHEMA IF NOT EXISTS bench;
CREATE TABLE IF NOT EXISTS bench.peer_results (
    id uuid PRIMARY KEY, org_id uuid NOT NULL, status text NOT NULL, sql_hash text NOT NULL,
    output_location text, row_count bigint, bytes bigint, updated_at timestamptz NOT NULL DEFAULT now()
)
"""
INSERT = "INSERT INTO bench.peer_results (id, org_id, status, sql_hash) VALUES (%s, %s, 'Queued', %s)"
START = "UPDATE bench.peer_results SET status = 'Running', updated_at = now() WHERE id = %s"
FINISH = """
UPDATE bench.peer_results
SET status = 'Succeeded', output_location = %s, row_count = %s, bytes = %s, updated_at = now() WHERE id = %s
"""

# The embedded broker lets a member join after half of this and accepts no less.
_SESSION_MS = 6_000
# The embedded broker answers an empty fetch after half of this; with the default of 500 ms the wait hides all else.
FETCH_WAIT_MS = 20

CONTRACT = Contract()


def consumer_options(servers: Servers, topic: str) -> dict[str, Any]:
    """librdkafka's configuration of a consumer group of its own, without automatic commits."""
    return {
        "bootstrap.servers": servers.bootstrap,
        "group.id": f"peer-{topic}",
        "enable.auto.commit": False,
        "auto.offset.reset": "earliest",
        "session.timeout.ms": _SESSION_MS,
        "fetch.wait.max.ms": FETCH_WAIT_MS,
    }


@dataclass(frozen=True, slots=True)
class Event:
    """A status event, ready to be produced; the type of its headers is what confluent-kafka asks for."""

    key: str
    value: bytes
    headers: list[tuple[str, str | bytes | None]]


@dataclass(slots=True)
class Work:
    """One query on its way: the request, and what is known of its result."""

    request: Mapping[str, Any]
    row_count: int = 0
    content: bytes = b""
    etag: str = ""
    sql_hash: str = field(init=False)

    def __post_init__(self) -> None:
        self.sql_hash = hashlib.sha256(self.request["sql"].encode()).hexdigest()

    @classmethod
    def from_record(cls, payload: bytes | None) -> Self:
        """Decode a request as it came from Kafka."""
        assert payload is not None
        return cls(CONTRACT.decode(payload)[1])

    @property
    def query_id(self) -> str:
        """The request's own id."""
        return str(self.request["query_id"])

    @property
    def sql(self) -> str:
        """The request's statement."""
        return str(self.request["sql"])

    @property
    def key(self) -> str:
        """The result's key in the bucket."""
        return f"bench/{self.request['org_id']}/{self.query_id}/result.parquet"

    def inserted(self) -> tuple[Any, ...]:
        """The parameters of `INSERT`."""
        return self.query_id, self.request["org_id"], self.sql_hash

    def finished(self, bucket: str) -> tuple[Any, ...]:
        """The parameters of `FINISH`."""
        return f"s3://{bucket}/{self.key}", self.row_count, len(self.content), self.query_id

    def queued(self) -> Event:
        """The first event."""
        return self._event(sequence=1, status="Queued", attempt=0)

    def running(self) -> Event:
        """The second event."""
        return self._event(sequence=2, previous_status="Queued", status="Running", attempt=1)

    def succeeded(self, bucket: str) -> Event:
        """The last event, with the object's size and hash."""
        size = len(self.content)
        stored = {
            "key": self.key,
            "bytes": size,
            "rows": self.row_count,
            "etag": self.etag,
            "sha256": hashlib.sha256(self.content).hexdigest(),
        }
        return self._event(
            sequence=3,
            previous_status="Running",
            status="Succeeded",
            attempt=1,
            output_location=f"s3://{bucket}/bench/{self.request['org_id']}/{self.query_id}/",
            row_count=self.row_count,
            bytes=size,
            files=[stored],
        )

    def _event(self, **fields: Any) -> Event:
        event = {
            "event_id": str(uuid.uuid5(uuid.UUID(self.query_id), str(fields["sequence"]))),
            "occurred_at": time.time_ns() // 1_000_000,
            "query_id": self.query_id,
            "org_id": self.request["org_id"],
            "mode": self.request["mode"],
            "sql_hash": self.sql_hash,
            **fields,
        }
        value = CONTRACT.encode("QueryStatusChanged", event)
        return Event(self.query_id, value, list(cloud_event_headers("QueryStatusChanged", self.query_id)))


def run_duckdb(connection: Any, work: Work, file: Path) -> None:
    """Execute the query into a Parquet file and read it."""
    copied = connection.execute(f"COPY ({work.sql}) TO '{file}' (FORMAT parquet, COMPRESSION zstd)")
    [(work.row_count,)] = copied.fetchall()
    work.content = file.read_bytes()


def open_bucket(servers: Servers) -> S3Store:
    """Return obstore's client of the results bucket."""
    settings = servers.settings
    return S3Store(
        servers.bucket,
        endpoint=settings["AWS_ENDPOINT_URL"],
        region=settings["AWS_REGION"],
        access_key_id=settings["AWS_ACCESS_KEY_ID"],
        secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def refuse_loss(error: Any, _message: Message) -> None:
    """Raise if a record was not delivered; a producer's `on_delivery`."""
    if error is not None:
        raise KafkaException(error)


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is started with."""

    servers: Servers
    topic: str
    status_topic: str


def parse_task(description: str | None) -> Task:
    """Read the command line of a peer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--env", type=Path, required=True, help="the stack's .queryd/env")
    parser.add_argument("--topic", required=True)
    parser.add_argument("--status-topic", required=True)
    given = parser.parse_args()
    return Task(Servers.from_env_file(given.env), given.topic, given.status_topic)
