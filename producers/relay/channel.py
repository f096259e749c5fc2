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
from queryd.kafka.transactional_producer import BROKER_SECONDS, Headers, TransactionalProducer
from queryd.outages import QUIET, OutageLog
from queryd.publisher import MESSAGE_BYTES


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
        self._producer = TransactionalProducer(config, name, "the relay")
        self._config = config | QUIET | {"group.id": name, "enable.auto.commit": False}
        self._consumer: Consumer | None = None
        # The ledger's place: an offset of the relay's own group. Nothing is ever read by it.
        self._place = TopicPartition(Topic.STATUS, 0)
        self._last: TopicPartition | None = None

    def open(self) -> Ledger | None:
        """`init_transactions` completes or aborts a crashed relay's open transaction; then the ledger is stable."""
        try:
            self._consumer = Consumer(self._config | {"isolation.level": "read_committed"})
            self._producer.open()
            [committed] = self._consumer.committed([self._place], timeout=BROKER_SECONDS)
        except KafkaException as error:
            raise ChannelBroken(_reason(error)) from error
        if committed.offset < 0:
            return None
        self._last = TopicPartition(Topic.STATUS, 0, committed.offset, committed.metadata)
        return read_ledger(committed.metadata or "")

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> None:
        """All of the batch and its ledger, or nothing."""
        failures = _Failures()
        try:
            self._producer.begin()
            for event in events:
                self._producer.produce(*_to_record(event), on_delivery=failures.report)
            failpoint(Failpoint.RELAY_PRODUCING)
            self._send_ledger(TopicPartition(Topic.STATUS, 0, max(ledger.positions) + 1, write_ledger(ledger)))
            failpoint(Failpoint.RELAY_BEFORE_COMMIT)
            self._producer.commit()
        except (KafkaException, BufferError) as error:
            # Whether the commit went through is not known here; `open` of the next session finds out.
            raise ChannelBroken(failures.first or _reason(error)) from error

    def keep(self) -> None:
        """Commit the last ledger again: a broker forgets the offsets of a group that is silent for a week."""
        if self._last is None:
            return
        try:
            self._producer.begin()
            self._send_ledger(self._last)
            self._producer.commit()
        except KafkaException as error:
            raise ChannelBroken(_reason(error)) from error

    def _send_ledger(self, place: TopicPartition) -> None:
        assert self._consumer is not None
        self._producer.send_offsets([place], self._consumer.consumer_group_metadata())
        # If the commit fails, so does the session, and the next one reads the ledger.
        self._last = place

    def close(self) -> None:
        """An open transaction is aborted by the next session's `init_transactions`, or by its timeout."""
        if self._consumer is not None:
            self._consumer.close()
        self._consumer = None


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
            | {
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "compression.type": "zstd",
                "message.max.bytes": MESSAGE_BYTES,
                "error_cb": self._outages.complain,
            }
        )
        return None

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> None:
        """All of the batch, acknowledged."""
        assert self._producer is not None
        failures = _Failures()
        try:
            for event in events:
                topic, key, value, headers = _to_record(event)
                self._producer.produce(topic, key=key, value=value, headers=headers, on_delivery=failures.report)
            left = self._producer.flush(BROKER_SECONDS)
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


def _to_record(event: WaitingEvent) -> tuple[str, bytes | None, bytes | None, Headers]:
    """Topic, key, value and headers."""
    if event.topic is None:
        assert event.query_id is not None
        return Topic.STATUS.value, event.query_id.encode(), event.payload, to_kafka(event.headers)
    return event.topic, event.key, event.payload, _read_headers(event.headers)


def _read_headers(written: Sequence[tuple[str, str | None]]) -> Headers:
    """The headers of a dead letter, which may hold any byte."""
    return [
        (base64.b64decode(name).decode(), None if value is None else base64.b64decode(value)) for name, value in written
    ]


def _reason(error: Exception) -> str:
    cause = error.args[0] if error.args else error
    return cause.str() if isinstance(cause, KafkaError) else str(cause)
