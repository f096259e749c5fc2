"""Dead letters: what came in, untouched, why nobody could use it, and never twice."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import KafkaError, Message, Producer

from consumers.dead_letters import DeadLetter, DeadLetters, DeadLetterTooLarge
from db.connection import DataPool
from db.data.outbox import DEAD_LETTER_SHARD, read_waiting
from db.migrations.upgrade import upgrade_data
from producers.relay.relay import Relay, RelayRules
from queryd.dead_letters import DeadCode
from queryd.events import Topic
from queryd.kafka.record import Record
from queryd.topics import read_topic_identity
from tests.integration.queries import new_id, opened_pool
from tests.integration.records import prepare_topics, read_topic, until
from tests.servers.kafka import Kafka

_MIB = 1024 * 1024

# Beyond the 1 MiB that a broker takes unless told otherwise.
_TOO_LARGE = 20 * _MIB

# A relay's name on the shared broker is its first shard: these are nobody's shards.
_relays = itertools.count(5_000)

# The tests share the topic: no two records come from the same place.
_offsets = itertools.count(123_456_789_012)


@dataclass(frozen=True, slots=True)
class Place:
    """A data database of the test's own, the broker, and the number of a relay that no other test has."""

    url: str
    pool: DataPool
    kafka: Kafka
    relay: int


@pytest.fixture
async def place(kafka: Kafka, data_url: str) -> AsyncIterator[Place]:
    upgrade_data(data_url)
    async with opened_pool(data_url) as pool:
        yield Place(data_url, pool, kafka, next(_relays))


def _open_dead_letters(place: Place) -> DeadLetters:
    """What one process writes dead letters with."""
    config = prepare_topics(place.kafka)
    lanes = (Topic.REQUESTS_INTERACTIVE, Topic.REQUESTS_BATCH)
    return DeadLetters(place.pool, {lane.value: read_topic_identity(config, lane) for lane in lanes})


@pytest.fixture
def dead_letters(place: Place) -> DeadLetters:
    return _open_dead_letters(place)


async def _publish(place: Place) -> None:
    """A relay of the dead letters, until the outbox is empty."""
    shards = (place.relay, DEAD_LETTER_SHARD)
    relay = Relay(RelayRules(place.url, prepare_topics(place.kafka), place.kafka.transactions, shards), lambda: None)
    running = asyncio.create_task(relay.run())

    async def is_empty() -> bool:
        async with place.pool.connection() as connection:
            row = await (await connection.execute("SELECT count(*) FROM outbox")).fetchone()
        return row == (0,)

    await until(is_empty, running)
    relay.stop()
    await running


# What a dead letter is.


@pytest.mark.slow
async def test_a_dead_letter_is_the_record_as_received_and_says_why(place: Place, dead_letters: DeadLetters) -> None:
    received: tuple[tuple[str, bytes | None], ...] = (
        ("ce_id", b"an id"),
        # A name may come twice, a value may be missing or no text; the order is the producer's.
        ("x", b"1"),
        ("x", b"2"),
        ("bytes", b"\xff\x00"),
        ("nothing", None),
    )
    letter = _make_letter(value=b"\x00\xff no event", headers=received, reason="the marker is missing")
    before = datetime.now(UTC)
    await dead_letters.write([letter])
    await _publish(place)
    [message] = await _read_dead(place.kafka, letter)
    assert message.key() == letter.record.key
    assert message.value() == letter.record.value
    headers = _headers(message)
    assert tuple(headers[: len(received)]) == received
    added = dict(headers[len(received) :])
    moment = added.pop("queryd_dead_time")
    assert moment is not None
    # In milliseconds.
    assert before.replace(microsecond=0) <= datetime.fromisoformat(moment.decode()) <= datetime.now(UTC)
    assert added == {
        "queryd_dead_code": b"UNDECODABLE",
        "queryd_dead_reason": b"the marker is missing",
        "queryd_dead_topic": b"query.requests.batch",
        "queryd_dead_partition": b"4",
        "queryd_dead_offset": str(letter.record.offset).encode(),
        "queryd_dead_redrives": b"0",
    }


