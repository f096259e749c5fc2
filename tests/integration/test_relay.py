"""The relay: every row of the outbox reaches the status topic once, whatever the moment of a crash."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from psycopg import sql

from consumers.executor.status_event import QueryFacts, build_status_event
from db.connection import DataPool
from db.data.outbox import CHANNEL, NewEvent, Progress, read_progress, read_waiting, shard_of
from db.data.retention import UNTELL
from db.migrations.upgrade import upgrade_data
from processes.failpoints import FAILPOINTS_VARIABLE, Failpoint
from producers.relay.ledger import SPAN, Ledger, LedgerUnreadable, write_ledger
from producers.relay.relay import OutboxMismatch, Relay, RelayRules
from queryd.events import Mode, OrgId, QueryId, Status, Topic
from queryd.headers import continue_trace
from queryd.kafka import producer as producer_module
from queryd.kafka import transactional_producer
from service.embedded.postgres import Postgres
from tests.integration.queries import new_id, opened_pool
from tests.integration.records import PATIENCE_SECONDS, headers_of, prepare_topics, read_topic, until
from tests.servers.kafka import Kafka
from tests.servers.kafka_proxy import KafkaProxy, Trap

# What the relay reads at once.
_BATCH = 500
# A broker's default for the metadata of an offset.
_METADATA_BYTES = 4096

# The tests share a broker, and a relay's name there is its first shard: each test takes shards that no other has.
_free_shards = iter(range(63, -1, -1))

_BOTH_WAYS = pytest.mark.parametrize(
    "transactions", [pytest.param(True, marks=pytest.mark.needs_kafka), False], ids=["transactional", "plain"]
)
needs_kafka = pytest.mark.needs_kafka


class _Crash(Exception):
    """The relay's process ends here."""


@dataclass(frozen=True, slots=True)
class Place:
    """A data database of the test's own, a shard that no other test uses, and the broker."""

    url: str
    pool: DataPool
    kafka: Kafka
    shard: int

    def rules(self, *, transactions: bool) -> RelayRules:
        return RelayRules(self.url, prepare_topics(self.kafka), transactions, (self.shard,))


@dataclass(frozen=True, slots=True)
class RunningRelay:
    """A relay at work; `ready` is set once it publishes, or stands by."""

    relay: Relay
    task: "asyncio.Task[None]"
    ready: asyncio.Event


@pytest.fixture
async def place(kafka: Kafka, data_url: str) -> AsyncIterator[Place]:
    upgrade_data(data_url)
    async with opened_pool(data_url) as pool:
        yield Place(data_url, pool, kafka, next(_free_shards))


# Without a crash.


@_BOTH_WAYS
async def test_every_row_is_published_once_in_order_and_leaves_the_outbox(place: Place, transactions: bool) -> None:
    early = await _insert(place, _tell_stories(place.shard, queries=20))
    async with _running(place.rules(transactions=transactions), place.pool) as running:
        await _until_empty(place.pool, running)
        # It is at work, and hears of news.
        late = await _insert(place, _tell_stories(place.shard, queries=5))
        await _until_empty(place.pool, running)
    await _assert_published_once(place, [*early, *late])


@_BOTH_WAYS
async def test_a_record_has_the_rows_bytes_and_headers_and_the_querys_id_as_key(
    place: Place, transactions: bool
) -> None:
    [event, *_] = await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions)
    message = (await _read_published(place, [event]))[0]
    assert message.key() == event.query_id.encode()
    assert message.value() == event.payload
    assert headers_of(message) == {name: value.encode() for name, value in event.headers.obj.items()}


@_BOTH_WAYS
async def test_a_row_without_a_payload_is_a_tombstone(place: Place, transactions: bool) -> None:
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    async with place.pool.connection() as connection:
        await connection.execute("UPDATE outbox SET payload = NULL WHERE event_id = %s", [events[-1].event_id])
    await _publish_all(place, transactions)
    assert [message.value() for message in await _read_published(place, events)] == [
        *(event.payload for event in events[:-1]),
        None,
    ]


