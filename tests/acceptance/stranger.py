"""A client written against `schemas/` and the documents alone. Nothing of queryd is imported here: no shared mistakes.

It publishes requests, reads whole topics, both databases by their libpq URIs, and the results bucket. Sizes are bytes,
times on the wire are milliseconds since the epoch, ids are UUID strings.
"""

import json
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import boto3
import fastavro
import psycopg
from botocore.config import Config
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from fastavro.schema import fingerprint, to_parsing_canonical_form
from fastavro.types import Schema
from psycopg.rows import dict_row

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"

REQUEST_TOPICS = {"interactive": "query.requests.interactive", "batch": "query.requests.batch"}
STATUS_TOPIC = "query.status"
DEAD_LETTER_TOPIC = "query.requests.dead"

TERMINAL = ("Succeeded", "Failed")

Headers = tuple[tuple[str, bytes | None], ...]

_MARKER = b"\xc3\x01"
# One fetch waits this long for something to arrive: short enough to see the condition soon, long enough to idle.
_POLL_SECONDS = 0.2
# librdkafka's word for: let the partitioner choose.
_BY_KEY = -1
# Metadata of a topic that was made a moment ago may be a little late.
_METADATA_SECONDS = 30.0
# Eight connections keep a local S3 server busy; more only queue in it.
_S3_THREADS = 8


class Place(NamedTuple):
    """Where a record lies."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be produced. Without a partition, the key decides."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it was read; its time in ms since the epoch, None where the broker gives none."""

    place: Place
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None = None

    def header(self, name: str) -> str | None:
        """The last header of that name as text; None where there is none."""
        found = [value for key, value in self.headers if key == name and value is not None]
        return found[-1].decode() if found else None


@dataclass(frozen=True, slots=True)
class StatusEvent:
    """A decoded `QueryStatusChanged` and the record that it came in."""

    record: Record
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of the results bucket; the ETag without its quotes."""

    content: bytes
    etag: str


class Contract:
    """Every schema version of a folder, and Avro's single-object encoding by them.

    Logical types are taken off before use: values are what is on the wire, strings for ids and milliseconds for times.
    """

    def __init__(self, folder: Path = SCHEMAS) -> None:
        self._writers: dict[str, tuple[int, bytes, Schema]] = {}
        self._readers: dict[bytes, tuple[str, Schema]] = {}
        for file in sorted(folder.glob("*.avsc")):
            name, version = file.stem.rsplit(".v", 1)
            declared = json.loads(file.read_text())
            # fastavro gives this fingerprint in the little-endian order of the encoding.
            mark = bytes.fromhex(fingerprint(to_parsing_canonical_form(declared), "CRC-64-AVRO"))
            schema = fastavro.parse_schema(_without_logical_types(declared))
            self._readers[mark] = (name, schema)
            if name not in self._writers or self._writers[name][0] < int(version):
                self._writers[name] = (int(version), mark, schema)

    def encode(self, name: str, value: Mapping[str, Any]) -> bytes:
        """The value as the highest version of the schema has it: C3 01, the fingerprint, the body."""
        _, mark, schema = self._writers[name]
        body = BytesIO()
        fastavro.schemaless_writer(body, schema, dict(value))
        return _MARKER + mark + body.getvalue()

    def decode(self, payload: bytes) -> tuple[str, dict[str, Any]]:
        """The schema's name and the value; raises ValueError for anything but one whole value of a known schema."""
        if payload[:2] != _MARKER:
            raise ValueError("no single-object encoding")
        if payload[2:10] not in self._readers:
            raise ValueError("an unknown schema")
        name, schema = self._readers[payload[2:10]]
        body = BytesIO(payload[10:])
        value = fastavro.schemaless_reader(body, schema, None)
        if body.read(1):
            raise ValueError("bytes after the value")
        if not isinstance(value, dict):
            raise ValueError("not a record")  # noqa: TRY004 - the payload is wrong, not an argument's type
        return name, value


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
    if isinstance(schema, list):
        return [_without_logical_types(item) for item in schema]
    return schema


@dataclass(frozen=True, slots=True)
class Servers:
    """Where everything is, as `.queryd/env` says."""

    settings: Mapping[str, str]

    @classmethod
    def from_env_file(cls, path: Path) -> Self:
        """Read lines of `KEY=value` as a shell does."""
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        return cls({name: "".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)})

    @property
    def bootstrap(self) -> str:
        """Kafka's bootstrap servers."""
        return self.settings["QUERYD_KAFKA_BOOTSTRAP"]

    @property
    def data_url(self) -> str:
        """Postgres data."""
        return self.settings["QUERYD_DATA_URL"]

    @property
    def state_url(self) -> str:
        """Postgres state."""
        return self.settings["QUERYD_STATE_URL"]

    @property
    def bucket(self) -> str:
        """The bucket of the results."""
        return urlsplit(self.settings["QUERYD_RESULTS_URL"]).netloc

    def s3(self) -> Any:
        """A boto3 client of the results' server."""
        return boto3.client(
            "s3",
            endpoint_url=self.settings["AWS_ENDPOINT_URL"],
            region_name=self.settings["AWS_REGION"],
            aws_access_key_id=self.settings["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.settings["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=_S3_THREADS),
        )


