"""Two ways for a replay's copies into Kafka: one by one, or as a transaction that can still be taken back."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from confluent_kafka import KafkaError, KafkaException, Producer

from queryd.outages import QUIET, OutageLog
from queryd.publisher import BY_KEY, MESSAGE_BYTES, NotDelivered, Publisher, RecordTooLarge
from replay.copies import Copy

# The broker aborts what is not committed by then, at most 10 s later when it looks: before Postgres lets go of rows
# that were held at the transaction's beginning, which it does after 30 s.
_TRANSACTION_MILLIS = 10_000
_BROKER_SECONDS = 15.0
_PREFIX = "queryd-replay-"


@dataclass(frozen=True, slots=True)
class Sending:
    """A copy with its final headers."""

    copy: Copy
    headers: list[tuple[str, str | bytes | None]]


Still = Callable[[], Awaitable[None]]


class Outlet(Protocol):
    """Where copies go."""

    async def send(self, sendings: Sequence[Sending], still: Still) -> list[bool]:
        """Send all, acknowledged; which the broker takes, and which are too large for their topic. `still` raises
        where what they were judged by holds no longer. Raises `NotDelivered`; nothing is under way then."""
        ...

    async def close(self) -> None:
        """Let go of the broker."""
        ...


class PlainOutlet:
    """One by one: what is sent is sent."""

    def __init__(self, publisher: Publisher) -> None:
        """`publisher` is open, and closed with this."""
        self._publisher = publisher

    async def send(self, sendings: Sequence[Sending], still: Still) -> list[bool]:
        """See `Outlet`."""
        await still()
        publish = self._publisher.publish
        answers = await asyncio.gather(
            *(
                publish(each.copy.topic, each.copy.key, each.copy.value, each.headers, each.copy.partition)
                for each in sendings
            ),
            # None may be under way when somebody goes on.
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, RecordTooLarge):
                raise answer
        return [not isinstance(answer, RecordTooLarge) for answer in answers]

    async def close(self) -> None:
        """See `Outlet`."""
        await self._publisher.close()


class FencedOutlet:
    """A Kafka transaction a batch, committed only while what it was judged by still holds: a process that is stopped in
    between, or can't reach the brokers, has published nothing. Whoever takes the replay up fences it."""

    def __init__(self, config: dict[str, Any], replay_id: str) -> None:
        self._outages = OutageLog("the replay")
        self._producer = Producer(
            config
            | QUIET
            | {
                "transactional.id": _PREFIX + replay_id,
                "transaction.timeout.ms": _TRANSACTION_MILLIS,
                "compression.type": "zstd",
                "message.max.bytes": MESSAGE_BYTES,
                "error_cb": self._outages.complain,
            }
        )
        self._begun = False
        self._open = False

    async def send(self, sendings: Sequence[Sending], still: Still) -> list[bool]:
        """See `Outlet`."""
        try:
            await asyncio.to_thread(self._produce, sendings)
            await still()
            await asyncio.to_thread(self._producer.commit_transaction, _BROKER_SECONDS)
            self._open = False
        except (KafkaException, BufferError) as error:
            cause = error.args[0] if error.args else error
            raise NotDelivered(cause.str() if isinstance(cause, KafkaError) else str(cause)) from error
        return [True] * len(sendings)

    async def close(self) -> None:
        """What was not committed is aborted, by us or, where we can't, by the broker: readers wait for that."""
        self._producer.purge()
        if self._open:
            with suppress(KafkaException):
                await asyncio.to_thread(self._producer.abort_transaction, _BROKER_SECONDS)

    def _produce(self, sendings: Sequence[Sending]) -> None:
        if not self._begun:
            self._producer.init_transactions(_BROKER_SECONDS)
            self._begun = True
        self._producer.begin_transaction()
        self._open = True
        for each in sendings:
            copied = each.copy
            self._producer.produce(
                copied.topic,
                value=copied.value,
                key=copied.key,
                headers=each.headers,
                partition=BY_KEY if copied.partition is None else copied.partition,
            )