@_BOTH_WAYS
async def test_more_rows_than_a_batch_are_published_once_in_order(place: Place, transactions: bool) -> None:
    events = await _insert(place, _tell_stories(place.shard, queries=_BATCH // 2))
    assert len(events) > _BATCH
    await _publish_all(place, transactions)
    await _assert_published_once(place, events)


@_BOTH_WAYS
async def test_a_relay_that_starts_again_publishes_nothing_again(place: Place, transactions: bool) -> None:
    first = await _insert(place, _tell_stories(place.shard, queries=3))
    await _publish_all(place, transactions)
    second = await _insert(place, _tell_stories(place.shard, queries=3))
    await _publish_all(place, transactions)
    await _publish_all(place, transactions)
    await _assert_published_once(place, [*first, *second])


@_BOTH_WAYS
async def test_rows_of_other_shards_stay(place: Place, transactions: bool) -> None:
    ours = await _insert(place, _tell_stories(place.shard, queries=2))
    theirs = await _insert(place, _tell_stories((place.shard + 1) % 64, queries=2))
    async with _running(place.rules(transactions=transactions), place.pool) as running:
        await until(lambda: _is(place.pool, len(theirs)), running.task)
    await _assert_published_once(place, ours, left=len(theirs))
    assert await _read_published(place, theirs) == []


@needs_kafka
async def test_positions_far_apart_are_published_in_batches_whose_ledger_fits(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers: list[str] = []

    class Recording(Producer):
        def send_offsets_to_transaction(self, positions: Any, *rest: Any) -> None:
            ledgers.extend(position.metadata for position in positions)
            super().send_offsets_to_transaction(positions, *rest)

    monkeypatch.setattr(transactional_producer, "Producer", Recording)
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    # The last position that one ledger holds with the first, then the next one, then one that is far away.
    for position in (SPAN, SPAN + 1, 100 * SPAN):
        await _go_on_at(place.pool, position)
        events += await _insert(place, _tell_stories(place.shard, queries=1)[:1])
    await _publish_all(place, transactions=True)
    await _assert_published_once(place, events)
    assert len(ledgers) == 3
    assert max(map(len, ledgers)) < _METADATA_BYTES


# Crashes. What a process leaves behind is simulated by a producer that ends the relay at one of its calls.


def _crashing(point: str, *, at: int) -> type[Producer]:
    """A producer whose relay dies at a point of its batch, the `at`th time that it comes there."""
    passed = 0

    def die(here: str) -> bool:
        nonlocal passed
        passed += here == point
        return here == point and passed == at

    class Crashing(Producer):
        def begin_transaction(self) -> None:
            if die("before the transaction"):
                raise _Crash
            super().begin_transaction()

        def produce(self, *args: Any, **named: Any) -> None:
            if die("amid producing"):
                # What was produced has arrived.
                super().flush(PATIENCE_SECONDS)
                raise _Crash
            super().produce(*args, **named)

        def send_offsets_to_transaction(self, *args: Any) -> None:
            if die("before the ledger"):
                super().flush(PATIENCE_SECONDS)
                raise _Crash
            super().send_offsets_to_transaction(*args)

        def commit_transaction(self, *args: Any) -> None:
            if die("before the commit"):
                super().flush(PATIENCE_SECONDS)
                raise _Crash
            super().commit_transaction(*args)
            if die("before the delete"):
                raise _Crash

        def flush(self, *args: Any) -> int:
            left = super().flush(*args)
            if die("acknowledged"):
                raise _Crash
            return left

    return Crashing


@pytest.mark.slow
@needs_kafka
@pytest.mark.parametrize(
    ("point", "at"),
    [
        ("before the transaction", 1),
        ("amid producing", 1),
        ("amid producing", 20),
        ("before the ledger", 1),
        ("before the commit", 1),
        ("before the delete", 1),
        # In the second batch, when there is a ledger of the first.
        ("amid producing", _BATCH + 20),
        ("before the commit", 2),
        ("before the delete", 2),
    ],
)
async def test_after_a_crash_every_event_is_there_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, point: str, at: int
) -> None:
    queries = 200 if at in (2, _BATCH + 20) else 20
    events = await _insert(place, _tell_stories(place.shard, queries))
    await _crash(place, monkeypatch, _crashing(point, at=at), transactions=True)
    # Rows of a crashed batch are still there, whether it was committed or not.
    assert await _count_waiting(place.pool) == len(events) % _BATCH
    late = await _insert(place, _tell_stories(place.shard, queries=2))
    await _publish_all(place, transactions=True)
    await _assert_published_once(place, [*events, *late])


@pytest.mark.slow
@needs_kafka
async def test_crash_after_crash_every_event_is_there_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    for point in ("before the delete", "before the commit", "amid producing", "before the delete"):
        events += await _insert(place, _tell_stories(place.shard, queries=3))
        await _crash(place, monkeypatch, _crashing(point, at=1), transactions=True)
    await _publish_all(place, transactions=True)
    await _assert_published_once(place, events)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "at"), [("amid producing", 1), ("amid producing", 20), ("acknowledged", 1)])
