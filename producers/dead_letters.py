"""Dead letters: the original bytes, key and headers, with headers that say why, when and from where.

A record that is read again after a crash must not become a second dead letter, so each is noted in Postgres before and
after it is written. Where a crash left only the note before, the topic itself is read to find out.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any

import structlog
from confluent_kafka import KafkaException

from db.connection import DataPool, transaction
from db.data.dead_letters import Origin, intend, mark_sent
from db.retrying import until_available
from processes.failpoints import Failpoint, failpoint
from producers.read_back import EndNotReached, read_to_end
from queryd.events import Topic
from queryd.publisher import NotDelivered, Publisher
from queryd.subscription import Record
from queryd.topics import TopicIdentity
from telemetry.events import LogEvent
from telemetry.metrics import METRICS

_log = structlog.get_logger("queryd.dead_letters")

_PREFIX = "queryd_dead_"
_GROUP = "queryd-dead-letters-read-back"


class DeadCode(StrEnum):
    """Why a record is a dead letter."""

    UNDECODABLE = "UNDECODABLE"
    INVALID_REQUEST = "INVALID_REQUEST"
    CONFLICT = "CONFLICT"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be accepted, and a sentence to act on."""

    record: Record
    code: DeadCode
    reason: str


class DeadLetters:
    """Writes dead letters. A record may be finished only after `send` has returned."""

    def __init__(
        self, pool: DataPool, publisher: Publisher, kafka: dict[str, Any], topics: dict[str, TopicIdentity]
    ) -> None:
        """`topics` are the identities of the topics that records come from, by name."""
        self._pool = pool
        self._publisher = publisher
        self._kafka = kafka
        self._topics = topics

    async def send(self, letters: Sequence[DeadLetter]) -> None:
        """Write each once and wait for the broker; raises `NotDelivered`: then the consumer stops."""
        if not letters:
            return
        origins = {self._origin(letter.record): letter for letter in letters}
        fresh, unsure = await until_available(partial(self._intend, list(origins)), "postgres data")
        failpoint(Failpoint.DEAD_LETTER_INTENDED)
        if unsure:
            fresh |= unsure - await asyncio.to_thread(self._read_back, unsure)
        try:
            await asyncio.gather(*(self._publish(origins[origin]) for origin in fresh))
        except NotDelivered as error:
            raise NotDelivered(
                f"a dead letter can't be written to {Topic.DEAD_LETTERS.value}: {error}. "
                "No record was passed over: put the topic right, then start again"
            ) from error
        failpoint(Failpoint.DEAD_LETTER_SENT)
        await until_available(partial(self._mark_sent, [*fresh, *unsure]), "postgres data")

    def _origin(self, record: Record) -> Origin:
        return Origin(self._topics[record.topic].topic_id, record.partition, record.offset)

    async def _intend(self, origins: Sequence[Origin]) -> tuple[set[Origin], set[Origin]]:
        async with transaction(self._pool) as connection:
            return await intend(connection, origins)

    async def _mark_sent(self, origins: Sequence[Origin]) -> None:
        async with transaction(self._pool) as connection:
            await mark_sent(connection, origins)

    async def _publish(self, letter: DeadLetter) -> None:
        record = letter.record
        await self._publisher.publish(
            Topic.DEAD_LETTERS, record.key, record.value, [*record.headers, *_explain(letter)]
        )
        METRICS.bury(letter.code.value)
        _log.warning(
            LogEvent.REQUEST_DEAD_LETTERED,
            code=letter.code.value,
            reason=letter.reason,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
        )

    def _read_back(self, wanted: set[Origin]) -> set[Origin]:
        """Which of the origins are in the dead-letter topic. Reads all of it: this happens only after a crash between
        a letter's write and its note, and the topic is short where it matters that this is quick. Raises `NotDelivered`
        when it can't be read."""
        ids = {name: identity.topic_id for name, identity in self._topics.items()}
        found: set[Origin] = set()
        try:
            for message in read_to_end(self._kafka, _GROUP, Topic.DEAD_LETTERS, {}):
                found |= _read_origin(message.headers() or [], ids)
        except (EndNotReached, KafkaException) as error:
            raise NotDelivered("the dead letters' topic can't be read, so nobody knows what it holds") from error
        return found & wanted


def _read_origin(headers: Any, ids: dict[str, str]) -> set[Origin]:
    # The last of each name is ours: a redriven record carries those of its first death as well.
    written = {name: value for name, value in headers if name.startswith(_PREFIX) and value is not None}
    try:
        topic_id = ids[written[f"{_PREFIX}topic"].decode()]
        return {Origin(topic_id, int(written[f"{_PREFIX}partition"]), int(written[f"{_PREFIX}offset"]))}
    except (KeyError, ValueError):
        return set()


def _explain(letter: DeadLetter) -> list[tuple[str, bytes]]:
    record = letter.record
    redrives = next((value for name, value in record.headers if name == f"{_PREFIX}redrives"), None)
    explained = {
        "code": letter.code.value,
        "reason": letter.reason,
        "topic": record.topic,
        "partition": str(record.partition),
        "offset": str(record.offset),
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if redrives is None:
        explained["redrives"] = "0"
    return [(_PREFIX + name, value.encode()) for name, value in explained.items()]
