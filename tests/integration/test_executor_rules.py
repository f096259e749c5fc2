"""The rules of a Kafka consumer, kept by whole executors: real processes, real signals, and an Apache Kafka of their
own, whose group and topics they may break. `docs/consumer-rules.md` says which rule is held where.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from db.connection import DataPool
from db.migrations.upgrade import upgrade_data
from queryd.codec import decode_status, encode
from queryd.events import Mode, Status, Topic
from queryd.kafka.record import Partition
from service.embedded.object_store import ObjectStore
from service.embedded.servers import Lifeline
from service.topics import apply_topics
from tests.integration.queries import make_request, new_id, opened_pool
from tests.integration.records import until
from tests.servers import kafka as brokers
from tests.servers.kafka import Kafka

pytestmark = pytest.mark.needs_kafka

_PARTITIONS = 3
_GROUPS = ("queryd-executor", "queryd-cancellations")
# As short as an executor keeps up with on a busy machine. Stopped for longer, it has lost its partitions by both.
_SESSION_SECONDS = 6
_STOPPABLE = {"QUERYD_KAFKA_OPTIONS": json.dumps({"max.poll.interval.ms": 6000})}
# Whole processes start and stop here, each with children of its own: a busy machine takes its time.
_PATIENCE_SECONDS = 120.0
_LOOK_SECONDS = 0.05
# Half a second of one core: time enough to be seen running.
_SLOW = "SELECT count(*) FROM range(8000000) AS a(i) WHERE sqrt(i) * sin(i) > 100"


@pytest.fixture(scope="module")
def own_kafka(kafka: Kafka, lifeline: Lifeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A broker that no other test knows: the executors' group and topics have fixed names."""
    directory = tmp_path_factory.mktemp("own-kafka")
    with brokers.run(kafka.kind, directory, lifeline) as broker:
        yield broker
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(slots=True)
class Place:
    """Where a test's executors run: everything of it fresh but the broker and the object store."""

    kafka: Kafka
    admin: AdminClient
    pool: DataPool
    folder: Path
    environment: dict[str, str]
    sent: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """librdkafka's configuration."""
        return {"bootstrap.servers": self.kafka.bootstrap}

    def submit(self, count: int, *, slow: int = 0, bad: int = 0) -> None:
        """Publish requests over both lanes, of which some are slow, and so many records that are none."""
        producer = Producer(self.config)
        for number in range(count):
            mode = Mode.BATCH if number % 3 == 0 else Mode.INTERACTIVE
            request = make_request(mode=mode, sql=_SLOW if number < slow else f"SELECT {number} AS n")
            producer.produce(mode.topic.value, key=request.query_id, value=encode(request))
            self.sent.append(request.query_id)
            if number < bad:
                producer.produce(mode.topic.value, key=new_id(), value=f"no request {number}".encode())
        assert producer.flush(_PATIENCE_SECONDS) == 0

    def offsets(self) -> tuple[dict[Partition, int], dict[Partition, int]]:
        """The committed offsets of both lanes, 0 where there is none, and the ends of their logs."""
        reader = Consumer(self.config | {"group.id": "queryd-executor"})
        try:
            lanes = [TopicPartition(mode.topic.value, number) for mode in Mode for number in range(_PARTITIONS)]
            committed = reader.committed(lanes, timeout=_PATIENCE_SECONDS)
            ends = {(p.topic, p.partition): reader.get_watermark_offsets(p, timeout=_PATIENCE_SECONDS) for p in lanes}
            return (
                {(partition.topic, partition.partition): max(0, partition.offset) for partition in committed},
                {partition: high for partition, (_, high) in ends.items()},
            )
        finally:
            reader.close()

    async def statuses(self) -> dict[str, str]:
        """The status of each query that has a row."""
        async with self.pool.connection() as connection:
            cursor = await connection.execute("SELECT id::text, status FROM query_results")
            return dict(await cursor.fetchall())

    async def all_succeeded(self) -> bool:
        """Every request that was sent has succeeded."""
        statuses = await self.statuses()
        return all(statuses.get(query_id) == Status.SUCCEEDED for query_id in self.sent)

    async def stories(self) -> dict[str, list[tuple[int, Status]]]:
        """The events of each query in order, which all wait in the outbox: there is no relay."""
        async with self.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT query_id::text, payload FROM outbox WHERE type = 'QueryStatusChanged' ORDER BY position"
            )
            stories: dict[str, list[tuple[int, Status]]] = {}
            for query_id, payload in await cursor.fetchall():
                event = decode_status(bytes(payload))
                stories.setdefault(query_id, []).append((event.sequence, event.status))
            return stories

    async def busy_workers(self) -> set[int]:
        """The pids of the executors that run something."""
        async with self.pool.connection() as connection:
            cursor = await connection.execute("SELECT DISTINCT worker FROM query_leases")
            return {int(worker.rpartition(":")[2]) for (worker,) in await cursor.fetchall()}

    async def assert_every_query_ended_once(self) -> None:
        """One row for each request, all succeeded; a gap-free story each, with one terminal event, at its end."""
        assert await self.statuses() == dict.fromkeys(self.sent, Status.SUCCEEDED)
        stories = await self.stories()
        assert stories.keys() == set(self.sent)
        for story in stories.values():
            assert [sequence for sequence, _ in story] == list(range(1, len(story) + 1))
            assert [status.terminal for _, status in story] == [False] * (len(story) - 1) + [True]