async def test_without_transactions_a_crashed_batch_is_published_again_with_the_same_event_ids(
    place: Place, monkeypatch: pytest.MonkeyPatch, point: str, at: int
) -> None:
    events = await _insert(place, _tell_stories(place.shard, queries=2))
    await _publish_all(place, transactions=False)
    again = await _insert(place, _tell_stories(place.shard, queries=20))
    await _crash(place, monkeypatch, _crashing(point, at=at), transactions=False)
    assert await _count_waiting(place.pool) == 60
    await _publish_all(place, transactions=False)
    await _assert_published_once(place, events)
    published = Counter(_event_id(message) for message in await _read_published(place, again))
    assert published.keys() == {event.event_id for event in again}
    assert set(published.values()) <= {1, 2}
    # What a subscriber applies, passing over a sequence that it has seen, is the whole story in order.
    for query_id in {event.query_id for event in again}:
        own = [event for event in again if event.query_id == query_id]
        seen = [_event_id(message) for message in await _read_published(place, own)]
        assert list(dict.fromkeys(seen)) == [event.event_id for event in own]


def _event_id(message: Message) -> str:
    identity = headers_of(message)["ce_id"]
    assert identity is not None
    return identity.decode()


# Where Kafka and Postgres disagree.


@needs_kafka
async def test_a_ledger_of_another_outbox_stops_the_relay(place: Place, postgres_url: str) -> None:
    await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions=True)
    upgrade_data(postgres_url)
    async with opened_pool(postgres_url) as pool:
        remade = Place(postgres_url, pool, place.kafka, place.shard)
        events = await _insert(remade, _tell_stories(place.shard, queries=1))
        await _assert_stops(remade)
        assert await _read_published(remade, events) == []
        assert await _count_waiting(pool) == len(events)


@pytest.mark.slow
@needs_kafka
async def test_a_lost_ledger_stops_the_relay(place: Place) -> None:
    await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions=True)
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    admin = AdminClient(prepare_topics(place.kafka))
    [answer] = admin.delete_consumer_groups([f"queryd-relay-{place.shard}"]).values()
    await asyncio.to_thread(answer.result, PATIENCE_SECONDS)
    await _assert_stops(place)
    assert await _read_published(place, events) == []
    assert await _count_waiting(place.pool) == len(events)


@pytest.mark.slow
@needs_kafka
async def test_a_relay_that_was_reset_as_documented_publishes_what_still_waits(place: Place) -> None:
    await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions=True)
    await _commit_ledger(place, None)
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    await _assert_stops(place, LedgerUnreadable)
    relay = f"queryd-relay-{place.shard}"
    admin = AdminClient(prepare_topics(place.kafka))
    [answer] = admin.delete_consumer_groups([relay]).values()
    await asyncio.to_thread(answer.result, PATIENCE_SECONDS)
    async with place.pool.connection() as connection:
        await connection.execute("DELETE FROM relay_batches WHERE relay = %s", [relay])
    await _publish_all(place, transactions=True)
    events += await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions=True)
    await _assert_published_once(place, events)


@needs_kafka
async def test_a_group_offset_of_somebody_else_stops_the_relay(place: Place) -> None:
    await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions=True)
    # As an administrator's reset of the group leaves it.
    await _commit_ledger(place, None)
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    await _assert_stops(place, LedgerUnreadable)
    assert await _read_published(place, events) == []
    assert await _count_waiting(place.pool) == len(events)


@pytest.mark.slow
@needs_kafka
async def test_a_kafka_that_forgot_its_last_batches_stops_the_relay(place: Place) -> None:
    for _ in range(2):
        await _insert(place, _tell_stories(place.shard, queries=1))
        await _publish_all(place, transactions=True)
    await _commit_ledger(place, await _make_ledger(place, batch=1))
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    await _assert_stops(place)
    assert await _read_published(place, events) == []
    assert await _count_waiting(place.pool) == len(events)


@needs_kafka
async def test_after_a_relay_of_the_first_release_its_last_batch_is_settled(place: Place) -> None:
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    # It had published them, and counted no batches.
    await _commit_ledger(place, await _make_ledger(place, batch=None))
    late = await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions=True)
    await _assert_published_once(place, late)
    assert await _read_published(place, events) == []
    await _publish_all(place, transactions=True)
    await _assert_published_once(place, late)


