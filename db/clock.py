"""The two clocks of a process: one that measures durations, and the database's time for events."""

import sys
import time
from datetime import UTC, datetime, timedelta

from db.connection import DataPool, statement

READ_NOW = "SELECT clock_timestamp()"


def elapsed() -> float:
    """Seconds on a clock that nobody sets. On Linux it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


class DatabaseClock:
    """The database's time between two answers: the last one that it gave plus our monotonic clock.

    Only times that people read, in events, come from here. Statements use `now()`.
    """

    def __init__(self, now: datetime) -> None:
        self.update(now)

    def update(self, now: datetime) -> None:
        """Set the clock by an answer of the database."""
        self._read = now.astimezone(UTC)
        self._read_at = elapsed()

    def now(self) -> datetime:
        """The database's time, UTC, in milliseconds."""
        now = self._read + timedelta(seconds=elapsed() - self._read_at)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)


async def read_clock(pool: DataPool) -> DatabaseClock:
    """A clock that the database has just set; raises `DatabaseUnavailable`."""
    async with statement(pool) as connection:
        row = await (await connection.execute(READ_NOW)).fetchone()
    assert row is not None
    return DatabaseClock(row[0])
