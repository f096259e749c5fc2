"""The loop around a subscription: hand over each batch, and open another subscription when one was lost."""

import asyncio
from collections.abc import Awaitable, Callable

from queryd.kafka.consumer import Subscription, SubscriptionLost
from queryd.kafka.record import Partition, Record

# A consumer that fails at once would otherwise be opened again as fast as the machine can.
_REOPEN_SECONDS = 1.0


class ConsumerLoop:
    """Runs one subscription after another until `stop`.

    `handle` is awaited with each batch, and the records that it returns are finished: all of them if their effects are
    durable then. A handler whose effects come later returns none, and finishes each record by `subscription`.
    """

    def __init__(
        self,
        subscribe: Callable[[], Subscription],
        handle: Callable[[list[Record]], Awaitable[list[Record]]],
        *,
        on_assigned: Callable[[], None] = lambda: None,
        on_lost: Callable[[SubscriptionLost], None],
        wait: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`on_assigned` is called once a group has answered, with partitions or with none.

        `wait` is awaited before each poll. It must return within seconds, since a rebalance waits for the poll.
        """
        self._subscribe = subscribe
        self._handle = handle
        self._on_assigned = on_assigned
        self._on_lost = on_lost
        self._wait = wait
        # None while no subscription is open.
        self.subscription: Subscription | None = None
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._stopping.set()

    def lags(self) -> dict[Partition, int]:
        """How many records of each partition held are not finished; see `Subscription.lags`."""
        return {} if self.subscription is None else self.subscription.lags()

    async def run(self) -> None:
        """Poll and handle until `stop`. Raises what `handle` raises, and `OffsetOutOfRange`."""
        while not self._stopping.is_set():
            subscription = self.subscription = self._subscribe()
            try:
                await self._follow(subscription)
            except SubscriptionLost as error:
                # What was received by a consumer that has failed can't be finished any more.
                self.subscription = None
                self._on_lost(error)
            finally:
                await subscription.close()
                self.subscription = None
            if not self._stopping.is_set():
                await asyncio.sleep(_REOPEN_SECONDS)

    async def _follow(self, subscription: Subscription) -> None:
        await subscription.open()
        assigned = asyncio.create_task(self._announce(subscription))
        try:
            while not self._stopping.is_set():
                if self._wait is not None:
                    await self._wait()
                if records := await subscription.poll():
                    for record in await self._handle(records):
                        subscription.finish(record)
        finally:
            assigned.cancel()

    async def _announce(self, subscription: Subscription) -> None:
        await subscription.wait_assigned()
        self._on_assigned()
