"""Members of consumer groups for tests: what the group did to them is written down, and so is what they did."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from queryd.kafka.consumer import Subscription, SubscriptionLost
from queryd.kafka.record import Partition, Record
from tests.integration.records import PATIENCE_SECONDS, until

# As short as members stay in their groups on a busy machine, whose polls come a second late at times.
MAX_POLL_SECONDS = 6.0
PROTOCOLS: dict[str, dict[str, Any]] = {
    "classic": {"session.timeout.ms": 6000},
    "consumer": {"group.protocol": "consumer"},
}


_Callback = Callable[[Consumer, list[TopicPartition]], None]


class Entry(NamedTuple):
    """One thing that happened to a member: assign, revoke or lost with partitions, or commit with their offsets."""

    what: str
    partitions: dict[Partition, int]


class Recorder(Consumer):
    """A consumer that writes down its rebalances and commits, and fails what the rules forbid: a bare commit, a commit
    of what was not stored or was lost, and `assign` under a cooperative protocol."""

    journals: ClassVar[defaultdict[str, list[Entry]]] = defaultdict(list)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._journal = self.journals[config["client.id"]]
        self._stored: dict[Partition, int] = {}
        self._at_a_loss = False

    def subscribe(
        self,
        topics: list[str],
        on_assign: _Callback | None = None,
        on_revoke: _Callback | None = None,
        on_lost: _Callback | None = None,
    ) -> None:
        assert on_assign is not None and on_revoke is not None
        assert on_lost is not None, "without it losses arrive at on_revoke"
        super().subscribe(
            topics,
            on_assign=self._told("assign", on_assign),
            on_revoke=self._told("revoke", on_revoke),
            on_lost=self._told("lost", on_lost),
        )

    def assign(self, partitions: list[TopicPartition]) -> None:
        raise AssertionError(f"assign() under a cooperative protocol, of {partitions}")

    def store_offsets(self, message: Any = None, offsets: list[TopicPartition] | None = None) -> None:
        assert message is None and offsets is not None
        super().store_offsets(offsets=offsets)
        self._stored.update(_offsets(offsets))

    def commit(self, message: Any = None, offsets: Any = None, asynchronous: bool = True) -> Any:
        assert message is None and offsets is not None, "a bare commit commits what was polled"
        assert not self._at_a_loss, "somebody else owns them already"
        wanted = _offsets(offsets)
        assert wanted.items() <= self._stored.items(), "stored first, since storing refuses what is not ours"
        self._journal.append(Entry("commit", wanted))
        if asynchronous:
            return super().commit(offsets=offsets, asynchronous=True)
        return super().commit(offsets=offsets, asynchronous=False)

    def _told(self, name: str, callback: _Callback) -> _Callback:
        def told(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            # The protocols also announce changes that are none.
            if partitions:
                self._journal.append(Entry(name, _offsets(partitions)))
            self._at_a_loss = name == "lost"
            callback(consumer, partitions)
            self._at_a_loss = False

        return told


def _offsets(partitions: Iterable[TopicPartition]) -> dict[Partition, int]:
    return {(partition.topic, partition.partition): partition.offset for partition in partitions}


def rebalances(name: str) -> list[tuple[str, int]]:
    """What the group did to the member, in order, each with the number of partitions."""
    return [(entry.what, len(entry.partitions)) for entry in Recorder.journals[name] if entry.what != "commit"]


class Effects:
    """What members did, by topic, partition and offset: the names of those who did it."""

    def __init__(self) -> None:
        self.by: defaultdict[Partition, defaultdict[int, list[str]]] = defaultdict(lambda: defaultdict(list))

    def happen(self, record: Record, member: str) -> None:
        """The record's effect is durable."""
        self.by[record.topic, record.partition][record.offset].append(member)

    def prefix(self, partition: Partition) -> int:
        """The end of the contiguous prefix of a partition without holes."""
        done = self.by[partition]
        return next(offset for offset in range(len(done) + 1) if offset not in done)


