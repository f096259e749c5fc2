"""Dead letters: the original bytes, key and headers, with headers that say why, when and from where.

A record that is read again after a crash must not become a second dead letter, so each is noted in Postgres before and
after it is written. Where only the note before is there, its writer is ended, see `producers.letter_box`, and the topic
itself is read to find out what it had written.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any

import structlog
from confluent_kafka import KafkaException

from db.connection import DataPool, transaction
from db.data.dead_letters import Origin, intend, mark_sent, take
from db.retrying import until_available
from processes.failpoints import Failpoint, failpoint
from producers.letter_box import FencedBox, LetterBox, Outgoing, PlainBox, WriterLost
from producers.read_back import EndNotReached, read_ends, read_to_end
from queryd.events import Topic
from queryd.publisher import NotDelivered, Publisher
from queryd.subscription import Record
from queryd.topics import TopicIdentity
from telemetry.events import LogEvent
from telemetry.metrics import METRICS

_log = structlog.get_logger("queryd.dead_letters")

# For so long a letter is tried, as any other record of ours.
_PATIENCE_SECONDS = 60.0
# Between two tries; with jitter, for whoever has ended our session may have done so because we had ended theirs.
_PAUSE_SECONDS = 0.5

_TRANSACTION_BYTES = 16 * 1024 * 1024

DEAD_PREFIX = "queryd_dead_"
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
        self,
        pool: DataPool,
        publisher: Publisher,
        kafka: dict[str, Any],
        topics: dict[str, TopicIdentity],
        *,
        transactions: bool,
    ) -> None:
        """`topics` are the identities of the topics that records come from, by name; `transactions` says whether the
        broker has them, and the publisher serves where it has not."""
        self._pool = pool
        self._publisher = publisher
        self._kafka = kafka
        self._topics = topics
        self._transactions = transactions
        self._box: LetterBox | None = None

    async def send(self, letters: Sequence[DeadLetter]) -> None:
        """Write each once and wait for the broker; raises `NotDelivered`: then the consumer stops."""
        if not letters:
            return
        origins = {self._origin(letter.record): letter for letter in letters}
        latest = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                await self._try(origins)
            except WriterLost as lost:
                self._box = None
                if time.monotonic() > latest:
                    raise _give_up(lost) from lost
                _log.warning(LogEvent.DEPENDENCY_UNAVAILABLE, dependency="kafka", reason=str(lost))
                await asyncio.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 — jitter
            except NotDelivered as error:
                self._box = None
                raise _give_up(error) from error
            else:
                return

    async def _try(self, origins: Mapping[Origin, DeadLetter]) -> None:
        # Opened before the note that names it: whoever finds the note can end the session.
        box = await self._open_box()
        fresh, unsure = await until_available(partial(self._intend, list(origins), box.writer), "postgres data")
        failpoint(Failpoint.DEAD_LETTER_INTENDED)
        if unsure:
            await box.end({writer for writer in unsure.values() if writer})
            written = await asyncio.to_thread(self._read_back, unsure.keys())
            missing = {origin: writer for origin, writer in unsure.items() if origin not in written}
            if missing:
                taken = await until_available(partial(self._take, missing, box.writer), "postgres data")
                if taken != missing.keys():
                    raise WriterLost("another worker writes the same dead letters")
                fresh |= taken
        letters = [origins[origin] for origin in fresh]
        for some in _split(letters):
            await box.put([_to_outgoing(letter) for letter in some])
            for letter in some:
                _tell(letter)
        failpoint(Failpoint.DEAD_LETTER_SENT)
        await until_available(partial(self._mark_sent, [*fresh, *unsure]), "postgres data")

    async def _open_box(self) -> LetterBox:
        if self._box is None:
            self._box = await FencedBox.open(self._kafka) if self._transactions else PlainBox(self._publisher)
        return self._box

    def _origin(self, record: Record) -> Origin:
        return Origin(self._topics[record.topic].topic_id, record.partition, record.offset)

    async def _intend(self, origins: Sequence[Origin], writer: str) -> tuple[set[Origin], dict[Origin, str]]:
        async with transaction(self._pool) as connection:
            return await intend(connection, origins, writer)

    async def _take(self, unsure: Mapping[Origin, str], writer: str) -> set[Origin]:
        async with transaction(self._pool) as connection:
            return await take(connection, unsure, writer)

    async def _mark_sent(self, origins: Sequence[Origin]) -> None:
        async with transaction(self._pool) as connection:
            await mark_sent(connection, origins)

    def _read_back(self, wanted: AbstractSet[Origin]) -> set[Origin]:
        """Which of the origins are in the dead-letter topic. Reads all of it: this happens only after a crash between
        a letter's write and its note, and the topic is short where it matters that this is quick. Raises `WriterLost`
        when it can't be read."""
        ids = {name: identity.topic_id for name, identity in self._topics.items()}
        found: set[Origin] = set()
        try:
            # What other writers have under way keeps what lies behind it from being read until it has ended.
            ends = read_ends(self._kafka, Topic.DEAD_LETTERS) if self._transactions else {}
            for message in read_to_end(self._kafka, _GROUP, Topic.DEAD_LETTERS, {}, ends):
                found |= _read_origin(message.headers() or [], ids)
        except (EndNotReached, KafkaException) as error:
            raise WriterLost("the dead letters' topic can't be read, so nobody knows what it holds") from error
        return found.intersection(wanted)


def _give_up(error: Exception) -> NotDelivered:
    return NotDelivered(
        f"a dead letter can't be written to {Topic.DEAD_LETTERS.value}: {error}. "
        "No record was passed over: put the topic right, then start again"
    )


def _split(letters: Sequence[DeadLetter]) -> Iterator[list[DeadLetter]]:
    """So few that their transaction's time is enough on a slow link."""
    some: list[DeadLetter] = []
    size = 0
    for letter in letters:
        some.append(letter)
        size += len(letter.record.value or b"")
        if size >= _TRANSACTION_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _to_outgoing(letter: DeadLetter) -> Outgoing:
    record = letter.record
    return Outgoing(record.key, record.value, [*record.headers, *_explain(letter)])


def _tell(letter: DeadLetter) -> None:
    METRICS.bury(letter.code.value)
    _log.warning(
        LogEvent.REQUEST_DEAD_LETTERED,
        code=letter.code.value,
        reason=letter.reason,
        topic=letter.record.topic,
        partition=letter.record.partition,
        offset=letter.record.offset,
    )


def _read_origin(headers: Any, ids: dict[str, str]) -> set[Origin]:
    # The last of each name is ours: a redriven record carries those of its first death as well.
    written = {name: value for name, value in headers if name.startswith(DEAD_PREFIX) and value is not None}
    try:
        topic_id = ids[written[f"{DEAD_PREFIX}topic"].decode()]
        return {Origin(topic_id, int(written[f"{DEAD_PREFIX}partition"]), int(written[f"{DEAD_PREFIX}offset"]))}
    except (KeyError, ValueError):
        return set()


def _explain(letter: DeadLetter) -> list[tuple[str, bytes]]:
    record = letter.record
    redrives = next((value for name, value in record.headers if name == f"{DEAD_PREFIX}redrives"), None)
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
    return [(DEAD_PREFIX + name, value.encode()) for name, value in explained.items()]
