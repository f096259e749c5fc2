"""Two ways into the status topic: in a Kafka transaction, or, on a broker without them, by reading back.

Both run in a worker thread and block; the relay uses one of them at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from db.data.outbox import WaitingEvent
from processes.failpoints import Failpoint, failpoint
from producers.read_back import EndNotReached, read_to_end
from producers.relay.ledger import Ledger, read_ledger, write_ledger
from queryd.events import Topic
from queryd.headers import REPUBLISHED, ReplayHeader, to_kafka
from queryd.outages import QUIET, OutageLog

# A zombie's transaction is aborted by the broker after this; readers at read_committed wait for no longer.
_TRANSACTION_MILLIS = 10_000
# How long one call to the broker may take before the session counts as broken and is made anew.
_BROKER_SECONDS = 15.0


class ChannelBroken(Exception):
    """The session with the broker can't go on: close it, make a new one and recover from what was committed."""


# What tells a published record from every other: its event's id, and why the event came once more, if it did.
Identity = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an earlier session had published: positions by the ledger, or events by reading back."""

    ledger: Ledger | None = None
    published: frozenset[Identity] = frozenset()


def identify(event: WaitingEvent) -> Identity:
    """What the event's record will be recognized by."""
    return event.event_id, event.headers.get(REPUBLISHED)


class Channel(Protocol):
    """How the relay publishes."""

    def open(self) -> Recovered:
        """Fence whoever was before, and learn what they had published; raises `ChannelBroken`."""
        ...

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> dict[int, int]:
        """Publish a batch, acknowledged; the next offset of each partition it went to. Raises `ChannelBroken`."""
        ...

    def keep(self) -> None:
        """Keep what `open` will need from being forgotten by the broker. Raises `ChannelBroken`."""
        ...

    def close(self) -> None:
        """Let go of the broker."""
        ...


class TransactionalChannel:
    """Produces a batch and commits its ledger in one Kafka transaction."""

    def __init__(self, config: dict[str, Any], name: str) -> None:
        self._config = config
        self._name = name
        self._outages = OutageLog("the relay")
        self._producer: Producer | None = None
        self._consumer: Consumer | None = None
        # The ledger's place: an offset of the relay's own group. Nothing is ever read by it.
        self._place = TopicPartition(Topic.STATUS, 0)
        self._last: TopicPartition | None = None

    def open(self) -> Recovered:
        """`init_transactions` settles or aborts what a crashed relay left open; then its ledger is stable."""
        try:
            self._consumer = Consumer(
                self._config
                | QUIET
                | {"group.id": self._name, "enable.auto.commit": False, "isolation.level": "read_committed"}
            )
            self._producer = Producer(
                self._config
                | QUIET
                | {
                    "transactional.id": self._name,
                    "transaction.timeout.ms": _TRANSACTION_MILLIS,
                    "error_cb": self._outages.complain,
                }
            )
            self._producer.init_transactions(_BROKER_SECONDS)
            [committed] = self._consumer.committed([self._place], timeout=_BROKER_SECONDS)
        except KafkaException as error:
            raise ChannelBroken(_reason(error)) from error
        self._outages.answered()
        if committed.offset < 0:
            return Recovered()
        self._last = TopicPartition(Topic.STATUS, 0, committed.offset, committed.metadata)
        return Recovered(ledger=read_ledger(committed.metadata or ""))

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> dict[int, int]:
        """All of the batch and its ledger, or nothing."""
        assert self._producer is not None and self._consumer is not None
        place = TopicPartition(Topic.STATUS, 0, max(ledger.positions) + 1, write_ledger(ledger))
        try:
            self._producer.begin_transaction()
            deliveries = _Deliveries()
            for event in events:
                _produce(self._producer, event, deliveries)
            failpoint(Failpoint.RELAY_PRODUCING)
            self._producer.send_offsets_to_transaction(
                [place], self._consumer.consumer_group_metadata(), _BROKER_SECONDS
            )
            failpoint(Failpoint.RELAY_BEFORE_COMMIT)
            self._producer.commit_transaction(_BROKER_SECONDS)
        except (KafkaException, BufferError) as error:
            # Whether the commit went through is not known here; `open` of the next session finds out.
            raise ChannelBroken(_reason(error)) from error
        self._last = place
        return deliveries.ends

    def keep(self) -> None:
        """Commit the last ledger again: a broker forgets the offsets of a group that is silent for a week."""
        if self._last is None:
            return
        assert self._producer is not None and self._consumer is not None
        try:
            self._producer.begin_transaction()
            self._producer.send_offsets_to_transaction(
                [self._last], self._consumer.consumer_group_metadata(), _BROKER_SECONDS
            )
            self._producer.commit_transaction(_BROKER_SECONDS)
        except KafkaException as error:
            raise ChannelBroken(_reason(error)) from error

    def close(self) -> None:
        """An open transaction is aborted by the next session's `init_transactions`, or by its timeout."""
        if self._consumer is not None:
            self._consumer.close()
        self._producer = self._consumer = None


