"""The poll-to-commit loop, on the mock cluster that librdkafka carries: a broker inside this very process."""

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from queryd.kafka.consumer import OffsetOutOfRange, Subscription, SubscriptionLost, Window
from queryd.kafka.record import Partition, Record, to_record
from queryd.registry import RegistryAway

# Joining takes the mock cluster 3 s in the classic protocol and milliseconds in this one.
QUICK_GROUP = {"group.protocol": "consumer"}
# More than any step takes on a busy machine; only a failing test waits for it.
_PATIENCE_SECONDS = 15.0


class Cluster:
    """The mock cluster. Each topic has four partitions; tests write to the first unless they say otherwise."""

    def __init__(self) -> None:
        # librdkafka announces on stderr that the cluster is a mock; nobody needs to know.
        self._producer = Producer({"test.mock.num.brokers": 1, "log_level": 0})
        brokers = self._producer.list_topics(timeout=_PATIENCE_SECONDS).brokers.values()
        self.bootstrap = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def write(self, topic: str, values: list[str], partition: int = 0) -> None:
        """Write records and wait until the broker has them."""
        for value in values:
            self._producer.produce(topic, key=b"key", value=value.encode(), partition=partition, headers={"h": b"1"})
        assert self._producer.flush(_PATIENCE_SECONDS) == 0

    def committed(self, group: str, topic: str, partition: int = 0) -> int:
        """The group's committed offset, as a stranger sees it."""
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": group, "log_level": 0})
        try:
            return consumer.committed([TopicPartition(topic, partition)], timeout=_PATIENCE_SECONDS)[0].offset
        finally:
            consumer.close()


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def topic() -> str:
    return f"topic-{uuid.uuid4()}"


@pytest.fixture
def group() -> str:
    return f"group-{uuid.uuid4()}"


@pytest.fixture(autouse=True)
def _complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test may pass while a callback swallowed an error, unless it says so by clearing the log."""
    caplog.set_level(logging.ERROR, "queryd.kafka.consumer")
    yield
    assert [line for line in caplog.messages if "callback failed" in line] == []


@asynccontextmanager
async def _opened(cluster: Cluster, topic: str, group: str, **options: Any) -> AsyncIterator[Subscription]:
    # A fetch that waits for records would hold each pause, resume and close up for 0.5 s.
    config = {"bootstrap.servers": cluster.bootstrap, "group.id": group, "fetch.wait.max.ms": 20}
    subscription = Subscription(config | options.pop("protocol", QUICK_GROUP), [topic], **options)
    await subscription.open()
    try:
        yield subscription
    finally:
        await subscription.close()


async def _poll_until(subscription: Subscription, enough: Callable[[list[Record]], bool]) -> list[Record]:
    records: list[Record] = []
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not enough(records):
            records += await subscription.poll()
    return records


async def _read(subscription: Subscription, count: int) -> list[Record]:
    return await _poll_until(subscription, lambda records: len(records) >= count)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _values(records: list[Record]) -> list[str]:
    return [(record.value or b"").decode() for record in records]


async def _start_everywhere(offset: int, partitions: list[Partition]) -> dict[Partition, int]:
    return dict.fromkeys(partitions, offset)


async def test_a_record_is_what_was_written(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, ["seven"])
    async with _opened(cluster, topic, group) as subscription:
        (record,) = await _read(subscription, 1)
        assert (record.topic, record.partition, record.offset) == (topic, 0, 0)
        assert (record.key, record.value, record.headers) == (b"key", b"seven", (("h", b"1"),))
        assert record.size == len(b"key") + len(b"seven")
        assert record.timestamp_ms is not None
        assert not record.appended_by_broker
        assert subscription.owns(record)
        assert subscription.assignment == {(topic, partition) for partition in range(4)}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [QUICK_GROUP, {"session.timeout.ms": 6000}], ids=["KIP-848", "classic"])
async def test_a_restart_reads_on_from_the_finished_prefix(
    cluster: Cluster, topic: str, group: str, protocol: dict[str, Any]
) -> None:
    cluster.write(topic, _numbers(10))
    async with _opened(cluster, topic, group, protocol=protocol) as subscription:
        records = await _read(subscription, 10)
        # Everything but number 4, and out of order: what finished beyond it is read again.
        for record in reversed(records):
            if record.offset != 4:
                subscription.finish(record)
    assert cluster.committed(group, topic) == 4
    if protocol is QUICK_GROUP:
        async with _opened(cluster, topic, group) as subscription:
            assert _values(await _read(subscription, 6)) == ["4", "5", "6", "7", "8", "9"]
            # What lies before the committed offset will not come any more; what came is in work.
            assert [subscription.is_over(topic, 0, offset) for offset in (3, 4, 9, 10)] == [True, False, False, False]
            assert not subscription.is_over(topic, 1, 0)


async def test_what_was_polled_and_not_finished_is_never_committed(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(5))
    async with _opened(cluster, topic, group) as subscription:
        await _read(subscription, 5)
        await subscription.commit()
    async with _opened(cluster, topic, group) as subscription:
        assert _values(await _read(subscription, 5)) == _numbers(5)


async def test_what_is_finished_is_committed_while_the_poll_goes_on(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(5))
    async with _opened(cluster, topic, group) as subscription:
        for record in await _read(subscription, 5):
            subscription.finish(record)
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while await asyncio.to_thread(cluster.committed, group, topic) != 5:
                await subscription.poll()


async def test_a_commit_waits_for_the_brokers_answer(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(5))
    async with _opened(cluster, topic, group) as subscription:
        first, second, *_ = await _read(subscription, 5)
        subscription.finish(second)
        await subscription.commit()
        assert cluster.committed(group, topic) < 0
        subscription.finish(first)
        await subscription.commit()
        assert cluster.committed(group, topic) == 2


async def test_without_commits_the_group_remembers_nothing(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(5))
    for _ in range(2):
        async with _opened(cluster, topic, group, commit=False) as subscription:
            records = await _read(subscription, 5)
            assert _values(records) == _numbers(5)
            for record in records:
                subscription.finish(record)
            await subscription.commit()
    assert cluster.committed(group, topic) < 0


class Recorder(Consumer):
    """A consumer that says when it was paused and resumed."""

    calls: ClassVar[list[str]] = []

    def pause(self, partitions: list[TopicPartition]) -> None:
        self.calls.append("pause")
        super().pause(partitions)

    def resume(self, partitions: list[TopicPartition]) -> None:
        self.calls.append("resume")
        super().resume(partitions)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pauses and resumes of this test's subscriptions, as they happen."""
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr("queryd.kafka.consumer.Consumer", Recorder)
    return Recorder.calls


