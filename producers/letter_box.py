"""Two ways into the dead letters' topic: in Kafka transactions that another process can end, or without.

A worker that was cut off from the brokers has lost its partitions, and may still hold letters that its producer sends
once it is back: then the next owner has written them as well. So each session of a writer has a transactional id of its
own, which stands in the note about each letter: whoever finds a note without its end first ends that session for good,
and only then looks what it has written.
"""

import asyncio
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from queryd.events import Topic
from queryd.outages import QUIET, OutageLog
from queryd.publisher import MESSAGE_BYTES, NotDelivered, Publisher

# A dead writer's transaction, which nobody has ended, is aborted by the broker after this.
_TRANSACTION_MILLIS = 10_000
# How long one call to the broker may take before the session counts as broken.
_BROKER_SECONDS = 15.0
_PREFIX = "queryd-dead-letters-"
# What no repetition mends.
_REFUSALS = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_RECORD,
        KafkaError.POLICY_VIOLATION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        # Told only once the topic has had its time to become known.
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A dead letter as Kafka gets it."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, str | bytes | None]]


class WriterLost(Exception):
    """The session with the broker can't go on: open another, and find out what this one has written."""


class LetterBox(Protocol):
    """One session of one writer. `writer` stands in the notes about its letters."""

    writer: str

    async def put(self, letters: Sequence[Outgoing]) -> None:
        """Write all of them, acknowledged. Raises `NotDelivered` where the broker refuses them, and `WriterLost`."""
        ...

    async def end(self, writers: Collection[str]) -> None:
        """See to it that those sessions write nothing any more. Raises `WriterLost`."""
        ...


class PlainBox:
    """Without transactions: what an ended process has left behind can be read back, a stopped one can't be ended."""

    writer = ""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def put(self, letters: Sequence[Outgoing]) -> None:
        """Write all of them, acknowledged; raises `NotDelivered`."""
        publish = self._publisher.publish
        await asyncio.gather(*(publish(Topic.DEAD_LETTERS, each.key, each.value, each.headers) for each in letters))

    async def end(self, writers: Collection[str]) -> None:
        """Nothing can be done."""


class FencedBox:
    """A transactional producer. `open` makes one."""

    def __init__(self, config: dict[str, Any], writer: str, producer: Producer) -> None:
        self.writer = writer
        self._config = config
        self._producer = producer

    @classmethod
    async def open(cls, config: dict[str, Any]) -> "FencedBox":
        """A session under a name that nobody has had; raises `WriterLost`."""
        writer = _PREFIX + str(uuid.uuid4())
        return cls(config, writer, await asyncio.to_thread(_open_producer, config, writer))

    async def put(self, letters: Sequence[Outgoing]) -> None:
        """All of them or none. Raises `NotDelivered` where the broker refuses them, and `WriterLost`."""
        await asyncio.to_thread(self._put, letters)

    async def end(self, writers: Collection[str]) -> None:
        """Fence those sessions: what they have not committed is aborted. Raises `WriterLost`."""
        for writer in writers:
            await asyncio.to_thread(_open_producer, self._config, writer)

    def _put(self, letters: Sequence[Outgoing]) -> None:
        failures: list[KafkaError] = []

        def report(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                failures.append(error)

        try:
            self._producer.begin_transaction()
            for letter in letters:
                self._producer.produce(
                    Topic.DEAD_LETTERS, letter.value, letter.key, headers=letter.headers, on_delivery=report
                )
            self._producer.commit_transaction(_BROKER_SECONDS)
        except (KafkaException, BufferError) as error:
            # Whether the commit went through is not known here; whoever ends this session finds out.
            causes = [*failures, *(cause for cause in error.args if isinstance(cause, KafkaError))]
            refusal = next((cause for cause in causes if cause.code() in _REFUSALS), None)
            if refusal is not None:
                raise NotDelivered(refusal.str()) from error
            raise WriterLost("; ".join(cause.str() for cause in causes) or type(error).__name__) from error


def _open_producer(config: dict[str, Any], writer: str) -> Producer:
    """A producer of that name; any other of that name is fenced."""
    outages = OutageLog("the dead letters' producer")
    producer = Producer(
        config
        | QUIET
        | {
            "transactional.id": writer,
            "transaction.timeout.ms": _TRANSACTION_MILLIS,
            # As the publisher's: a record that came compressed may be far larger than its topic's limit.
            "compression.type": "zstd",
            "message.max.bytes": MESSAGE_BYTES,
            "error_cb": outages.complain,
        }
    )
    try:
        producer.init_transactions(_BROKER_SECONDS)
    except KafkaException as error:
        cause = error.args[0]
        if isinstance(cause, KafkaError) and cause.code() in _REFUSALS:
            raise NotDelivered(cause.str()) from error
        raise WriterLost(str(cause)) from error
    outages.answered()
    return producer
