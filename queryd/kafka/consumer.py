"""The one poll-to-commit loop: asyncio around confluent-kafka's consumer.

The consumer is touched by one thread at a time: `poll`, `commit` and `close` are awaited by one task, and each runs
in a worker thread, so that the event loop never blocks and the poll goes on whatever the records' work does.
What may be committed follows `consumer-rules` 1 to 6: offsets are stored and committed only after `finish`, only for
partitions still owned, and never beyond the first unfinished record.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    OFFSET_STORED,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from queryd.forks import Origin
from queryd.kafka.lag import STATISTICS_MILLIS, read_behind
from queryd.kafka.offsets import PartitionOffsets
from queryd.kafka.outages import QUIET, OutageLog, explain_error
from queryd.kafka.record import Partition, Record, to_record
from queryd.registry import RegistryAway, registry_in_use

_log = logging.getLogger("queryd.kafka.consumer")

# How many records one poll hands over at most: a batch of this size is one admission transaction of some 50 ms.
_BATCH = 500
# How long one poll waits for a first record: also the longest that a commit or a close waits for the poll to return.
_POLL_SECONDS = 0.1
# How often finished offsets are committed: what a crash has to read again is what finished within this time.
_COMMIT_SECONDS = 0.5
# How long a revoke may take: the group waits for us meanwhile, and nobody works on the partitions.
_DRAIN_SECONDS = 3.0
# How long to wait for the group's offsets or a synchronous commit before the broker counts as gone.
_BROKER_SECONDS = 10.0

# How often the schema registry is asked again while it is away: each time may hold the poll up for 3 s.
_ASK_AGAIN_SECONDS = 2.0

# Assignments are numbered across all subscriptions of a process, so that work of one that was lost can't be taken for
# work of its successor.
_EPOCHS = itertools.count(1)

# What a commit is answered while the group is shared out anew, and by a member that has yet to hear of it.
_REBALANCING = {
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.STALE_MEMBER_EPOCH,
    # Of a group whose only member was away for longer than its session.
    KafkaError.GROUP_ID_NOT_FOUND,
}

_Answer = TypeVar("_Answer")


class SubscriptionLost(Exception):
    """The consumer can't go on and must be made anew: wait, then open another subscription."""


class Rebalancing(Exception):
    """The group is being shared out anew: poll on, and commit again what is still this member's."""


class OffsetOutOfRange(Exception):
    """The committed offset is no longer in the log: an operator decides where to go on."""


@dataclass(frozen=True, slots=True)
class Window:
    """How much unfinished work one topic may hold in memory before its partitions pause."""

    records: int = 100_000
    bytes: int = 256 * 1024 * 1024


StartOffsets = Callable[[list[Partition]], Awaitable[dict[Partition, int]]]
Revoked = Callable[[set[Partition]], Awaitable[None]]


@dataclass(slots=True)
class _Assigned:
    """One partition during one assignment; `start` is where reading began, None at the earliest record."""

    epoch: int
    start: int | None
    offsets: PartitionOffsets = field(default_factory=PartitionOffsets)


