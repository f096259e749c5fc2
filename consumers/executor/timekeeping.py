"""The database's time at an executor's start: found before anything is counted by it, and watched from then on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

import structlog

from consumers.executor.cancelling import end_tasks
from db.clock import DatabaseClock, elapsed
from db.connection import DataPool, statement
from db.retrying import until_available
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.clock")

# As often as an executor's watch looks.
_LOOK_SECONDS = 0.5
# Hosts that are looked after differ by less, and a lease or a limit that is off by this does no harm.
_APART_SECONDS = 5.0
# Where the database's clock as it is set agrees with ours, most likely an old jump is made up for in the steady time,
# and will be at every start from now on. Whoever sees a new one corrects it within a second, unless cut off or stopped.
_CORRECTED_SECONDS = 5.0


async def find_time(pool: DataPool, clock: DatabaseClock) -> None:
    """Return once the database has told the time and there is no reason to doubt it.

    A newcomer can't tell a clock that has just jumped from one that is right, and what it writes by the wrong time
    stays when somebody who has watched for longer corrects it. Where the time that it is told is not its own either, it
    waits until they agree, or for as long as such a correction may take.
    """
    told = False
    while True:
        await until_available(partial(_look, pool, clock), "postgres data")
        if _is_near(clock.steady_now()) or clock.settled:
            return
        if _is_near(clock.now()) and elapsed() - clock.reached_since >= _CORRECTED_SECONDS:
            return
        if not told:
            apart = (clock.steady_now() - datetime.now(UTC)).total_seconds()
            _log.warning(LogEvent.CLOCKS_APART, seconds=round(apart, 1))
            told = True
        await asyncio.sleep(_LOOK_SECONDS)


def _is_near(told: datetime) -> bool:
    return abs((told - datetime.now(UTC)).total_seconds()) <= _APART_SECONDS


@asynccontextmanager
async def watching(pool: DataPool, clock: DatabaseClock) -> AsyncIterator[None]:
    """Within it the database's clock is watched as a working executor does it.

    All executors may wait for Kafka at once, and a jump that none of them has seen can't be made up for. What the watch
    itself has run into is raised at its end.
    """

    async def watch_for_ever() -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await until_available(partial(_look, pool, clock), "postgres data")

    watch = asyncio.create_task(watch_for_ever(), name="clock")
    try:
        yield
    finally:
        await end_tasks([watch])
    if not watch.cancelled():
        watch.result()


async def _look(pool: DataPool, clock: DatabaseClock) -> None:
    async with statement(pool) as connection:
        await clock.check(connection)