async def test_a_full_window_pauses_and_half_of_it_resumes(
    cluster: Cluster, topic: str, group: str, pauses: list[str]
) -> None:
    # One poll takes up to 500 records, so the window overflows by less than that.
    cluster.write(topic, _numbers(1_200))
    async with _opened(cluster, topic, group, window=Window(records=20)) as subscription:
        records = await _read(subscription, 20)
        assert len(records) < 20 + 500
        assert await subscription.poll() == []
        assert pauses == ["pause"]
        # One above the half: still paused, as each pause and resume throws the fetch buffer away.
        for record in records[11:]:
            subscription.finish(record)
        assert await subscription.poll() == []
        assert pauses == ["pause"]
        subscription.finish(records[0])
        more = await _poll_until(subscription, bool)
        assert pauses == ["pause", "resume"]
        assert more[0].offset == records[-1].offset + 1
        for record in [*records, *more]:
            subscription.finish(record)
        rest: list[Record] = []
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while len(records) + len(more) + len(rest) < 1_200:
                for record in await subscription.poll():
                    subscription.finish(record)
                    rest.append(record)
        # Nothing is lost and nothing comes twice over all the pauses.
        assert _values([*records, *more, *rest]) == _numbers(1_200)


async def test_a_window_is_counted_in_bytes_too(cluster: Cluster, topic: str, group: str, pauses: list[str]) -> None:
    cluster.write(topic, ["x" * 1_000] * 10)
    async with _opened(cluster, topic, group, window=Window(bytes=5_000)) as subscription:
        # They may come in several polls, and then the rest stays away.
        records = await _read(subscription, 5)
        await subscription.poll()
        assert pauses == ["pause"]
        # Down to half of the window, which are two and a half.
        for record in records[:-2]:
            assert pauses == ["pause"]
            subscription.finish(record)
            await subscription.poll()
        assert pauses == ["pause", "resume"]


async def test_a_completion_of_an_earlier_assignment_does_not_count(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(3))
    async with _opened(cluster, topic, group) as subscription:
        for record in await _read(subscription, 3):
            stale = dataclasses.replace(record, epoch=record.epoch - 1)
            assert not subscription.owns(stale)
            subscription.finish(stale)
    assert cluster.committed(group, topic) < 0


