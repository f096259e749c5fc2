"""Waiting for what is away: repeat with backoff and jitter until it answers, saying so once."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina
import structlog

from db.connection import DatabaseUnavailable
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.retrying")
_Answer = TypeVar("_Answer")

_LONGEST_SECONDS = 5.0
_JITTER_SECONDS = 0.5
# Once a dependency is back, everything that waits for it has asked again within this time.
ASKED_AGAIN_SECONDS = _LONGEST_SECONDS + _JITTER_SECONDS + 0.5


async def until_available(
    work: Callable[[], Awaitable[_Answer]],
    dependency: str | Callable[[Exception], str],
    *,
    unavailable: type[Exception] = DatabaseUnavailable,
    give_up_after: float | None = None,
) -> _Answer:
    """Repeat `work` while it raises `unavailable`, waiting 0.1 s to 5 s in between.

    Retries forever, or for `give_up_after` seconds; then it raises `unavailable`. `dependency` is the name for the log,
    or a function that returns the name for an error.
    """
    try:
        return await work()
    except unavailable as error:
        if callable(dependency):
            dependency = dependency(error)
        _log.warning(LogEvent.DEPENDENCY_UNAVAILABLE, dependency=dependency, reason=str(error))
    async for attempt in stamina.retry_context(
        on=unavailable,
        attempts=None,
        timeout=give_up_after,
        wait_initial=0.1,
        wait_max=_LONGEST_SECONDS,
        wait_jitter=_JITTER_SECONDS,
    ):
        with attempt:
            answer = await work()
            _log.info(LogEvent.DEPENDENCY_AVAILABLE, dependency=dependency)
            return answer
    raise AssertionError("unreachable: the last attempt raises")