class Subscription:
    """A group's subscription to some topics, with explicit finishing of each record.

    `start_offsets` answers, for newly assigned partitions, from where to read; a partition that it leaves out starts at
    the group's committed offset, or at the earliest record where there is none. `revoked` is awaited when partitions
    are taken away, for at most 3 s, before their finished offsets are committed.
    """

    def __init__(
        self,
        config: dict[str, Any],
        topics: Iterable[str],
        *,
        window: Window | None = None,
        start_offsets: StartOffsets | None = None,
        revoked: Revoked | None = None,
        commit: bool = True,
    ) -> None:
        self._topics = list(topics)
        self._window = window or Window()
        self._start_offsets = start_offsets
        self._revoked = revoked
        self._commits = commit
        self._paused: set[str] = set()
        self._assigned: dict[Partition, _Assigned] = {}
        self._next_commit = 0.0
        self._behind: dict[Partition, int] = {}
        # Received and not handed over: their schemas are still to come from the registry.
        self._held: list[Record] = []
        self._next_asking = 0.0
        self._failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        # A cancelled poll leaves its thread behind for a moment: whoever uses the consumer next waits for it.
        self._consumer_turn = threading.Lock()
        self._first_assignment = asyncio.Event()
        self._outages = OutageLog("the consumer")
        # In a forked process the consumer's destructor would hang.
        self._origin = Origin(self)
        self._consumer = Consumer(
            _consumer_config(config)
            | QUIET
            | {"on_commit": self._on_commit, "error_cb": self._outages.complain, "logger": _log}
            | {"statistics.interval.ms": STATISTICS_MILLIS, "stats_cb": self._on_statistics}
        )

    async def open(self) -> None:
        """Join the group."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(
            self._consumer.subscribe,
            self._topics,
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )

    async def wait_assigned(self) -> None:
        """Return once the group has answered for the first time, with partitions or with none."""
        await self._first_assignment.wait()

    @property
    def assignment(self) -> frozenset[Partition]:
        """The partitions that this member holds now."""
        return frozenset(self._assigned)

    def lags(self) -> dict[Partition, int]:
        """How many records of each partition held are not finished: those in the log, up to 5 s ago, and those in work
        here. A partition of which nothing is known yet is left out."""
        behind = self._behind
        with self._lock:
            return {
                partition: behind[partition] + held.offsets.unfinished[0]
                for partition, held in self._assigned.items()
                if partition in behind
            }

    def owns(self, record: Record) -> bool:
        """True while the assignment that delivered the record lasts."""
        held = self._assigned.get((record.topic, record.partition))
        return held is not None and held.epoch == record.epoch

    def is_over(self, topic: str, partition: int, offset: int) -> bool:
        """True when this member holds the partition, and the record there is finished or will not come any more.

        False says that it is in work here or still to come, or that the partition is another member's.
        """
        with self._lock:
            held = self._assigned.get((topic, partition))
            return held is not None and held.offsets.is_over(offset, held.start)

    async def poll(self) -> list[Record]:
        """Up to 500 records; an empty list after 100 ms without any. A record whose schema has to come from the schema
        registry is handed over once it is here.

        Raises `SubscriptionLost` (make a new subscription) and `OffsetOutOfRange` (stop).
        """
        records = await asyncio.to_thread(self._in_turn, self._poll)
        if self._failure is not None:
            raise SubscriptionLost(f"a rebalance callback failed: {self._failure!r}") from self._failure
        return records

    def finish(self, record: Record) -> None:
        """The record's effect is durable. A record of an assignment that has ended is ignored."""
        with self._lock:
            held = self._assigned.get((record.topic, record.partition))
            if held is None or held.epoch != record.epoch:
                return
            held.offsets.finish(record.offset)

    async def commit(self) -> None:
        """Commit what is finished now, and wait for the broker's answer.

        Raises `Rebalancing`, and `KafkaException` where the broker refuses for any other reason; what was not committed
        goes with the next commit.
        """
        await asyncio.to_thread(self._in_turn, partial(self._commit, synchronously=True))

    async def close(self) -> None:
        """Commit what is finished and leave the group. `close` of the consumer is reached whatever fails before.

        `revoked` has been awaited with every partition that was still assigned, also if the consumer has failed.
        """
        try:
            await self.commit()
        except (KafkaException, Rebalancing) as error:
            _log.warning("the last commit failed, some finished records will be read again: %s", explain_error(error))
        finally:
            try:
                await asyncio.to_thread(self._in_turn, self._consumer.close)
            finally:
                # A consumer that has failed calls no callback.
                left = set(self._assigned)
                self._forget(left)
                if left and self._revoked is not None:
                    await self._revoked(left)

    # What follows runs in the worker thread that polls, callbacks included.

    def _in_turn(self, call: Callable[[], _Answer]) -> _Answer:
        with self._consumer_turn:
            return call()

    def _poll(self) -> list[Record]:
        try:
            self._pause_or_resume()
            # One blocking poll for the first record, then what is already here: `consume(500, 0.1)` alone would wait
            # for its timeout whenever fewer than 500 are there.
            first = self._consumer.poll(_POLL_SECONDS)
            messages = [] if first is None else [first, *self._consumer.consume(_BATCH - 1, 0)]
            records = [record for message in messages if (record := self._receive(message)) is not None]
            if self._commits and time.monotonic() >= self._next_commit:
                self._commit(synchronously=False)
                self._next_commit = time.monotonic() + _COMMIT_SECONDS
        except KafkaException as error:
            raise SubscriptionLost(explain_error(error)) from error
        return self._wait_for_schemas(records)

    def _wait_for_schemas(self, records: list[Record]) -> list[Record]:
        """What can be handed over. Without the registry the poll goes on, and what arrives is held, up to the window:
        nothing is passed over, and nothing judged by what nobody knows."""
        registry = registry_in_use()
        if registry is None:
            return records
        self._held += records
        batch = self._held[:_BATCH]
        try:
            if missing := registry.missing(record.value for record in batch):
                if time.monotonic() < self._next_asking:
                    return []
                registry.fetch(missing)
        except RegistryAway:
            self._next_asking = time.monotonic() + _ASK_AGAIN_SECONDS
            return []
        del self._held[:_BATCH]
        return [record for record in batch if self.owns(record)]

    def _receive(self, message: Message) -> Record | None:
        if self._failure is not None:
            # A failed assignment leaves the binding's own defaults in force: what then arrives is not to be judged.
            return None
        error = message.error()
        if error is not None:
            _judge(error)
            return None
        self._outages.answered()
        topic, partition = message.topic(), message.partition()
        assert topic is not None and partition is not None
        with self._lock:
            held = self._assigned.get((topic, partition))
            if held is None:
                return None
            record = to_record(message, held.epoch)
            held.offsets.receive(record.offset, record.size)
        return record

    def _pause_or_resume(self) -> None:
        # Resuming only at half the window: each pause and resume throws the fetch buffer away.
        for topic in self._topics:
            records, size = self._unfinished(topic)
            full = records >= self._window.records or size >= self._window.bytes
            half = records <= self._window.records // 2 and size <= self._window.bytes // 2
            if full and topic not in self._paused:
                self._consumer.pause(self._partitions_of(topic))
                self._paused.add(topic)
            elif half and topic in self._paused:
                self._consumer.resume(self._partitions_of(topic))
                self._paused.discard(topic)

    def _unfinished(self, topic: str) -> tuple[int, int]:
        with self._lock:
            held = [held.offsets.unfinished for (of, _), held in self._assigned.items() if of == topic]
        return sum(records for records, _ in held), sum(size for _, size in held)

    def _partitions_of(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(held, partition) for held, partition in self._assigned if held == topic]

    def _commit(self, *, synchronously: bool) -> None:
        if not self._commits:
            return
        with self._lock:
            positions = self._take_positions(self._assigned, again=synchronously)
        if not positions:
            return
        if synchronously:
            self._commit_and_wait(positions)
        else:
            # Storing refuses partitions that are no longer ours; a bare commit of offsets would not.
            self._consumer.store_offsets(offsets=positions)
            # The answer comes to `_on_commit`, served by a later poll.
            self._consumer.commit(offsets=positions, asynchronous=True)

    def _commit_and_wait(self, positions: list[TopicPartition]) -> None:
        """Raises as `commit` does; what did not reach the broker is then told again by the next one."""
        try:
            self._consumer.store_offsets(offsets=positions)
            answers = self._consumer.commit(offsets=positions, asynchronous=False) or ()
        except KafkaException as error:
            self._retake(positions)
            raise _of_commit(error) from error
        # A refusal of single partitions is in the answer and is not raised.
        if refused := [answer for answer in answers if answer.error is not None]:
            self._retake(refused)
            raise _of_commit(KafkaException(refused[0].error))

    def _take_positions(self, partitions: Iterable[Partition], *, again: bool) -> list[TopicPartition]:
        """What is to be committed; `again` with what was taken before, whose answer may still come and be a refusal."""
        if again:
            for partition in partitions:
                self._assigned[partition].offsets.retake()
        return [
            TopicPartition(*partition, position)
            for partition in partitions
            if (position := self._assigned[partition].offsets.take_commit()) is not None
        ]

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        with self._guarded("commit"):
            failed = [partition for partition in partitions if error is not None or partition.error is not None]
            if failed:
                _log.warning("a commit failed and will be repeated: %s", error or failed[0].error)
                self._retake(failed)

    def _on_statistics(self, statistics: str) -> None:
        with self._guarded("statistics"):
            self._behind = read_behind(statistics)

    def _retake(self, partitions: Iterable[TopicPartition]) -> None:
        with self._lock:
            for partition in partitions:
                held = self._assigned.get((partition.topic, partition.partition))
                if held is not None:
                    held.offsets.retake()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with self._guarded("assign"):
            self._outages.answered()
            start = self._find_start(consumer, partitions)
            with self._lock:
                epoch = next(_EPOCHS)
                for partition in start:
                    first = partition.offset if partition.offset >= 0 else None
                    self._assigned[partition.topic, partition.partition] = _Assigned(epoch, first)
            consumer.incremental_assign(start)
            if paused := [partition for partition in start if partition.topic in self._paused]:
                consumer.pause(paused)
            _log.info("partitions assigned", extra=_fields({(p.topic, p.partition) for p in partitions}))
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._first_assignment.set)

    def _find_start(self, consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        wanted = [(partition.topic, partition.partition) for partition in partitions]
        known: dict[Partition, int] = {}
        if self._start_offsets is not None:
            known = self._await(self._start_offsets(wanted), _BROKER_SECONDS)
        unknown = [TopicPartition(*partition) for partition in wanted if partition not in known]
        committed: dict[Partition, int] = {}
        for partition in consumer.committed(unknown, timeout=_BROKER_SECONDS) if unknown else ():
            if partition.error is not None:
                # Not an answer: starting at the beginning would move the group's offset back.
                raise KafkaException(partition.error)
            committed[partition.topic, partition.partition] = partition.offset
        # A group without an offset begins at the earliest record; an offset that has left the log is another matter
        # and arrives as an error, since `auto.offset.reset` is `error`.
        return [
            TopicPartition(*partition, known.get(partition, _or_beginning(committed.get(partition))))
            for partition in wanted
        ]

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with self._guarded("revoke"):
            revoked = {(partition.topic, partition.partition) for partition in partitions}
            try:
                self._drain(revoked)
            finally:
                self._commit_revoked(revoked)
            _log.info("partitions revoked", extra=_fields(revoked))

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with self._guarded("lost"):
            lost = {(partition.topic, partition.partition) for partition in partitions}
            # Somebody else owns them already: nothing may be committed.
            self._forget(lost)
            self._drain(lost)
            _log.warning("partitions lost", extra=_fields(lost))

    def _drain(self, revoked: set[Partition]) -> None:
        if self._revoked is not None:
            try:
                self._await(self._revoked(revoked), _DRAIN_SECONDS)
            except TimeoutError:
                _log.warning("draining revoked partitions took too long, going on without")

    def _commit_revoked(self, revoked: set[Partition]) -> None:
        with self._lock:
            positions = self._take_positions(revoked & self._assigned.keys(), again=True)
        try:
            if positions and self._commits:
                self._commit_and_wait(positions)
        except (KafkaException, Rebalancing) as error:
            _log.warning("the commit at a revoke failed, records will be read again: %s", explain_error(error))
        finally:
            self._forget(revoked)

    def _forget(self, partitions: set[Partition]) -> None:
        with self._lock:
            for partition in partitions:
                self._assigned.pop(partition, None)

    @contextmanager
    def _guarded(self, callback: str) -> Iterator[None]:
        """Latch what is raised, so that the next `poll` raises `SubscriptionLost`.

        librdkafka's binding silently drops fetched messages if a rebalance callback raises.
        """
        try:
            yield
        except BaseException as raised:  # noqa: BLE001
            # Of an error that is not Kafka's only the class is logged: its text may quote anything.
            reason = f": {explain_error(raised)}" if isinstance(raised, KafkaException) else ""
            _log.error("the %s callback failed: %s%s", callback, type(raised).__name__, reason)
            self._failure = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))

    def _await(self, work: Awaitable[Any], seconds: float) -> Any:
        async def run() -> Any:
            return await asyncio.wait_for(work, seconds)

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()