@pytest.mark.slow
async def test_every_letter_of_a_batch_is_written_under_its_own_code(place: Place, dead_letters: DeadLetters) -> None:
    letters = [_make_letter(code=code) for code in DeadCode]
    await dead_letters.write(letters)
    await _publish(place)
    for letter in letters:
        [message] = await _read_dead(place.kafka, letter)
        assert ("queryd_dead_code", letter.code.value.encode()) in _headers(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"), [(None, b"value"), (b"", b""), (b"\xff\xfe", b"value"), (b"key", None)], ids=repr
)
async def test_keys_and_values_of_any_kind_stay_what_they_were(
    place: Place, dead_letters: DeadLetters, key: bytes | None, value: bytes | None
) -> None:
    letter = _make_letter(value=value)
    letter = replace(letter, record=replace(letter.record, key=key))
    await dead_letters.write([letter])
    await _publish(place)
    [message] = await _read_dead(place.kafka, letter)
    assert (message.key(), message.value()) == (key, value)


@pytest.mark.slow
async def test_how_often_a_record_was_driven_again_is_kept(place: Place, dead_letters: DeadLetters) -> None:
    letter = _make_letter(headers=(("queryd_dead_redrives", b"2"),))
    await dead_letters.write([letter])
    await _publish(place)
    [message] = await _read_dead(place.kafka, letter)
    assert [value for name, value in _headers(message) if name == "queryd_dead_redrives"] == [b"2"]


# Once, whatever happens.


@pytest.mark.slow
async def test_a_record_that_is_read_again_is_no_second_letter(place: Place, dead_letters: DeadLetters) -> None:
    letter, other = _make_letter(), _make_letter()
    await dead_letters.write([letter])
    await _publish(place)
    await dead_letters.write([letter, other])
    await _publish(place)
    # After a restart.
    await _open_dead_letters(place).write([other, letter])
    await _publish(place)
    for sent in (letter, other):
        assert len(await _read_dead(place.kafka, sent)) == 1


@pytest.mark.slow
async def test_two_owners_of_a_record_write_one_letter(place: Place) -> None:
    letters = [_make_letter() for _ in range(3)]
    await asyncio.gather(*(_open_dead_letters(place).write(letters[:: 1 - 2 * (number % 2)]) for number in range(6)))
    await _publish(place)
    for letter in letters:
        assert len(await _read_dead(place.kafka, letter)) == 1


@pytest.mark.slow
async def test_a_letter_that_a_former_release_may_not_have_written_is_written(place: Place) -> None:
    letter = _make_letter()
    dead_letters = _open_dead_letters(place)
    origin = [dead_letters._topics[letter.record.topic].topic_id, letter.record.partition, letter.record.offset]
    async with place.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO dead_letters (topic_id, partition, record_offset, writer) VALUES (%s, %s, %s, 'x')", origin
        )
    await dead_letters.write([letter])
    await dead_letters.write([letter])
    await _publish(place)
    assert len(await _read_dead(place.kafka, letter)) == 1


# What can't be written.


@pytest.mark.slow
async def test_a_record_that_the_topic_would_refuse_is_not_skipped(place: Place) -> None:
    # Random bytes stay as large as they are, however they are compressed.
    refused, small = _make_letter(value=random.Random(7).randbytes(_TOO_LARGE)), _make_letter()
    dead_letters = _open_dead_letters(place)
    for _ in range(2):
        with pytest.raises(DeadLetterTooLarge, match=f"offset {refused.record.offset} is too large"):
            await dead_letters.write([refused])
    await dead_letters.write([small])
    await _publish(place)
    assert await _read_dead(place.kafka, refused) == []
    assert len(await _read_dead(place.kafka, small)) == 1


