"""Dead letters: what came in, untouched, and why nobody could use it."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Message

from producers.dead_letters import DeadCode, DeadLetters
from queryd.events import Topic
from queryd.publisher import NotDelivered, Publisher
from queryd.subscription import Record
from tests.integration.queries import new_id
from tests.integration.records import prepare_topics, read_topic
from tests.servers.kafka import Kafka

# Beyond the 1 MiB that a broker takes unless told otherwise.
_TOO_LARGE = 2 * 1024 * 1024


@pytest.fixture
async def publisher(kafka: Kafka) -> AsyncIterator[Publisher]:
    made = Publisher(prepare_topics(kafka))
    made.open()
    yield made
    await made.close()


async def test_a_dead_letter_is_the_record_as_received_and_says_why(kafka: Kafka, publisher: Publisher) -> None:
    received: tuple[tuple[str, bytes | None], ...] = (
        ("ce_id", b"an id"),
        # A name may come twice, a value may be missing or no text; the order is the producer's.
        ("x", b"1"),
        ("x", b"2"),
        ("bytes", b"\xff\x00"),
        ("nothing", None),
    )
    record = _make_record(value=b"\x00\xff no event", headers=received)
    before = datetime.now(UTC)
    await DeadLetters(publisher).send(record, DeadCode.UNDECODABLE, "the marker is missing")
    [message] = await _read_dead(kafka, record)
    assert message.key() == record.key
    assert message.value() == record.value
    headers: Any = message.headers()
    assert tuple(headers[: len(received)]) == received
    added = dict(headers[len(received) :])
    moment = datetime.fromisoformat(added.pop("queryd_dead_time").decode())
    assert before.replace(microsecond=0) <= moment <= datetime.now(UTC)
    assert added == {
        "queryd_dead_code": b"UNDECODABLE",
        "queryd_dead_reason": b"the marker is missing",
        "queryd_dead_topic": b"query.requests.batch",
        "queryd_dead_partition": b"4",
        "queryd_dead_offset": b"123456789012",
        "queryd_dead_redrives": b"0",
    }


@pytest.mark.parametrize("code", DeadCode)
async def test_every_code_is_told_by_its_own_name(kafka: Kafka, publisher: Publisher, code: DeadCode) -> None:
    record = _make_record()
    await DeadLetters(publisher).send(record, code, "a reason")
    [message] = await _read_dead(kafka, record)
    assert ("queryd_dead_code", code.value.encode()) in _headers(message)


@pytest.mark.parametrize(
    ("key", "value"), [(None, b"value"), (b"", b""), (b"\xff\xfe", b"value"), (b"key", None)], ids=repr
)
async def test_keys_and_values_of_any_kind_stay_what_they_were(
    kafka: Kafka, publisher: Publisher, key: bytes | None, value: bytes | None
) -> None:
    # Found by a header, as the key may be anything.
    own = new_id().encode()
    record = replace(_make_record(value=value, headers=(("own", own),)), key=key)
    await DeadLetters(publisher).send(record, DeadCode.UNDECODABLE, "a reason")
    [message] = [found for found in await read_topic(kafka, Topic.DEAD_LETTERS) if ("own", own) in _headers(found)]
    assert (message.key(), message.value()) == (key, value)


async def test_how_often_a_record_was_driven_again_is_kept(kafka: Kafka, publisher: Publisher) -> None:
    record = _make_record(headers=(("queryd_dead_redrives", b"2"),))
    await DeadLetters(publisher).send(record, DeadCode.UNDECODABLE, "a reason")
    [message] = await _read_dead(kafka, record)
    assert [value for name, value in _headers(message) if name == "queryd_dead_redrives"] == [b"2"]


async def test_a_dead_letter_that_the_client_cannot_send_is_not_delivered(publisher: Publisher) -> None:
    with pytest.raises(NotDelivered):
        await DeadLetters(publisher).send(_make_record(value=bytes(_TOO_LARGE)), DeadCode.UNDECODABLE, "a reason")


@pytest.mark.needs_kafka
async def test_a_dead_letter_that_the_broker_refuses_is_not_delivered(kafka: Kafka) -> None:
    record = _make_record(value=bytes(_TOO_LARGE))
    # The client would send it.
    publisher = Publisher(prepare_topics(kafka) | {"message.max.bytes": 2 * _TOO_LARGE})
    publisher.open()
    try:
        with pytest.raises(NotDelivered):
            await DeadLetters(publisher).send(record, DeadCode.UNDECODABLE, "a reason")
        # The refusal is that record's alone.
        small = _make_record()
        await DeadLetters(publisher).send(small, DeadCode.UNDECODABLE, "a reason")
    finally:
        await publisher.close()
    assert await _read_dead(kafka, record) == []
    assert len(await _read_dead(kafka, small)) == 1


def _make_record(value: bytes | None = b"value", headers: tuple[tuple[str, bytes | None], ...] = ()) -> Record:
    """A record as received, with a key of its own."""
    return Record(
        topic=Topic.REQUESTS_BATCH.value,
        partition=4,
        offset=123_456_789_012,
        key=new_id().encode(),
        value=value,
        headers=headers,
        timestamp_ms=0,
        appended_by_broker=True,
        polled_at=time.monotonic(),
        epoch=1,
    )


def _headers(message: Message) -> list[tuple[str, bytes | None]]:
    headers: Any = message.headers() or []
    return list(headers)


async def _read_dead(kafka: Kafka, record: Record) -> list[Message]:
    """The dead letters with a record's key."""
    return [message for message in await read_topic(kafka, Topic.DEAD_LETTERS) if message.key() == record.key]
