"""How a replay publishes its copies."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from confluent_kafka import KafkaException

from queryd.kafka.outages import explain_error
from queryd.kafka.producer import LARGE_RECORDS, IdempotentProducer, NotDelivered
from queryd.kafka.record import NewRecord
from queryd.kafka.transactional_producer import TransactionalProducer

_WHO = "the replay"
# How long librdkafka tries to deliver a batch, retries included: a new leader may take ten seconds.
_DELIVERY_SECONDS = 60.0
# librdkafka looks once a second for records whose time is over.
_EXPIRY_SECONDS = 3.0

Check = Callable[[], Awaitable[None]]


class Outlet:
    """Publishes batches of copies, each acknowledged.

    With a transactional id a batch is one Kafka transaction, committed only if what the copies were judged by still
    holds: a process that was stopped or lost its database publishes nothing. The process that resumes the replay fences
    the earlier one. Without an id it is at-least-once, and the check comes before the records leave.
    """

    def __init__(self, config: dict[str, Any], transactional_id: str | None = None) -> None:
        self._producer: TransactionalProducer | IdempotentProducer
        if transactional_id is not None:
            self._producer = TransactionalProducer(config, transactional_id, _WHO)
        else:
            options = LARGE_RECORDS | {"delivery.timeout.ms": int(_DELIVERY_SECONDS * 1000)}
            self._producer = IdempotentProducer(config, _WHO, options)

    async def publish(self, records: Sequence[NewRecord], check: Check) -> list[bool]:
        """Publish a batch. False for a record that is larger than its topic accepts; in a transaction that is an error.

        `check` raises if what the records were judged by holds no longer. Raises `NotDelivered`: then the outlet must
        be closed, and a transaction's outcome is not known.
        """
        producer = self._producer
        if isinstance(producer, IdempotentProducer):
            await check()
            errors = await asyncio.to_thread(producer.publish, records, _DELIVERY_SECONDS + _EXPIRY_SECONDS)
            return [error is None for error in errors]
        try:
            await asyncio.to_thread(_produce, producer, records)
            await check()
            await asyncio.to_thread(producer.commit)
        except (KafkaException, BufferError) as error:
            raise NotDelivered(explain_error(error)) from error
        return [True] * len(records)

    async def close(self) -> None:
        """Drop what was not published. If the abort fails, the broker aborts after the transaction's timeout."""
        if isinstance(self._producer, IdempotentProducer):
            await asyncio.to_thread(self._producer.close, 0)
            return
        with suppress(KafkaException):
            await asyncio.to_thread(self._producer.abort)


def _produce(producer: TransactionalProducer, records: Sequence[NewRecord]) -> None:
    producer.begin()
    for record in records:
        producer.produce(record)