class Group:
    """A group of members over some topics, and what they did."""

    def __init__(self, bootstrap: str, name: str, topics: list[str], protocol: str) -> None:
        self.name = name
        self.topics = topics
        self.effects = Effects()
        self._kafka: dict[str, Any] = {"bootstrap.servers": bootstrap}
        self._protocol = PROTOCOLS[protocol]
        # A consumer that never subscribes belongs to no group and may read its offsets.
        self._reader = Consumer(self._kafka | {"group.id": name})

    def config(self, member: str) -> dict[str, Any]:
        """librdkafka's configuration of a member."""
        timeouts = {"max.poll.interval.ms": int(MAX_POLL_SECONDS * 1000), "fetch.wait.max.ms": 20}
        return self._kafka | self._protocol | timeouts | {"group.id": self.name, "client.id": member}

    async def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The committed offsets; 0 where there is none."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        found: list[TopicPartition] = []

        async def answered() -> bool:
            # A coordinator that has just come says for a moment that it is none.
            with suppress(KafkaException):
                found.extend(await asyncio.to_thread(self._reader.committed, wanted, PATIENCE_SECONDS))
            return bool(found)

        await until(answered)
        return {partition: max(0, offset) for partition, offset in _offsets(found).items()}

    def commit(self, offsets: dict[Partition, int]) -> None:
        """Move the committed offsets of a group without members, as an operator would."""
        Consumer(self._kafka | {"group.id": self.name}).commit(
            offsets=[TopicPartition(*partition, offset) for partition, offset in offsets.items()], asynchronous=False
        )

    def forget(self) -> None:
        """Delete the group and its offsets."""
        admin = AdminClient(self._kafka)
        for deleted in admin.delete_consumer_groups([self.name], request_timeout=PATIENCE_SECONDS).values():
            deleted.result()

    def close(self) -> None:
        """Let go of the broker."""
        self._reader.close()


class Member:
    """A member at work: it polls, and finishes what it received in any order and some of it late.

    `stall` and `wake` stop and restart its polling; what it holds then has its effects although it is not its own any
    more, as with a process that was stopped in the middle of work.
    """

    def __init__(self, group: Group, name: str, seed: int) -> None:
        self.name = name
        self._group = group
        self._random = random.Random(seed)
        self._polls = asyncio.Event()
        self._leaves = False
        self._pending: list[Record] = []
        self.subscription = Subscription(group.config(name), group.topics)
        self.task = asyncio.create_task(self._work(), name=name)
        self._polls.set()

    async def _work(self) -> None:
        await self.subscription.open()
        while not self._leaves:
            try:
                self._pending += await self.subscription.poll()
            except SubscriptionLost:
                # On a busy machine the broker may not tell in time from where to read.
                await self.subscription.close()
                self.subscription = Subscription(self._group.config(self.name), self._group.topics)
                await self.subscription.open()
            self.finish_some()
            await self._polls.wait()

    def finish_some(self) -> None:
        """Let a part of what is pending have its effect."""
        self._random.shuffle(self._pending)
        for _ in range(self._random.randint(0, len(self._pending))):
            record = self._pending.pop()
            self._group.effects.happen(record, self.name)
            self.subscription.finish(record)

    def stall(self) -> None:
        """Poll no more."""
        self._polls.clear()

    def wake(self) -> None:
        """Poll again."""
        self._polls.set()

    async def leave(self) -> None:
        """Close; what is pending is left to whoever comes next. Leaving twice is leaving once."""
        if self._leaves:
            return
        self._leaves = True
        self._polls.set()
        await self.task
        await self.subscription.close()


def write_records(bootstrap: str, partitions: Iterable[Partition], count: int, size: int = 20) -> None:
    """Write so many records of so many bytes to each partition."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20})
    for topic, partition in partitions:
        for number in range(count):
            producer.produce(topic, key=str(number), value=b"x" * size, partition=partition)
    assert producer.flush(PATIENCE_SECONDS) == 0


async def read(subscription: Subscription, enough: Callable[[list[Record]], bool]) -> list[Record]:
    """Poll until it is enough."""
    records: list[Record] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not enough(records):
            records += await subscription.poll()
    return records


async def read_until_lost(subscription: Subscription) -> SubscriptionLost:
    """Poll until the subscription says that it can't go on."""
    try:
        await read(subscription, lambda _: False)
    except SubscriptionLost as lost:
        return lost
    raise AssertionError("the subscription was not lost")


async def poll_all(subscriptions: Iterable[Subscription], enough: Callable[[], bool]) -> list[Record]:
    """Poll several members side by side until it is enough; what all of them received."""
    received: list[Record] = []

    async def follow(subscription: Subscription) -> None:
        while not enough():
            received.extend(await subscription.poll())

    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as tasks:
        for subscription in subscriptions:
            tasks.create_task(follow(subscription))
    return received