@pytest.mark.parametrize("part", ["value", "key", "a header's name", "a header's value"])
@pytest.mark.parametrize("compressible", [False, True])
async def test_no_part_of_a_record_stops_the_relay(place: Place, part: str, compressible: bool) -> None:
    # Zeros compress to less than any limit, but no producer takes so many.
    size = 300 * _MIB if compressible else 20 * _MIB
    large = bytes(size) if compressible else random.Random(7).randbytes(size)
    if part == "a header's name":
        large = large.translate(bytes(number % 128 for number in range(256)))
    match part:
        case "value":
            letter = _make_letter(value=large)
        case "key":
            letter = _make_letter()
            letter = replace(letter, record=replace(letter.record, key=large))
        case "a header's name":
            letter = _make_letter(headers=((large.decode(), b""),))
        case _:
            letter = _make_letter(headers=(("x", large),))
    with pytest.raises(DeadLetterTooLarge):
        await _open_dead_letters(place).write([letter])


async def test_a_relay_holds_no_more_headers_and_keys_than_a_batch(place: Place, dead_letters: DeadLetters) -> None:
    letters = [_make_letter(value=None, headers=(("x", bytes(_MIB)),)) for _ in range(3)]
    keyed = _make_letter()
    letters.append(replace(keyed, record=replace(keyed.record, key=bytes(_MIB))))
    await dead_letters.write(letters)
    async with place.pool.connection() as connection:
        for max_bytes, count in ((1, 1), (3 * _MIB, 2), (20 * _MIB, 4)):
            assert len(await read_waiting(connection, [DEAD_LETTER_SHARD], 500, max_bytes)) == count


@pytest.mark.slow
@pytest.mark.needs_kafka
@pytest.mark.parametrize("compressible", [False, True])
async def test_large_letters_survive_unchanged(place: Place, compressible: bool) -> None:
    value = bytes(_TOO_LARGE) if compressible else random.Random(8).randbytes(15 * 1024 * 1024 - 1_000)
    letters = [_make_letter(value=value), _make_letter(value=value), _make_letter()]
    await _open_dead_letters(place).write(letters)
    await _publish(place)
    for letter in letters:
        [message] = await _read_dead(place.kafka, letter)
        assert message.value() == letter.record.value


def _make_letter(
    code: DeadCode = DeadCode.UNDECODABLE,
    value: bytes | None = b"value",
    headers: tuple[tuple[str, bytes | None], ...] = (),
    reason: str = "a reason",
) -> DeadLetter:
    """A letter of a record with an offset and a key of its own."""
    record = Record(
        topic=Topic.REQUESTS_BATCH.value,
        partition=4,
        offset=next(_offsets),
        key=new_id().encode(),
        value=value,
        headers=headers,
        timestamp_ms=0,
        appended_by_broker=True,
        polled_at=time.monotonic(),
        epoch=1,
    )
    return DeadLetter(record, code, reason)


def _headers(message: Message) -> list[tuple[str, bytes | None]]:
    headers: Any = message.headers() or []
    return list(headers)


async def _read_dead(kafka: Kafka, letter: DeadLetter) -> list[Message]:
    """The dead letters of a record."""
    offset = ("queryd_dead_offset", str(letter.record.offset).encode())
    return [message for message in await read_topic(kafka, Topic.DEAD_LETTERS) if offset in _headers(message)]


@pytest.mark.slow
@pytest.mark.needs_kafka
async def test_whatever_a_lane_takes_can_become_a_dead_letter(place: Place) -> None:
    value = bytes(1_500_000)
    # Compressed, it is far below the broker's limit.
    producer = Producer(prepare_topics(place.kafka) | {"message.max.bytes": 4_000_000, "compression.type": "gzip"})
    errors: list[KafkaError | None] = []
    producer.produce(
        Topic.REQUESTS_BATCH, key=b"k", value=value, on_delivery=lambda error, _message: errors.append(error)
    )
    assert producer.flush(30) == 0
    assert errors == [None]
    await _open_dead_letters(place).write([_make_letter(value=value)])
    await _publish(place)
