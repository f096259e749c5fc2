"""Status events by subscription, on a real broker: durable, in order, and each once as far as one process can know."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from queryd import (
    AsyncQueryClient,
    AsyncStatusFeed,
    ClientStopped,
    CommitOverdue,
    QueryClient,
    QueryStatusChanged,
    StatusFeed,
    Topic,
)
from queryd import feed as feeds
from queryd.feed import AsyncFeed
from queryd.headers import ReplayHeader
from queryd.kafka import consumer_loop
from queryd.kafka.consumer import Subscription, SubscriptionLost
from queryd.kafka.record import Record
from tests.integration.queries import new_id
from tests.integration.records import PATIENCE_SECONDS, prepare_topics
from tests.integration.stories import make_story, publish, publish_async
from tests.servers.kafka import Kafka

NewGroup = Callable[[], str]


@pytest.fixture
def config(kafka: Kafka) -> dict[str, Any]:
    # The embedded broker lets a member wait for half of its session timeout; Apache's least is our default.
    soon = {} if kafka.transactions else {"session.timeout.ms": 2000, "heartbeat.interval.ms": 500}
    return prepare_topics(kafka) | soon


@pytest.fixture
def new_group(config: dict[str, Any]) -> NewGroup:
    """Makes a group that begins where the topic ends now, so that what other tests wrote is not read."""

    def make() -> str:
        group = f"billing-{new_id()}"
        consumer = Consumer(config | {"group.id": group})
        try:
            partitions = consumer.list_topics(Topic.STATUS, timeout=PATIENCE_SECONDS).topics[Topic.STATUS].partitions
            places = [TopicPartition(Topic.STATUS, number) for number in partitions]
            for place in places:
                place.offset = _find_end(config, place)
            consumer.commit(offsets=places, asynchronous=False)
        finally:
            consumer.close()
        return group

    return make


def _find_end(config: dict[str, Any], place: TopicPartition) -> int:
    """Behind the last record, by the broker's own word: the embedded one's watermarks are odd."""
    reader = Consumer(
        config | {"group.id": new_id(), "enable.partition.eof": True, "isolation.level": "read_committed"}
    )
    try:
        reader.assign([TopicPartition(place.topic, place.partition, 0)])
        while True:
            message = reader.poll(PATIENCE_SECONDS)
            assert message is not None
            if message.error() is not None:
                offset = message.offset()
                assert offset is not None
                return offset
    finally:
        reader.close()


@pytest.mark.slow
def test_events_of_one_org_come_in_order_and_go_on_behind_the_commit(
    config: dict[str, Any], new_group: NewGroup
) -> None:
    group, org_id = new_group(), new_id()
    own = [make_story(org_id=org_id) for _ in range(5)]
    publish(config, *(event for step in zip(*own, make_story(), strict=True) for event in step))
    with QueryClient(config) as client:
        with client.events(group=group, org=org_id.upper()) as events:
            first = [next(events) for _ in range(9)]
            events.commit()
            # Handed out, and never said to be processed.
            lost = [next(events) for _ in range(6)]
        with client.events(group=group, org=org_id) as events:
            again = [next(events) for _ in range(6)]
            assert events.take(0.5) is None
            events.commit()
            publish(config, *make_story(org_id=org_id))
            assert next(events).sequence == 1
    assert sorted(map(_name, again)) == sorted(map(_name, lost))
    assert sorted(map(_name, first + again)) == sorted(_name(event) for story in own for event in story)
    for story in own:
        of_query = [event for event in first + again if event.query_id == story[0].query_id]
        assert of_query == story


def _name(event: QueryStatusChanged) -> tuple[str, int]:
    return event.query_id, event.sequence


@pytest.mark.slow
def test_copies_and_older_events_are_passed_over_and_a_restart_tells_them_by_their_replay(
    config: dict[str, Any], new_group: NewGroup
) -> None:
    group, story, marker = new_group(), make_story(), make_story()
    replay: list[tuple[str, str | bytes | None]] = [(ReplayHeader.ID.value, b"a replay")]
    with StatusFeed(config, group) as feed:
        publish(config, *story)
        assert [next(feed).event for _ in story] == story
        feed.commit()
        publish(config, story[1], story[2])
        publish(config, story[2], headers=replay)
        publish(config, story[0].query_id, story[0].query_id, *marker)
        heard = [next(feed) for _ in range(4)]
        # Its deletion once, and nothing else of the query.
        assert [each.event for each in heard if each.query_id == story[0].query_id] == [None]
        assert [each.event for each in heard if each.query_id == marker[0].query_id] == marker
        assert [each.replay_id for each in heard] == [None] * 4
        feed.commit()
        assert feed.take(0.3) is None
    publish(config, marker[2], headers=replay)
    with StatusFeed(config, group) as feed:
        copy = next(feed)
    assert copy.event is not None
    assert (copy.event, copy.event.event_id, copy.replay_id) == (marker[2], marker[2].event_id, "a replay")


@pytest.mark.slow
def test_the_story_of_an_id_that_was_deleted_and_asked_for_again_is_another(
    config: dict[str, Any], new_group: NewGroup
) -> None:
    group, org_id = new_group(), new_id()
    story, marker = make_story(org_id=org_id), make_story(org_id=org_id)
    again = make_story(story[0].query_id, org_id=org_id)
    with QueryClient(config) as client, client.events(group=group, org=org_id) as events:
        publish(config, *story)
        assert [next(events) for _ in story] == story
        # A copy behind the deletion is still a copy.
        publish(config, story[0].query_id, story[2], *again, *marker)
        heard = [next(events) for _ in again + marker]
    assert [event for event in heard if event.query_id == story[0].query_id] == again
    assert [event for event in heard if event.query_id == marker[0].query_id] == marker


@pytest.mark.slow
async def test_a_copy_of_what_is_not_processed_yet_is_not_committed_before_it(
    config: dict[str, Any], new_group: NewGroup
) -> None:
    group, story = await asyncio.to_thread(new_group), make_story()
    async with asyncio.timeout(PATIENCE_SECONDS):
        async with AsyncStatusFeed(config, group) as feed:
            await publish_async(config, story[0], story[0])
            assert (await anext(feed)).event == story[0]
            assert await feed.take(1.0) is None
        async with AsyncStatusFeed(config, group) as feed:
            assert (await anext(feed)).event == story[0]


@pytest.mark.slow
async def test_who_never_commits_is_told_so(
    config: dict[str, Any], new_group: NewGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MOST_UNCOMMITTED", 5)
    group, stories = await asyncio.to_thread(new_group), [make_story() for _ in range(2)]
    await publish_async(config, *(event for story in stories for event in story))
    async with asyncio.timeout(PATIENCE_SECONDS), AsyncStatusFeed(config, group) as feed:
        for _ in range(6):
            await anext(feed)
        with pytest.raises(CommitOverdue, match="6 events"):
            await anext(feed)
        await feed.commit()
        await publish_async(config, *make_story())
        await anext(feed)


@pytest.mark.slow
async def test_members_of_a_group_share_what_there_is(config: dict[str, Any], new_group: NewGroup) -> None:
    group = await asyncio.to_thread(new_group)
    stories = [make_story() for _ in range(30)]
    names = {_name(event) for story in stories for event in story}
    heard: list[tuple[str, int]] = []

    async def work(feed: AsyncFeed[QueryStatusChanged]) -> None:
        async for event in feed:
            heard.append(_name(event))
            await feed.commit()
            if names <= set(heard):
                return

    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        AsyncQueryClient(config) as client,
        client.events(group=group) as one,
        client.events(group=group) as other,
    ):
        # Both are members before there is anything.
        await asyncio.gather(one.take(0.1), other.take(0.1))
        await publish_async(config, *(event for story in stories for event in story))
        works = [asyncio.create_task(work(one)), asyncio.create_task(work(other))]
        await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        for each in works:
            each.cancel()
        await asyncio.gather(*works, return_exceptions=True)
    assert names <= set(heard)
    for story in stories:
        told = [sequence for query_id, sequence in heard if query_id == story[0].query_id]
        # A rebalance may repeat what was not committed, and turns nothing round.
        assert list(dict.fromkeys(told)) == [1, 2, 3]


class _Losing(Subscription):
    """Is lost once, and the first records with it."""

    losses = 0

    async def poll(self) -> list[Record]:
        records = await super().poll()
        if records and _Losing.losses < 1:
            _Losing.losses += 1
            raise SubscriptionLost("the test takes it away")
        return records


@pytest.mark.slow
async def test_a_subscription_that_is_lost_is_opened_again_and_nothing_is_missed(
    config: dict[str, Any], new_group: NewGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "Subscription", _Losing)
    monkeypatch.setattr(consumer_loop, "_REOPEN_SECONDS", 0.0)
    group, story = await asyncio.to_thread(new_group), make_story()
    await publish_async(config, *story)
    async with asyncio.timeout(PATIENCE_SECONDS), AsyncStatusFeed(config, group) as feed:
        heard: list[QueryStatusChanged | None] = []
        while len(heard) < len(story):
            status = await anext(feed)
            heard += [status.event] if status.query_id == story[0].query_id else []
        assert heard == story
        await feed.commit()
    assert _Losing.losses == 1


class _Refused(Consumer):
    """Its commits are refused, as a broker does between two generations of a group, for as long as `refusing`; the
    answer to one that nobody waits for has still to come."""

    refusing = False
    polled, waited_for = threading.Event(), threading.Event()

    def commit(self, **wanted: Any) -> Any:
        if not _Refused.refusing:
            return super().commit(**wanted)
        if wanted["asynchronous"]:
            self.polled.set()
            return None
        self.waited_for.set()
        raise KafkaException(KafkaError(KafkaError.REBALANCE_IN_PROGRESS))


@pytest.fixture
def _refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queryd.kafka.consumer.Consumer", _Refused)
    monkeypatch.setattr(_Refused, "refusing", True)
    for event in ("polled", "waited_for"):
        monkeypatch.setattr(_Refused, event, threading.Event())


async def _await_event(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE_SECONDS)


@pytest.mark.slow
@pytest.mark.usefixtures("_refused")
async def test_a_commit_waits_while_the_group_is_shared_out_anew(config: dict[str, Any], new_group: NewGroup) -> None:
    group, story = await asyncio.to_thread(new_group), make_story()
    before = await asyncio.to_thread(_sum_committed, config, group)
    await publish_async(config, *story)
    async with asyncio.timeout(PATIENCE_SECONDS), AsyncStatusFeed(config, group) as feed:
        assert [(await anext(feed)).event for _ in story] == story
        committing = asyncio.create_task(feed.commit())
        await _await_event(_Refused.polled)
        # That a poll has committed by itself says nothing to who waits: it asks again.
        _Refused.waited_for.clear()
        await _await_event(_Refused.waited_for)
        assert not committing.done()
        _Refused.refusing = False
        await committing
        assert await asyncio.to_thread(_sum_committed, config, group) == before + len(story)


def _sum_committed(config: dict[str, Any], group: str) -> int:
    """The group's offsets of all partitions together."""
    reader = Consumer(config | {"group.id": group})
    try:
        partitions = reader.list_topics(Topic.STATUS, timeout=PATIENCE_SECONDS).topics[Topic.STATUS].partitions
        places = [TopicPartition(Topic.STATUS, number) for number in partitions]
        return sum(place.offset for place in reader.committed(places, timeout=PATIENCE_SECONDS))
    finally:
        reader.close()


@pytest.mark.slow
@pytest.mark.usefixtures("_refused")
async def test_a_commit_that_a_close_overtakes_says_so(config: dict[str, Any], new_group: NewGroup) -> None:
    group, story = await asyncio.to_thread(new_group), make_story()
    await publish_async(config, *story)
    async with asyncio.timeout(PATIENCE_SECONDS):
        async with AsyncStatusFeed(config, group) as feed:
            await anext(feed)
            committing = asyncio.create_task(feed.commit())
            await _await_event(_Refused.waited_for)
        with pytest.raises(ClientStopped):
            await committing


@pytest.mark.slow
@pytest.mark.usefixtures("_refused")
async def test_a_commit_does_not_wait_for_ever(
    config: dict[str, Any], new_group: NewGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_COMMIT_SECONDS", 0.5)
    group, story = await asyncio.to_thread(new_group), make_story()
    await publish_async(config, *story)
    async with asyncio.timeout(PATIENCE_SECONDS), AsyncStatusFeed(config, group) as feed:
        await anext(feed)
        with pytest.raises(KafkaException, match="no commit"):
            await feed.commit()


def test_queryds_own_groups_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="queryd's own"):
        StatusFeed(config, "queryd-projector")