# A database that was restored has the same generation, and draws the same positions again for other events.

Backup = Callable[[str], str]


@pytest.fixture
def back_up(postgres_server: Postgres) -> Iterator[Backup]:
    """Copies a database to which nobody is connected; the copy's URI."""
    made: list[str] = []

    def copy(url: str) -> str:
        made.append(f"backup_{uuid.uuid4().hex}")
        original = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.format(sql.Identifier(made[-1]), sql.Identifier(str(original))))
        return postgres_server.url(made[-1])

    yield copy
    for name in made:
        postgres_server.drop_database(name)


@asynccontextmanager
async def _connected(kafka: Kafka, url: str, shard: int) -> AsyncIterator[Place]:
    async with opened_pool(url) as pool:
        yield Place(url, pool, kafka, shard)


@pytest.mark.slow
@needs_kafka
@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("after", ["nothing new", "other events"])
async def test_a_database_restored_to_before_what_was_published_stops_the_relay(
    kafka: Kafka, data_url: str, back_up: Backup, batches: int, after: str
) -> None:
    upgrade_data(data_url)
    shard, published = next(_free_shards), []
    async with _connected(kafka, data_url, shard) as place:
        published += await _insert(place, _tell_stories(shard, queries=1))
        await _publish_all(place, transactions=True)
    older = back_up(data_url)
    async with _connected(kafka, data_url, shard) as place:
        for _ in range(batches):
            published += await _insert(place, _tell_stories(shard, queries=1))
            await _publish_all(place, transactions=True)
    async with _connected(kafka, older, shard) as restored:
        # They get the positions that the last batches had.
        new = await _insert(restored, _tell_stories(shard, queries=2)) if after == "other events" else []
        await _assert_stops(restored)
        await _assert_published_once(restored, published, left=len(new))
        assert await _read_published(restored, new) == []


@pytest.mark.slow
@needs_kafka
async def test_a_database_restored_to_while_events_waited_that_were_published_since_stops_the_relay(
    kafka: Kafka, data_url: str, back_up: Backup
) -> None:
    upgrade_data(data_url)
    shard = next(_free_shards)
    async with _connected(kafka, data_url, shard) as place:
        events = await _insert(place, _tell_stories(shard, queries=1))
    older = back_up(data_url)
    async with _connected(kafka, data_url, shard) as place:
        await _publish_all(place, transactions=True)
        more = await _insert(place, _tell_stories(shard, queries=1))
        await _publish_all(place, transactions=True)
    async with _connected(kafka, older, shard) as restored:
        await _assert_stops(restored)
        await _assert_published_once(restored, [*events, *more], left=len(events))


@pytest.mark.slow
@needs_kafka
async def test_a_database_that_lacks_no_more_than_the_last_delete_is_settled_as_after_a_crash(
    kafka: Kafka, data_url: str, back_up: Backup
) -> None:
    upgrade_data(data_url)
    shard = next(_free_shards)
    async with _connected(kafka, data_url, shard) as place:
        events = await _insert(place, _tell_stories(shard, queries=2))
    older = back_up(data_url)
    async with _connected(kafka, data_url, shard) as place:
        await _publish_all(place, transactions=True)
    async with _connected(kafka, older, shard) as restored:
        events += await _insert(restored, _tell_stories(shard, queries=1))
        await _publish_all(restored, transactions=True)
        await _assert_published_once(restored, events)


@needs_kafka
async def test_of_what_was_published_and_waits_to_be_deleted_a_hard_deletion_changes_nothing_for_the_relay(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = await _insert(place, _tell_stories(place.shard, queries=2))
    await _crash(place, monkeypatch, _crashing("before the delete", at=1), transactions=True)
    async with place.pool.connection() as connection:
        await connection.execute(UNTELL, {"query_ids": [events[0].query_id]})
    await _publish_all(place, transactions=True)
    await _assert_published_once(place, events)


# Two relays.


@pytest.mark.slow
@_BOTH_WAYS
async def test_of_two_relays_one_works_and_the_standby_takes_over(place: Place, transactions: bool) -> None:
    rules = place.rules(transactions=transactions)
    events = await _insert(place, _tell_stories(place.shard, queries=3))
    async with _running(rules, place.pool) as active:
        await _until_empty(place.pool, active)
        async with _running(rules, place.pool) as standby:
            await _wait(standby.ready)
            events += await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, active, standby)
            assert await _count_lock_holders(place.pool, place.shard) == 1
            await _stop(active, place.pool)
            events += await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, standby)
    await _assert_published_once(place, events)


