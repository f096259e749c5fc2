"""A replay goes as fast as it may, and not while others wait."""

import asyncio
import time

import pytest

from replay.pace import LagGuard, TokenBucket


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleep moves; the naps taken."""
    taken: list[float] = []

    async def sleep(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + sum(taken))
    return taken


async def test_a_second_s_worth_goes_at_once_and_the_rest_at_its_rate(naps: list[float]) -> None:
    bucket = TokenBucket(100)
    for _ in range(5):
        await bucket.take(100)
    # The first hundred were there; four hundred more take four seconds.
    assert sum(naps) == pytest.approx(4.0)


async def test_what_was_not_used_is_not_saved_up(naps: list[float]) -> None:
    bucket = TokenBucket(10)
    naps.append(3600.0)
    await bucket.take(10)
    await bucket.take(10)
    assert sum(naps) - 3600.0 == pytest.approx(1.0)


class _Lag:
    def __init__(self) -> None:
        self.records = 0
        self.looks = 0

    async def measure(self) -> int:
        self.looks += 1
        return self.records


async def test_the_guard_looks_once_a_second(naps: list[float]) -> None:
    lag = _Lag()
    guard = LagGuard(lag.measure, 10)
    lag.records = 11
    assert await guard.is_exceeded()
    lag.records = 10
    assert await guard.is_exceeded()
    naps.append(1.0)
    assert not await guard.is_exceeded()
    assert lag.looks == 2


async def test_a_guard_of_zero_never_looks(naps: list[float]) -> None:
    lag = _Lag()
    lag.records = 10**9
    assert not await LagGuard(lag.measure, 0).is_exceeded()
    assert lag.looks == 0