async def test_start_offsets_decide_and_the_rest_starts_at_the_earliest(
    cluster: Cluster, topic: str, group: str
) -> None:
    cluster.write(topic, _numbers(5))
    cluster.write(topic, _numbers(3), partition=1)

    async def start(partitions: list[Partition]) -> dict[Partition, int]:
        assert set(partitions) == {(topic, partition) for partition in range(4)}
        return {(topic, 0): 3}

    async with _opened(cluster, topic, group, start_offsets=start, commit=False) as subscription:
        records = await _read(subscription, 5)
    assert sorted((record.partition, record.offset) for record in records) == [(0, 3), (0, 4), (1, 0), (1, 1), (1, 2)]


async def test_an_offset_that_left_the_log_is_an_operators_decision(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(5))

    async def start(partitions: list[Partition]) -> dict[Partition, int]:
        return await _start_everywhere(4_711, partitions)

    async with _opened(cluster, topic, group, start_offsets=start) as subscription:
        with pytest.raises(OffsetOutOfRange, match="move the group's offset"):
            await _read(subscription, 1)


async def test_a_failing_assignment_surfaces_and_no_record_gets_through(
    cluster: Cluster, topic: str, group: str, caplog: pytest.LogCaptureFixture
) -> None:
    for partition in range(4):
        cluster.write(topic, _numbers(3), partition)
    async with _opened(cluster, topic, group) as subscription:
        for record in await _read(subscription, 12):
            if record.offset < 2:
                subscription.finish(record)
    async with _opened(cluster, topic, group, start_offsets=_refuse) as subscription:
        with pytest.raises(SubscriptionLost, match="LookupError"):
            await _read(subscription, 1)
        assert subscription.assignment == frozenset()
        assert caplog.messages == ["the assign callback failed: LookupError"]
        caplog.clear()
    # The group is none the worse for it.
    async with _opened(cluster, topic, group) as subscription:
        assert _values(await _read(subscription, 4)) == ["2"] * 4


async def _refuse(_partitions: list[Partition]) -> dict[Partition, int]:
    raise LookupError("the database is away")


async def test_a_revoke_drains_then_commits_and_ends_ownership(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(5))
    told: list[set[Partition]] = []
    records: list[Record] = []

    async def revoked(partitions: set[Partition]) -> None:
        told.append(partitions)
        # What finishes during the drain still counts.
        assert subscription.owns(records[0])
        subscription.finish(records[0])

    async with _opened(cluster, topic, group, revoked=revoked) as subscription:
        records += await _read(subscription, 5)
    assert told == [{(topic, partition) for partition in range(4)}]
    assert subscription.assignment == frozenset()
    assert not subscription.owns(records[1])
    assert cluster.committed(group, topic) == 1
    # A completion of an assignment that has ended is dropped.
    subscription.finish(records[1])
    assert cluster.committed(group, topic) == 1


@pytest.mark.slow
async def test_a_new_member_takes_over_without_loss_and_old_work_no_longer_counts(
    cluster: Cluster, topic: str, group: str
) -> None:
    for partition in range(4):
        cluster.write(topic, _numbers(3), partition)
    async with _opened(cluster, topic, group) as old:
        first = await _read(old, 12)
        for record in first:
            if record.offset == 0:
                old.finish(record)
        async with _opened(cluster, topic, group) as new:
            second: list[Record] = []
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while len(second) < 2 * len(new.assignment) or not new.assignment:
                    polled, _ = await asyncio.gather(new.poll(), old.poll())
                    second += polled
            moved = new.assignment
            assert moved
            assert moved | old.assignment == {(topic, partition) for partition in range(4)}
            assert not moved & old.assignment
            assert {(record.partition, record.offset) for record in second} == {
                (partition, offset) for _, partition in moved for offset in (1, 2)
            }
            assert [old.owns(record) for record in first] == [
                (record.topic, record.partition) not in moved for record in first
            ]
            # The old member's late completions must not commit for the new owner.
            for record in first:
                old.finish(record)
            await old.commit()
            await asyncio.gather(new.poll(), old.poll())
    for partition in range(4):
        assert cluster.committed(group, topic, partition) == (1 if (topic, partition) in moved else 3)


async def test_the_first_assignment_can_be_awaited(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, ["one"])
    async with _opened(cluster, topic, group) as subscription:
        waiting = asyncio.create_task(subscription.wait_assigned())
        await _read(subscription, 1)
        await asyncio.wait_for(waiting, _PATIENCE_SECONDS)


