"""The log between two offsets a partition, which are pinned before anything is read."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from queryd.events import Invalid, from_millis
from queryd.kafka.bounded_reader import BoundedReader, list_offsets, read_ends, read_starts
from queryd.kafka.outages import QUIET
from queryd.kafka.record import Partition, Record, to_record
from queryd.topics import TopicIdentity, read_topic_identity
from replay.refused import ReplayRefused

_BROKER_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class OffsetRange:
    """Offsets `start` to `end` of a partition, without `end`."""

    topic: str
    partition: int
    start: int
    end: int

    @property
    def place(self) -> Partition:
        """Topic and partition."""
        return self.topic, self.partition


@dataclass(frozen=True, slots=True)
class Window:
    """Which part of the topics: their partitions (all where none is named), and either offsets or a span of time.

    Times are aware. A record is in the window if its own timestamp is at `since` or later, and before `until`.
    """

    partitions: frozenset[int] = frozenset()
    from_offset: int | None = None
    to_offset: int | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def has_offsets(self) -> bool:
        """True if the window has a first or a last offset."""
        return self.from_offset is not None or self.to_offset is not None

    def holds(self, timestamp_ms: int | None) -> bool:
        """Whether a record of that time is in the window; its offset is another matter."""
        if self.since is None and self.until is None:
            return True
        if timestamp_ms is None:
            return False
        try:
            moment = from_millis(timestamp_ms)
        except Invalid:
            # Beyond the year 9999: in no window.
            return False
        return (self.since is None or moment >= self.since) and (self.until is None or moment < self.until)


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a window came to: each topic's identity, and the offsets to be read."""

    topics: Mapping[str, TopicIdentity]
    ranges: tuple[OffsetRange, ...]


def pin(config: dict[str, Any], topics: Sequence[str], window: Window) -> Pinned:
    """Resolve a window to offsets, once. Blocks.

    A range ends where the log ends now, whatever the window's end: a record's timestamp may be odd, so each is judged
    by itself. Raises `ReplayRefused`, `TopicUnknown` and `KafkaException`.
    """
    identities = {topic: read_topic_identity(config, topic) for topic in topics}
    ranges = [each for topic in topics for each in _pin_topic(config, topic, window)]
    return Pinned(identities, tuple(ranges))


def _pin_topic(config: dict[str, Any], topic: str, window: Window) -> list[OffsetRange]:
    ends = read_ends(config, topic)
    if missing := window.partitions - ends.keys():
        raise ReplayRefused(f"{topic} has no partition {min(missing)}; its partitions are 0 to {max(ends)}")
    wanted = sorted(window.partitions or ends.keys())
    firsts = read_starts(config, topic)
    ranges = []
    for partition in wanted:
        first, end = firsts[partition], ends[partition]
        start = _check_start(topic, partition, window, first, end)
        ranges.append(OffsetRange(topic, partition, start, _check_end(topic, partition, window, end)))
    if window.since is None:
        return ranges
    millis = int(window.since.timestamp() * 1000)
    kept_since = _find_kept_since(config, topic)
    oldest = list_offsets(config, topic, OffsetSpec.for_timestamp(0))
    found = list_offsets(config, topic, OffsetSpec.for_timestamp(millis))
    narrowed = []
    for each in ranges:
        offset, timestamp = oldest[each.partition].offset, oldest[each.partition].timestamp
        if firsts[each.partition] > 0 and (offset < 0 or timestamp > millis) and millis < kept_since:
            # What was removed may have been in the window: nobody can tell any more.
            held = f"goes back to {_say(timestamp)}" if offset >= 0 else "holds nothing any more"
            raise ReplayRefused(
                f"the window begins before what {topic} still holds: partition {each.partition} {held}, and what is "
                f"older than {_say(kept_since)} may be gone. Begin the window later"
            )
        # Nothing at that time or later: the range is empty.
        start = found[each.partition].offset if found[each.partition].offset >= 0 else each.end
        narrowed.append(OffsetRange(topic, each.partition, max(each.start, min(start, each.end)), each.end))
    return narrowed


def _find_kept_since(config: dict[str, Any], topic: str) -> int:
    """Return the time (ms since the epoch) since which the topic keeps every record.

    It is now if retention is also by size, or if the broker does not report it: the embedded one lists no defaults.
    """
    # Named, since it answers no more once it is collected.
    admin, resource = AdminClient(config | QUIET), ConfigResource(ResourceType.TOPIC, topic)
    described = admin.describe_configs([resource], request_timeout=_BROKER_SECONDS)[resource].result()
    now = int(time.time() * 1000)
    if not {"retention.bytes", "retention.ms"} <= described.keys() or int(described["retention.bytes"].value) >= 0:
        return now
    retention = int(described["retention.ms"].value)
    return now - retention if retention >= 0 else 0


def _check_start(topic: str, partition: int, window: Window, first: int, end: int) -> int:
    if window.to_offset is not None and window.to_offset <= first:
        raise ReplayRefused(f"{topic}/{partition} begins at offset {first}: what lay before was removed by retention")
    if window.from_offset is None:
        return first
    if window.from_offset < first:
        raise ReplayRefused(
            f"offset {window.from_offset} of {topic}/{partition} was removed by retention: the log begins at {first}"
        )
    return min(window.from_offset, end)


def _check_end(topic: str, partition: int, window: Window, end: int) -> int:
    if window.to_offset is None:
        return end
    if window.to_offset > end:
        raise ReplayRefused(f"{topic}/{partition} ends at offset {end}, before {window.to_offset}")
    return window.to_offset


def _say(millis: int) -> str:
    return datetime.fromtimestamp(millis / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def open_reader(
    config: dict[str, Any], ranges: Sequence[OffsetRange], starts: Mapping[Partition, int]
) -> BoundedReader:
    """A reader of ranges. `starts` has the next offsets of ranges that were begun before."""
    return BoundedReader(config, {each.place: max(each.start, starts.get(each.place, 0)) for each in ranges})


async def read_batches(reader: BoundedReader, ranges: Sequence[OffsetRange], most: int) -> AsyncIterator[list[Record]]:
    """The committed records of the ranges, at most `most` at once. Raises as `BoundedReader.read_to`."""
    batches = reader.read_to({each.place: each.end for each in ranges}, most=most)
    while (messages := await asyncio.to_thread(next, batches, None)) is not None:
        yield [to_record(message) for message in messages]
