"""Dead letters: what came in, untouched, why nobody could use it, and never twice."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import KafkaError, Message, Producer

from db.connection import DataPool
from db.migrations.upgrade import upgrade_data
from producers.dead_letters import DeadCode, DeadLetter, DeadLetters
from producers.letter_box import FencedBox, Outgoing, PlainBox
from queryd.events import Topic
from queryd.publisher import NotDelivered, Publisher
from queryd.subscription import Record
from queryd.topics import read_topic_identity
from tests.integration.queries import new_id, opened_pool
from tests.integration.records import prepare_topics, read_topic
from tests.servers.kafka import Kafka

# Beyond the 1 MiB that a broker takes unless told otherwise.
_TOO_LARGE = 20 * 1024 * 1024

# Time for a reading that does not wait to be over.
_UNDER_WAY_SECONDS = 3.0

# The tests share the topic: no two records come from the same place.
_offsets = itertools.count(123_456_789_012)


class _Crash(Exception):
    """The process ends here."""


@dataclass(frozen=True, slots=True)
class Place:
    """A data database of the test's own, and the broker."""

    pool: DataPool
    kafka: Kafka


@pytest.fixture
async def place(kafka: Kafka, data_url: str) -> AsyncIterator[Place]:
    upgrade_data(data_url)
    async with opened_pool(data_url) as pool:
        yield Place(pool, kafka)


@asynccontextmanager
async def opened_dead_letters(place: Place) -> AsyncIterator[DeadLetters]:
    """What one process writes dead letters with."""
    config = prepare_topics(place.kafka)
    lanes = (Topic.REQUESTS_INTERACTIVE, Topic.REQUESTS_BATCH)
    topics = {lane.value: read_topic_identity(config, lane) for lane in lanes}
    publisher = Publisher(config)
    publisher.open()
    try:
        yield DeadLetters(place.pool, publisher, config, topics, transactions=place.kafka.transactions)
    finally:
        await publisher.close()


@pytest.fixture
async def dead_letters(place: Place) -> AsyncIterator[DeadLetters]:
    async with opened_dead_letters(place) as made:
        yield made


# What a dead letter is.


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
    await dead_letters.send([letter])
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


async def test_every_letter_of_a_batch_is_written_under_its_own_code(place: Place, dead_letters: DeadLetters) -> None:
    letters = [_make_letter(code=code) for code in DeadCode]
    await dead_letters.send(letters)
    for letter in letters:
        [message] = await _read_dead(place.kafka, letter)
        assert ("queryd_dead_code", letter.code.value.encode()) in _headers(message)


@pytest.mark.parametrize(
    ("key", "value"), [(None, b"value"), (b"", b""), (b"\xff\xfe", b"value"), (b"key", None)], ids=repr
)
async def test_keys_and_values_of_any_kind_stay_what_they_were(
    place: Place, dead_letters: DeadLetters, key: bytes | None, value: bytes | None
) -> None:
    letter = _make_letter(value=value)
    letter = replace(letter, record=replace(letter.record, key=key))
    await dead_letters.send([letter])
    [message] = await _read_dead(place.kafka, letter)
    assert (message.key(), message.value()) == (key, value)


async def test_how_often_a_record_was_driven_again_is_kept(place: Place, dead_letters: DeadLetters) -> None:
    letter = _make_letter(headers=(("queryd_dead_redrives", b"2"),))
    await dead_letters.send([letter])
    [message] = await _read_dead(place.kafka, letter)
    assert [value for name, value in _headers(message) if name == "queryd_dead_redrives"] == [b"2"]


# Once, whatever happens.


async def test_a_record_that_is_read_again_is_no_second_letter(place: Place, dead_letters: DeadLetters) -> None:
    letter, other = _make_letter(), _make_letter()
    await dead_letters.send([letter])
    await dead_letters.send([letter, other])
    # After a restart.
    async with opened_dead_letters(place) as restarted:
        await restarted.send([other, letter])
    for sent in (letter, other):
        assert len(await _read_dead(place.kafka, sent)) == 1


