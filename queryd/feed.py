"""Status events one by one, as a durable subscription of a group, with an explicit commit.

What is promised, by every class here:

- **Durable**: a group goes on behind its last commit; a new one begins at the earliest record. Members of a group share
  the partitions.
- **At least once**: `commit` says that everything handed out so far is processed. What was handed out and not committed
  comes again, after a crash and after a rebalance.
- **In order** per query.
- **Without duplicates** as far as that can be known without a store: within one process, what was handed out does not
  come again, nor does an older event of the same query, for the 100,000 queries that were heard of last. A copy that a
  replay has published is such a duplicate, and so is a last event that is published again without its inline result.
  After a restart a copy is handed out once more, for nobody remembers it: `event.event_id` is then the same as before,
  and `StatusRecord.replay_id` says which replay it was.
"""

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from uuid import UUID

from confluent_kafka import KafkaError, KafkaException

from queryd.errors import ClientStopped, CommitOverdue
from queryd.events import QueryId, QueryStatusChanged, Topic, parse_uuid
from queryd.forks import Origin
from queryd.kafka.consumer import Rebalancing, Subscription, SubscriptionLost, Window
from queryd.kafka.consumer_loop import ConsumerLoop
from queryd.kafka.record import Record
from queryd.status_records import StatusRecord, Unreadable, read_status

_log = logging.getLogger("queryd.feed")

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")
_Choose = Callable[[StatusRecord], _Item | None]

# How much may be handed out without a commit: far more than anybody processes at a time, and what a crash repeats.
MOST_UNCOMMITTED = 10_000
_MOST_UNCOMMITTED_BYTES = 64 * 1024 * 1024
# Reading pauses at its window and resumes at half of it, so that whoever has not reached the limits is never starved.
_WINDOW = Window(2 * MOST_UNCOMMITTED, 2 * _MOST_UNCOMMITTED_BYTES)
# How many queries are remembered, to tell duplicates: some 15 MB.
_REMEMBERED = 100_000
# While its caller works, a member polls this often, for the group's sake: a rebalance waits for it.
_KEEP_ALIVE_SECONDS = 1.0
# How soon a commit is tried again while the group is shared out anew, which takes a round of heartbeats.
_REBALANCE_SECONDS = 0.1
# How long it may take: a member that was to share the group out and died is waited for as long as its session lasts.
_COMMIT_SECONDS = 60.0
# The least that brokers allow by default: for so long a crashed member's partitions wait for another.
_SESSION_MILLIS = 6_000
# queryd's own groups: who joined one would take its partitions away.
_OWN_GROUPS = "queryd-"


