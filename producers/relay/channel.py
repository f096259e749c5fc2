"""Publish the relay's batches: in a Kafka transaction, or at least once on a broker without transactions.

Both run in a worker thread and block; the relay uses one of them at a time.
"""

import base64
from collections.abc import Sequence
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from db.data.outbox import WaitingEvent
from processes.failpoints import Failpoint, failpoint
from producers.relay.ledger import Ledger, read_ledger, write_ledger
from queryd.events import Topic
from queryd.headers import to_kafka
from queryd.outages import QUIET, OutageLog
from queryd.publisher import MESSAGE_BYTES

# A zombie's transaction is aborted by the broker after this; readers at read_committed wait for no longer.
_TRANSACTION_MILLIS = 10_000
# How long one call to the broker may take before the session counts as broken and is made anew.
_BROKER_SECONDS = 15.0

_PRODUCER: dict[str, Any] = {
    # Uncompressed, a record may be far larger than its topic's limit. Its dead letter is compressed again.
    "compression.type": "zstd",
    "message.max.bytes": MESSAGE_BYTES,
}


class ChannelBroken(Exception):
    """The session with the broker can't go on: close it, make a new one and recover from what was committed."""


class Channel(Protocol):
    """How the relay publishes."""

    def open(self) -> Ledger | None:
        """Fence an earlier session and return its last ledger, if it has one; raises `ChannelBroken`."""
        ...

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> None:
        """Publish a batch, acknowledged. Raises `ChannelBroken`."""
        ...

    def keep(self) -> None:
        """Refresh the ledger, so that the broker does not expire it. Raises `ChannelBroken`."""
        ...

    def close(self) -> None:
        """End the session with the broker."""
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

    def open(self) -> Ledger | None:
        """`init_transactions` completes or aborts a crashed relay's open transaction; then the ledger is stable."""
        try:
            self._consumer = Consumer(
                self._config
                | QUIET
                | {"group.id": self._name, "enable.auto.commit": False, "isolation.level": "read_committed"}
            )
            self._producer = Producer(
                self._config
                | QUIET
                | _PRODUCER
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
            return None
        self._last = TopicPartition(Topic.STATUS, 0, committed.offset, committed.metadata)
        return read_ledger(committed.metadata or "")

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> None:
        """All of the batch and its ledger, or nothing."""
        assert self._producer is not None and self._consumer is not None
        place = TopicPartition(Topic.STATUS, 0, max(ledger.positions) + 1, write_ledger(ledger))
        failures = _Failures()
        try:
            self._producer.begin_transaction()
            for event in events:
                _produce(self._producer, event, failures)
            failpoint(Failpoint.RELAY_PRODUCING)
            self._producer.send_offsets_to_transaction(
                [place], self._consumer.consumer_group_metadata(), _BROKER_SECONDS
            )
            failpoint(Failpoint.RELAY_BEFORE_COMMIT)
            self._producer.commit_transaction(_BROKER_SECONDS)
        except (KafkaException, BufferError) as error:
            # Whether the commit went through is not known here; `open` of the next session finds out.
            raise ChannelBroken(failures.first or _reason(error)) from error
        self._last = place

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


class PlainChannel:
    """Produces without transactions. If a session crashes after publishing rows, the next one publishes them again."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._outages = OutageLog("the relay")
        self._producer: Producer | None = None

    def open(self) -> Ledger | None:
        """Return no ledger: without transactions nothing records what an earlier session published."""
        self._producer = Producer(
            self._config
            | QUIET
            | _PRODUCER
            | {"enable.idempotence": True, "acks": "all", "linger.ms": 0, "error_cb": self._outages.complain}
        )
        return None

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> None:
        """All of the batch, acknowledged."""
        assert self._producer is not None
        failures = _Failures()
        try:
            for event in events:
                _produce(self._producer, event, failures)
            left = self._producer.flush(_BROKER_SECONDS)
        except (KafkaException, BufferError) as error:
            raise ChannelBroken(_reason(error)) from error
        if left or failures.first is not None:
            raise ChannelBroken(f"publishing failed: {left} events not acknowledged, first error: {failures.first}")

    def keep(self) -> None:
        """Do nothing: there is no ledger to refresh."""

    def close(self) -> None:
        """Drop the producer and its undelivered records."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(0)
        self._producer = None


class _Failures:
    """The delivery reports of one batch. It keeps the first failure."""

    def __init__(self) -> None:
        self.first: str | None = None

    def report(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self.first = self.first or error.str()


def _produce(producer: Producer, event: WaitingEvent, failures: _Failures) -> None:
    if event.topic is None:
        assert event.query_id is not None
        topic, headers = Topic.STATUS.value, to_kafka(event.headers)
        key: bytes | None = event.query_id.encode()
    else:
        topic, key, headers = event.topic, event.key, _read_headers(event.headers)
    producer.produce(topic, key=key, value=event.payload, headers=headers, on_delivery=failures.report)


def _read_headers(written: Sequence[tuple[str, str | None]]) -> list[tuple[str, str | bytes | None]]:
    """The headers of a dead letter, which may hold any byte."""
    return [
        (base64.b64decode(name).decode(), None if value is None else base64.b64decode(value)) for name, value in written
    ]


def _reason(error: Exception) -> str:
    cause = error.args[0] if error.args else error
    return cause.str() if isinstance(cause, KafkaError) else str(cause)
