"""How fast a replay publishes: so many records a second, and none while live traffic is behind."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions
from confluent_kafka.admin import AdminClient

from queryd.kafka.bounded_reader import read_ends, read_starts
from queryd.kafka.outages import QUIET

_BROKER_SECONDS = 15.0
# As often as executors commit the offsets that it reads, or less.
_LOOK_SECONDS = 1.0


class TokenBucket:
    """`rate` records a second, and no more than a second's worth at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = rate
        self._filled = time.monotonic()

    async def take(self, records: int) -> None:
        """Return once so many may be published."""
        now = time.monotonic()
        self._tokens = min(self._rate, self._tokens + (now - self._filled) * self._rate) - records
        self._filled = now
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._rate)


class LagGuard:
    """Measures how many records of live traffic wait, at most once a second. With a `most` of 0 it never measures."""

    def __init__(self, measure: Callable[[], Awaitable[int]], most: int) -> None:
        self._measure = measure
        self._most = most
        self._looked = -_LOOK_SECONDS
        self.behind = 0

    async def is_exceeded(self) -> bool:
        """True if more than `most` records waited at the last look."""
        if self._most == 0:
            return False
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self.behind = await self._measure()
            self._looked = time.monotonic()
        return self.behind > self._most


def measure_group_lag(kafka: dict[str, Any], group: str, topics: Sequence[str]) -> int:
    """How many records of the topics a consumer group has not committed. Blocks; raises `KafkaException`.

    A long query holds back what was read behind it. A group that has committed nothing has the whole log before it.
    """
    admin = AdminClient(kafka | QUIET)
    [answer] = admin.list_consumer_group_offsets(
        [ConsumerGroupTopicPartitions(group)], request_timeout=_BROKER_SECONDS
    ).values()
    positions = answer.result().topic_partitions or ()
    committed = {(each.topic, each.partition): each.offset for each in positions if each.offset >= 0}
    behind = 0
    for topic in topics:
        # In this order, so that no start is behind its end.
        starts = read_starts(kafka, topic)
        for partition, end in read_ends(kafka, topic).items():
            # Records that retention has removed don't wait, committed or not.
            behind += end - max(committed.get((topic, partition), 0), starts.get(partition, 0))
    return behind
