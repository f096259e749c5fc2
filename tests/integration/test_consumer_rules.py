"""The rules of a Kafka consumer, on Apache Kafka itself: members that come, go, stall and come back, and offsets that
somebody moved. Effects and committed offsets are judged. `docs/consumer-rules.md` says which rule is held where.
"""

import asyncio
import logging
import os
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import NamedTuple

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from queryd.kafka.consumer import OffsetOutOfRange, Rebalancing, Subscription, Window
from queryd.kafka.record import Partition, Record
from tests.integration.members import (
    MAX_POLL_SECONDS,
    PROTOCOLS,
    Group,
    Member,
    Recorder,
    poll_all,
    read,
    read_until_lost,
    rebalances,
    write_records,
)
from tests.integration.records import PATIENCE_SECONDS, until
from tests.servers.kafka import Kafka

pytestmark = pytest.mark.needs_kafka

# Every member's poll blocks a thread for up to 100 ms, and no member may wait for another's.
_THREADS = 32
_STORM_SECONDS = 9.0
# How often the storm looks whether a committed offset has moved back or passed what is finished.
_WATCH_SECONDS = 0.1

NewTopic = Callable[..., str]
NewGroup = Callable[..., Group]


@pytest.fixture(autouse=True)
async def _threads() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))


@pytest.fixture(autouse=True)
def _journals(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.journals.clear()
    monkeypatch.setattr("queryd.kafka.consumer.Consumer", Recorder)


@pytest.fixture(autouse=True)
def _complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test may pass while a callback swallowed an error, unless it says so by clearing the log."""
    caplog.set_level(logging.WARNING, "queryd.kafka.consumer")
    yield
    complaints = [line for line in caplog.messages if "callback failed" in line]
    # That the broker did not tell in time from where to read is for a new subscription to mend.
    assert [line for line in complaints if "Failed to get committed offsets" not in line] == []


@pytest.fixture
def new_group(kafka: Kafka) -> Iterator[NewGroup]:
    """Makes a group that no other test knows: `new_group(topics, protocol)`."""
    made: list[Group] = []

    def make(topics: list[str], protocol: str = "classic") -> Group:
        made.append(Group(kafka.bootstrap, f"group-{uuid.uuid4()}", topics, protocol))
        return made[-1]

    yield make
    for group in made:
        group.close()


# Rebalances.


@pytest.mark.slow
async def test_a_member_that_stalled_commits_nothing_and_its_late_work_does_not_count(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup
) -> None:
    """Rules 6, 7, 8: stalled past `max.poll.interval.ms`, for real. Both protocols side by side, for it takes time."""
    await asyncio.gather(
        *(_stall(kafka, new_group([unique_topic(2)], protocol), protocol, together=True) for protocol in PROTOCOLS),
        *(_stall(kafka, new_group([unique_topic(2)], protocol), protocol, together=False) for protocol in PROTOCOLS),
    )


async def _stall(kafka: Kafka, group: Group, protocol: str, *, together: bool) -> None:
    """`together`: they share the partitions beforehand. Otherwise the other member joins when the first has stalled."""
    first, second = f"{protocol}-{together}-first", f"{protocol}-{together}-second"
    [topic] = group.topics
    partitions: list[Partition] = [(topic, 0), (topic, 1)]
    a, b = Subscription(group.config(first), [topic]), Subscription(group.config(second), [topic])
    await a.open()
    await poll_all([a], lambda: len(a.assignment) == 2)
    if together:
        await b.open()
        await poll_all([a, b], lambda: len(a.assignment) == len(b.assignment) == 1)
    write_records(kafka.bootstrap, partitions, 10)
    mine = sorted(a.assignment)
    held = await read(a, lambda records: len(records) == 10 * len(mine))
    for record in held:
        if record.offset < 4:
            a.finish(record)
    await a.commit()
    # Finished before the stall, or by work that went on during it, and never committed.
    for record in held:
        if record.offset < 7:
            a.finish(record)
    if not together:
        await b.open()
    taken: list[Record] = []
    while len(b.assignment) < 2 or len(taken) < 20 - 4 * len(mine):
        taken += await b.poll()
    assert {record.offset for record in taken if (record.topic, record.partition) in mine} == set(range(4, 10))
    for record in taken:
        if record.offset < 9:
            b.finish(record)
    await b.commit()
    assert await group.committed(partitions) == dict.fromkeys(partitions, 9)
    # It comes back, and still believes that all of it is its own.
    received = await poll_all([a, b], lambda: len(a.assignment) == len(b.assignment) == 1)
    assert not any(a.owns(record) for record in held)
    for record in held:
        a.finish(record)
    await a.commit()
    # The last record of what it has regained it receives again: its completion from before is not this one's.
    [again] = [record for record in received if a.owns(record)] or await read(a, bool)
    assert again.offset == 9
    for record in held:
        a.finish(record)
    await a.commit()
    assert await group.committed(partitions) == dict.fromkeys(partitions, 9)
    _assert_lost_and_never_committed(first, second, together=together)
    # Both work on.
    a.finish(again)
    for record in taken:
        b.finish(record)
    write_records(kafka.bootstrap, partitions, 5)
    late: list[Record] = []

    async def work(subscription: Subscription) -> None:
        while len(late) < 10:
            for record in await subscription.poll():
                subscription.finish(record)
                late.append(record)

    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(work(a), work(b))
    assert sorted((record.partition, record.offset) for record in late) == [
        (partition, offset) for partition in (0, 1) for offset in range(10, 15)
    ]
    await a.close()
    await b.close()
    assert await group.committed(partitions) == dict.fromkeys(partitions, 15)


def _assert_lost_and_never_committed(stalled: str, other: str, *, together: bool) -> None:
    of_stalled, of_other = rebalances(stalled), rebalances(other)
    if together:
        assert of_stalled == [("assign", 2), ("revoke", 1), ("lost", 1), ("assign", 1)]
        assert of_other == [("assign", 1), ("assign", 1), ("revoke", 1)]
    else:
        # What was asked back from it while it stalled it may hear of as a revoke, or together with its loss.
        assert of_stalled[0] == ("assign", 2)
        assert of_stalled[-1] == ("assign", 1)
        assert sum(count for what, count in of_stalled if what in ("lost", "revoke")) == 2
        assert any(what == "lost" for what, _ in of_stalled)
        assert sum(count for what, count in of_other if what == "assign") == 2
        assert of_other[-1] == ("revoke", 1)


@pytest.mark.slow
async def test_members_come_go_stall_and_die_at_random_and_nothing_is_lost(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup
) -> None:
    """Rules 1 to 9, by their effects. `QUERYD_TEST_SEED` repeats a run."""
    seed = int(os.environ.get("QUERYD_TEST_SEED") or random.randrange(2**32))
    print(f"seed={seed}")
    topics = [unique_topic(3), unique_topic(3)]
    partitions: list[Partition] = [(topic, number) for topic in topics for number in range(3)]
    writing = asyncio.create_task(_write_for_a_while(kafka, partitions))
    groups = [new_group(topics, protocol) for protocol in PROTOCOLS]
    await asyncio.gather(
        *(_storm(group, partitions, random.Random(seed + place), writing) for place, group in enumerate(groups))
    )


async def _write_for_a_while(kafka: Kafka, partitions: list[Partition]) -> int:
    """Write while members come and go; how many records each partition has in the end."""
    loop = asyncio.get_running_loop()
    written, end = 0, loop.time() + _STORM_SECONDS
    while loop.time() < end:
        await asyncio.to_thread(write_records, kafka.bootstrap, partitions, 20)
        written += 20
        await asyncio.sleep(0.2)
    return written


async def _storm(group: Group, partitions: list[Partition], rng: random.Random, writing: "asyncio.Task[int]") -> None:
    members, stalled = list[Member](), list[Member]()
    watching = asyncio.create_task(_watch(group, partitions))

    async def complete() -> bool:
        return await group.committed(partitions) == dict.fromkeys(partitions, await writing)

    async with AsyncExitStack() as leaving:

        def join() -> None:
            members.append(Member(group, str(uuid.uuid4()), rng.randrange(2**32)))
            leaving.push_async_callback(members[-1].leave)

        join()
        while not writing.done():
            await asyncio.sleep(rng.uniform(0.1, 1.2))
            await _do_something(rng, members, stalled, join)
        await until(complete, watching, *(member.task for member in members))
        end = await writing
        assert {partition: sorted(group.effects.by[partition]) for partition in partitions} == {
            partition: list(range(end)) for partition in partitions
        }
        # Whoever is still stalled is dead by now for the others. What it then does must not count, nor its farewell.
        for zombie in stalled:
            zombie.finish_some()
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    assert await complete()


async def _do_something(
    rng: random.Random, members: list[Member], stalled: list[Member], join: Callable[[], None]
) -> None:
    # librdkafka never expels a member of a KIP-848 group that stalls before its first assignment was handed over.
    settled = [member for member in members if rebalances(member.name)]
    match rng.choice(["join", "leave", "stall", "wake"]):
        case "join" if len(members) < 4:
            join()
        case "leave" if len(members) > 1:
            await members.pop(rng.randrange(len(members))).leave()
        case "stall" if len(members) > 1 and len(stalled) < 2 and settled:
            stalled.append(rng.choice(settled))
            members.remove(stalled[-1])
            stalled[-1].stall()
        case "wake" if stalled:
            members.append(stalled.pop(0))
            members[-1].wake()


async def _watch(group: Group, partitions: list[Partition]) -> None:
    """Rules 2 and 4: at no moment is a committed offset past the finished prefix, and it never moves back."""
    before = dict.fromkeys(partitions, 0)
    while True:
        committed = await group.committed(partitions)
        for partition, offset in committed.items():
            assert before[partition] <= offset <= group.effects.prefix(partition)
        before = committed
        await asyncio.sleep(_WATCH_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_storing_refuses_what_a_member_no_longer_owns(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup, protocol: str
) -> None:
    """Rule 5, as the rule has it: the refusal that all our commits pass by first."""
    topic = unique_topic(2)
    group = new_group([topic], protocol)
    write_records(kafka.bootstrap, [(topic, 0), (topic, 1)], 1)
    a, b = Subscription(group.config("a"), [topic]), Subscription(group.config("b"), [topic])
    await a.open()
    await read(a, lambda records: len(records) == 2)
    await b.open()
    await poll_all([a, b], lambda: len(a.assignment) == len(b.assignment) == 1)
    [moved], [kept] = b.assignment, a.assignment
    a._consumer.store_offsets(offsets=[TopicPartition(*kept, 1)])
    with pytest.raises(KafkaException, match="_STATE"):
        a._consumer.store_offsets(offsets=[TopicPartition(*moved, 1)])
    await a.close()
    await b.close()


@pytest.mark.slow
async def test_a_member_a_topic_shares_out_each_topic_evenly(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup
) -> None:
    """Two workers of two lanes each hold half of each lane, although the group balances only their sum."""
    topics = [unique_topic(6), unique_topic(6)]
    group = new_group(topics)
    first, second = ([Subscription(group.config(f"{n}-{topic}"), [topic]) for topic in topics] for n in (1, 2))
    for subscription in first:
        await subscription.open()
    await poll_all(first, lambda: sum(len(each.assignment) for each in first) == 12)
    for subscription in second:
        await subscription.open()
    everyone = [*first, *second]
    await poll_all(everyone, lambda: all(len(each.assignment) == 3 for each in everyone))
    for subscription in everyone:
        await subscription.close()


# The loop.


@pytest.mark.slow
async def test_a_full_window_is_no_stall(kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup) -> None:
    """Rules 13 and 15: paused for longer than `max.poll.interval.ms`, the member stays, and nothing comes twice."""
    topic = unique_topic(2)
    group = new_group([topic])
    write_records(kafka.bootstrap, [(topic, 0), (topic, 1)], 2_000)
    subscription = Subscription(group.config("slow"), [topic], window=Window(records=100))
    await subscription.open()
    held = await read(subscription, lambda records: len(records) >= 100)
    loop = asyncio.get_running_loop()
    end = loop.time() + MAX_POLL_SECONDS + 1
    while loop.time() < end:
        assert await subscription.poll() == []
    assert rebalances("slow") == [("assign", 2)]
    received = len(held)
    while received < 4_000:
        for record in held:
            assert subscription.owns(record)
            group.effects.happen(record, "slow")
            subscription.finish(record)
        held = await subscription.poll()
        received += len(held)
    for record in held:
        group.effects.happen(record, "slow")
        subscription.finish(record)
    await subscription.close()
    for partition in ((topic, 0), (topic, 1)):
        assert group.effects.by[partition] == {offset: ["slow"] for offset in range(2_000)}
    assert set((await group.committed([(topic, 0), (topic, 1)])).values()) == {2_000}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_fatal_error_is_a_loss_and_the_next_subscription_goes_on(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup, protocol: str
) -> None:
    """Rules 11 and 14: another member takes the same `group.instance.id`. librdkafka says so in place of a message."""
    topic = unique_topic()
    group = new_group([topic], protocol)
    identity = {"group.instance.id": "the same"}
    write_records(kafka.bootstrap, [(topic, 0)], 10)
    a, b = (Subscription(group.config(name) | identity, [topic]) for name in ("a", "b"))
    await a.open()
    held = await read(a, lambda records: len(records) == 10)
    for record in held[:3]:
        a.finish(record)
    await a.commit()
    await b.open()
    if protocol == "classic":
        # The older one is fenced, and what it finishes now is not committed any more.
        polling = asyncio.create_task(read(b, lambda records: len(records) == 7))
        lost = await read_until_lost(a)
        for record in held[:5]:
            a.finish(record)
        await a.close()
        assert [record.offset for record in await polling] == list(range(3, 10))
    else:
        # The younger one is refused.
        lost = await read_until_lost(b)
        assert a.owns(held[0])
        await a.close()
    assert "instance" in str(lost)
    assert await group.committed([(topic, 0)]) == {(topic, 0): 3}
    anew = Subscription(group.config("anew") | identity, [topic])
    await anew.open()
    assert (await read(anew, lambda records: len(records) == 7))[0].offset == 3
    await anew.close()
    # In the classic protocol it has been fenced in its turn.
    await b.close()


async def test_records_of_a_failed_assignment_are_read_by_the_next_subscription(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup, caplog: pytest.LogCaptureFixture
) -> None:
    """Rules 10 and 11: the callback's error is latched, nothing gets through, and nothing is lost."""
    topic = unique_topic(2)
    group = new_group([topic])
    write_records(kafka.bootstrap, [(topic, 0), (topic, 1)], 100)

    async def refuse(_partitions: list[Partition]) -> dict[Partition, int]:
        raise LookupError("the database is away")

    failing = Subscription(group.config("failing"), [topic], start_offsets=refuse)
    await failing.open()
    assert "LookupError" in str(await read_until_lost(failing))
    await failing.close()
    assert "the assign callback failed: LookupError" in caplog.messages
    caplog.clear()
    subscription = Subscription(group.config("next"), [topic])
    await subscription.open()
    records = await read(subscription, lambda records: len(records) == 200)
    await subscription.close()
    assert {(record.partition, record.offset) for record in records} == {
        (partition, offset) for partition in (0, 1) for offset in range(100)
    }


@pytest.mark.slow
async def test_a_drain_that_fails_in_a_revoke_loses_nothing(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup, caplog: pytest.LogCaptureFixture
) -> None:
    """Rule 10: the owner's own part of the callback raises, and what was finished is committed all the same."""
    topic = unique_topic(2)
    group = new_group([topic])
    write_records(kafka.bootstrap, [(topic, 0), (topic, 1)], 10)

    async def fail(_partitions: set[Partition]) -> None:
        raise RuntimeError

    a = Subscription(group.config("a"), [topic], revoked=fail)
    b = Subscription(group.config("b"), [topic])
    await a.open()
    for record in await read(a, lambda records: len(records) == 20):
        if record.offset < 3:
            a.finish(record)
    await b.open()
    polling = asyncio.create_task(poll_all([b], lambda: len(b.assignment) == 2))
    assert "RuntimeError" in str(await read_until_lost(a))
    await a.close()
    received = await polling
    received += await read(b, lambda records: len(received) + len(records) >= 14)
    assert {(record.partition, record.offset) for record in received} == {
        (partition, offset) for partition in (0, 1) for offset in range(3, 10)
    }
    await b.close()
    caplog.clear()


# Offsets that somebody moved, and logs with holes.


@pytest.mark.parametrize(("moved_to", "first"), [(2, 2), (8, 8), (None, 0)], ids=["lower", "higher", "removed"])
async def test_reading_goes_on_where_the_committed_offset_was_moved_to(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup, moved_to: int | None, first: int
) -> None:
    """Rules 3 and 4: only an operator moves it back, and what was finished since counts from there."""
    topic = unique_topic()
    group = new_group([topic])
    write_records(kafka.bootstrap, [(topic, 0)], 10)
    subscription = Subscription(group.config("before"), [topic])
    await subscription.open()
    for record in await read(subscription, lambda records: len(records) == 10):
        if record.offset < 5:
            subscription.finish(record)
    await subscription.close()
    assert await group.committed([(topic, 0)]) == {(topic, 0): 5}
    if moved_to is None:
        group.forget()
    else:
        group.commit({(topic, 0): moved_to})
    subscription = Subscription(group.config("after"), [topic])
    await subscription.open()
    records = await read(subscription, lambda records: len(records) == 10 - first)
    assert [record.offset for record in records] == list(range(first, 10))
    for record in records[1:]:
        subscription.finish(record)
    await subscription.close()
    assert await group.committed([(topic, 0)]) == {(topic, 0): moved_to or 0}


@pytest.mark.parametrize("beyond", ["the log's start", "the log's end"])
async def test_an_offset_out_of_range_stops_with_a_sentence(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup, beyond: str
) -> None:
    """Rule 17."""
    topic = unique_topic()
    group = new_group([topic])
    write_records(kafka.bootstrap, [(topic, 0)], 10)
    if beyond == "the log's start":
        group.commit({(topic, 0): 3})
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        for deleted in admin.delete_records([TopicPartition(topic, 0, 6)]).values():
            deleted.result(PATIENCE_SECONDS)
    else:
        group.commit({(topic, 0): 1_000})
    before = await group.committed([(topic, 0)])
    subscription = Subscription(group.config("reader"), [topic])
    await subscription.open()
    with pytest.raises(OffsetOutOfRange, match="move the group's offset to where reading shall go on"):
        await read(subscription, bool)
    await subscription.close()
    assert await group.committed([(topic, 0)]) == before


async def test_markers_and_aborted_records_are_holes_and_no_more(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup
) -> None:
    """Rules 3 and 18: transactions leave markers in the log, and aborted records are never seen."""
    topic = unique_topic()
    group = new_group([topic])
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": str(uuid.uuid4())})
    producer.init_transactions(PATIENCE_SECONDS)
    for number in range(6):
        producer.begin_transaction()
        for _ in range(3):
            producer.produce(topic, value=f"{number}".encode())
        # Written, and only then aborted.
        assert producer.flush(PATIENCE_SECONDS) == 0
        if number % 2:
            producer.abort_transaction(PATIENCE_SECONDS)
        else:
            producer.commit_transaction(PATIENCE_SECONDS)
    # Three records and a marker each.
    expected = [4 * number + place for number in (0, 2, 4) for place in range(3)]
    subscription = Subscription(group.config("reader"), [topic])
    await subscription.open()
    records = await read(subscription, lambda records: len(records) == 9)
    assert [record.offset for record in records] == expected
    assert {record.value for record in records} == {b"0", b"2", b"4"}
    for record in records:
        if record.offset != 16:
            subscription.finish(record)
    await subscription.commit()
    assert await group.committed([(topic, 0)]) == {(topic, 0): 16}
    subscription.finish(records[6])
    await subscription.close()
    assert await group.committed([(topic, 0)]) == {(topic, 0): 19}
    # Behind it there is nothing but markers and what was aborted.
    producer.begin_transaction()
    producer.produce(topic, value=b"new")
    producer.commit_transaction(PATIENCE_SECONDS)
    subscription = Subscription(group.config("again"), [topic])
    await subscription.open()
    [record] = await read(subscription, bool)
    await subscription.close()
    assert (record.offset, record.value) == (24, b"new")


async def test_a_compacted_log_is_read_across_its_holes(
    kafka: Kafka, unique_topic: NewTopic, new_group: NewGroup
) -> None:
    """Rule 3: a commit is derived from records received; the offset itself may lie in a hole."""
    topic = unique_topic(cleanup_policy="compact", segment_ms="100", min_cleanable_dirty_ratio="0.01")
    group = new_group([topic])
    group.commit({(topic, 0): 7})
    for _ in range(3):
        write_records(kafka.bootstrap, [(topic, 0)], 10)
        # A segment is rolled by the first record that comes after its time.
        await asyncio.sleep(0.2)
    write_records(kafka.bootstrap, [(topic, 0)], 1)
    records: list[Record] = []

    async def compacted() -> bool:
        records.clear()
        subscription = Subscription(group.config("reader"), [topic])
        await subscription.open()
        records.extend(await read(subscription, lambda read: bool(read) and read[-1].offset == 30))
        await subscription.close()
        return records[0].offset > 7

    await until(compacted)
    # Nothing was finished, so nothing was committed either.
    assert await group.committed([(topic, 0)]) == {(topic, 0): 7}
    subscription = Subscription(group.config("last"), [topic])
    await subscription.open()
    records = await read(subscription, lambda read: bool(read) and read[-1].offset == 30)
    for record in records[1:]:
        subscription.finish(record)
    await subscription.commit()
    # Below the first record there is nothing of ours to commit, and that one is not finished.
    assert await group.committed([(topic, 0)]) == {(topic, 0): 7}
    subscription.finish(records[0])
    await subscription.close()
    assert await group.committed([(topic, 0)]) == {(topic, 0): 31}


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        (KafkaError.REBALANCE_IN_PROGRESS, Rebalancing),
        (KafkaError.ILLEGAL_GENERATION, Rebalancing),
        (KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaException),
    ],
)
async def test_a_refused_commit_is_told_again(
    kafka: Kafka,
    unique_topic: NewTopic,
    new_group: NewGroup,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    raised: type[Exception],
) -> None:
    """Rule 1: the broker refuses a single partition, which the binding says in its answer and does not raise."""
    topic = unique_topic()
    group = new_group([topic])
    write_records(kafka.bootstrap, [(topic, 0)], 3)
    subscription = Subscription(group.config("reader"), [topic])
    await subscription.open()
    for record in await read(subscription, lambda records: len(records) == 3):
        subscription.finish(record)

    class Refused(NamedTuple):
        """What the binding answers for a partition."""

        topic: str
        partition: int
        error: KafkaError

    with monkeypatch.context() as patched:
        refused = [Refused(topic, 0, KafkaError(code))]
        patched.setattr(Recorder, "commit", lambda *_, **__: refused)
        with pytest.raises(raised):
            await subscription.commit()
    await subscription.commit()
    assert await group.committed([(topic, 0)]) == {(topic, 0): 3}
    await subscription.close()
