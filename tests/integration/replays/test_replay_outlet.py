"""Last events are sent in a transaction that commits only while the rows they were judged by are held: a process that
was stopped, or cut off, puts none behind a tombstone."""

import asyncio
import threading
from typing import Any

import pytest
from confluent_kafka import Producer

from db.connection import DatabaseUnavailable
from queryd.events import Topic
from queryd.kafka import transactional_producer
from queryd.kafka.producer import NotDelivered
from queryd.kafka.record import NewRecord
from replay.outlet import Outlet
from tests.integration.queries import new_id
from tests.integration.records import PATIENCE_SECONDS, prepare_topics, read_topic
from tests.servers.kafka import Kafka
from tests.servers.kafka_proxy import KafkaProxy, Trap

pytestmark = pytest.mark.needs_kafka


async def _still_held() -> None:
    pass


async def _lost() -> None:
    raise DatabaseUnavailable("IdleInTransactionSessionTimeout")


def _make_record(key: str) -> NewRecord:
    # A tombstone for a key that no query has: other readers of the topic ignore it.
    return NewRecord(Topic.STATUS, key.encode(), None, [], 0)


async def _count(kafka: Kafka, key: str) -> int:
    return sum(record.key() == key.encode() for record in await read_topic(kafka, Topic.STATUS))


async def test_what_is_held_no_longer_is_not_published(kafka: Kafka) -> None:
    config, key = prepare_topics(kafka), new_id()
    outlet = Outlet(config, new_id())
    try:
        assert await outlet.publish([_make_record(key)], _still_held) == [True]
        with pytest.raises(DatabaseUnavailable):
            await outlet.publish([_make_record(key)], _lost)
    finally:
        await outlet.close()
    assert await _count(kafka, key) == 1


async def test_a_process_that_wakes_is_fenced_by_whoever_took_the_replay_up(kafka: Kafka) -> None:
    config, key, replay_id = prepare_topics(kafka), new_id(), new_id()
    stopped, resumed = Outlet(config, replay_id), Outlet(config, replay_id)

    async def take_up() -> None:
        assert await resumed.publish([_make_record(key)], _still_held) == [True]

    try:
        with pytest.raises(NotDelivered):
            await stopped.publish([_make_record(key)], take_up)
    finally:
        await stopped.close()
        await resumed.close()
    assert await _count(kafka, key) == 1


async def test_an_end_of_a_transaction_that_was_repeated_and_comes_late_publishes_nothing_that_is_held_no_longer(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """librdkafka repeats the request when its connection ends. The first one reaches the broker during the next batch,
    whose records are in the log by then."""

    class Flushing(Producer):
        def produce(self, *args: Any, **named: Any) -> None:
            super().produce(*args, **named)
            assert super().flush(PATIENCE_SECONDS) == 0

    monkeypatch.setattr(transactional_producer, "Producer", Flushing)
    monkeypatch.setattr(transactional_producer, "_TRANSACTION_MILLIS", 60_000)
    config, keys = prepare_topics(kafka), [new_id() for _ in range(3)]
    with KafkaProxy(kafka.bootstrap) as proxy:
        outlet = Outlet(config | {"bootstrap.servers": proxy.bootstrap}, new_id())
        try:
            assert await outlet.publish([_make_record(keys[0])], _still_held) == [True]
            caught = proxy.catch(Trap.HOLD_AND_CUT)
            assert await outlet.publish([_make_record(keys[1])], _still_held) == [True]
            assert caught.seen.is_set()

            async def lose() -> None:
                caught.release()
                await _see(caught.answered)
                await _lost()

            with pytest.raises(DatabaseUnavailable):
                await outlet.publish([_make_record(keys[2])], lose)
        finally:
            await outlet.close()
    assert [await _count(kafka, key) for key in keys] == [1, 1, 0]


async def _see(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE_SECONDS)
