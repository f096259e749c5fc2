"""Sends requests and cancels; each one's acknowledgement is a future of its own, for threads and event loops alike."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message

from queryd.codec import encode, topic_of
from queryd.errors import ClientStopped, NotSubmitted
from queryd.events import QueryCancelRequested, QueryRequested
from queryd.forks import Origin
from queryd.kafka.outages import explain_error
from queryd.kafka.producer import IdempotentProducer
from queryd.kafka.record import NewRecord
from queryd.registry import RegistryAway, RegistryRefused
from queryd.requests import make_headers

# How long the broker may take to acknowledge, retries included, before a submit says that it failed. A leader's
# election takes some ten seconds at worst.
_DELIVERY_SECONDS = 30.0
# librdkafka looks once a second for what is too late; at a close it is given that time and some more.
_EXPIRY_SECONDS = 3.0
# How long one poll for acknowledgements blocks its thread; only a close waits for it.
_POLL_SECONDS = 0.1


class Sender:
    """Publishes requests and cancels, acknowledged by all replicas. Safe for several threads."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        self._producer = IdempotentProducer(kafka, "the client", {"delivery.timeout.ms": int(_DELIVERY_SECONDS * 1000)})
        self._origin = Origin(self)
        self._closing = threading.Event()
        # No request enters the queue after a close, which would leave its future unresolved.
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
        try:
            record = NewRecord(topic_of(request), request.query_id.encode(), encode(request), make_headers(request))
            with self._open:
                if self._closing.is_set():
                    raise ClientStopped("the client was closed: make another")
                self._producer.produce(record, partial(_answer, answer))
        except BufferError:
            raise NotSubmitted("too many requests wait for the broker's acknowledgement; submit again later") from None
        except KafkaException as error:
            raise NotSubmitted(explain_error(error)) from error
        except (RegistryAway, RegistryRefused) as error:
            raise NotSubmitted(str(error)) from error
        return answer

    def close(self) -> None:
        """Wait for what is under way, and resolve its futures. Blocks for up to 34 s if the broker is away.

        Raises `ClientStopped` in a fork of the process.
        """
        self._origin.check()
        with self._open:
            self._closing.set()
        self._poller.join()
        self._producer.close(_DELIVERY_SECONDS + _EXPIRY_SECONDS)

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(_POLL_SECONDS)


def _answer(answer: "Future[None]", error: KafkaError | None, _message: Message) -> None:
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(NotSubmitted(error.str()))
