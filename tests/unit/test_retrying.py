"""Waiting for what is away: with backoff and jitter, told of once, and never for an error that is the work's own."""

import asyncio

import pytest

from db.connection import DatabaseUnavailable
from db.retrying import until_available

_MOST_SECONDS = 6.0


class Dependency:
    """Away for so many calls."""

    def __init__(self, away: int, error: Exception) -> None:
        self.calls = 0
        self._away = away
        self._error = error

    async def work(self) -> int:
        self.calls += 1
        if self.calls <= self._away:
            raise self._error
        return self.calls


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, in seconds; nobody really waits."""
    waited: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return waited


async def test_waits_grow_to_some_seconds_and_no_further(waits: list[float]) -> None:
    away = Dependency(20, DatabaseUnavailable("away"))
    assert await until_available(away.work, "postgres data") == 21
    # The first repetition is at once; each further one waits.
    assert len(waits) == 19
    assert waits[0] < 1.0
    assert max(waits) <= _MOST_SECONDS
    assert all(wait >= 4.0 for wait in waits[-8:])


async def test_waits_have_jitter_so_that_not_all_come_back_together(waits: list[float]) -> None:
    for _ in range(8):
        await until_available(Dependency(3, DatabaseUnavailable("away")).work, "postgres data")
    assert len(set(waits)) > len(waits) // 2


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("ours")])
async def test_an_error_of_the_works_own_is_never_repeated(waits: list[float], error: Exception) -> None:
    broken = Dependency(5, error)
    with pytest.raises(type(error)):
        await until_available(broken.work, "postgres data")
    assert (broken.calls, waits) == (1, [])


async def test_an_error_of_the_works_own_ends_the_waiting_too(waits: list[float]) -> None:
    calls = 0

    async def work() -> None:
        nonlocal calls
        calls += 1
        raise DatabaseUnavailable("away") if calls < 3 else ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        await until_available(work, "postgres data")
    assert calls == 3
    assert len(waits) == 1


async def test_who_gives_up_gets_the_dependencys_own_error() -> None:
    away = Dependency(1_000, DatabaseUnavailable("away"))
    with pytest.raises(DatabaseUnavailable):
        await until_available(away.work, "postgres data", give_up_after=0.3)
    assert away.calls >= 2
