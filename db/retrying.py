"""Waiting for what is away: repeat with backoff and jitter until it answers, saying so once."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina
import structlog

from db.connection import DatabaseUnavailable
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.db")
_Answer = TypeVar("_Answer")


async def until_available(work: Callable[[], Awaitable[_Answer]], dependency: str) -> _Answer:
    """Repeat `work` while it raises `DatabaseUnavailable`, waiting 0.1 s to 5 s in between; for ever, if need be."""
    told = False
    async for attempt in stamina.retry_context(
        on=DatabaseUnavailable, attempts=None, timeout=None, wait_initial=0.1, wait_max=5.0, wait_jitter=0.5
    ):
        with attempt:
            try:
                answer = await work()
            except DatabaseUnavailable as error:
                if not told:
                    _log.warning(LogEvent.DEPENDENCY_UNAVAILABLE, dependency=dependency, reason=str(error))
                    told = True
                raise
            if told:
                _log.info(LogEvent.DEPENDENCY_AVAILABLE, dependency=dependency)
            return answer
    raise AssertionError("unreachable: the attempts have no end")
