"""Status events into the caller's own tables, each exactly once: offsets are stored with the rows.

The caller's store writes a batch's rows and the offsets behind it in one transaction of its own, and reading begins
where the stored offsets say, whatever the group has committed. So a batch whose transaction failed comes again, and one
whose transaction was committed does not.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from confluent_kafka import OFFSET_BEGINNING

from queryd.events import Topic
from queryd.feed import group_config
from queryd.kafka.consumer import Subscription, SubscriptionLost
from queryd.kafka.consumer_loop import ConsumerLoop
from queryd.kafka.record import Partition, Record
from queryd.status_records import StatusRecord, read_all
from queryd.topics import TopicIdentity, wait_for_topic

_log = logging.getLogger("queryd.projector")

_Answer = TypeVar("_Answer")


class Store(Protocol):
    """Where a projector writes to. What it raises ends the projector; a store that can wait for its database does."""

    async def read_offsets(self, topic: TopicIdentity) -> Mapping[int, int]:
        """The next offset to read of each partition, as `apply` has stored them for this very topic; a partition that
        is left out is read from its beginning."""
        ...

    async def apply(self, topic: TopicIdentity, batch: Sequence[StatusRecord], offsets: Mapping[int, int]) -> None:
        """Write what up to 500 records say, and the offsets behind them by partition, in one transaction.

        An event may be a copy, by a replay, of one that was applied long ago: write none whose `sequence` is not above
        the one that stands. A member that was stopped and wakes may bring what another has applied since, with offsets
        lower than the stored ones of this topic: refuse those, or it would be applied again. Its records lie below the
        stored offset of their partition, `status.record.partition` and `.offset`; who deletes by tombstones passes over
        them, or a deleted query would come back. The batch may be empty, where it held nothing that could be read.
        """
        ...


class BlockingStore(Protocol):
    """A `Store` without asyncio; see `in_thread`."""

    def read_offsets(self, topic: TopicIdentity) -> Mapping[int, int]:
        """As `Store.read_offsets`."""
        ...

    def apply(self, topic: TopicIdentity, batch: Sequence[StatusRecord], offsets: Mapping[int, int]) -> None:
        """As `Store.apply`."""
        ...


def tell_unreadable(record: Record, reason: str) -> None:
    """What a projector does by default with a record that holds no event, besides passing it over."""
    where = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
    _log.error("skipping a record: %s", reason, extra=where)


def tell_lost(error: SubscriptionLost) -> None:
    """What a projector does by default when its consumer can't go on, besides opening another."""
    _log.warning("the subscription was lost, opening another: %s", error)


class Projector:
    """Reads `query.status` into a store. `run` returns once it has been asked to stop."""

    def __init__(
        self,
        kafka: Mapping[str, Any],
        group: str,
        store: Store,
        *,
        ready: Callable[[], None] = lambda: None,
        unreadable: Callable[[Record, str], None] = tell_unreadable,
        lost: Callable[[SubscriptionLost], None] = tell_lost,
    ) -> None:
        """`kafka` is librdkafka's configuration; members of one group share the partitions, and must share the store.

        `ready` is called when the group has answered, with partitions or with none.
        """
        self._kafka = dict(kafka)
        self._group = group_config(kafka, group)
        self._store = store
        self._unreadable = unreadable
        self._topic: TopicIdentity | None = None
        self._stopping = asyncio.Event()
        self._loop = ConsumerLoop(self._subscribe, self._apply, on_assigned=ready, on_lost=lost)

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._stopping.set()
        self._loop.stop()

    def lags(self) -> dict[Partition, int]:
        """How many records of each partition held are still to be projected; see `Subscription.lags`."""
        return self._loop.lags()

    async def run(self) -> None:
        """Project until `stop`, waiting for Kafka whenever it is away.

        Raises what the store raises, `OffsetOutOfRange` when what follows the stored offsets has left the log, and
        `NoRegistry` for events in Confluent's wire format where this process knows no schema registry.
        """
        self._topic = await self._unless_stopped(wait_for_topic(self._kafka, Topic.STATUS))
        if self._topic is not None:
            await self._loop.run()

    def _subscribe(self) -> Subscription:
        return Subscription(self._group, [Topic.STATUS.value], start_offsets=self._start_offsets, commit=False)

    async def _start_offsets(self, partitions: list[Partition]) -> dict[Partition, int]:
        assert self._topic is not None
        known = await self._store.read_offsets(self._topic)
        # What was never read from this topic of this cluster is read from its beginning, whatever the group's offset
        # says: that one is not written with the rows.
        return {partition: known.get(partition[1], OFFSET_BEGINNING) for partition in partitions}

    async def _apply(self, records: list[Record]) -> list[Record]:
        assert self._topic is not None
        ends = {record.partition: record.offset + 1 for record in records}
        await self._store.apply(self._topic, read_all(records, self._unreadable), ends)
        return records

    async def _unless_stopped(self, work: Coroutine[Any, Any, _Answer]) -> _Answer | None:
        task, stopping = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        waited: set[asyncio.Task[Any]] = {task, stopping}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        for each in waited:
            each.cancel()
        return task.result() if task.done() else None


class _InThread:
    def __init__(self, store: BlockingStore) -> None:
        self._store = store
        # One thread for all calls: some database connections belong to the thread that made them.
        self._thread = ThreadPoolExecutor(1, "queryd-store")

    async def read_offsets(self, topic: TopicIdentity) -> Mapping[int, int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._store.read_offsets, topic)

    async def apply(self, topic: TopicIdentity, batch: Sequence[StatusRecord], offsets: Mapping[int, int]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.apply, topic, batch, offsets)


def in_thread(store: BlockingStore) -> Store:
    """A store whose calls block, each run in the same thread of its own, so that the group is kept alive meanwhile."""
    return _InThread(store)
