"""Commit records that can't be accepted to the outbox as dead letters, with headers for the reason, time and origin.

The relay publishes them. The table `dead_letters` stores the origin of each, so that a record that is read again after
a crash does not become a second dead letter.
"""

import base64
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import structlog
from psycopg.types.json import Jsonb

from db.connection import DataPool, statement
from db.data.dead_letters import NewDeadLetter, insert_dead_letters
from db.retrying import until_available
from processes.failpoints import Failpoint, failpoint
from queryd.dead_letters import DEAD_PREFIX, DeadCode
from queryd.kafka.record import Record
from queryd.topics import TopicIdentity
from telemetry.events import LogEvent
from telemetry.metrics import METRICS

_log = structlog.get_logger("queryd.dead_letters")

# The topic accepts 16 MiB per record. zlib compresses no better than the relay's zstd, so a record that fits after zlib
# also fits when the relay sends it. Leave room for headers and framing.
_MAX_BYTES = 15 * 1024 * 1024
# A few KiB may become gigabytes. The relay's producer takes 256 MiB, and jsonb as much for headers in base64.
_MAX_UNCOMPRESSED_BYTES = 128 * 1024 * 1024
# The limits of one transaction: a few large dead letters, or an admission batch of small ones.
_BATCH_BYTES = 16 * 1024 * 1024

RawHeaders = list[tuple[str, bytes | None]]


class DeadLetterTooLarge(Exception):
    """The record is too large for the dead letters' topic. The consumer stops, because it must not skip a record."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be accepted, and a sentence that says why."""

    record: Record
    code: DeadCode
    reason: str


class DeadLetters:
    """Commits dead letters. A record may be finished only after `write` has returned."""

    def __init__(self, pool: DataPool, topics: dict[str, TopicIdentity]) -> None:
        """`topics` maps the names of the source topics to their identities."""
        self._pool = pool
        self._topics = topics

    async def write(self, letters: Sequence[DeadLetter]) -> None:
        """Commit each dead letter exactly once, even if called again; waits while the database is unavailable.

        Raises `DeadLetterTooLarge`.
        """
        for some in _split(letters):
            rows = [self._to_row(letter) for letter in some]
            failpoint(Failpoint.DEAD_LETTER_BEFORE)
            written = await until_available(partial(self._insert, rows), "postgres data")
            failpoint(Failpoint.DEAD_LETTER_AFTER)
            for letter, row in zip(some, rows, strict=True):
                if row.event_id in written:
                    _report(letter)

    async def _insert(self, rows: Sequence[NewDeadLetter]) -> set[str]:
        async with statement(self._pool) as connection:
            return await insert_dead_letters(connection, rows)

    def _to_row(self, letter: DeadLetter) -> NewDeadLetter:
        record = letter.record
        headers = [*record.headers, *_explain(letter)]
        _check_size(record, headers)
        topic_id = self._topics[record.topic].topic_id
        return NewDeadLetter(
            topic_id=topic_id,
            partition=record.partition,
            record_offset=record.offset,
            event_id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{topic_id}:{record.partition}:{record.offset}")),
            key=record.key,
            payload=record.value,
            headers=Jsonb(write_headers(headers)),
        )


def write_headers(headers: RawHeaders) -> list[list[str | None]]:
    """Encode headers as base64 in JSON, since names and values may contain any byte; a value may be None."""
    return [
        [base64.b64encode(name.encode()).decode(), None if value is None else base64.b64encode(value).decode()]
        for name, value in headers
    ]


def _check_size(record: Record, headers: RawHeaders) -> None:
    size = sum(map(len, _parts(record, headers)))
    if size <= _MAX_BYTES:
        return
    compressed = 0
    if size <= _MAX_UNCOMPRESSED_BYTES:
        compressed = sum(len(zlib.compress(part, 1)) for part in _parts(record, headers))
    if size > _MAX_UNCOMPRESSED_BYTES or compressed > _MAX_BYTES:
        raise DeadLetterTooLarge(
            f"the record {record.topic} [{record.partition}] at offset {record.offset} is too large to be a dead letter"
            " and was not skipped: move the group's offset past it, then start again"
        )


def _parts(record: Record, headers: RawHeaders) -> Iterator[bytes]:
    yield record.key or b""
    yield record.value or b""
    for name, value in headers:
        yield name.encode()
        yield value or b""


def _split(letters: Sequence[DeadLetter]) -> Iterator[list[DeadLetter]]:
    some: list[DeadLetter] = []
    size = 0
    for letter in letters:
        some.append(letter)
        size += sum(map(len, _parts(letter.record, list(letter.record.headers))))
        if size >= _BATCH_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _report(letter: DeadLetter) -> None:
    METRICS.bury(letter.code.value)
    _log.warning(
        LogEvent.REQUEST_DEAD_LETTERED,
        code=letter.code.value,
        reason=letter.reason,
        topic=letter.record.topic,
        partition=letter.record.partition,
        offset=letter.record.offset,
    )


def _explain(letter: DeadLetter) -> RawHeaders:
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