class AsyncFeed(Generic[_Item]):
    """`async with AsyncStatusFeed(kafka, group) as feed: async for record in feed: …; await feed.commit()`."""

    def __init__(self, kafka: Mapping[str, Any], group: str, choose: "_Choose[_Item]") -> None:
        if group.startswith(_OWN_GROUPS):
            raise ValueError(f"groups that begin with {_OWN_GROUPS} are queryd's own: choose another name")
        self._origin = Origin(self)
        self._choose = choose
        subscribe = partial(Subscription, group_config(kafka, group), [Topic.STATUS.value], window=_WINDOW)
        self._loop = ConsumerLoop(subscribe, self._take_in, on_lost=self._on_lost, wait=self._wait_until_wanted)
        self._reading: asyncio.Task[None] | None = None
        self._arrived: deque[Record] = deque()
        self._handed: list[Record] = []
        self._handed_bytes = 0
        self._handed_queries: set[QueryId] = set()
        self._seen = Seen()
        self._news = asyncio.Event()
        self._wanted = asyncio.Event()
        self._closed = False

    async def take(self, timeout: float | None = None) -> _Item | None:  # noqa: ASYNC109 — its twin has it as well
        """The next one; None when none has come within `timeout` seconds, or after `close`.

        Raises `CommitOverdue` when 10,000 or 64 MB were handed out without a commit, and `OffsetOutOfRange` when what
        the group would go on with is no longer in the log; `NoRegistry` for events in Confluent's wire format where
        this process knows no schema registry.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._next()
        except TimeoutError:
            return None

    def take_arrived(self) -> _Item | None:
        """The next one of those that were read already, without waiting; None where none is left.

        Whoever takes may call it from another thread than the event loop's, as long as nobody else takes or commits.
        """
        self._origin.check()
        while True:
            try:
                record = self._arrived.popleft()
            except IndexError:
                return None
            if (item := self._judge(record)) is not None:
                return item

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _Item:
        item = await self._next()
        if item is None:
            raise StopAsyncIteration
        return item

    async def wait_arrived(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 — as `take` has it
        """True once `take_arrived` may have one; False when `timeout` seconds have passed, or after `close`.

        Hands out nothing, so that who is interrupted while it waits has lost nothing. Raises as `take` does.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._await_arrival()
        except TimeoutError:
            return False

    async def commit(self) -> None:
        """Everything that was handed out is processed; returns once the broker knows.

        While the group is shared out anew it waits, for a minute at most. Of partitions that are taken away meanwhile
        nothing is committed, and it comes again where they are. Raises `KafkaException` where the broker refuses, and
        `ClientStopped` when the feed is closed meanwhile: then some of it may come again.
        """
        self._origin.check()
        if (subscription := self._loop.subscription) is None:
            return
        for record in self._handed:
            # Of partitions that are another member's by now this does nothing.
            subscription.finish(record)
        self._handed.clear()
        self._handed_bytes = 0
        self._handed_queries.clear()
        await self._commit_finished()

    async def close(self) -> None:
        """Leave the group. What was not committed comes again."""
        self._origin.check()
        self._closed = True
        self._news.set()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _next(self) -> _Item | None:
        while await self._await_arrival():
            if (item := self.take_arrived()) is not None:
                return item
        return None

    async def _await_arrival(self) -> bool:
        """True once records lie here that nobody has judged; False after `close`."""
        self._origin.check()
        if self._reading is None and not self._closed:
            self._reading = asyncio.create_task(self._loop.run())
            self._reading.add_done_callback(lambda _: self._news.set())
        while not self._closed:
            if self._arrived:
                return True
            assert self._reading is not None
            if self._reading.done():
                self._reading.result()
            self._check_commits()
            self._news.clear()
            self._wanted.set()
            await self._news.wait()
        return False

    def _judge(self, record: Record) -> _Item | None:
        """The item to hand out; None for what is passed over."""
        subscription = self._loop.subscription
        if subscription is None or not subscription.owns(record):
            return None
        try:
            status = read_status(record)
        except Unreadable as error:
            where = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
            _log.warning("skipping a record: %s", error, extra=where)
            subscription.finish(record)
            return None
        item = self._choose(status)
        if item is None and status.event is None:
            self._seen.delete(status.query_id)
        if item is not None and self._seen.add(status):
            self._hand_out(status)
            return item
        if item is not None and status.query_id in self._handed_queries:
            # The copy of something that may not be processed yet: finished with it, and not before.
            self._hand_out(status)
        else:
            subscription.finish(record)
        return None

    def _hand_out(self, status: StatusRecord) -> None:
        self._handed_bytes += status.record.size
        self._handed_queries.add(status.query_id)
        # Last: who is interrupted before it has not been handed the record, and does not commit it.
        self._handed.append(status.record)

    async def _commit_finished(self) -> None:
        deadline = time.monotonic() + _COMMIT_SECONDS
        # A subscription that was lost meanwhile has had its partitions taken away, and the next one nothing to commit.
        while not self._closed and (subscription := self._loop.subscription) is not None:
            try:
                await subscription.commit()
            except Rebalancing as error:
                if time.monotonic() > deadline:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no commit in a minute: {error}")) from None
            else:
                return
            # The poll carries the rebalance on.
            self._wanted.set()
            await asyncio.sleep(_REBALANCE_SECONDS)
        if self._closed:
            raise ClientStopped("the feed was closed before the commit was answered: some of it may come again")

    def _check_commits(self) -> None:
        if len(self._handed) > MOST_UNCOMMITTED or self._handed_bytes > _MOST_UNCOMMITTED_BYTES:
            raise CommitOverdue(
                f"{len(self._handed)} events were handed out without a commit: commit() what is processed"
            )

    async def _take_in(self, records: list[Record]) -> list[Record]:
        """A record finishes when its event is committed or skipped."""
        self._arrived.extend(records)
        self._wanted.clear()
        self._news.set()
        return []

    def _on_lost(self, error: SubscriptionLost) -> None:
        # What is left belongs to an assignment that is over.
        self._arrived.clear()
        _log.warning("the subscription was lost, opening another: %s", error)

    async def _wait_until_wanted(self) -> None:
        # Only when the next one is awaited, so that no poll is in the way of a commit.
        with suppress(TimeoutError):
            async with asyncio.timeout(_KEEP_ALIVE_SECONDS):
                await self._wanted.wait()


