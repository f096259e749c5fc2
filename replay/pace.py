"""Gently: so many records a second, and none while live traffic suffers."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

from confluent_kafka import ConsumerGroupTopicPartitions
from confluent_kafka.admin import AdminClient

from db.connection import Connection, unavailable_told_apart
from db.data.outbox import measure_waiting
from queryd.kafka.bounded_reader import read_ends, read_starts
from queryd.kafka.outages import QUIET

_BROKER_SECONDS = 15.0
# As often as the offsets that it looks at are committed, or seldomer.
_LOOK_SECONDS = 1.0


class TokenBucket:
    """`rate` records a second, and no more than a second's worth at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = rate
        self._filled = time.monotonic()

    async def take(self, records: int) -> None:
        """Return once so many may go."""
        now = time.monotonic()
        self._tokens = min(self._rate, self._tokens + (now - self._filled) * self._rate) - records
        self._filled = now
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._rate)


class Lag(Protocol):
    """How far live traffic is behind, in records."""

    async def measure(self) -> int:
        """How many records wait now. Raises `KafkaException` and `DatabaseUnavailable`."""
        ...


class GroupLag:
    """What a consumer group has not committed of some topics. A long query holds back what was read behind it."""

    def __init__(self, config: dict[str, Any], group: str, topics: Sequence[str]) -> None:
        self._config = config
        self._group = group
        self._topics = topics
        self._admin = AdminClient(config | QUIET)

    async def measure(self) -> int:
        """See `Lag`. A group that has committed nothing yet has all that the log still holds before it."""
        return await asyncio.to_thread(self._measure)

    def _measure(self) -> int:
        [answer] = self._admin.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(self._group)], request_timeout=_BROKER_SECONDS
        ).values()
        positions = answer.result().topic_partitions or ()
        committed = {(each.topic, each.partition): each.offset for each in positions if each.offset >= 0}
        behind = 0
        for topic in self._topics:
            # In this order, so that no start is behind its end.
            starts = read_starts(self._config, topic)
            for partition, end in read_ends(self._config, topic).items():
                # What retention has removed waits for nobody, committed or not.
                behind += end - max(committed.get((topic, partition), 0), starts.get(partition, 0))
        return behind


class OutboxLag:
    """Events that wait for the relay."""

    def __init__(self, connection: Connection, most: int) -> None:
        """Counts to `most` and one more."""
        self._connection = connection
        self._most = most

    async def measure(self) -> int:
        """See `Lag`."""
        with unavailable_told_apart():
            events, _ = await measure_waiting(self._connection, self._most + 1)
        return events


class LagGuard:
    """Says whether live traffic suffers; looks at most once a second. With a `most` of 0 it never does."""

    def __init__(self, lag: Lag, most: int) -> None:
        self._lag = lag
        self._most = most
        self._looked = -_LOOK_SECONDS
        self.behind = 0

    async def suffers(self) -> bool:
        """Whether more than `most` records wait, as of the last look."""
        if self._most == 0:
            return False
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self.behind = await self._lag.measure()
            self._looked = time.monotonic()
        return self.behind > self._most