@pytest.mark.slow
@needs_kafka
@pytest.mark.parametrize("point", ["amid producing", "before the commit", "before the delete"])
async def test_a_relay_that_was_stopped_and_wakes_up_late_publishes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    asleep, wake = threading.Event(), threading.Event()

    def doze(here: str) -> None:
        if here == point and not asleep.is_set():
            asleep.set()
            assert wake.wait(PATIENCE_SECONDS)

    class Dozing(Producer):
        def produce(self, *args: Any, **named: Any) -> None:
            super().produce(*args, **named)
            doze("amid producing")

        def commit_transaction(self, *args: Any) -> None:
            doze("before the commit")
            super().commit_transaction(*args)
            doze("before the delete")

    rules = place.rules(transactions=True)
    events = await _insert(place, _tell_stories(place.shard, queries=3))
    monkeypatch.setattr(transactional_producer, "Producer", Dozing)
    async with _running(rules, place.pool) as zombie:
        try:
            assert await asyncio.to_thread(asleep.wait, PATIENCE_SECONDS)
            monkeypatch.undo()
            # Its session is over, as `idle_session_timeout` has it, and with it the lock.
            await _end_lock_holder(place.pool, place.shard)
            async with _running(rules, place.pool) as successor:
                await _until_empty(place.pool, successor)
                wake.set()
                # Fenced, it stands by: told of in its log by way of `ready`.
                await _wait(zombie.ready)
                events += await _insert(place, _tell_stories(place.shard, queries=3))
                await _until_empty(place.pool, zombie, successor)
        finally:
            wake.set()
    await _assert_published_once(place, events)


@pytest.mark.slow
async def test_each_outage_of_postgres_is_logged_once_with_its_end(place: Place) -> None:
    rules = place.rules(transactions=False)
    with structlog.testing.capture_logs() as logs:
        async with _running(rules, place.pool) as active:
            await _wait(active.ready)
            async with _running(rules, place.pool) as standby:
                await _wait(standby.ready)
                for outage in (1, 2):
                    await _end_relays(place.pool)
                    await _insert(place, _tell_stories(place.shard, queries=1))
                    await _until_empty(place.pool, active, standby)

                    async def is_logged(times: int = 2 * outage) -> bool:
                        return _count_outages(logs) == (times, times)

                    await until(is_logged, active.task, standby.task)


async def _end_relays(pool: DataPool) -> None:
    """End the sessions of the active relay and of its standby."""
    async with pool.connection() as connection:
        ended = await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'queryd relay' AND datname = current_database()"
        )
        assert await ended.fetchall() == [(True,), (True,)]


def _count_outages(logs: Sequence[MutableMapping[str, Any]]) -> tuple[int, int]:
    """How often Postgres was logged as unavailable, and as available again."""
    events = [line["event"] for line in logs if line.get("dependency") == "postgres data"]
    return events.count("dependency_unavailable"), events.count("dependency_available")


# A request to end a transaction (EndTxn) that is delayed, or whose answer is lost. librdkafka speaks the first version
# of transactions: nothing in the request says which transaction of the producer it ends.


@contextmanager
def _proxied(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[KafkaProxy, RelayRules]]:
    """A relay's rules whose broker is behind a proxy."""
    rules = place.rules(transactions=True)
    with KafkaProxy(place.kafka.bootstrap) as proxy:
        kafka = rules.kafka | {"bootstrap.servers": proxy.bootstrap, "retry.backoff.max.ms": 5_000}
        yield proxy, replace(rules, kafka=kafka)


async def _see(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE_SECONDS)


def _is_aborted(place: Place) -> bool:
    """True once the broker has ended the relay's transaction: a pending one keeps back its offset."""
    group = {
        "group.id": f"queryd-relay-{place.shard}",
        "enable.auto.commit": False,
        "isolation.level": "read_committed",
    }
    consumer = Consumer(prepare_topics(place.kafka) | group)
    try:
        consumer.committed([TopicPartition(Topic.STATUS, 0)], timeout=PATIENCE_SECONDS)
    finally:
        consumer.close()
    return True


