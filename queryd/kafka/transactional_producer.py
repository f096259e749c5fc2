"""A producer of Kafka transactions whose late or repeated requests can't end a transaction that they don't belong to.

librdkafka 2.16 speaks the first version of transactions: an EndTxn request names the producer and its epoch, but not
the transaction. librdkafka repeats the request when its connection ends. If the first one reaches the broker late, it
ends the producer's next transaction, in the middle of it. A new producer has a new epoch, which fences such a request.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import Producer, TopicPartition

from queryd.kafka.outages import QUIET, OutageLog
from queryd.kafka.producer import LARGE_RECORDS, OnDelivery
from queryd.kafka.record import NewRecord

# The broker aborts what is not committed by then: readers at read_committed wait for an abandoned one for no longer.
_TRANSACTION_MILLIS = 10_000
# How long one call to the broker may take before the producer counts as broken.
BROKER_SECONDS = 15.0
# librdkafka waits for this, less at most 20%, before it repeats a request. The time that the calls take therefore shows
# whether one was repeated.
_RETRY_MILLIS = 1_000
_REPEATED_SECONDS = 0.5
# `poll` returns earlier where there is something to report.
_POLL_SECONDS = 0.01


class TransactionalProducer:
    """One transaction at a time. Blocks. After any error make a new one: the outcome of a commit is then not known.

    Every method raises `KafkaException`, and `produce` also `BufferError`.
    """

    def __init__(self, config: Mapping[str, Any], transactional_id: str, who: str) -> None:
        """Does not connect yet. `who` names the program in the log when Kafka is away."""
        self._outages = OutageLog(who)
        self._config = (
            dict(config)
            | QUIET
            | LARGE_RECORDS
            | {
                "transactional.id": transactional_id,
                "transaction.timeout.ms": _TRANSACTION_MILLIS,
                "retry.backoff.ms": _RETRY_MILLIS,
                "error_cb": self._outages.complain,
            }
        )
        self._producer: Producer | None = None
        self._sent_offsets_seconds = 0.0
        self._may_be_late = False

    def open(self) -> None:
        """Fence earlier producers of the same id, and settle what they left open."""
        self._producer = Producer(self._config)
        self._producer.init_transactions(BROKER_SECONDS)
        self._may_be_late = False
        self._outages.answered()

    def begin(self) -> None:
        """Begin a transaction; opens the producer if it is not open yet."""
        if self._producer is None or self._may_be_late:
            # An earlier copy of a request may still be on its way: a new epoch fences it.
            self.open()
        self._opened.begin_transaction()

    def produce(self, record: NewRecord, on_delivery: OnDelivery | None = None) -> None:
        """Add a record to the transaction."""
        # The binding takes no None for a callback.
        reporting: dict[str, Any] = {} if on_delivery is None else {"on_delivery": on_delivery}
        topic, key, value, headers, partition = record
        self._opened.produce(topic, key=key, value=value, headers=list(headers), partition=partition, **reporting)

    def send_offsets(self, offsets: Sequence[TopicPartition], group: Any) -> None:
        """Add offsets of a consumer group, which is given by its metadata, to the transaction."""
        # Once the records are acknowledged, the broker has completed the transaction before. Until then it refuses
        # offsets as concurrent, and librdkafka repeats such a request only after `_RETRY_MILLIS`.
        self._await_acknowledgements()
        began = time.monotonic()
        self._opened.send_offsets_to_transaction(list(offsets), group, BROKER_SECONDS)
        self._sent_offsets_seconds = time.monotonic() - began

    def commit(self) -> None:
        """Commit the transaction."""
        began = time.monotonic()
        self._opened.commit_transaction(BROKER_SECONDS)
        self._may_be_late = max(time.monotonic() - began, self._sent_offsets_seconds) > _REPEATED_SECONDS
        self._sent_offsets_seconds = 0.0

    def abort(self) -> None:
        """Drop what was not sent, and abort the transaction."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.abort_transaction(BROKER_SECONDS)

    def _await_acknowledgements(self) -> None:
        """Return once all records are acknowledged or have failed, or after `BROKER_SECONDS`."""
        # `flush` of a producer that was fenced raises SystemError (confluent-kafka 2.16).
        latest = time.monotonic() + BROKER_SECONDS
        while len(self._opened) and time.monotonic() < latest:
            self._opened.poll(_POLL_SECONDS)

    @property
    def _opened(self) -> Producer:
        assert self._producer is not None
        return self._producer
