"""The state database from the log: what a projector would have made of it that began at its beginning."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from confluent_kafka import Message

from consumers.projector import Changes, report_unreadable
from db.connection import Connection
from db.state.query_status import read_offsets, write_offsets
from db.state.rebuild import has_other_topics, stage, unstage
from queryd.events import Topic
from queryd.kafka.bounded_reader import BoundedReader, LogChanged
from queryd.kafka.record import to_record
from queryd.status_records import read_all
from queryd.topics import TopicIdentity, read_topic_identity
from replay.log import Pinned, Window, open_reader, pin
from replay.rebuild.source import PartitionRead, Reading, Report, SourceName
from replay.refused import ReplayRefused

# What is understood in one go, and written while the next is read: statements of some 10,000 rows cost the least a row,
# and hold some 20 MB.
_CHUNK = 10_000
_AT_ONCE = 1_000
# A record that the projector has read comes with the next fetch; while it is waited for, the projector waits too.
_CATCH_UP_SECONDS = 5.0

_INSTEAD = "rebuild from Postgres data instead, --source postgres"


class Chunk(Changes):
    """The changes of a stretch of the log, and how many records it has."""

    def __init__(self) -> None:
        super().__init__()
        self.events = 0
        self.unreadable = 0

    def take(self, messages: Sequence[Message]) -> None:
        """Add what follows."""
        statuses = read_all([to_record(message) for message in messages], report_unreadable)
        self.events += len(messages)
        self.unreadable += len(messages) - len(statuses)
        self.add(statuses)


class LogSource:
    """The status topic, from its beginning."""

    def __init__(self, kafka: dict[str, Any], topic: TopicIdentity, pinned: Pinned, log: BoundedReader) -> None:
        self._kafka = kafka
        self._topic = topic
        self._starts = _starts(pinned)
        self._offsets = sum(each.end - each.start for each in pinned.ranges)
        self._log = log
        self._events = 0
        self._unreadable = 0

    @property
    def facts(self) -> Mapping[str, Any]:
        """The topic, and where its log begins: with the ends that move all the time no plan would hold for a minute,
        and what comes behind them is taken in anyway."""
        return {
            "source": SourceName.LOG,
            "cluster_id": self._topic.cluster_id,
            "topic_id": self._topic.topic_id,
            "starts": sorted(self._starts.items()),
        }

    @property
    def reading(self) -> Reading:
        """What has been read so far."""
        ends = self._positions()
        partitions = tuple(
            PartitionRead(partition, start, ends[partition]) for partition, start in sorted(self._starts.items())
        )
        return Reading(self._events, self._unreadable, partitions)

    async def stage(self, connection: Connection, report: Report) -> None:
        """Fill the copy from the whole log. Raises `EndNotReached`, `LogChanged`, `KafkaException`."""
        batches = self._log.read_to(most=_AT_ONCE)
        # The next chunk is read and understood while the database takes the one before.
        coming = asyncio.create_task(asyncio.to_thread(_gather, batches))
        try:
            while (chunk := await coming) is not None:
                coming = asyncio.create_task(asyncio.to_thread(_gather, batches))
                await self._write(connection, chunk)
                await report(self._read_offsets(), max(self._offsets, self._read_offsets()))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        if await asyncio.to_thread(read_topic_identity, self._kafka, Topic.STATUS) != self._topic:
            raise LogChanged(f"{Topic.STATUS} was made anew while it was read: plan again")

    async def settle(self, connection: Connection) -> None:
        """Read on to where the live table has been brought by the projector, so that nothing it knows is lost.

        Raises as `stage`.
        """
        live = await self._read_live(connection)
        if live.keys() - self._starts.keys():
            raise LogChanged(f"{Topic.STATUS} has got more partitions: plan again")
        ends = {(Topic.STATUS.value, partition): offset for partition, offset in live.items()}
        batches = self._log.read_to(ends, most=_AT_ONCE, silence_seconds=_CATCH_UP_SECONDS)
        while (chunk := await asyncio.to_thread(_gather, batches)) is not None:
            await self._write(connection, chunk)

    async def write_offsets(self, connection: Connection) -> None:
        """Only for partitions that have none. A running projector may be behind us, and writes what it reads: if its
        offset were moved on, and it died between an event and the query's deletion, nobody would read the deletion."""
        live = await self._read_live(connection)
        ends = {partition: end for partition, end in self._positions().items() if partition not in live}
        await write_offsets(connection, self._topic.cluster_id, self._topic.topic_id, ends)

    async def _read_live(self, connection: Connection) -> dict[int, int]:
        return await read_offsets(connection, self._topic.cluster_id, self._topic.topic_id)

    async def _write(self, connection: Connection, chunk: Chunk) -> None:
        self._events += chunk.events
        self._unreadable += chunk.unreadable
        await unstage(connection, list(chunk.gone))
        await stage(connection, list(chunk.rows.values()))

    def _positions(self) -> dict[int, int]:
        return {partition: end for (_, partition), end in self._log.positions.items()}

    def _read_offsets(self) -> int:
        return sum(end - self._starts[partition] for partition, end in self._positions().items())


@asynccontextmanager
async def opened_log(connection: Connection, kafka: dict[str, Any]) -> AsyncIterator[LogSource]:
    """The log as a source for the state database of the connection.

    Raises `ReplayRefused` where the log can't have the whole story; `TopicUnknown`, `KafkaException`.
    """
    pinned = await asyncio.to_thread(pin, kafka, [Topic.STATUS.value], Window())
    topic = pinned.topics[Topic.STATUS]
    starts = _starts(pinned)
    for partition, start in starts.items():
        if start > 0:
            raise ReplayRefused(f"{Topic.STATUS}/{partition} has lost its records before offset {start}: {_INSTEAD}")
    if await has_other_topics(connection, topic.cluster_id, topic.topic_id):
        raise ReplayRefused(f"the state database was also fed from another topic than this one: {_INSTEAD}")
    with open_reader(kafka, pinned.ranges, {}) as log:
        yield LogSource(kafka, topic, pinned, log)


def _starts(pinned: Pinned) -> dict[int, int]:
    return {each.partition: each.start for each in pinned.ranges}


def _gather(batches: Iterator[list[Message]]) -> Chunk | None:
    """The next chunk; None at the end."""
    chunk = Chunk()
    for messages in batches:
        chunk.take(messages)
        if chunk.events >= _CHUNK:
            break
    return chunk if chunk.events else None
