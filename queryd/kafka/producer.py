"""A producer without transactions: what it publishes is published at least once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from queryd.kafka.outages import QUIET, OutageLog, explain_error
from queryd.kafka.record import NewRecord

# For records that may have come compressed, and be far larger than their topic's limit: they leave compressed as well,
# and librdkafka's own limit is for the uncompressed record.
LARGE_RECORDS = {"compression.type": "zstd", "message.max.bytes": 256 * 1024 * 1024}

# How long the reports of dropped records may take: they are in memory.
_REPORT_SECONDS = 1.0

OnDelivery = Callable[[KafkaError | None, Message], None]


class NotDelivered(Exception):
    """The broker did not acknowledge a record in time, or refused it: it may be published or not."""


class IdempotentProducer:
    """Acknowledged by all replicas; librdkafka's retries make no duplicates. Safe for several threads."""

    def __init__(self, config: Mapping[str, Any], who: str, options: Mapping[str, Any]) -> None:
        """`who` names the program in the log when Kafka is away; `options` add to `config`."""
        self._outages = OutageLog(who)
        fixed = {"enable.idempotence": True, "acks": "all", "error_cb": self._outages.complain}
        self._producer = Producer(dict(config) | QUIET | dict(options) | fixed)

    def produce(self, record: NewRecord, on_delivery: OnDelivery) -> None:
        """Begin to publish. `on_delivery` is called by `poll`, `publish` or `close`.

        Raises `KafkaException`, and `BufferError` if too many records wait.
        """
        self._producer.produce(
            record.topic,
            key=record.key,
            value=record.value,
            headers=list(record.headers),
            partition=record.partition,
            on_delivery=partial(self._report, on_delivery),
        )

    def publish(self, records: Sequence[NewRecord], seconds: float) -> list[KafkaError | None]:
        """Publish a batch; the errors of records that the broker refuses as too large, in their places. Blocks.

        Raises `NotDelivered` if any other record is not acknowledged within `seconds`.
        """
        errors: list[KafkaError | None] = [None] * len(records)
        try:
            for number, record in enumerate(records):
                self.produce(record, partial(_keep_error, errors, number))
            left = self._producer.flush(seconds)
        except (KafkaException, BufferError) as error:
            raise NotDelivered(explain_error(error)) from error
        failed = [each for each in errors if each is not None and each.code() != KafkaError.MSG_SIZE_TOO_LARGE]
        if left or failed:
            first = failed[0].str() if failed else None
            raise NotDelivered(f"{left} of {len(records)} records not acknowledged, first error: {first}")
        return errors

    def poll(self, seconds: float) -> None:
        """Call what waits for delivery reports."""
        self._producer.poll(seconds)

    def close(self, seconds: float) -> None:
        """Wait so long for what is under way, then drop it; each record's `on_delivery` is called."""
        if self._producer.flush(seconds):
            self._producer.purge()
            self._producer.flush(_REPORT_SECONDS)

    def _report(self, on_delivery: OnDelivery, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._outages.answered()
        on_delivery(error, message)


def _keep_error(errors: list[KafkaError | None], number: int, error: KafkaError | None, _message: Message) -> None:
    errors[number] = error
