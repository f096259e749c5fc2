"""The contract's topics on a broker."""

import asyncio

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from queryd.events import Topic
from service.topics import apply_topics
from tests.integration.records import PATIENCE_SECONDS, prepare_topics
from tests.servers.kafka import Kafka

_DAY = 24 * 3600 * 1000
_REQUESTS = {"cleanup.policy": "delete", "retention.ms": str(7 * _DAY), "message.timestamp.type": "LogAppendTime"}

# The design's words, as a broker has them.
_SETTINGS = {
    Topic.REQUESTS_INTERACTIVE: _REQUESTS,
    Topic.REQUESTS_BATCH: _REQUESTS,
    Topic.CANCELLATIONS: {"cleanup.policy": "delete", "retention.ms": str(7 * _DAY)},
    # The full story for a week.
    Topic.STATUS: {"cleanup.policy": "compact", "min.compaction.lag.ms": str(7 * _DAY)},
    Topic.DEAD_LETTERS: {"cleanup.policy": "delete", "retention.ms": str(30 * _DAY)},
}


def test_every_topic_of_the_contract_is_made(kafka: Kafka) -> None:
    known = AdminClient(prepare_topics(kafka)).list_topics(timeout=PATIENCE_SECONDS).topics
    assert set(Topic) <= known.keys()
    assert len({len(known[topic].partitions) for topic in Topic}) == 1


@pytest.mark.needs_kafka
@pytest.mark.parametrize("topic", Topic)
async def test_a_topic_has_the_designs_settings(kafka: Kafka, topic: Topic) -> None:
    settings = await _read_settings(AdminClient(prepare_topics(kafka)), topic)
    assert {name: settings[name] for name in _SETTINGS[topic]} == _SETTINGS[topic]


@pytest.mark.needs_kafka
async def test_the_status_topic_is_really_compacted_in_the_days_after_its_week(kafka: Kafka) -> None:
    settings = await _read_settings(AdminClient(prepare_topics(kafka)), Topic.STATUS)
    # Only closed segments are compacted, and a segment that gets nothing more is closed in time as well.
    assert int(settings["segment.ms"]) <= _DAY
    assert 7 * _DAY < int(settings["max.compaction.lag.ms"]) <= 8 * _DAY


async def _read_settings(admin: AdminClient, topic: Topic) -> dict[str, str]:
    """A topic's settings, defaults included."""
    [answer] = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic.value)]).values()
    entries = await asyncio.to_thread(answer.result, PATIENCE_SECONDS)
    return {name: entry.value for name, entry in entries.items()}


@pytest.mark.needs_kafka
async def test_applying_twice_keeps_topics_and_puts_their_settings_right(kafka: Kafka) -> None:
    config = prepare_topics(kafka)
    admin = AdminClient(config)
    changed = {"cleanup.policy": "delete", "min.compaction.lag.ms": "1", "retention.bytes": "123456789"}
    await _set(admin, changed)
    partitions = {topic: len(admin.list_topics(timeout=PATIENCE_SECONDS).topics[topic].partitions) for topic in Topic}
    try:
        for _ in range(2):
            assert apply_topics(config, 7, 1) == dict.fromkeys(Topic, "settings applied")
        settings = await _read_settings(admin, Topic.STATUS)
        assert {name: settings[name] for name in _SETTINGS[Topic.STATUS]} == _SETTINGS[Topic.STATUS]
        # What the contract says nothing of is the operator's.
        assert settings["retention.bytes"] == "123456789"
    finally:
        await _set(admin, _SETTINGS[Topic.STATUS] | {"retention.bytes": "-1"})
    known = admin.list_topics(timeout=PATIENCE_SECONDS).topics
    assert {topic: len(known[topic].partitions) for topic in Topic} == partitions


async def _set(admin: AdminClient, settings: dict[str, str]) -> None:
    entries = [
        ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, Topic.STATUS.value, incremental_configs=entries)
    [answer] = admin.incremental_alter_configs([resource]).values()
    await asyncio.to_thread(answer.result, PATIENCE_SECONDS)
