"""The executor's intake: what arrives from the lanes' topics, and what of it is finished.

A member of the group for each topic: a group shares the sum of all partitions out evenly, so that a member of both
topics often holds all of one lane and nothing of the other, whose slots would then stay idle.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import structlog

from queryd.kafka.consumer import Revoked, Subscription, SubscriptionLost
from queryd.kafka.record import Partition, Record
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.intake")

# A consumer that fails at once would otherwise be made anew as fast as the machine can.
_RESUBSCRIBE_SECONDS = 1.0


class Intake:
    """The subscriptions of one executor, by topic."""

    def __init__(self, config: dict[str, Any], topics: Iterable[str], forget: Revoked) -> None:
        """`forget` is awaited with partitions that are taken away."""
        self._config = config
        self._forget = forget
        self._subscriptions = {topic: self._subscribe(topic) for topic in topics}

    def _subscribe(self, topic: str) -> Subscription:
        config = self._config
        if identity := config.get("group.instance.id"):
            # A static member of each topic: two of one name would fence each other for ever.
            config = config | {"group.instance.id": f"{identity}-{topic}"}
        return Subscription(config, [topic], revoked=self._forget)

    @property
    def topics(self) -> Sequence[str]:
        """Where records come from."""
        return list(self._subscriptions)

    async def open(self) -> None:
        """Join the group."""
        for subscription in self._subscriptions.values():
            await subscription.open()

    async def wait_assigned(self) -> None:
        """Return once the group has answered for every topic, with partitions or with none."""
        await asyncio.gather(*(subscription.wait_assigned() for subscription in self._subscriptions.values()))

    async def follow(self, topic: str, take: Callable[[Sequence[Record]], None]) -> None:
        """Hand over what arrives, for ever: the poll goes on whatever its records' work does."""
        while True:
            try:
                if records := await self._subscriptions[topic].poll():
                    take(records)
            except SubscriptionLost as error:
                _log.warning(LogEvent.SUBSCRIPTION_LOST, reason=str(error), topic=topic)
                await self._subscribe_anew(topic)

    async def _subscribe_anew(self, topic: str) -> None:
        """Nothing that a consumer that failed still says can be relied on: another takes its place."""
        lost = self._subscriptions[topic]
        await self._forget(set(lost.assignment))
        try:
            await lost.close()
        # It has failed already; what else it runs into changes nothing.
        except Exception as error:  # noqa: BLE001
            _log.error(LogEvent.SERVICE_FAILED, step="leave the group", error=type(error).__name__)
        await asyncio.sleep(_RESUBSCRIBE_SECONDS)
        self._subscriptions[topic] = self._subscribe(topic)
        await self._subscriptions[topic].open()

    def owns(self, record: Record) -> bool:
        """True while the assignment that delivered the record lasts."""
        return self._subscriptions[record.topic].owns(record)

    def finish(self, record: Record) -> None:
        """The record's effect is durable."""
        self._subscriptions[record.topic].finish(record)

    def is_over(self, topic: str, partition: int, offset: int) -> bool:
        """True when the record there will not come to this executor's work any more, see `Subscription.is_over`."""
        known = self._subscriptions.get(topic)
        return known is not None and known.is_over(topic, partition, offset)

    def lags(self) -> dict[Partition, int]:
        """Records that are not finished, by topic and partition."""
        return {partition: lag for held in self._subscriptions.values() for partition, lag in held.lags().items()}

    async def close(self) -> None:
        """Commit what is finished and leave the group; the first error is raised once all have been closed."""
        closing = (subscription.close() for subscription in self._subscriptions.values())
        for failed in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(failed, BaseException):
                raise failed