def _judge(error: KafkaError) -> None:
    """Decide on an error that came in place of a message; raises where the consumer can't go on."""
    if error.code() == KafkaError._AUTO_OFFSET_RESET:
        raise OffsetOutOfRange(
            f"{error.str()}. Records between the committed offset and the log's start are gone; "
            "move the group's offset to where reading shall go on, then start again"
        )
    # In an error that comes in place of a message `fatal()` is false even of a fatal one: the code tells.
    if error.fatal() or error.code() == KafkaError._FATAL:
        raise SubscriptionLost(error.str())
    # Everything else librdkafka mends by itself: brokers away, topics not there yet, the poll interval exceeded
    # (the group takes the partitions away by `on_lost`, and the next poll joins again).
    _log.warning("kafka: %s", error.str())


def _or_beginning(committed: int | None) -> int:
    if committed is None or committed in (OFFSET_INVALID, OFFSET_STORED) or committed < 0:
        return OFFSET_BEGINNING
    return committed


def _fields(partitions: Iterable[Partition]) -> dict[str, Any]:
    """Return the log fields for partitions: their numbers by topic."""
    by_topic: dict[str, list[int]] = {}
    for topic, partition in sorted(partitions):
        by_topic.setdefault(topic, []).append(partition)
    return {"partitions": by_topic}


def _of_commit(error: KafkaException) -> KafkaException | Rebalancing:
    cause = error.args[0] if error.args else None
    return Rebalancing(cause.str()) if isinstance(cause, KafkaError) and cause.code() in _REBALANCING else error


def _consumer_config(config: dict[str, Any]) -> dict[str, Any]:
    fixed = {
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        # Bounds of the prefetch; the default is 64 MB a consumer beside our own window.
        "queued.max.messages.kbytes": 16_384,
        "fetch.max.bytes": 8_388_608,
    }
    if config.get("group.protocol") != "consumer":
        fixed["partition.assignment.strategy"] = "cooperative-sticky"
        # How soon a member hears that another has left: the next attempt of a handed-back query waits for it.
        fixed["heartbeat.interval.ms"] = 1_000
    return config | fixed