class Feed(Generic[_Item]):
    """`with StatusFeed(kafka, group) as feed: for record in feed: …; feed.commit()`. For one thread at a time."""

    def __init__(self, feed: AsyncFeed[_Item]) -> None:
        self._feed = feed
        self._origin = Origin(self)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="queryd-feed", daemon=True)
        self._thread.start()

    def take(self, timeout: float | None = None) -> _Item | None:
        """See `AsyncFeed.take`."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        # Most are here already, and a round through the loop's thread costs as much as ten of them. Handed out is in
        # the caller's own thread only: what the loop's had taken while Ctrl-C ended the wait would be committed unseen.
        while (item := self._feed.take_arrived()) is None:
            left = None if timeout is None else max(0.0, deadline - time.monotonic())
            if not self._run(partial(self._feed.wait_arrived, left)):
                return None
        return item

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _Item:
        item = self.take()
        if item is None:
            raise StopIteration
        return item

    def commit(self) -> None:
        """See `AsyncFeed.commit`."""
        self._run(self._feed.commit)

    def close(self) -> None:
        """Leave the group. What was not committed comes again."""
        self._origin.check()
        if self._loop.is_closed():
            return
        self._run(self._feed.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _run(self, work: Callable[[], Coroutine[Any, Any, _Answer]]) -> _Answer:
        self._origin.check()
        if self._loop.is_closed():
            raise ClientStopped("the feed was closed: make another, it goes on behind the last commit")
        running = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return running.result()
        except BaseException:
            # Ctrl-C: nobody waits for it any more.
            running.cancel()
            raise


class AsyncStatusFeed(AsyncFeed[StatusRecord]):
    """Every record of `query.status`, deletions included."""

    def __init__(self, kafka: Mapping[str, Any], group: str) -> None:
        """`kafka` is librdkafka's configuration; raises `ValueError` for a group of queryd's own."""
        super().__init__(kafka, group, lambda status: status)


class StatusFeed(Feed[StatusRecord]):
    """`AsyncStatusFeed` without asyncio."""

    def __init__(self, kafka: Mapping[str, Any], group: str) -> None:
        """`kafka` is librdkafka's configuration; raises `ValueError` for a group of queryd's own."""
        super().__init__(AsyncStatusFeed(kafka, group))


class AsyncEventFeed(AsyncFeed[QueryStatusChanged]):
    """The events of all orgs, or of one, as this module's text promises: durable, at least once, in order per query.

    Deletions are not events: who keeps data takes `AsyncStatusFeed`.
    """

    def __init__(self, kafka: Mapping[str, Any], group: str, *, org: str | UUID | None = None) -> None:
        """`kafka` is librdkafka's configuration; raises `ValueError` for a group of queryd's own, and `Invalid` for an
        org that is no UUID."""
        super().__init__(kafka, group, partial(_choose_event, None if org is None else parse_uuid(org, "org")))


class EventFeed(Feed[QueryStatusChanged]):
    """`AsyncEventFeed` without asyncio."""

    def __init__(self, kafka: Mapping[str, Any], group: str, *, org: str | UUID | None = None) -> None:
        """`kafka` is librdkafka's configuration; raises `ValueError` for a group of queryd's own, and `Invalid` for an
        org that is no UUID."""
        super().__init__(AsyncEventFeed(kafka, group, org=org))


class Seen:
    """How far each query's story was handed out, for the queries that were heard of last."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._size = size
        self._sequences: OrderedDict[QueryId, float] = OrderedDict()

    def delete(self, query_id: QueryId) -> None:
        """A tombstone that is not handed out: what follows it is another story. Of a query that was never handed out
        nothing has to be known."""
        if query_id in self._sequences:
            self._sequences[query_id] = math.inf

    def add(self, status: StatusRecord) -> bool:
        """True for what is new; False for an event as old as one that was seen, or a tombstone that was."""
        seen = self._sequences.get(status.query_id, 0)
        sequence = math.inf if status.event is None else status.event.sequence
        # Only a first event begins another story after a tombstone.
        if sequence <= seen and not (seen == math.inf and sequence == 1):
            return False
        self._sequences[status.query_id] = sequence
        self._sequences.move_to_end(status.query_id)
        if len(self._sequences) > self._size:
            self._sequences.popitem(last=False)
        return True


def _choose_event(org: str | None, status: StatusRecord) -> QueryStatusChanged | None:
    event = status.event
    return event if event is not None and org in (None, event.org_id) else None


def group_config(kafka: Mapping[str, Any], group: str) -> dict[str, Any]:
    """librdkafka's configuration of a group's member."""
    config = dict(kafka) | {"group.id": group}
    if config.get("group.protocol") != "consumer":
        # Under the newer protocol the broker decides, and librdkafka refuses the property.
        config.setdefault("session.timeout.ms", _SESSION_MILLIS)
    return config
