"""The database's clock as a process sees it between two answers: its last time plus our monotonic clock.

A worker's wall clock decides nothing, so it may jump as it likes. The database's own may jump as well: leases, limits
and waiting are therefore counted on a steady clock, the server's time less the sum of its jumps, which is kept in
`steady_clock`. Every process knows the steady time by its own monotonic clock, and gives it to every statement that
judges or sets a time; it checks that knowledge against the database again and again, and the first to see a jump
corrects the sum for all. Where two of them disagree, who has watched for longer is right: a newcomer may have looked
for the first time between a jump and its correction.
"""

import asyncio
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import structlog

from db.connection import Connection
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.clock")

# The steady time within a statement, for one that is in no hurry: a jump that nobody has corrected yet is in it.
STEADY_NOW = "(SELECT now() - skew FROM steady_clock WHERE only_row)"

# A sequence is not undone by a rollback: no two processes have the same rank. It is drawn with the first look, so that
# whoever has one knows the time of that moment.
FIRST_LOOK = """
SELECT clock_timestamp(), skew, corrected_by, nextval('steady_clock_ranks') FROM steady_clock WHERE only_row
"""
READ_CLOCK = "SELECT clock_timestamp(), skew, corrected_by FROM steady_clock WHERE only_row"
# Whoever saw the same jump and was first has changed the skew already.
CORRECT = """
UPDATE steady_clock
SET skew = skew + make_interval(secs => %(jump)s), corrected_by = %(rank)s, updated_at = now()
WHERE skew = %(seen)s
"""

# A jump below this harms nobody: no lease is that short, and limits are counted in seconds.
_SLACK_SECONDS = 2.0
# How far two sound clocks may drift apart in a second: twice what NTP's slewing does.
_DRIFT = 0.001

# Executors look at the database twice a second. When this long has passed from one look to the next, it was out of
# reach, and may have been so for others: as long as the shortest wait between two renewals of a common lease.
_OUTAGE_SECONDS = 5.0
# A machine that stalls again and again says nothing about the database: after this long it counts as settled anyway.
_LONGEST_UNSETTLED_SECONDS = 300.0
# After an outage a pool may take 10 s to try again, and the retries above it 5 s: by then every process has looked, and
# the eldest has corrected what jumped meanwhile.
_SETTLED_SECONDS = 20.0