@pytest.mark.slow
@needs_kafka
@pytest.mark.parametrize("late", ["after the timeout", "after the successor"])
async def test_an_end_of_a_transaction_that_comes_after_its_timeout_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    # Long enough for the broker to abort, which it looks for each second. librdkafka gives up a request 0.1 s before
    # the transaction's timeout; repeated after its usual second, it could commit before the broker looks.
    monkeypatch.setattr(transactional_producer, "_TRANSACTION_MILLIS", 2_000)
    monkeypatch.setattr(transactional_producer, "_RETRY_MILLIS", 5_000)
    monkeypatch.setattr(transactional_producer, "BROKER_SECONDS", 30.0 if late == "after the timeout" else 5.0)
    with _proxied(place, monkeypatch) as (proxy, rules):
        async with _running(rules, place.pool) as running:
            events = await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, running)
            caught = proxy.catch(Trap.HOLD)
            delayed = await _insert(place, _tell_stories(place.shard, queries=3))
            await _see(caught.seen)
            if late == "after the timeout":
                assert await asyncio.to_thread(_is_aborted, place)
                assert await _read_published(place, delayed) == []
            else:
                await _until_empty(place.pool, running)
            caught.release()
            await _see(caught.answered)
            events += delayed + await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, running)
    await _assert_published_once(place, events)


@pytest.mark.slow
@needs_kafka
async def test_an_end_of_a_transaction_whose_answer_is_lost_is_found_in_the_ledger(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactional_producer, "BROKER_SECONDS", 3.0)
    with _proxied(place, monkeypatch) as (proxy, rules):
        async with _running(rules, place.pool) as running:
            events = await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, running)
            caught = proxy.catch(Trap.DROP_ANSWER)
            events += await _insert(place, _tell_stories(place.shard, queries=3))
            await _see(caught.answered)
            await _until_empty(place.pool, running)
            events += await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, running)
    await _assert_published_once(place, events)


@pytest.mark.slow
@needs_kafka
async def test_an_end_of_a_transaction_that_was_repeated_and_comes_late_ends_no_later_transaction(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """librdkafka repeats the request when its connection ends. The first one still reaches the broker, in the middle
    of the next batch."""
    amid, go_on, armed = threading.Event(), threading.Event(), threading.Event()

    class Pausing(Producer):
        def produce(self, *args: Any, **named: Any) -> None:
            super().produce(*args, **named)
            if armed.is_set() and not amid.is_set():
                # The batch's first record is in the log, and the transaction open.
                assert super().flush(PATIENCE_SECONDS) == 0
                amid.set()
                assert go_on.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(transactional_producer, "Producer", Pausing)
    monkeypatch.setattr(transactional_producer, "_TRANSACTION_MILLIS", 60_000)
    with _proxied(place, monkeypatch) as (proxy, rules):
        async with _running(rules, place.pool) as running:
            events = await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, running)
            caught = proxy.catch(Trap.HOLD_AND_CUT)
            events += await _insert(place, _tell_stories(place.shard, queries=3))
            await _see(caught.seen)
            await _until_empty(place.pool, running)
            armed.set()
            torn = await _insert(place, _tell_stories(place.shard, queries=3))
            await _see(amid)
            try:
                caught.release()
                await _see(caught.answered)
            finally:
                go_on.set()
            await _until_empty(place.pool, running)
            events += torn + await _insert(place, _tell_stories(place.shard, queries=3))
            await _until_empty(place.pool, running)
    await _assert_published_once(place, events)


# Real processes, killed and stopped at each named place.


