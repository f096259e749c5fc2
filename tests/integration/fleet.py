"""Executors and a relay as real processes on real servers, to be stopped, woken and killed by a test."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import psutil
import psycopg
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from psycopg.rows import dict_row

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from processes.failpoints import FAILPOINTS_VARIABLE, Failpoint
from queryd.client import QueryClient
from queryd.codec import decode_status
from queryd.events import QueryStatusChanged, Topic
from service.embedded.broker import Broker
from service.embedded.object_store import Credentials, ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from service.readiness import READY_VARIABLE
from tests.integration.records import config_of, prepare_topics, read_topic
from tests.servers.kafka import Kafka, Kind

# Guards against hanging only: what is awaited comes within seconds.
PATIENCE_SECONDS = 90.0
_LOOK_SECONDS = 0.02
# The least that the setting takes; a stopped worker is missed by Postgres and by Kafka after 3 s each.
LEASE_SECONDS = 3.0
_SESSION_SECONDS = 3
# Time for the other executor to be given the partition before what runs is handed back: a heartbeat, and a join of half
# a session on the embedded broker.
_DRAIN_SECONDS = 3.5
_GROUPS = {
    "queryd-executor": (Topic.REQUESTS_INTERACTIVE, Topic.REQUESTS_BATCH),
    "queryd-cancellations": (Topic.CANCELLATIONS,),
}
_RELAY_GROUP = "queryd-relay-0"

_Found = TypeVar("_Found")


class Service:
    """One process of `queryd run`, with a log of its own."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self._log = folder / "log"
        self._ready = folder / "ready"
        folder.mkdir()
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "queryd", "run", name],
                cwd=folder,
                env=environment | {"QUERYD_SCRATCH": str(self.scratch), READY_VARIABLE: str(self._ready)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def ready(self) -> bool:
        """It holds its partitions, or publishes."""
        assert self.process.poll() is None, self._log.read_text(errors="replace")[-4_000:]
        return self._ready.exists()

    @property
    def stopped(self) -> bool:
        """By SIGSTOP."""
        return self.process.poll() is None and _is_stopped(psutil.Process(self.process.pid))

    def read_log(self) -> list[dict[str, Any]]:
        """Its lines so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    def find_stopped_children(self) -> list[psutil.Process]:
        """Its children that a failpoint has stopped."""
        if self.process.poll() is not None:
            return []
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if _is_stopped(child)]

    def has_lost(self, query_id: str, attempt: int) -> bool:
        """It has found out that the attempt is no longer its own."""
        lost = {"event": "lease_lost", "query_id": query_id, "attempt": attempt}
        return any(lost.items() <= line.items() for line in self.read_log())

    def terminate(self) -> None:
        """SIGTERM, and wait for its end."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_SECONDS) == 0

    def kill(self) -> None:
        """SIGKILL, stopped or not."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class Held:
    """What is stopped inside which executor."""

    executor: Service
    child: psutil.Process


class Fleet:
    """The executors that are up. They share a folder of failpoints: what is armed there takes the first to pass."""

    def __init__(self, folder: Path, environment: dict[str, str], kafka: Kafka, store: ObjectStore) -> None:
        self.environment = environment
        self.client = QueryClient(config_of(kafka))
        self._kafka = kafka
        self._store = store
        self._folder = folder
        self._failpoints = folder / "failpoints"
        self._failpoints.mkdir()
        self._started: list[Service] = []
        self._relay = self._start("relay")

    def close(self) -> None:
        """Kill whatever lives."""
        for service in self._started:
            service.kill()
        self.client.close()

    def _start(self, name: str) -> Service:
        armed = {FAILPOINTS_VARIABLE: str(self._failpoints)}
        folder = self._folder / f"{name}-{len(self._started)}"
        self._started.append(Service(name, folder, self.environment | armed))
        return self._started[-1]

    @property
    def executors(self) -> list[Service]:
        """Those that live."""
        return [each for each in self._started if each is not self._relay and each.process.poll() is None]

    def man(self, count: int) -> None:
        """See to it that so many executors live, and that those which are not stopped hold partitions."""
        while len(self.executors) < count:
            self._start("executor")
        awake = [each for each in (*self.executors, self._relay) if not each.stopped]
        await_that(lambda: all(each.ready for each in awake), "the services to be ready")

    def arm(self, place: Failpoint, what: str) -> None:
        """The next process that passes sends itself this signal."""
        draft = self._failpoints / "draft"
        draft.write_text(what)
        draft.rename(self._failpoints / place)

    def disarm(self) -> None:
        """Nothing is armed any more."""
        for file in self._failpoints.iterdir():
            file.unlink()

    def await_held(self, *known: psutil.Process) -> Held:
        """A child that a failpoint has stopped, other than these, and its executor."""

        def find() -> list[Held]:
            stopped = [(each, child) for each in self.executors for child in each.find_stopped_children()]
            return [Held(executor, child) for executor, child in stopped if child not in known]

        return await_that(find, "a child to stop")[0]

    def await_stopped(self) -> Service:
        """An executor that a failpoint has stopped."""
        return await_that(lambda: [each for each in self.executors if each.stopped], "an executor to stop")[0]

    def read_row(self, query_id: str) -> dict[str, Any]:
        """The canonical row and what the run says beside it; raises where there is none."""
        with psycopg.connect(self.environment["QUERYD_DATA_URL"], row_factory=dict_row) as connection:
            row = connection.execute(
                "SELECT q.status, q.output_location, q.bytes, q.row_count, q.error_code, r.sequence, r.attempt, "
                "r.crashes, r.token::text AS token FROM query_results q JOIN query_runs r ON r.query_id = q.id "
                "WHERE q.id = %s",
                [query_id],
            ).fetchone()
        assert row is not None
        return row

    def read_status(self, query_id: str) -> str | None:
        """The canonical row's status; None where there is no row yet."""
        with psycopg.connect(self.environment["QUERYD_DATA_URL"]) as connection:
            row = connection.execute("SELECT status FROM query_results WHERE id = %s", [query_id]).fetchone()
        return None if row is None else str(row[0])

    def read_story(self, query_id: str) -> list[QueryStatusChanged]:
        """A query's events as a reader at read_committed sees them, in order, once the relay has nothing left."""
        await_that(self._outbox_is_empty, "the relay to publish everything")
        records = asyncio.run(read_topic(self._kafka, Topic.STATUS))
        return [
            decode_status(value)
            for record in records
            if record.key() == query_id.encode() and (value := record.value()) is not None
        ]

    def _outbox_is_empty(self) -> bool:
        with psycopg.connect(self.environment["QUERYD_DATA_URL"]) as connection:
            return connection.execute("SELECT FROM outbox LIMIT 1").fetchone() is None

    def read_objects(self, org_id: str, query_id: str) -> dict[str, tuple[str, bytes]]:
        """Every object of a query by key: ETag and bytes."""
        s3 = self._s3()
        keys = [item["Key"] for item in self._list(f"results/{org_id}/{query_id}/")]
        found = {key: s3.get_object(Bucket=self._store.bucket, Key=key) for key in keys}
        return {key: (each["ETag"], each["Body"].read()) for key, each in found.items()}

    def put_object(self, key: str, body: bytes) -> str:
        """An object at a key, and its URL."""
        self._s3(self._store.writer).put_object(Bucket=self._store.bucket, Key=key, Body=body)
        return f"s3://{self._store.bucket}/{key}"

    def list_objects(self, org_id: str) -> set[tuple[str, str]]:
        """Every object of an org: its key and its ETag."""
        return {(item["Key"], item["ETag"]) for item in self._list(f"results/{org_id}/")}

    def _list(self, prefix: str) -> list[dict[str, Any]]:
        pages = self._s3().get_paginator("list_objects_v2").paginate(Bucket=self._store.bucket, Prefix=prefix)
        return [item for page in pages for item in page.get("Contents", [])]

    def _s3(self, identity: Credentials | None = None) -> Any:
        """As the one who may only read, unless it is to be another."""
        who = identity or self._store.reader
        return boto3.client(
            "s3",
            endpoint_url=self._store.endpoint_url,
            region_name=self._store.region,
            aws_access_key_id=who.access_key,
            aws_secret_access_key=who.secret_key,
        )


def await_that(look: Callable[[], _Found], what: str, seconds: float = PATIENCE_SECONDS) -> _Found:
    """The first true answer of `look`, for what nothing announces; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(_LOOK_SECONDS)
    return found


@contextmanager
def running_fleet(
    kafka: Kafka, postgres: Postgres, store: ObjectStore, folder: Path, settings: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """A fleet without executors yet, on databases of its own. An embedded `kafka` is `own_broker`'s."""
    with ExitStack() as stack:
        stack.enter_context(_groups_at_the_end(kafka))
        urls = {name: _make_database(postgres, f"fleet_{name}", stack) for name in ("data", "state")}
        upgrade_data(urls["data"])
        upgrade_state(urls["state"])
        create_platform_tables(urls["state"])
        fleet = Fleet(folder, _environment(kafka, urls, store) | dict(settings or {}), kafka, store)
        stack.callback(fleet.close)
        yield fleet


@contextmanager
def own_broker(folder: Path, lifeline: Lifeline) -> Iterator[Kafka]:
    """The embedded broker is up at once, and whatever other tests wrote is not in it."""
    broker = Broker(folder / "kafka", folder / "kafka.log", lifeline)
    broker.start()
    try:
        yield Kafka(broker.bootstrap, Kind.EMBEDDED)
    finally:
        broker.stop()


@contextmanager
def _groups_at_the_end(kafka: Kafka) -> Iterator[None]:
    """Our groups begin behind what other tests have written, and leave nothing that others would find."""
    config = prepare_topics(kafka)
    if not kafka.transactions:
        yield
        return
    admin = AdminClient(config)
    _forget_groups(admin)
    consumer = Consumer(config | {"group.id": "fleet"})
    try:
        for group, topics in _GROUPS.items():
            ends = [
                _find_end(consumer, topic, partition)
                for topic in topics
                for partition in consumer.list_topics(topic).topics[topic].partitions
            ]
            for altered in admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, ends)]).values():
                altered.result(PATIENCE_SECONDS)
    finally:
        consumer.close()
    yield
    # Members that were killed are members until their session is over.
    await_that(lambda: _forget_groups(admin), "the groups to be empty")