def elapsed() -> float:
    """Seconds on a clock that no one sets, and that goes on while the machine sleeps where there is such a one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


class JumpDetector:
    """Finds out whether a remote clock went on as steadily as ours, from readings that took their time to arrive."""

    def __init__(self) -> None:
        # Remote time less ours lies between these, as of `_seen_at` on our clock.
        self._least = self._most = 0.0
        self._seen_at: float | None = None

    def observe(self, remote: float, sent: float, received: float) -> float | None:
        """A reading that was taken between `sent` and `received`; the jump in seconds, if there was one.

        What shows a jump is not believed: `now` goes on as if there had been none, until `adopt`.
        """
        least, most = remote - received, remote - sent
        jump = self._compare(least, most, received)
        if jump is not None:
            return jump
        if self._seen_at is not None:
            # What was known before still holds, but for the drift since: a slow answer must not blur it.
            drift = _DRIFT * (received - self._seen_at)
            narrower = max(least, self._least - drift), min(most, self._most + drift)
            if narrower[0] <= narrower[1]:
                least, most = narrower
        self._least, self._most, self._seen_at = least, most, received
        return None

    def adopt(self, remote: float, sent: float, received: float) -> None:
        """Believe a reading, whatever was known before."""
        self._least, self._most, self._seen_at = remote - received, remote - sent, received

    def now(self) -> float | None:
        """The remote time, if it was ever read."""
        return None if self._seen_at is None else elapsed() + (self._least + self._most) / 2

    def _compare(self, least: float, most: float, received: float) -> float | None:
        if self._seen_at is None:
            return None
        allowed = _SLACK_SECONDS + _DRIFT * (received - self._seen_at)
        if least > self._most + allowed or most < self._least - allowed:
            return (least + most) / 2 - (self._least + self._most) / 2
        return None


class DatabaseClock:
    """Give it the database's time whenever an answer brings one; ask it for the time in between."""

    def __init__(self) -> None:
        # Before the first answer the wall clock has to do; every service asks the database before it does anything.
        self._told = datetime.now(UTC)
        self._told_at = elapsed()
        self._steady = JumpDetector()
        # A reading from before a correction must not be compared with one from after it.
        self._checking = asyncio.Lock()
        self._checked_at = self._reached_since = self._unsettled_since = elapsed()
        # Those who have watched for longer have a lower one. There is none before the first look.
        self._rank = 0
        # The skew that was seen last: another one was set by another process.
        self._skew: timedelta | None = None

    def tell(self, now: datetime) -> None:
        """The database has just said what time it is."""
        self._told = now
        self._told_at = elapsed()

    def now(self) -> datetime:
        """The database's time as it is set, UTC, in milliseconds: for people, in events."""
        return _to_millis(self._told + timedelta(seconds=elapsed() - self._told_at))

    def steady_now(self) -> datetime:
        """The database's steady time, UTC, in milliseconds: by it, leases and all times in `query_runs` are counted.

        To be taken at each try of a statement anew.
        """
        seconds = self._steady.now()
        return self.now() if seconds is None else _to_millis(datetime.fromtimestamp(seconds, UTC))

    @property
    def settled(self) -> bool:
        """True once the database has been in reach for so long that whoever knows better has corrected the time."""
        now = elapsed()
        return now - self.reached_since >= _SETTLED_SECONDS or now - self._unsettled_since >= _LONGEST_UNSETTLED_SECONDS

    @property
    def reached_since(self) -> float:
        """Since when, on `elapsed`'s clock, the database has been in reach without a break as far as we can tell.

        What others had to write before then, they may have been kept from writing.
        """
        return self._reached_since

    async def check(self, connection: Connection) -> None:
        """Compare what we know with what the database says: a jump is found and made up for.

        To be awaited once before `steady_now` is used, and often from then on; in a transaction as its first statement,
        which is committed by itself.
        """
        async with self._checking:
            while not await self._agree(connection):
                pass

    async def _agree(self, connection: Connection) -> bool:
        """One look: true if it shows what we know. Else somebody has corrected, or we have: look again."""
        sent = elapsed()
        if self._rank:
            told, skew, corrected_by = await _read_row(connection, READ_CLOCK)
        else:
            told, skew, corrected_by, self._rank = await _read_row(connection, FIRST_LOOK)
        received = elapsed()
        self._note_outage(received)
        self.tell(told)
        reading = (told - skew).timestamp(), sent, received
        jump = self._steady.observe(*reading)
        by_elder = self._skew is not None and skew != self._skew and corrected_by < self._rank
        self._skew = skew
        if jump is None:
            return True
        if by_elder:
            self._steady.adopt(*reading)
            return True
        _log.warning(LogEvent.CLOCK_JUMPED, seconds=round(jump, 1))
        await connection.execute(CORRECT, {"jump": jump, "seen": skew, "rank": self._rank})
        # At once, whatever becomes of the caller's transaction: what is seen of the skew must not be rolled back, and
        # nobody else's correction must wait.
        await connection.commit()
        return False

    def _note_outage(self, received: float) -> None:
        """The database has answered: for how long had it not?"""
        silent = received - self._checked_at
        if silent > _OUTAGE_SECONDS:
            if max(silent, self._checked_at - self._reached_since) >= _SETTLED_SECONDS:
                self._unsettled_since = received
            self._reached_since = received
        self._checked_at = received


async def _read_row(connection: Connection, statement: LiteralString) -> Any:
    row = await (await connection.execute(statement)).fetchone()
    assert row is not None
    return row


def _to_millis(moment: datetime) -> datetime:
    moment = moment.astimezone(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
