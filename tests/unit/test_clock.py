"""The database's time between two of its answers."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from db import clock
from db.clock import DatabaseClock

_NOW = datetime(2026, 11, 30, 12, 0, 0, 1_999, UTC)


def test_between_answers_the_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 1_000.0
    monkeypatch.setattr(clock, "elapsed", lambda: at)
    told = DatabaseClock(_NOW)
    assert told.now() == datetime(2026, 11, 30, 12, 0, 0, 1_000, UTC)
    at += 90.0
    assert told.now() == datetime(2026, 11, 30, 12, 1, 30, 1_000, UTC)


def test_the_last_answer_counts_in_utc() -> None:
    told = DatabaseClock(_NOW)
    told.update((_NOW - timedelta(hours=1)).astimezone(timezone(timedelta(hours=2))))
    now = told.now()
    assert now.tzinfo is UTC
    assert timedelta(minutes=59) < _NOW - now <= timedelta(hours=1, milliseconds=1)
