"""Sends requests and cancels; each one's acknowledgement is a future of its own, for threads and event loops alike."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from queryd.codec import encode, topic_of
from queryd.errors import ClientStopped, NotSubmitted
from queryd.events import QueryCancelRequested, QueryRequested
from queryd.forks import Origin
from queryd.outages import QUIET
from queryd.registry import RegistryAway, RegistryRefused
from queryd.requests import make_headers

# How long the broker may take to acknowledge, retries included, before a submit says that it failed. A leader's
# election takes some ten seconds at worst.
_DELIVERY_SECONDS = 30.0
# librdkafka looks once a second for what is too late; at a close it is given that time and some more.
_EXPIRY_SECONDS = 3.0
# How long the reports of what a close has given up may take: they are in memory.
_REPORT_SECONDS = 1.0
# How long one poll for acknowledgements blocks its thread; only a close waits for it.
_POLL_SECONDS = 0.1


class Sender:
    """An idempotent producer, acknowledged by all replicas. Safe for several threads."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        self._producer = Producer(
            dict(kafka)
            | QUIET
            | {"enable.idempotence": True, "acks": "all", "delivery.timeout.ms": int(_DELIVERY_SECONDS * 1000)}
        )
        self._origin = Origin(self)
        self._closing = threading.Event()
        # Nothing gets into the queue behind a close, where nobody would ever hear of it.
        self._open = threading.Lock()
        self._poller = threading.Thread(target=self._poll, name="queryd-sender", daemon=True)
        self._poller.start()

    def send(self, request: QueryRequested | QueryCancelRequested) -> "Future[None]":
        """Begin to publish; the future is done once the broker has it, and raises `NotSubmitted` after 30 s.

        Raises `NotSubmitted` if the send can't start, `ClientStopped` after `close` and in a fork of the process, and
        `Invalid` and `EventTooLarge` for an event that does not fit its schema.
        """
        self._origin.check()
        answer: Future[None] = Future()
        # What is on its way can't be called back.
        answer.set_running_or_notify_cancel()

        def report(error: KafkaError | None, _message: Message) -> None:
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(NotSubmitted(error.str()))

        try:
            value = encode(request)
            with self._open:
                if self._closing.is_set():
                    raise ClientStopped("the client was closed: make another")
                self._producer.produce(
                    topic_of(request),
                    key=request.query_id.encode(),
                    value=value,
                    headers=make_headers(request),
                    on_delivery=report,
                )
        except BufferError:
            raise NotSubmitted("too many requests wait for the broker's acknowledgement; submit again later") from None
        except KafkaException as error:
            raise NotSubmitted(error.args[0].str()) from error
        except (RegistryAway, RegistryRefused) as error:
            raise NotSubmitted(str(error)) from error
        return answer

    def close(self) -> None:
        """Wait for what is under way; its futures say how it went, all of them. Blocks for up to 34 s, where the broker
        is away. Raises `ClientStopped` in a fork of the process."""
        self._origin.check()
        with self._open:
            self._closing.set()
        self._poller.join()
        if self._producer.flush(_DELIVERY_SECONDS + _EXPIRY_SECONDS):
            # A request that lies with a broker which fell silent outlives its time.
            self._producer.purge()
            self._producer.flush(_REPORT_SECONDS)

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(_POLL_SECONDS)