@pytest.fixture
async def place(own_kafka: Kafka, object_store: ObjectStore, data_url: str, tmp_path: Path) -> AsyncIterator[Place]:
    upgrade_data(data_url)
    config: dict[str, Any] = {"bootstrap.servers": own_kafka.bootstrap}
    apply_topics(config, _PARTITIONS, replication=1)
    admin = AdminClient(config)
    async with opened_pool(data_url) as pool:
        yield Place(
            own_kafka,
            admin,
            pool,
            tmp_path,
            {
                "QUERYD_KAFKA_BOOTSTRAP": own_kafka.bootstrap,
                "QUERYD_KAFKA_SESSION_TIMEOUT": str(_SESSION_SECONDS),
                "QUERYD_DATA_URL": data_url,
                "QUERYD_STATE_URL": data_url,
                "QUERYD_RESULTS_URL": f"s3://{object_store.bucket}",
                "QUERYD_LEASE_SECONDS": "3",
                "QUERYD_SLOTS_INTERACTIVE": "2",
                "QUERYD_SLOTS_BATCH": "1",
                "QUERYD_SCRATCH": str(tmp_path / "scratch"),
                "AWS_ENDPOINT_URL": object_store.endpoint_url,
                "AWS_REGION": object_store.region,
                "AWS_ACCESS_KEY_ID": object_store.writer.access_key,
                "AWS_SECRET_ACCESS_KEY": object_store.writer.secret_key,
            },
        )
        await _forget_everything(admin)


async def _forget_everything(admin: AdminClient) -> None:
    """The next test finds neither topics nor groups."""
    for deleted in admin.delete_topics([topic.value for topic in Topic], operation_timeout=_PATIENCE_SECONDS).values():
        deleted.result()
    known = {group.group_id for group in admin.list_consumer_groups().result().valid}

    async def forgotten() -> bool:
        # A static member, or one that was killed, is missed only after its session.
        for group in known & set(_GROUPS):
            with suppress(KafkaException):
                await asyncio.to_thread(admin.delete_consumer_groups([group])[group].result)
                known.discard(group)
        return known.isdisjoint(_GROUPS)

    await _until(forgotten)


