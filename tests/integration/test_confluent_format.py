"""With a schema registry: requests in either wire format are answered by events that Confluent's consumers read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

from db.migrations.upgrade import upgrade_data
from queryd.codec import decode_status, encode
from queryd.events import Mode, Topic
from queryd.registry import announce_schemas, registry_in_use, use
from service.embedded.servers import Lifeline
from tests.integration.queries import make_request
from tests.integration.records import until
from tests.integration.small_executor import Stage, own_broker, running_executor

# Guards against hanging only.
_PATIENCE_SECONDS = 60.0


@pytest.fixture
def kafka(lifeline: Lifeline, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A broker of the test's own, for the lanes have fixed names; librdkafka's configuration."""
    with own_broker(tmp_path, lifeline, partitions=1) as config:
        yield config


@pytest.fixture
def _plain_again() -> Iterator[None]:
    yield
    use(None)


def _read_stories(url: str) -> dict[str, list[bytes]]:
    """The events that wait for the relay, in order, by query."""
    stories: dict[str, list[bytes]] = {}
    with psycopg.connect(url) as connection:
        for query_id, payload in connection.execute("SELECT query_id::text, payload FROM outbox ORDER BY position"):
            stories.setdefault(query_id, []).append(payload)
    return stories


@pytest.mark.slow
@pytest.mark.usefixtures("_plain_again")
async def test_requests_in_either_format_are_answered_in_confluents(
    data_url: str, kafka: dict[str, Any], tmp_path: Path
) -> None:
    upgrade_data(data_url)
    requests = [make_request(mode=mode) for mode in Mode for _ in range(2)]
    # As a producer without a registry writes them; every other one is sent so.
    plain = [encode(request) for request in requests]
    use("mock://registry")
    await announce_schemas()
    registry = registry_in_use()
    assert registry is not None
    producer = Producer(kafka)
    for number, request in enumerate(requests):
        value = encode(request) if number % 2 else plain[number]
        producer.produce(request.mode.topic.value, key=request.query_id, value=value)
    assert producer.flush(_PATIENCE_SECONDS) == 0
    stage = Stage()
    stage.end_all()

    async def are_told() -> bool:
        stories = _read_stories(data_url)
        return len(stories) == len(requests) and all(len(story) == 3 for story in stories.values())

    async with running_executor(data_url, kafka, tmp_path, stage, slots=1):
        await until(are_told, seconds=_PATIENCE_SECONDS)
    read = AvroDeserializer(registry.client)
    for query_id, story in _read_stories(data_url).items():
        fields: list[Any] = [
            read(payload, SerializationContext(Topic.STATUS.value, MessageField.VALUE)) for payload in story
        ]
        assert [each["status"] for each in fields] == ["Queued", "Running", "Succeeded"]
        assert {str(each["query_id"]) for each in fields} == {query_id}
        assert [str(each["event_id"]) for each in fields] == [decode_status(each).event_id for each in story]