async def test_a_caller_cannot_configure_automatic_commits(cluster: Cluster, topic: str, group: str) -> None:
    cluster.write(topic, _numbers(5))
    automatic = {"enable.auto.commit": True, "enable.auto.offset.store": True, "auto.commit.interval.ms": 1}
    async with _opened(cluster, topic, group, protocol=QUICK_GROUP | automatic) as subscription:
        await _read(subscription, 5)
        await subscription.poll()
    assert cluster.committed(group, topic) < 0


async def test_a_configuration_that_librdkafka_refuses_is_an_error_at_once(topic: str, group: str) -> None:
    with pytest.raises(KafkaException, match=r"no\.such\.property"):
        Subscription({"bootstrap.servers": "localhost:1", "group.id": group, "no.such.property": 1}, [topic])


async def test_a_failing_first_assignment_is_a_loss_and_no_operators_decision(
    cluster: Cluster, topic: str, group: str, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.write(topic, _numbers(3))
    async with _opened(cluster, topic, group, start_offsets=_refuse, commit=False) as subscription:
        with pytest.raises(SubscriptionLost):
            await _read(subscription, 1)
    caplog.clear()


async def test_a_failing_revoke_still_commits_and_ends_ownership(
    cluster: Cluster, topic: str, group: str, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.write(topic, _numbers(3))

    async def revoked(_partitions: set[Partition]) -> None:
        subscription.finish(records[0])
        raise LookupError

    async with _opened(cluster, topic, group, revoked=revoked) as subscription:
        records = await _read(subscription, 3)
    caplog.clear()
    assert not subscription.assignment
    assert not subscription.owns(records[0])
    assert cluster.committed(group, topic) == 1


def test_headers_that_the_binding_cannot_read_do_not_stop_the_record(caplog: pytest.LogCaptureFixture) -> None:
    class Unreadable(Mock):
        """What the binding does with a header name that is not UTF-8, such as `bad\\xff` by another client."""

        def headers(self) -> list[tuple[str, bytes]]:
            raise SystemError

    caplog.set_level(logging.WARNING, "queryd.kafka.record")
    message = Unreadable()
    message.configure_mock(
        **{
            "topic.return_value": "query.requests.batch",
            "partition.return_value": 3,
            "offset.return_value": 7,
            "timestamp.return_value": (1, 0),
        }
    )
    record = to_record(message)
    assert (record.headers, record.has_headers) == ((), False)
    [line] = caplog.records
    assert (vars(line)["topic"], vars(line)["partition"], vars(line)["offset"]) == ("query.requests.batch", 3, 7)


class _Registry:
    """A schema registry that is away until it knows the one schema that records need."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = False
        self.known = False
        monkeypatch.setattr("queryd.kafka.consumer.registry_in_use", lambda: self)
        monkeypatch.setattr("queryd.kafka.consumer._ASK_AGAIN_SECONDS", 0.0)

    def missing(self, records: Iterable[bytes | None]) -> set[int]:
        return {7} if any(records) and not self.known else set()

    def fetch(self, ids: set[int]) -> None:
        assert ids == {7}
        self.asked = True
        raise RegistryAway


async def test_while_the_registry_is_away_the_poll_goes_on_and_nothing_is_handed_over_or_committed(
    cluster: Cluster, topic: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = _Registry(monkeypatch)
    cluster.write(topic, _numbers(3))
    async with _opened(cluster, topic, group) as subscription:
        assert await _poll_until(subscription, lambda _: registry.asked) == []
        cluster.write(topic, ["3", "4"])
        # Received all the same: what is held counts as unfinished.
        assert await _poll_until(subscription, lambda _: subscription._unfinished(topic)[0] == 5) == []
        registry.known = True
        records = await _read(subscription, 5)
        assert _values(records) == _numbers(5)
        assert cluster.committed(group, topic) < 0
        for record in records:
            subscription.finish(record)
        await subscription.commit()
        assert cluster.committed(group, topic) == 5


async def test_what_was_held_of_a_partition_that_is_gone_is_not_handed_over(
    cluster: Cluster, topic: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = _Registry(monkeypatch)
    cluster.write(topic, ["0"])
    cluster.write(topic, ["1"], partition=1)
    async with _opened(cluster, topic, group) as subscription:
        await _poll_until(subscription, lambda _: subscription._unfinished(topic)[0] == 2)
        subscription._forget({(topic, 0)})
        registry.known = True
        assert _values(await _read(subscription, 1)) == ["1"]
