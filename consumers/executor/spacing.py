"""Starts that come together: servers do the same work for less CPU when it arrives in groups."""

import asyncio
import time


class Spacing:
    """Groups starts of one kind. The first starts at once; under load, groups start a fixed time apart.

    An S3 server spends 2.2 ms of CPU on each of 160 PUTs a second that come one by one, and 1.5 ms if they come in
    groups of six.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds`: the time between two groups."""
        self._seconds = seconds
        # When the last group has started, or when the next one will; on the monotonic clock.
        self._starts_at = -seconds

    async def wait(self) -> None:
        """Return when the caller's group starts."""
        now = time.monotonic()
        if now >= self._starts_at + self._seconds:
            self._starts_at = now
            return
        if now > self._starts_at:
            self._starts_at += self._seconds
        await asyncio.sleep(self._starts_at - now)
