"""Publishing with an answer: each record's delivery report is awaited by whoever sent it."""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from queryd.forks import Origin
from queryd.headers import to_kafka
from queryd.outages import QUIET, OutageLog

# How long librdkafka tries to deliver one record, retries included, before it is reported as failed.
_DELIVERY_MILLIS = 60_000
# librdkafka's own limit, before compression; what a topic takes is the broker's to say.
MESSAGE_BYTES = 256 * 1024 * 1024
# How long one poll for delivery reports blocks its thread; only a close waits for it.
_POLL_SECONDS = 0.1
# librdkafka's word for a partition that its partitioner chooses.
BY_KEY = -1


class NotDelivered(Exception):
    """The broker did not acknowledge a record in 60 s, or refused it: nobody may act as if it were published."""


class RecordTooLarge(NotDelivered):
    """The broker will never take it: its topic's records are smaller."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """Where an acknowledged record lies."""

    partition: int
    offset: int


class Publisher:
    """An idempotent producer, acknowledged by all replicas, whose delivery reports resolve futures.

    `open` and `close` it inside a running event loop.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._outages = OutageLog("the producer")
        self._producer = Producer(
            config
            | QUIET
            | {
                "enable.idempotence": True,
                "acks": "all",
                "delivery.timeout.ms": _DELIVERY_MILLIS,
                # A record that came compressed may be far larger than its topic's limit; it leaves compressed as well.
                "compression.type": "zstd",
                "message.max.bytes": MESSAGE_BYTES,
                "error_cb": self._outages.complain,
            }
        )
        self._origin = Origin(self)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="queryd-publisher", daemon=True)

    def open(self) -> None:
        """Begin to serve delivery reports."""
        self._loop = asyncio.get_running_loop()
        self._poller.start()

    async def publish(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Any, partition: int | None = None
    ) -> Delivered:
        """Publish one record and wait for its acknowledgement; raises `NotDelivered`.

        `headers` is a mapping of text, or a list of pairs as confluent-kafka takes it. Without a partition the key
        decides.
        """
        self._origin.check()
        assert self._loop is not None
        loop = self._loop
        answer: asyncio.Future[Delivered] = loop.create_future()

        def report(error: KafkaError | None, message: Message) -> None:
            if error is None:
                self._outages.answered()
            loop.call_soon_threadsafe(_resolve, answer, error, message)

        while True:
            try:
                self._producer.produce(
                    topic,
                    key=key,
                    value=value,
                    headers=to_kafka(headers) if isinstance(headers, dict) else headers,
                    partition=BY_KEY if partition is None else partition,
                    on_delivery=report,
                )
                break
            except BufferError:
                # The local queue is full: it drains at the broker's pace.
                await asyncio.sleep(_POLL_SECONDS)
            except KafkaException as error:
                raise NotDelivered(str(error.args[0])) from error
        return await answer

    async def close(self) -> None:
        """Wait for what is under way; raises `NotDelivered` if something stays unacknowledged."""
        self._origin.check()
        left = await asyncio.to_thread(self._producer.flush, _DELIVERY_MILLIS / 1000)
        self._closing.set()
        await asyncio.to_thread(self._poller.join)
        if left:
            raise NotDelivered(f"{left} records were not acknowledged")

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(_POLL_SECONDS)


def _resolve(answer: "asyncio.Future[Delivered]", error: KafkaError | None, message: Message) -> None:
    if answer.done():
        return
    if error is not None:
        too_large = error.code() == KafkaError.MSG_SIZE_TOO_LARGE
        answer.set_exception(RecordTooLarge(error.str()) if too_large else NotDelivered(error.str()))
        return
    partition, offset = message.partition(), message.offset()
    assert partition is not None and offset is not None
    answer.set_result(Delivered(partition, offset))