def _find_end(consumer: Consumer, topic: str, partition: int) -> TopicPartition:
    """The end of a partition, whose leader may have been elected at this moment and not know it yet."""
    found: list[int] = []

    def ask() -> bool:
        try:
            found.append(consumer.get_watermark_offsets(TopicPartition(topic, partition))[1])
        except KafkaException as error:
            if error.args[0].code() != KafkaError.NOT_LEADER_FOR_PARTITION:
                raise
        return bool(found)

    await_that(ask, f"the leader of {topic} {partition}")
    return TopicPartition(topic, partition, found[0])


def _forget_groups(admin: AdminClient) -> bool:
    """True once none of our groups is there any more."""
    deletions = admin.delete_consumer_groups([*_GROUPS, _RELAY_GROUP])
    return False not in [_is_gone(deletion) for deletion in deletions.values()]


def _is_gone(deleted: "Future[None]") -> bool:
    try:
        deleted.result(PATIENCE_SECONDS)
    except KafkaException as error:
        return bool(error.args[0].name() == "GROUP_ID_NOT_FOUND")
    return True


def _make_database(postgres: Postgres, name: str, stack: ExitStack) -> str:
    postgres.create_database(name)
    stack.callback(postgres.drop_database, name)
    return postgres.url(name)


def _environment(kafka: Kafka, urls: dict[str, str], store: ObjectStore) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "QUERYD_KAFKA_BOOTSTRAP": kafka.bootstrap,
        "QUERYD_KAFKA_SESSION_TIMEOUT": str(_SESSION_SECONDS),
        "QUERYD_RELAY_TRANSACTIONS": str(kafka.transactions).lower(),
        "QUERYD_DATA_URL": urls["data"],
        "QUERYD_STATE_URL": urls["state"],
        "QUERYD_RESULTS_URL": f"s3://{store.bucket}",
        "QUERYD_LEASE_SECONDS": str(LEASE_SECONDS),
        "QUERYD_DRAIN_SECONDS": str(_DRAIN_SECONDS),
        "QUERYD_SLOTS_INTERACTIVE": "2",
        "QUERYD_SLOTS_BATCH": "1",
        "QUERYD_LOG_LEVEL": "DEBUG",
        "AWS_ENDPOINT_URL": store.endpoint_url,
        "AWS_REGION": store.region,
        "AWS_ACCESS_KEY_ID": store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
    }


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False
