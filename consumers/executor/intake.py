"""The executor's intake: what arrives from the lanes' topics, and what of it is finished.

A member of the group for each topic: a group shares the sum of all partitions out evenly, so that a member of both
topics often holds all of one lane and nothing of the other, whose slots would then stay idle.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import structlog

from queryd.kafka.consumer import Revoked, Subscription, SubscriptionLost
from queryd.kafka.consumer_loop import ConsumerLoop
from queryd.kafka.record import Partition, Record
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.intake")


class Intake:
    """The consumer loops of one executor, by topic."""

    def __init__(
        self,
        config: dict[str, Any],
        topics: Iterable[str],
        take: Callable[[Sequence[Record]], None],
        forget: Revoked,
    ) -> None:
        """`take` receives what arrives, and finishes it later; `forget` is awaited with revoked partitions."""
        self._take = take
        self._assigned = {topic: asyncio.Event() for topic in topics}
        self._loops = {
            topic: ConsumerLoop(
                partial(_subscribe, config, topic, forget),
                self._hand_over,
                on_assigned=assigned.set,
                on_lost=partial(_report_lost, topic),
            )
            for topic, assigned in self._assigned.items()
        }
        self._running: list[asyncio.Task[None]] = []

    def start(self) -> "list[asyncio.Task[None]]":
        """Join the group for each topic, and poll until `close`. A task ends before only if it fails."""
        self._running = [asyncio.create_task(loop.run(), name=f"intake {topic}") for topic, loop in self._loops.items()]
        return self._running

    async def wait_assigned(self) -> None:
        """Return once the group has answered for every topic, with partitions or with none."""
        await asyncio.gather(*(assigned.wait() for assigned in self._assigned.values()))

    async def _hand_over(self, records: list[Record]) -> list[Record]:
        self._take(records)
        return []

    def owns(self, record: Record) -> bool:
        """True while the assignment that delivered the record lasts."""
        subscription = self._loops[record.topic].subscription
        return subscription is not None and subscription.owns(record)

    def finish(self, record: Record) -> None:
        """The record's effect is durable."""
        if (subscription := self._loops[record.topic].subscription) is not None:
            subscription.finish(record)

    def is_over(self, topic: str, partition: int, offset: int) -> bool:
        """True when the record there will not come to this executor's work any more, see `Subscription.is_over`."""
        loop = self._loops.get(topic)
        subscription = None if loop is None else loop.subscription
        return subscription is not None and subscription.is_over(topic, partition, offset)

    def lags(self) -> dict[Partition, int]:
        """Records that are not finished, by topic and partition."""
        return {partition: lag for loop in self._loops.values() for partition, lag in loop.lags().items()}

    async def close(self) -> None:
        """Commit what is finished and leave the group; the first error is raised once all have been closed."""
        running = [task for task in self._running if not task.done()]
        for loop in self._loops.values():
            loop.stop()
        for failed in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(failed, BaseException):
                raise failed


def _subscribe(config: dict[str, Any], topic: str, forget: Revoked) -> Subscription:
    if identity := config.get("group.instance.id"):
        # A static member of each topic: two of one name would fence each other for ever.
        config = config | {"group.instance.id": f"{identity}-{topic}"}
    return Subscription(config, [topic], revoked=forget)


def _report_lost(topic: str, error: SubscriptionLost) -> None:
    _log.warning(LogEvent.SUBSCRIPTION_LOST, reason=str(error), topic=topic)
