"""The database's clock as a process sees it between two answers: its last `now()` plus our monotonic clock.

A worker's wall clock decides nothing, so it may jump as it likes.
"""

import time
from datetime import UTC, datetime, timedelta


class DatabaseClock:
    """Give it the database's time whenever an answer brings one; ask it for the time in between."""

    def __init__(self) -> None:
        # Before the first answer the wall clock has to do; every service asks the database before it does anything.
        self._told = datetime.now(UTC)
        self._told_at = time.monotonic()

    def tell(self, now: datetime) -> None:
        """The database has just said what time it is."""
        self._told = now
        self._told_at = time.monotonic()

    def now(self) -> datetime:
        """The database's time, UTC, in milliseconds."""
        now = self._told + timedelta(seconds=time.monotonic() - self._told_at)
        return now.astimezone(UTC).replace(microsecond=now.microsecond // 1000 * 1000)