def cloud_event_headers(event_type: str, subject: str) -> Headers:
    """CloudEvents in binary mode, for a record whose value is Avro, and a W3C trace of its own."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return (
        ("ce_specversion", b"1.0"),
        ("ce_id", str(uuid.uuid4()).encode()),
        ("ce_source", b"/stranger"),
        ("ce_type", event_type.encode()),
        ("ce_time", now.encode()),
        ("ce_subject", subject.encode()),
        ("content-type", b"application/avro"),
        ("traceparent", f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-01".encode()),
    )


class Publisher:
    """Produces records, each once. Its first use costs half a second, in which the broker gives it its producer id."""

    def __init__(self, bootstrap: str) -> None:
        self._producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 5})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._producer.close()

    def publish(self, messages: Sequence[Outgoing], deadline: float = 60.0) -> list[Place]:
        """Produce the messages in their order; where each one lies. Raises TimeoutError if one is not acknowledged."""
        places: dict[int, Place] = {}

        def note(index: int) -> Callable[[Any, Message], None]:
            def delivered(error: Any, message: Message) -> None:
                if error is None:
                    places[index] = _place(message)

            return delivered

        for index, message in enumerate(messages):
            self._producer.produce(
                message.topic,
                key=message.key,
                value=message.value,
                headers=list(message.headers),
                partition=_BY_KEY if message.partition is None else message.partition,
                on_delivery=note(index),
            )
            self._producer.poll(0)
        self._producer.flush(deadline)
        if len(places) != len(messages):
            raise TimeoutError(f"{len(messages) - len(places)} of {len(messages)} records were not acknowledged")
        return [places[index] for index in range(len(messages))]


def find_partitions(bootstrap: str, topic: str) -> list[int]:
    """The topic's partitions; raises TimeoutError when there is no such topic."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    latest = time.monotonic() + _METADATA_SECONDS
    while time.monotonic() < latest:
        metadata = admin.list_topics(topic, timeout=_METADATA_SECONDS).topics.get(topic)
        if metadata is not None and metadata.error is None and metadata.partitions:
            return sorted(metadata.partitions)
    raise TimeoutError(f"there is no topic {topic}")


class Tail:
    """One topic from its beginning, every partition, read committed. It keeps all that it has read in `records`.

    It never asks for watermarks: the embedded broker's are only lower bounds.
    """

    def __init__(self, bootstrap: str, topic: str, options: Mapping[str, Any] | None = None) -> None:
        """`options` are further librdkafka properties."""
        self.topic = topic
        self.records: list[Record] = []
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"stranger-{uuid.uuid4()}",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                **(options or {}),
            }
        )
        self._consumer.assign(
            [TopicPartition(topic, number, OFFSET_BEGINNING) for number in find_partitions(bootstrap, topic)]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def poll(self, seconds: float = _POLL_SECONDS) -> list[Record]:
        """What has arrived, after waiting at most `seconds`; raises KafkaException for an error."""
        arrived = []
        # `consume` waits out its whole time unless it gets all that it asks for: so wait for one, then take the rest.
        first = self._consumer.poll(seconds)
        for message in [] if first is None else [first, *self._consumer.consume(1000, 0)]:
            if (error := message.error()) is not None:
                raise KafkaException(error)
            arrived.append(_record(message))
        self.records += arrived
        return arrived

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the broker is not asked for records."""
        partitions = self._consumer.assignment()
        self._consumer.pause(partitions)
        try:
            yield
        finally:
            self._consumer.resume(partitions)

    def read_until(self, enough: Callable[[], bool], seconds: float, what: str) -> None:
        """Read until `enough()`; raises TimeoutError, naming `what` was awaited, after `seconds`."""
        latest = time.monotonic() + seconds
        while not enough():
            if time.monotonic() > latest:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}; {self.topic} has {len(self.records)} records")
            self.poll()

    def read_surplus(self, quiet_seconds: float) -> None:
        """Read on until nothing has arrived for `quiet_seconds`: what should not be there shows itself here."""
        last = time.monotonic()
        while time.monotonic() - last < quiet_seconds:
            if self.poll():
                last = time.monotonic()


class StatusTail(Tail):
    """The status topic (or one like it), decoded as it arrives."""

    def __init__(
        self,
        bootstrap: str,
        contract: Contract,
        topic: str = STATUS_TOPIC,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(bootstrap, topic, options)
        self.events: dict[str, list[StatusEvent]] = {}
        self.terminal: set[str] = set()
        self._contract = contract

    def poll(self, seconds: float = _POLL_SECONDS) -> list[Record]:
        """As `Tail.poll`; raises ValueError for a record that is no `QueryStatusChanged`."""
        arrived = super().poll(seconds)
        for record in arrived:
            if record.value is None:
                raise ValueError(f"an unexpected tombstone at {record.place}")
            name, fields = self._contract.decode(record.value)
            if name != "QueryStatusChanged":
                raise ValueError(f"a {name} at {record.place}")
            self.events.setdefault(fields["query_id"], []).append(StatusEvent(record, fields))
            if fields["status"] in TERMINAL:
                self.terminal.add(fields["query_id"])
        return arrived

    def read_terminal(self, query_ids: Iterable[str], seconds: float) -> None:
        """Read until each of these queries has its terminal event."""
        wanted = set(query_ids)
        self.read_until(lambda: wanted <= self.terminal, seconds, f"{len(wanted)} terminal events")


def read_whole(bootstrap: str, topic: str, seconds: float = 60.0) -> list[Record]:
    """Every committed record of the topic, from its very beginning to where each partition ends now.

    In order of offsets within each partition. Raises TimeoutError when the ends are not reached, KafkaException for
    an error.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"stranger-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            # How long an empty fetch waits, and with it how soon an end is told.
            "fetch.wait.max.ms": 50,
        }
    )
    unread = set(find_partitions(bootstrap, topic))
    records: list[Record] = []
    latest = time.monotonic() + seconds
    try:
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in unread])
        while unread:
            if time.monotonic() > latest:
                raise TimeoutError(f"{topic} was not read to its end within {seconds:.0f} s")
            for message in consumer.consume(1000, _POLL_SECONDS):
                error = message.error()
                if error is None:
                    records.append(_record(message))
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(_place(message).partition)
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()
    return records


