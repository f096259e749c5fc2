"""Publish the relay's batches: in a Kafka transaction, or at least once on a broker without transactions.

Both run in a worker thread and block; the relay uses one of them at a time.
"""

import base64
from collections.abc import Sequence
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from db.data.outbox import WaitingEvent
from processes.failpoints import Failpoint, failpoint
from producers.relay.ledger import Ledger, read_ledger, write_ledger
from queryd.events import Topic
from queryd.headers import to_kafka
from queryd.kafka.outages import QUIET, explain_error
from queryd.kafka.producer import LARGE_RECORDS, IdempotentProducer, NotDelivered
from queryd.kafka.record import Headers, NewRecord
from queryd.kafka.transactional_producer import BROKER_SECONDS, TransactionalProducer


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
            raise ChannelBroken(explain_error(error)) from error
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
                self._producer.produce(_to_record(event), failures.report)
            failpoint(Failpoint.RELAY_PRODUCING)
            self._send_ledger(TopicPartition(Topic.STATUS, 0, max(ledger.positions) + 1, write_ledger(ledger)))
            failpoint(Failpoint.RELAY_BEFORE_COMMIT)
            self._producer.commit()
        except (KafkaException, BufferError) as error:
            # Whether the commit went through is not known here; `open` of the next session finds out.
            raise ChannelBroken(failures.first or explain_error(error)) from error

    def keep(self) -> None:
        """Commit the last ledger again: a broker forgets the offsets of a group that is silent for a week."""
        if self._last is None:
            return
        try:
            self._producer.begin()
            self._send_ledger(self._last)
            self._producer.commit()
        except KafkaException as error:
            raise ChannelBroken(explain_error(error)) from error

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
        self._producer: IdempotentProducer | None = None

    def open(self) -> Ledger | None:
        """Return no ledger: without transactions nothing records what an earlier session published."""
        self._producer = IdempotentProducer(self._config, "the relay", LARGE_RECORDS | {"linger.ms": 0})
        return None

    def publish(self, events: Sequence[WaitingEvent], ledger: Ledger) -> None:
        """All of the batch, acknowledged."""
        assert self._producer is not None
        try:
            refused = any(self._producer.publish([_to_record(event) for event in events], BROKER_SECONDS))
        except NotDelivered as error:
            raise ChannelBroken(str(error)) from error
        if refused:
            raise ChannelBroken("an event is larger than its topic accepts")

    def keep(self) -> None:
        """Do nothing: there is no ledger to refresh."""

    def close(self) -> None:
        """Drop the producer and its undelivered records."""
        if self._producer is not None:
            self._producer.close(0)
        self._producer = None


class _Failures:
    """The delivery reports of one batch. It keeps the first failure."""

    def __init__(self) -> None:
        self.first: str | None = None

    def report(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self.first = self.first or error.str()


def _to_record(event: WaitingEvent) -> NewRecord:
    if event.topic is None:
        assert event.query_id is not None
        return NewRecord(Topic.STATUS.value, event.query_id.encode(), event.payload, to_kafka(event.headers))
    return NewRecord(event.topic, event.key, event.payload, _read_headers(event.headers))


def _read_headers(written: Sequence[tuple[str, str | None]]) -> Headers:
    """The headers of a dead letter, which may hold any byte."""
    return [
        (base64.b64decode(name).decode(), None if value is None else base64.b64decode(value)) for name, value in written
    ]
