"""The relay's loop: read the next rows, publish them, delete them.

One relay is active for a set of shards: it holds an advisory lock on the very connection by which it reads and deletes.
A relay that was stopped loses its connection (`idle_session_timeout`), and with it the lock and the right to delete; in
Kafka its transactional id fences it.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
import structlog

from db.connection import Connection, DatabaseUnavailable, conninfo, unavailable_told_apart
from db.data.outbox import (
    DEAD_LETTER_SHARD,
    SHARDS,
    Progress,
    WaitingEvent,
    delete_published,
    discard_plans,
    limit_idleness,
    listen,
    read_event_ids,
    read_progress,
    read_waiting,
    try_lock,
)
from processes.failpoints import Failpoint, failpoint
from producers.relay.channel import Channel, ChannelBroken, PlainChannel, TransactionalChannel
from producers.relay.ledger import Ledger, digest_events, within_span
from queryd.events import Topic
from queryd.topics import TopicUnknown, read_topic_identity
from telemetry.events import LogEvent
from telemetry.metrics import METRICS
from telemetry.traces import SpanAttribute, SpanName, Step, spans

_log = structlog.get_logger("queryd.relay")

_BATCH = 500
# Inline results make events large. So many bytes get through a slow link, of 10 Mbit/s, while a transaction lives.
_BATCH_BYTES = 8 * 1024 * 1024
# How long to wait for a notification before looking anyway: keeps the session alive, and a lost notification cheap.
_LOOK_SECONDS = 1.0
# Under load, batches that aren't full start this far apart: an event more in a batch costs far less than a batch more.
# Idle, an event goes at once; a full batch has nothing to wait for.
_APART_SECONDS = 0.02
_KEEP_SECONDS = 24 * 3600.0
# How long a plan is used: Postgres may have made it for an empty outbox. As for a pool's connections.
_PLANS_SECONDS = 60.0
# Dependencies, as the log names them.
_POSTGRES, _KAFKA = "postgres data", "kafka"
# Backoff between two sessions while Postgres or Kafka is unavailable; doubled after each failure.
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 3.0
# How often a standby asks for the lock.
_STANDBY_SECONDS = 1.0


_REMADE = (
    "Kafka's record of what was published belongs to another outbox: the database was remade. "
    "Decide which events subscribers have seen, then reset the relay"
)
_KAFKA_FORGOT = (
    "Kafka has no record of what was published, and Postgres says that something was: the group's offset is lost or "
    "this is another cluster. Decide which events subscribers have seen, then reset the relay"
)
_KAFKA_FELL_BACK = (
    "Postgres knows of batches that Kafka has no record of: Kafka lost what it had committed, or was restored. "
    "Decide which events subscribers have seen, then reset the relay"
)
_POSTGRES_FELL_BACK = (
    "Kafka has batches that Postgres does not know of: the database was restored to an earlier state. "
    "Decide which events subscribers have seen, then reset the relay"
)


class OutboxMismatch(Exception):
    """Kafka and Postgres disagree on what was published: an operator must say which is right."""


@dataclass(frozen=True, slots=True)
class RelayRules:
    """What the relay needs of the settings: libpq URI, librdkafka's configuration, and whether to use transactions."""

    data_url: str
    kafka: dict[str, Any]
    transactions: bool
    shards: tuple[int, ...] = (*range(SHARDS), DEAD_LETTER_SHARD)

    @property
    def name(self) -> str:
        """The relay's group and transactional id, the same for a relay and its standby."""
        return f"queryd-relay-{self.shards[0]}"