def _record(message: Message) -> Record:
    given = message.headers() or []
    pairs = given.items() if isinstance(given, dict) else given
    headers = tuple((name, _as_bytes(value)) for name, value in pairs)
    _, millis = message.timestamp()
    return Record(
        _place(message), _as_bytes(message.key()), _as_bytes(message.value()), headers, millis if millis >= 0 else None
    )


def _place(message: Message) -> Place:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    if topic is None or partition is None or offset is None:
        raise ValueError("a message without coordinates")
    return Place(topic, partition, offset)


def _as_bytes(data: str | bytes | None) -> bytes | None:
    return data.encode() if isinstance(data, str) else data


_RESULTS = """
SELECT id::text AS query_id, org_id::text AS org_id, user_id::text AS user_id, task_id::text AS task_id,
       mode, status, sql_hash, saved_query_id::text AS saved_query_id, output_format, output_location,
       row_count, bytes, duration_ms, error_code, error_message
FROM query_results
"""

_STATUSES = """
SELECT query_id::text AS query_id, org_id::text AS org_id, user_id::text AS user_id, task_id::text AS task_id,
       mode, status, sequence, attempt, output_location, row_count, bytes, error_code, error_message
FROM query_status
"""


def read_results(servers: Servers) -> dict[str, dict[str, Any]]:
    """Every row of `query_results` by query id; ids are text."""
    return _read_rows(servers.data_url, _RESULTS)


def read_statuses(servers: Servers) -> dict[str, dict[str, Any]]:
    """Every row of the state database's `query_status` by query id; ids are text."""
    return _read_rows(servers.state_url, _STATUSES)


def _read_rows(url: str, statement: str) -> dict[str, dict[str, Any]]:
    with psycopg.connect(url, row_factory=dict_row) as connection:
        return {row["query_id"]: row for row in connection.execute(statement).fetchall()}


def read_objects(servers: Servers, prefixes: Iterable[str]) -> dict[str, StoredObject]:
    """Every object whose key starts with one of these prefixes (each ends with a slash), whole."""
    wanted = set(prefixes)
    client = servers.s3()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=servers.bucket, Prefix="results/")
    listed = [item["Key"] for page in pages for item in page.get("Contents", [])]
    keys = [key for key in listed if any(parent in wanted for parent in _parents(key))]

    def fetch(key: str) -> StoredObject:
        answer = client.get_object(Bucket=servers.bucket, Key=key)
        return StoredObject(answer["Body"].read(), answer["ETag"].strip('"'))

    with ThreadPoolExecutor(_S3_THREADS) as pool:
        return dict(zip(keys, pool.map(fetch, keys), strict=True))


def _parents(key: str) -> list[str]:
    """`a/b/c` lies under `a/` and `a/b/`."""
    parts = key.split("/")[:-1]
    return ["/".join(parts[: count + 1]) + "/" for count in range(len(parts))]


def prefix_of(location: str) -> str:
    """The key prefix of an `s3://bucket/prefix/`."""
    return urlsplit(location).path.lstrip("/")