@pytest.mark.parametrize("moment", ["before the broker has it", "when the broker has it"])
async def test_a_record_that_is_read_again_after_a_crash_is_one_letter(
    place: Place, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    letters = [_make_letter() for _ in range(3)]
    box = FencedBox if place.kafka.transactions else PlainBox
    put = box.put

    async def die(*args: Any) -> None:
        if moment == "when the broker has it":
            await put(*args)
        raise _Crash

    with monkeypatch.context() as patched:
        patched.setattr(box, "put", die)
        async with opened_dead_letters(place) as crashed:
            with pytest.raises(_Crash):
                await crashed.send(letters)
    fresh = _make_letter()
    async with opened_dead_letters(place) as restarted:
        await restarted.send([*letters, fresh])
        await restarted.send([*letters, fresh])
    for letter in (*letters, fresh):
        assert len(await _read_dead(place.kafka, letter)) == 1


@pytest.mark.needs_kafka
@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "both at once"])
async def test_a_writer_that_was_cut_off_and_is_back_writes_no_second_letter(
    place: Place, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """It has noted its letters and begun to write them; meanwhile their records have a new owner."""
    letters = [_make_letter() for _ in range(3)]
    put = FencedBox.put
    begun, cut_off = asyncio.Event(), asyncio.Event()

    async def wait_at_first(box: FencedBox, outgoing: Sequence[Outgoing]) -> None:
        if not begun.is_set():
            begun.set()
            await cut_off.wait()
        await put(box, outgoing)

    monkeypatch.setattr(FencedBox, "put", wait_at_first)
    async with opened_dead_letters(place) as zombie, opened_dead_letters(place) as owner:
        woken = asyncio.create_task(zombie.send(letters))
        await begun.wait()
        if at_once:
            cut_off.set()
        await owner.send(letters)
        cut_off.set()
        # It learns that its session was ended, and finds the letters written.
        await woken
    for letter in letters:
        assert len(await _read_dead(place.kafka, letter)) == 1


@pytest.mark.needs_kafka
async def test_a_reading_waits_for_what_another_writer_has_under_way(place: Place) -> None:
    """An open transaction hides what lies behind it, which may be the very letter that is looked for."""
    letter, other = _make_letter(), _make_letter()
    config = prepare_topics(place.kafka)
    blocking = Producer(config | {"transactional.id": new_id(), "transaction.timeout.ms": 60_000})
    blocking.init_transactions()
    blocking.begin_transaction()
    for partition in blocking.list_topics(Topic.DEAD_LETTERS).topics[Topic.DEAD_LETTERS].partitions:
        blocking.produce(Topic.DEAD_LETTERS, b"under way", partition=partition)
    blocking.flush()
    async with opened_dead_letters(place) as first:
        await first.send([letter])
    async with place.pool.connection() as connection:
        await connection.execute("UPDATE dead_letters SET sent_at = NULL")
    async with opened_dead_letters(place) as second:
        sending = asyncio.create_task(second.send([letter, other]))
        await asyncio.sleep(_UNDER_WAY_SECONDS)
        assert not sending.done()
        blocking.abort_transaction()
        await sending
    for sent in (letter, other):
        assert len(await _read_dead(place.kafka, sent)) == 1


# What can't be written.


@pytest.mark.needs_kafka
async def test_a_letter_that_the_broker_refuses_is_not_delivered_and_not_taken_for_written(place: Place) -> None:
    # Random bytes stay as large as they are, however they are compressed.
    refused, small = _make_letter(value=random.Random(7).randbytes(_TOO_LARGE)), _make_letter()
    async with opened_dead_letters(place) as dead_letters:
        for _ in range(2):
            with pytest.raises(NotDelivered):
                await dead_letters.send([refused])
        await dead_letters.send([small])
    assert await _read_dead(place.kafka, refused) == []
    assert len(await _read_dead(place.kafka, small)) == 1


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
    async with opened_dead_letters(place) as letters:
        await letters.send([_make_letter(value=value)])