class Relay:
    """One relay process. `run` returns once it has been asked to stop."""

    def __init__(self, rules: RelayRules, ready: Callable[[], None]) -> None:
        self._rules = rules
        self._ready = ready
        self._stopping = asyncio.Event()
        # The unavailable dependencies, and the backoff before the next session.
        self._unavailable: set[str] = set()
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._stopping.set()

    async def run(self) -> None:
        """Publish until `stop`. Whatever goes away is waited for; raises `OutboxMismatch` and `LedgerUnreadable`."""
        while not self._stopping.is_set():
            try:
                await self._run_session()
            except (DatabaseUnavailable, ChannelBroken, TopicUnknown) as error:
                dependency = _POSTGRES if isinstance(error, DatabaseUnavailable) else _KAFKA
                if dependency not in self._unavailable:
                    _log.warning(LogEvent.DEPENDENCY_UNAVAILABLE, dependency=dependency, reason=str(error))
                    self._unavailable.add(dependency)
                # Jitter, so that a relay and its standby don't go on asking together.
                await self._stops_within(self._pause_seconds * random.uniform(0.75, 1.25))  # noqa: S311
                self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _note_available(self, *dependencies: str) -> None:
        for dependency in self._unavailable.intersection(dependencies):
            _log.info(LogEvent.DEPENDENCY_AVAILABLE, dependency=dependency)
        self._unavailable.difference_update(dependencies)
        if not self._unavailable:
            self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def _run_session(self) -> None:
        with unavailable_told_apart():
            async with await psycopg.AsyncConnection.connect(
                conninfo(self._rules.data_url, "relay"), autocommit=True, prepare_threshold=0
            ) as connection:
                await limit_idleness(connection)
                if not await self._wait_for_lock(connection):
                    return
                await listen(connection)
                await self._publish_for_ever(connection)

    async def _wait_for_lock(self, connection: Connection) -> bool:
        told = False
        while not await try_lock(connection, self._rules.shards[0]):
            self._note_available(_POSTGRES)
            if not told:
                _log.info(LogEvent.RELAY_WAITING, reason="another relay is active for these shards")
                told = True
                self._ready()
            if await self._stops_within(_STANDBY_SECONDS):
                return False
        return True

    async def _publish_for_ever(self, connection: Connection) -> None:
        progress = await read_progress(connection, self._rules.name)
        channel = await self._make_channel()
        try:
            ledger = await asyncio.to_thread(channel.open)
            batches = await self._settle(connection, ledger, progress)
            self._ready()
            more_waits, last_start, next_keep, next_plans = False, -_APART_SECONDS, 0.0, 0.0
            while not self._stopping.is_set():
                if not more_waits:
                    await asyncio.sleep(last_start + _APART_SECONDS - time.monotonic())
                last_start = time.monotonic()
                if last_start >= next_keep:
                    # At every start and once a day, so that neither silence nor restarts let the ledger expire.
                    await asyncio.to_thread(channel.keep)
                    next_keep = last_start + _KEEP_SECONDS
                if last_start >= next_plans:
                    await discard_plans(connection)
                    next_plans = last_start + _PLANS_SECONDS
                waiting = await read_waiting(connection, self._rules.shards, _BATCH, _BATCH_BYTES)
                events = waiting[: within_span([event.position for event in waiting])]
                more_waits = len(events) < len(waiting) or _is_full(waiting)
                if events:
                    batches += self._rules.transactions
                    ledger = _make_ledger(progress.generation, batches, events)
                    failpoint(Failpoint.RELAY_BEFORE)
                    with spans(SpanName.PUBLISH, _to_steps(events)):
                        await asyncio.to_thread(channel.publish, events, ledger)
                    took = time.monotonic() - last_start
                    METRICS.publish(event.age_seconds + took for event in events if event.topic is None)
                    failpoint(Failpoint.RELAY_COMMITTED)
                    await delete_published(connection, self._rules.name, batches, ledger.positions)
                    failpoint(Failpoint.RELAY_DELETED)
                self._note_available(_POSTGRES, _KAFKA)
                if not more_waits:
                    await self._wait_for_news(connection)
        finally:
            await asyncio.to_thread(channel.close)

    async def _make_channel(self) -> Channel:
        # Wait for the topic: a producer would report its absence only after its delivery timeout.
        await asyncio.to_thread(read_topic_identity, self._rules.kafka, Topic.STATUS)
        if self._rules.transactions:
            return TransactionalChannel(self._rules.kafka, self._rules.name)
        return PlainChannel(self._rules.kafka)

    async def _settle(self, connection: Connection, ledger: Ledger | None, progress: Progress) -> int:
        """Delete the rows that an earlier session published and did not live to delete; how many batches there were.

        Raises `OutboxMismatch` where the batches of Kafka and Postgres differ.
        """
        batches = progress.batches or 0
        if ledger is not None:
            if ledger.generation != progress.generation:
                raise OutboxMismatch(_REMADE)
            if ledger.batch is None:
                # By the first release, which counted nothing.
                await delete_published(connection, self._rules.name, batches, ledger.positions)
                return batches
            if ledger.batch < batches:
                raise OutboxMismatch(_KAFKA_FELL_BACK)
            if ledger.batch > batches:
                # Exactly its rows must still wait: positions are drawn again in a database that was restored.
                waiting = await read_event_ids(connection, ledger.positions)
                if ledger.batch > batches + 1 or digest_events(waiting) != ledger.digest:
                    raise OutboxMismatch(_POSTGRES_FELL_BACK)
                await delete_published(connection, self._rules.name, ledger.batch, ledger.positions)
            return ledger.batch
        if self._rules.transactions and progress.batches is not None:
            raise OutboxMismatch(_KAFKA_FORGOT)
        return batches

    async def _wait_for_news(self, connection: Connection) -> None:
        async for _ in connection.notifies(timeout=_LOOK_SECONDS, stop_after=1):
            return

    async def _stops_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()


def _is_full(waiting: Sequence[WaitingEvent]) -> bool:
    """True if the outbox may contain more rows than this batch."""
    return len(waiting) == _BATCH or sum(len(event.payload or b"") for event in waiting) > _BATCH_BYTES // 2


def _to_steps(events: Sequence[WaitingEvent]) -> Iterator[Step]:
    """Each event's publishing continues the span that made it."""
    for event in events:
        if event.query_id is not None and (traceparent := event.headers.get("traceparent")) is not None:
            yield traceparent, {SpanAttribute.QUERY_ID: event.query_id}


def _make_ledger(generation: str, batch: int, events: Sequence[WaitingEvent]) -> Ledger:
    positions = tuple(event.position for event in events)
    return Ledger(generation, positions, batch, digest_events(event.event_id for event in events))