class Process:
    """An executor, started like anybody starts one."""

    def __init__(self, place: Place, settings: dict[str, str] | None = None) -> None:
        self._name = new_id()
        self._ready = place.folder / f"{self._name}.ready"
        self._log = place.folder / f"{self._name}.log"
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment |= place.environment | {"PYTHONPATH": os.pathsep.join(sys.path)} | (settings or {})
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "queryd", "run", "executor"],
                cwd=place.folder,
                env=environment | {"QUERYD_READY_FILE": str(self._ready)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def log(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    def says(self, words: str) -> bool:
        """True once a line of its log begins with these words."""
        return any(str(line["event"]).startswith(words) for line in self.log)

    async def until_ready(self) -> None:
        """Wait for its first assignment."""
        await self.until(self._ready.exists)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what must come while it lives."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            await asyncio.sleep(_LOOK_SECONDS)

    async def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        return await asyncio.to_thread(self.process.wait, _PATIENCE_SECONDS)

    async def end(self) -> None:
        """SIGTERM; it drains and ends well, and no callback of it has swallowed an error."""
        self.process.send_signal(signal.SIGTERM)
        assert await self.ended() == 0, self._log.read_text()
        assert not [line for line in self.log if "callback failed" in line["event"]]

    def failure(self) -> dict[str, Any]:
        """The one line that says why it ended."""
        [line] = [line for line in self.log if line["level"] in ("error", "critical")]
        return line


@contextmanager
def _executors(place: Place, *settings: dict[str, str]) -> Iterator[list[Process]]:
    with ExitStack() as stack:
        processes = [Process(place, each) for each in settings]
        for each in processes:
            stack.callback(each.process.wait)
            stack.callback(each.process.kill)
        yield processes


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
async def test_an_executor_that_was_stopped_and_wakes_loses_and_doubles_nothing(place: Place, protocol: str) -> None:
    """Rules 6 to 9 and 12: SIGSTOP past the lease, the session and `max.poll.interval.ms`, then SIGCONT."""
    settings = {"QUERYD_KAFKA_GROUP_PROTOCOL": protocol} | _STOPPABLE
    with _executors(place, settings, settings) as (stopped, other):
        await asyncio.gather(stopped.until_ready(), other.until_ready())
        place.submit(40, slow=4)

        async def busy() -> bool:
            return stopped.process.pid in await place.busy_workers()

        await _until(busy)
        stopped.process.send_signal(signal.SIGSTOP)
        place.submit(40)
        # The other one does it all, the attempts that the stopped one holds among it.
        await _until(place.all_succeeded)

        async def missed() -> bool:
            return await _count_members(place) == len(Mode)

        await _until(missed)
        stopped.process.send_signal(signal.SIGCONT)
        await stopped.until(lambda: any(_lost_some(line) for line in stopped.log))
        # It is given partitions again, and works.
        await stopped.until(lambda: _assigned_after_loss(stopped.log))
        place.submit(40)
        await _until(place.all_succeeded)
        await asyncio.gather(stopped.end(), other.end())
    await place.assert_every_query_ended_once()
    committed, ends = place.offsets()
    assert committed == ends


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    await until(condition, seconds=_PATIENCE_SECONDS)


async def _count_members(place: Place) -> int:
    """How many members the executors' group has; an executor is one of each lane."""
    described = place.admin.describe_consumer_groups(["queryd-executor"])["queryd-executor"]
    return len((await asyncio.to_thread(described.result, _PATIENCE_SECONDS)).members)


def _assigned_after_loss(log: list[dict[str, Any]]) -> bool:
    last_loss = max(place for place, line in enumerate(log) if _lost_some(line))
    return any(line["event"] == "partitions assigned" and line["partitions"] for line in log[last_loss:])


def _lost_some(line: dict[str, Any]) -> bool:
    return line["event"] == "partitions lost" and bool(line["partitions"])


@pytest.mark.slow
async def test_a_group_changes_its_protocol_once_the_last_of_the_old_has_left(place: Place) -> None:
    """Rule 12: a broker may refuse members of the other protocol. They wait, and take over what was committed."""
    classic, consumer = ({"QUERYD_KAFKA_GROUP_PROTOCOL": protocol} for protocol in ("classic", "consumer"))
    with _executors(place, classic) as [old]:
        await old.until_ready()
        place.submit(30)
        with _executors(place, consumer) as [new]:
            place.submit(30)
            await _until(place.all_succeeded)
            await old.end()
            await new.until_ready()
            place.submit(30)
            await _until(place.all_succeeded)
            await new.end()
    await place.assert_every_query_ended_once()
    committed, ends = place.offsets()
    assert committed == ends


@pytest.mark.slow
async def test_a_dead_letter_is_committed_to_the_outbox_before_its_offset_and_once(place: Place) -> None:
    """Rules 19 and 20: whatever becomes of Kafka's topic, and although every record is read twice."""
    place.submit(200, bad=20)
    topic = Topic.DEAD_LETTERS.value
    place.admin.delete_topics([topic], operation_timeout=_PATIENCE_SECONDS)[topic].result()
    for _ in range(2):
        with _executors(place, {}) as [executor]:
            await executor.until_ready()
            await _until(place.all_succeeded)
            await _until(lambda: _is_committed(place))
            await executor.end()
        assert await _count_letters(place) == (20, 20)
        _rewind(place)
    await place.assert_every_query_ended_once()
    apply_topics(place.config, _PARTITIONS, replication=1)


async def _is_committed(place: Place) -> bool:
    committed, ends = await asyncio.to_thread(place.offsets)
    return committed == ends


def _rewind(place: Place) -> None:
    """Every record will be read again."""
    first = [TopicPartition(mode.topic.value, number, 0) for mode in Mode for number in range(_PARTITIONS)]
    place.admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions("queryd-executor", first)])[
        "queryd-executor"
    ].result()


