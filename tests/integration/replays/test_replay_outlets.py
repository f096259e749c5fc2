"""Last events are sent in a transaction that is taken back where the rows they were judged by are no longer held: a
process that was stopped, or cut off, puts none behind a tombstone."""

import pytest

from db.connection import DatabaseUnavailable
from queryd.events import Topic
from queryd.publisher import NotDelivered
from replay.copies import Copy
from replay.outlets import FencedOutlet, Sending
from tests.integration.queries import new_id
from tests.integration.records import prepare_topics, read_topic
from tests.servers.kafka import Kafka

pytestmark = pytest.mark.needs_kafka


async def _still_held() -> None:
    pass


async def _lost() -> None:
    raise DatabaseUnavailable("IdleInTransactionSessionTimeout")


def _make_sending(key: str) -> Sending:
    # A tombstone of nobody: it means nothing to whoever else reads the topic.
    return Sending(Copy(Topic.STATUS, 0, key.encode(), None, [], key, None), [])


async def _count(kafka: Kafka, key: str) -> int:
    return sum(record.key() == key.encode() for record in await read_topic(kafka, Topic.STATUS))


async def test_what_is_held_no_longer_is_not_published(kafka: Kafka) -> None:
    config, key = prepare_topics(kafka), new_id()
    outlet = FencedOutlet(config, new_id())
    try:
        assert await outlet.send([_make_sending(key)], _still_held) == [True]
        with pytest.raises(DatabaseUnavailable):
            await outlet.send([_make_sending(key)], _lost)
    finally:
        await outlet.close()
    assert await _count(kafka, key) == 1


async def test_a_process_that_wakes_is_fenced_by_whoever_took_the_replay_up(kafka: Kafka) -> None:
    config, key, replay_id = prepare_topics(kafka), new_id(), new_id()
    stopped, resumed = FencedOutlet(config, replay_id), FencedOutlet(config, replay_id)

    async def take_up() -> None:
        assert await resumed.send([_make_sending(key)], _still_held) == [True]

    try:
        with pytest.raises(NotDelivered):
            await stopped.send([_make_sending(key)], take_up)
    finally:
        await stopped.close()
        await resumed.close()
    assert await _count(kafka, key) == 1
