"""Consumer lag on a real broker: records that are not finished, and nothing for a transaction's markers."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable

import pytest
from confluent_kafka import Producer

from queryd.kafka import consumer as subscriptions
from queryd.kafka.consumer import Subscription
from queryd.kafka.record import Record
from tests.integration.records import PATIENCE_SECONDS, config_of
from tests.servers.kafka import Kafka

_SESSION = {"session.timeout.ms": 2000}


@pytest.fixture
async def reader(
    kafka: Kafka, unique_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Subscription, str]]:
    """A subscription to a topic of two partitions, that hears of its statistics ten times a second."""
    monkeypatch.setattr(subscriptions, "STATISTICS_MILLIS", 100)
    topic = unique_topic(2)
    made = Subscription(config_of(kafka) | _SESSION | {"group.id": str(uuid.uuid4())}, [topic])
    await made.open()
    yield made, topic
    await made.close()


async def _poll_until(reader: Subscription, lags: dict[tuple[str, int], int], records: list[Record]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while reader.lags() != lags:
            records += await reader.poll()


@pytest.mark.slow
async def test_lag_is_what_is_not_finished(kafka: Kafka, reader: tuple[Subscription, str]) -> None:
    subscription, topic = reader
    producer = Producer(config_of(kafka))
    for number in range(30):
        producer.produce(topic, str(number), partition=0)
    assert producer.flush(PATIENCE_SECONDS) == 0
    await _follow(subscription, topic, 30)


@pytest.mark.slow
@pytest.mark.needs_kafka
async def test_markers_and_aborted_records_are_no_lag(kafka: Kafka, reader: tuple[Subscription, str]) -> None:
    subscription, topic = reader
    producer = Producer(config_of(kafka) | {"transactional.id": str(uuid.uuid4())})
    producer.init_transactions(PATIENCE_SECONDS)
    for kept in (True, False, True, False):
        producer.begin_transaction()
        for number in range(10):
            producer.produce(topic, str(number), partition=0)
        if kept:
            producer.commit_transaction(PATIENCE_SECONDS)
        else:
            # Sent, so that there is something to pass over.
            producer.flush(PATIENCE_SECONDS)
            producer.abort_transaction(PATIENCE_SECONDS)
    await _follow(subscription, topic, 20)


async def _follow(subscription: Subscription, topic: str, count: int) -> None:
    """All records arrive and are lag until they are finished."""
    records: list[Record] = []
    await _poll_until(subscription, {(topic, 0): count, (topic, 1): 0}, records)
    assert len(records) == count
    for record in records[:5]:
        subscription.finish(record)
    assert subscription.lags() == {(topic, 0): count - 5, (topic, 1): 0}
    for record in records:
        subscription.finish(record)
    assert subscription.lags() == {(topic, 0): 0, (topic, 1): 0}
