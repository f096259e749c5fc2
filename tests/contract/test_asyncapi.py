"""docs/asyncapi.yaml says what is so: the schemas, the topics and their settings, and every header that we write."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from consumers.dead_letters import DeadLetter, _explain
from queryd.contract import contract, schema_folder
from queryd.dead_letters import DeadCode
from queryd.events import Topic
from queryd.headers import REPUBLISHED, ReplayHeader, build_headers
from queryd.kafka.record import Record
from queryd.registry import EVENT_OF_TOPIC
from service.topics import TOPICS, TopicSpec

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "docs" / "asyncapi.yaml"
# That it is AsyncAPI 3.0 was checked by hand, with AsyncAPI's own JSON schema and parser.
DOCUMENT: dict[str, Any] = yaml.safe_load(PLACE.read_text(encoding="utf-8"))
CHANNELS: dict[str, Any] = {channel["address"]: channel for channel in DOCUMENT["channels"].values()}
MESSAGES: dict[str, Any] = DOCUMENT["components"]["messages"]

_AVRO = "application/vnd.apache.avro;version=1.9.0"
# What each topic holds: the events, or of those that were deleted or refused something else.
_MORE_MESSAGES = {Topic.STATUS: {"QueryDeleted"}, Topic.DEAD_LETTERS: {"DeadLetter"}}
_SENT = {Topic.STATUS, Topic.DEAD_LETTERS}


def _find_references(part: Any) -> Iterator[str]:
    match part:
        case {"$ref": str(reference)}:
            yield reference
        case dict():
            for inner in part.values():
                yield from _find_references(inner)
        case list():
            for inner in part:
                yield from _find_references(inner)


def _follow(reference: str) -> Any:
    """The part of the document that a reference of its own names; raises `KeyError`."""
    part: Any = DOCUMENT
    for name in reference.removeprefix("#/").split("/"):
        part = part[name]
    return part


def _headers_of(message: str) -> set[str]:
    """The names of all headers that a message may have."""
    declared = MESSAGES[message]["headers"]
    parts = [_follow(part["$ref"]) for part in declared.get("allOf", [declared])]
    return {name for part in parts for name in part["properties"]}


def _event_headers() -> set[str]:
    return set(
        build_headers(
            event_type="", event_id="", subject="", time=datetime.now(UTC), source="", traceparent="", schema=""
        )
    )


def _dead_headers() -> set[str]:
    record = Record("topic", 0, 0, None, None, (), None, False, time.monotonic(), 1)
    return {name for name, _ in _explain(DeadLetter(record, DeadCode.CONFLICT, "because"))}


def test_every_reference_leads_somewhere() -> None:
    references = set(_find_references(DOCUMENT))
    assert references
    for reference in references:
        if reference.startswith("#/"):
            assert _follow(reference)
        else:
            assert (PLACE.parent / reference).is_file(), reference


def test_every_schema_is_referenced_in_its_newest_version_and_nothing_else() -> None:
    newest = {(schema_folder() / f"{name}.v{schema.version}.avsc") for name, schema in contract().newest.items()}
    referenced = {reference for reference in _find_references(DOCUMENT) if not reference.startswith("#/")}
    assert {(PLACE.parent / reference).resolve() for reference in referenced} == newest
    for name in contract().newest:
        payload = MESSAGES[name]["payload"]
        assert payload["schemaFormat"] == _AVRO
        assert payload["schema"]["$ref"].startswith(f"../schemas/{name}.v")


def test_every_topic_is_a_channel_and_no_other() -> None:
    assert set(CHANNELS) == {topic.value for topic in Topic}


@pytest.mark.parametrize("spec", TOPICS, ids=lambda spec: spec.name.value)
def test_a_channels_settings_are_those_that_topics_apply_sets(spec: TopicSpec) -> None:
    binding = CHANNELS[spec.name.value]["bindings"]["kafka"]
    assert binding["topic"] == spec.name.value
    # How many partitions there are is the operator's.
    assert binding.keys() == {"topic", "topicConfiguration", "bindingVersion"}
    said = {
        name: ",".join(value) if isinstance(value, list) else str(value)
        for name, value in binding["topicConfiguration"].items()
    }
    assert said == spec.config


@pytest.mark.parametrize("topic", Topic)
def test_a_channel_has_its_topics_messages_and_one_operation(topic: Topic) -> None:
    name, channel = next((name, each) for name, each in DOCUMENT["channels"].items() if each["address"] == topic.value)
    expected = _MORE_MESSAGES.get(topic, set()) | ({EVENT_OF_TOPIC[topic]} if topic in EVENT_OF_TOPIC else set())
    assert set(channel["messages"]) == expected
    assert {_follow(message["$ref"])["name"] for message in channel["messages"].values()} == expected
    actions = [
        operation["action"]
        for operation in DOCUMENT["operations"].values()
        if operation["channel"]["$ref"] == f"#/channels/{name}"
    ]
    assert actions == ["send" if topic in _SENT else "receive"]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_has_the_headers_that_are_written(message: str) -> None:
    replayed = {header.value for header in ReplayHeader}
    more = {
        "QueryRequested": replayed,
        "QueryCancelRequested": replayed,
        "QueryStatusChanged": replayed | {REPUBLISHED},
        "QueryDeleted": set(),
        "DeadLetter": replayed | _dead_headers(),
    }
    assert _headers_of(message) == _event_headers() | more[message]


def test_required_are_the_headers_that_are_always_there() -> None:
    assert set(MESSAGES["QueryStatusChanged"]["headers"]["required"]) == _event_headers()
    assert set(MESSAGES["DeadLetter"]["headers"]["required"]) == _dead_headers()
    codes = DOCUMENT["components"]["schemas"]["DeadLetterHeaders"]["properties"]["queryd_dead_code"]["enum"]
    assert codes == [code.value for code in DeadCode]
    # A tombstone is a record without a value.
    assert MESSAGES["QueryDeleted"]["payload"]["type"] == "null"