@contextmanager
def _process(place: Place, armed: Path | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A relay's process; `armed` is a folder of failpoints."""
    command = [sys.executable, "-m", "tests.integration.relay_process"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUERYD_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if armed is not None:
        environment[FAILPOINTS_VARIABLE] = str(armed)
    process = subprocess.Popen(
        [*command, place.url, place.kafka.bootstrap, str(place.shard)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _arm(folder: Path, point: Failpoint, what: str = "KILL") -> Path:
    folder.mkdir()
    (folder / point).write_text(what)
    return folder


@pytest.mark.slow
@needs_kafka
@pytest.mark.parametrize("point", [point for point in Failpoint if point.startswith("relay.")])
async def test_a_relay_killed_at_a_named_place_has_published_everything_once(
    place: Place, tmp_path: Path, point: Failpoint
) -> None:
    prepare_topics(place.kafka)
    events = await _insert(place, _tell_stories(place.shard, queries=20))
    with _process(place, _arm(tmp_path / "failpoints", point)) as killed:
        assert await asyncio.to_thread(killed.wait, PATIENCE_SECONDS) == -signal.SIGKILL
    events += await _insert(place, _tell_stories(place.shard, queries=2))
    with _process(place):
        await until(lambda: _is(place.pool, 0))
    await _assert_published_once(place, events)


@pytest.mark.slow
@needs_kafka
async def test_relays_stopped_at_any_place_are_replaced_and_wake_to_find_themselves_fenced(
    place: Place, tmp_path: Path
) -> None:
    # All at once, for each waits until its session's idleness ends it.
    points = (Failpoint.RELAY_PRODUCING, Failpoint.RELAY_BEFORE_COMMIT, Failpoint.RELAY_COMMITTED)
    places = [replace(place, shard=next(_free_shards)) for _ in points]
    prepare_topics(place.kafka)
    events = [event for at in places for event in await _insert(at, _tell_stories(at.shard, queries=5))]
    with ExitStack() as stack:
        zombies = [
            stack.enter_context(_process(at, _arm(tmp_path / point, point, "STOP")))
            for at, point in zip(places, points, strict=True)
        ]
        await asyncio.gather(*(asyncio.to_thread(_wait_until_stopped, zombie.pid) for zombie in zombies))
        for at in places:
            stack.enter_context(_process(at))
        # Each successor publishes what its zombie had not committed, and deletes what it had.
        await until(lambda: _is(place.pool, 0))
        for zombie in zombies:
            zombie.send_signal(signal.SIGCONT)
        # It stands by, having been told by Kafka or by Postgres that it is nobody any more.
        await asyncio.gather(*(asyncio.to_thread(_read_ready, zombie, times=2) for zombie in zombies))
        for at in places:
            events += await _insert(at, _tell_stories(at.shard, queries=1))
        await until(lambda: _is(place.pool, 0))
    await _assert_published_once(place, events)


def _wait_until_stopped(pid: int) -> None:
    found, status = os.waitpid(pid, os.WUNTRACED)
    assert (found, os.WIFSTOPPED(status)) == (pid, True)


def _read_ready(process: "subprocess.Popen[str]", times: int) -> None:
    """Once for its own session, and once more for each that it began."""
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(times)] == ["ready\n"] * times


async def _crash(
    place: Place, monkeypatch: pytest.MonkeyPatch, producer: type[Producer], *, transactions: bool
) -> None:
    """Run a relay until its producer ends it."""
    with monkeypatch.context() as patched:
        patched.setattr(transactional_producer if transactions else producer_module, "Producer", producer)
        relay = Relay(place.rules(transactions=transactions), lambda: None)
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(_Crash):
                await relay.run()


async def _assert_stops(place: Place, error: type[Exception] = OutboxMismatch) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(error):
            await Relay(place.rules(transactions=True), lambda: None).run()


async def _make_ledger(place: Place, batch: int | None) -> Ledger:
    """The ledger of a batch with all that waits, or with one row that is gone."""
    progress = await _read_progress(place)
    async with place.pool.connection() as connection:
        waiting = await read_waiting(connection, [place.shard], _BATCH)
    return Ledger(progress.generation, tuple(event.position for event in waiting) or (1,), batch, "0" * 16)


async def _read_progress(place: Place) -> Progress:
    async with place.pool.connection() as connection:
        return await read_progress(connection, f"queryd-relay-{place.shard}")


async def _commit_ledger(place: Place, ledger: Ledger | None) -> None:
    """Put a committed offset in the place of the relay's."""
    group = {"group.id": f"queryd-relay-{place.shard}", "enable.auto.commit": False}
    metadata = "" if ledger is None else write_ledger(ledger)
    consumer = Consumer(prepare_topics(place.kafka) | group)
    try:
        offset = TopicPartition(Topic.STATUS, 0, 0, metadata)
        await asyncio.to_thread(lambda: consumer.commit(offsets=[offset], asynchronous=False))
    finally:
        consumer.close()


@asynccontextmanager
async def _running(rules: RelayRules, pool: DataPool) -> AsyncIterator[RunningRelay]:
    ready = asyncio.Event()
    relay = Relay(rules, ready.set)
    running = RunningRelay(relay, asyncio.create_task(relay.run()), ready)
    try:
        yield running
        await _stop(running, pool)
    finally:
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)


async def _stop(running: RunningRelay, pool: DataPool) -> None:
    running.relay.stop()
    async with pool.connection() as connection:
        # It looks once a second, and at once when there is news.
        await connection.execute(f"NOTIFY {CHANNEL}".encode())
    async with asyncio.timeout(PATIENCE_SECONDS):
        await running.task


async def _publish_all(place: Place, transactions: bool) -> None:
    """A relay from its start until the outbox is empty."""
    async with _running(place.rules(transactions=transactions), place.pool) as running:
        await _until_empty(place.pool, running)
        # An outbox that was empty before the relay came has told nothing of it yet.
        await _wait(running.ready)


async def _until_empty(pool: DataPool, *running: RunningRelay) -> None:
    await until(lambda: _is(pool, 0), *(relay.task for relay in running))


async def _is(pool: DataPool, waiting: int) -> bool:
    return await _count_waiting(pool) == waiting


async def _wait(event: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await event.wait()


def _tell_stories(shard: int, queries: int) -> list[NewEvent]:
    """Three events for each of so many new queries of a shard, interleaved."""
    facts = [_make_facts(shard) for _ in range(queries)]
    steps = [(None, Status.QUEUED), (Status.QUEUED, Status.RUNNING), (Status.RUNNING, Status.SUCCEEDED)]
    now = datetime.now(UTC)
    return [
        build_status_event(
            fact, sequence=sequence, previous=previous, status=status, attempt=int(sequence > 1), now=now
        )
        for sequence, (previous, status) in enumerate(steps, start=1)
        for fact in facts
    ]


def _make_facts(shard: int) -> QueryFacts:
    query_id = new_id()
    while shard_of(query_id) != shard:
        query_id = new_id()
    return QueryFacts(QueryId(query_id), OrgId(new_id()), Mode.INTERACTIVE, "0" * 64, continue_trace(None))


async def _insert(place: Place, events: list[NewEvent]) -> list[NewEvent]:
    """Commit events to the outbox, in their order."""
    async with place.pool.connection() as connection, connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO outbox (shard, event_id, query_id, type, payload, headers) VALUES (%s, %s, %s, %s, %s, %s)",
            [(e.shard, e.event_id, e.query_id, e.type, e.payload, e.headers) for e in events],
        )
    return events


async def _go_on_at(pool: DataPool, position: int) -> None:
    """The next row gets this position."""
    async with pool.connection() as connection:
        await connection.execute("SELECT setval(pg_get_serial_sequence('outbox', 'position'), %s, false)", [position])


async def _count_waiting(pool: DataPool) -> int:
    async with pool.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM outbox")).fetchone()
    assert row is not None
    return int(row[0])


_LOCK_HOLDERS = """
FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = %s
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def _count_lock_holders(pool: DataPool, shard: int) -> int:
    async with pool.connection() as connection:
        row = await (await connection.execute(f"SELECT count(*) {_LOCK_HOLDERS}".encode(), [shard])).fetchone()
    assert row is not None
    return int(row[0])


async def _end_lock_holder(pool: DataPool, shard: int) -> None:
    async with pool.connection() as connection:
        ended = await connection.execute(f"SELECT pg_terminate_backend(pid) {_LOCK_HOLDERS}".encode(), [shard])
        assert await ended.fetchall() == [(True,)]


async def _read_published(place: Place, events: Sequence[NewEvent]) -> list[Message]:
    """The records of these events' queries, in order within each query."""
    keys = {event.query_id.encode() for event in events}
    return [message for message in await read_topic(place.kafka, Topic.STATUS) if message.key() in keys]


async def _assert_published_once(place: Place, events: Sequence[NewEvent], left: int = 0) -> None:
    assert await _count_waiting(place.pool) == left
    published: dict[str, list[str]] = {}
    for message in await _read_published(place, events):
        headers = headers_of(message)
        subject, identity = headers["ce_subject"], headers["ce_id"]
        assert subject is not None
        assert identity is not None
        published.setdefault(subject.decode(), []).append(identity.decode())
    expected: dict[str, list[str]] = {}
    for event in events:
        expected.setdefault(event.query_id, []).append(event.event_id)
    assert published == expected


@pytest.mark.slow
@pytest.mark.needs_kafka
async def test_relays_of_different_shards_share_an_outbox(place: Place) -> None:
    events = await _insert(place, _tell_stories(place.shard, queries=1))
    await _publish_all(place, transactions=True)
    other = replace(place, shard=next(_free_shards))
    more = await _insert(place, _tell_stories(other.shard, queries=1))
    await _publish_all(other, transactions=True)
    await _assert_published_once(place, [*events, *more])