class ReadBackChannel:
    """Produces without transactions, and after a crash reads back what had arrived.

    `positions` are the ends of the partitions when rows were last deleted: whatever lies behind them was published by a
    session that did not live to delete its rows.
    """

    def __init__(self, config: dict[str, Any], positions: dict[int, int]) -> None:
        self._config = config
        self._positions = positions
        self._outages = OutageLog("the relay")
        self._producer: Producer | None = None

    def open(self) -> Recovered:
        """Read the status topic from the positions to its end."""
        try:
            found = self._read_back()
        except (EndNotReached, KafkaException) as error:
            raise ChannelBroken(_reason(error)) from error
        self._producer = Producer(
            self._config
            | QUIET
            | {"enable.idempotence": True, "acks": "all", "linger.ms": 0, "error_cb": self._outages.complain}
        )
        return Recovered(published=found)

    def _read_back(self) -> frozenset[Identity]:
        messages = read_to_end(self._config, "queryd-relay-read-back", Topic.STATUS, self._positions)
        found = (_identify_record(message) for message in messages)
        return frozenset(identity for identity in found if identity is not None)

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> dict[int, int]:
        """All of the batch, acknowledged."""
        assert self._producer is not None
        deliveries = _Deliveries()
        try:
            for event in events:
                _produce(self._producer, event, deliveries)
            left = self._producer.flush(_BROKER_SECONDS)
        except (KafkaException, BufferError) as error:
            raise ChannelBroken(_reason(error)) from error
        if left or deliveries.failure is not None:
            raise ChannelBroken(f"{left} events unacknowledged, {deliveries.failure}")
        return deliveries.ends

    def keep(self) -> None:
        """Nothing of this is kept by the broker."""

    def close(self) -> None:
        """Drop the producer; what it had not delivered will be read back as missing and published again."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(0)
        self._producer = None


class _Deliveries:
    """Delivery reports of one batch: the first failure is latched, and the ends of the partitions are kept."""

    def __init__(self) -> None:
        self.ends: dict[int, int] = {}
        self.failure: str | None = None

    def report(self, error: KafkaError | None, message: Message) -> None:
        partition, offset = message.partition(), message.offset()
        if error is not None:
            self.failure = self.failure or error.str()
        elif partition is not None and offset is not None:
            self.ends[partition] = max(self.ends.get(partition, 0), offset + 1)


def _produce(producer: Producer, event: WaitingEvent, deliveries: _Deliveries) -> None:
    producer.produce(
        Topic.STATUS,
        key=event.query_id.encode(),
        value=event.payload,
        headers=to_kafka(event.headers),
        on_delivery=deliveries.report,
    )


def _identify_record(message: Message) -> Identity | None:
    """None for a record that is no relay's: a replay's copy says nothing about the row it is a copy of."""
    headers: Any = message.headers() or ()
    values = {name: value.decode(errors="replace") for name, value in headers if value is not None}
    if "ce_id" not in values or ReplayHeader.ID in values:
        return None
    return values["ce_id"], values.get(REPUBLISHED)


def _reason(error: Exception) -> str:
    cause = error.args[0] if error.args else error
    return cause.str() if isinstance(cause, KafkaError) else str(cause)
