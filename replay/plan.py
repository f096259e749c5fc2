"""The plan: what a replay would do, found out without doing it."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from db.connection import Connection
from db.data.replays import Replay
from queryd.kafka.record import Partition
from queryd.topics import TopicIdentity
from replay.kinds import Judge, Tally, Verdict, judge_records
from replay.log import OffsetRange, open_reader, pin, read_batches
from replay.marks import Marks
from replay.refused import ReplayRefused
from replay.spec import ReplaySpec

# As the executor takes them: a batch is one look into the database of some milliseconds.
BATCH = 500
_FIRST_IDS = 5
# Enough to tell two plans apart by accident; short enough to be typed.
_HASH_DIGITS = 16

OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class RangePlan:
    """One range: how many records match and how many are skipped, and the offsets of those that match."""

    range: OffsetRange
    marks: Marks
    matched: int = 0
    skipped: int = 0
    # Of the offsets that match.
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

    def add(self, verdict: Verdict) -> None:
        """Count one record."""
        self.skipped += verdict.skip is not None
        if verdict.copy is not None:
            self.matched += 1
            self.marks.add(verdict.record.offset)
            self._digest.update(f"{verdict.record.offset}\n".encode())

    def digest(self) -> str:
        """Tells the records that match apart from others."""
        digest: str = self._digest.hexdigest()
        return digest


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be published and skipped. `scanned` records were read in all; the others were not asked for.

    `topics` has each topic's identity. `first_ids` are those of the records, not of copies with other ids.
    """

    spec: ReplaySpec
    topics: Mapping[str, str]
    ranges: tuple[RangePlan, ...]
    tally: Tally
    scanned: int
    first_ids: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Stands for what is asked, and for the records that match, by their offsets.

        The scan's end is not in it: new records that are not asked for leave a plan as good as it was.
        """
        matches = sorted((*each.range.place, each.digest()) for each in self.ranges)
        return digest_json(self._describe_spec() | {"kind": self.spec.name.value, "matches": matches})

    def _describe_spec(self) -> dict[str, Any]:
        return {"asked": self.spec.asked, "options": self.spec.options, "topics": dict(self.topics)}

    def to_row(self) -> dict[str, Any]:
        """The plan as its replay's row contains it: all that is needed to go on, and for an audit."""
        return {
            **self._describe_spec(),
            **self.tally.to_json(),
            "hash": self.hash,
            "ranges": [[*each.range.place, each.range.start, each.range.end] for each in self.ranges],
            "marks": [each.marks.dump() for each in self.ranges],
            "matched": self.tally.copies,
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as the command line prints it."""
        return {
            "kind": self.spec.name,
            "hash": self.hash,
            "ranges": [
                {
                    "topic": each.range.topic,
                    "partition": each.range.partition,
                    "start": each.range.start,
                    "end": each.range.end,
                    "matched": each.matched,
                    "skipped": each.skipped,
                }
                for each in self.ranges
            ],
            "scanned": self.scanned,
            "matched": self.tally.copies,
            **self.tally.to_json(),
            "first_ids": self.first_ids,
        }


async def make_plan(
    connection: Connection, kafka: dict[str, Any], spec: ReplaySpec, judge: Judge, on_progress: OnProgress
) -> Plan:
    """Find out what a replay would do. `on_progress` receives the offsets read, and all offsets.

    Raises `ReplayRefused`, `TopicUnknown`, `EndNotReached`, `LogChanged`,
    `KafkaException` and `DatabaseUnavailable`.
    """
    pinned = await asyncio.to_thread(pin, kafka, spec.topics, spec.window)
    ranges = {each.place: RangePlan(each, Marks.of(each)) for each in pinned.ranges}
    offsets = sum(each.end - each.start for each in pinned.ranges)
    tally, scanned, first_ids = Tally(), 0, list[str]()
    async for verdicts in judge_ranges(connection, kafka, judge, pinned.ranges):
        scanned += len(verdicts)
        tally.add(verdicts)
        for verdict in verdicts:
            ranges[verdict.record.topic, verdict.record.partition].add(verdict)
            if verdict.copy is not None and len(first_ids) < _FIRST_IDS:
                first_ids.append(verdict.copy.was or verdict.copy.query_id or "unreadable")
        on_progress(scanned, offsets)
    if not tally.copies:
        raise ReplayRefused(_describe_nothing(tally, scanned))
    topics = {topic: describe_topic(identity) for topic, identity in pinned.topics.items()}
    return Plan(spec, topics, tuple(ranges.values()), tally, scanned, tuple(first_ids))


async def judge_ranges(
    connection: Connection, kafka: dict[str, Any], judge: Judge, ranges: Sequence[OffsetRange]
) -> AsyncIterator[list[Verdict]]:
    """Judge all records of the ranges, batch by batch; publishes nothing. Raises as `make_plan`."""
    with open_reader(kafka, ranges, {}) as reader:
        async for records in read_batches(reader, ranges, BATCH):
            yield await judge_records(judge, connection, records)


def read_ranges(replay: Replay) -> list[OffsetRange]:
    """The ranges of the plan in a replay's row."""
    return [OffsetRange(*each) for each in replay.plan["ranges"]]


def read_marks(replay: Replay) -> dict[Partition, Marks]:
    """The records that match the plan in a replay's row."""
    marks = zip(read_ranges(replay), replay.plan["marks"], strict=True)
    return {each.place: Marks.load(each, text) for each, text in marks}


def describe_topic(identity: TopicIdentity) -> str:
    """A topic's identity as one text."""
    return f"{identity.cluster_id}/{identity.topic_id}"


def digest_json(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]


def _describe_nothing(tally: Tally, scanned: int) -> str:
    if not scanned:
        return "there are no records in these partitions at that time: look at the times"
    if not tally.skipped:
        return f"none of the {scanned} records that were read lies in the window and is asked for: look at both"
    why = ", ".join(f"{count} {skip.value} (it {skip.description})" for skip, count in sorted(tally.skipped.items()))
    return f"nothing of the {scanned} records that were read can be replayed: {why}"