async def _count_letters(place: Place) -> tuple[int, int]:
    """The origins that are noted, and the dead letters that wait for a relay."""
    async with place.pool.connection() as connection:
        row = await (
            await connection.execute(
                "SELECT (SELECT count(*) FROM dead_letters), (SELECT count(*) FROM outbox WHERE type = 'DeadLetter')"
            )
        ).fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.slow
async def test_an_offset_that_left_the_log_stops_the_executor_with_one_line(place: Place) -> None:
    """Rule 17."""
    moved = TopicPartition(Topic.REQUESTS_BATCH.value, 1, 4_711)
    place.admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions("queryd-executor", [moved])])[
        "queryd-executor"
    ].result()
    with _executors(place, {}) as [executor]:
        assert await executor.ended() == 1
        failure = executor.failure()
        assert (failure["event"], failure["error"]) == ("service_failed", "OffsetOutOfRange")
        assert "move the group's offset to where reading shall go on" in failure["reason"]
    assert place.offsets()[0][moved.topic, 1] == 4_711


@pytest.mark.slow
async def test_an_executor_whose_consumer_failed_for_good_makes_another(place: Place) -> None:
    """Rules 11 and 14: a stranger takes its `group.instance.id`, and the executor takes it back."""
    identity, lane = f"one-{uuid.uuid4()}", Mode.BATCH.topic.value
    # A static member that leaves is missed only after its session: a short one, for the next test waits for it.
    session = {"QUERYD_KAFKA_SESSION_TIMEOUT": "3"}
    with _executors(place, session | {"QUERYD_KAFKA_OPTIONS": json.dumps({"group.instance.id": identity})}) as [
        executor
    ]:
        await executor.until_ready()
        stranger = Consumer(
            place.config
            | {"group.instance.id": f"{identity}-{lane}", "group.id": "queryd-executor"}
            | {"partition.assignment.strategy": "cooperative-sticky"}
            # Said by the error that comes in place of a message, and not once more on stderr.
            | {"enable.auto.commit": False, "log_level": 0, "error_cb": lambda _: None}
            | {"session.timeout.ms": 3000}
        )
        stranger.subscribe([lane])
        try:
            await executor.until(lambda: stranger.poll(0.1) is not None or executor.says("subscription_lost"))
            place.submit(10)
            await _until(place.all_succeeded)
        finally:
            stranger.close()
        await executor.end()
    # Once, and of the lane whose member was fenced: the executor's own members don't fence each other.
    assert [line["topic"] for line in executor.log if line["event"] == "subscription_lost"] == [lane]
    await place.assert_every_query_ended_once()
    committed, ends = place.offsets()
    assert committed == ends
