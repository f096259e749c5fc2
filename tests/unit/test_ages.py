"""A record's age is judged by three clocks, and the one that is wrong by an hour decides nothing."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from consumers.executor.ages import RecordAges
from db.clock import DatabaseClock
from queryd.subscription import Record
from tests.unit.samples import make_record

_HOUR = 3600.0


def _record(seconds_ago: float, **changes: object) -> Record:
    return make_record(b"", timestamp_ms=round((time.time() - seconds_ago) * 1000), **changes)


def _ages(database_ahead: float = 0.0) -> RecordAges:
    clock = DatabaseClock()
    clock.tell(datetime.now(UTC) + timedelta(seconds=database_ahead))
    return RecordAges(clock)


def test_a_record_is_as_old_as_its_stamp_says() -> None:
    assert _ages().age_at_poll(_record(100.0)) == pytest.approx(100.0, abs=2.0)


@pytest.mark.parametrize("wrong", [_HOUR, -_HOUR])
def test_a_databases_clock_that_is_wrong_decides_nothing(wrong: float) -> None:
    ages = _ages(wrong)
    ages.age_at_poll(_record(0.0))
    assert ages.age_at_poll(_record(100.0)) == pytest.approx(100.0, abs=2.0)


@pytest.mark.parametrize("wrong", [_HOUR, -_HOUR])
def test_a_workers_clock_that_is_wrong_decides_nothing(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ages, fresh, old = _ages(), _record(0.0), _record(100.0)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + wrong)
    ages.age_at_poll(fresh)
    assert ages.age_at_poll(old) == pytest.approx(100.0, abs=2.0)


@pytest.mark.parametrize("wrong", [_HOUR, -_HOUR])
def test_a_brokers_clock_that_jumps_does_not_make_new_records_old(wrong: float) -> None:
    ages = _ages()
    ages.age_at_poll(_record(0.0))
    age = ages.age_at_poll(_record(-wrong))
    # Of a broker that is set back, the others can't know; it is the one that all stamps come from.
    assert age == pytest.approx(0.0 if wrong > 0 else _HOUR, abs=2.0)


def test_a_producers_stamp_says_nothing() -> None:
    assert _ages().age_at_poll(_record(100.0, appended_by_broker=False)) == 0.0
    assert _ages().age_at_poll(make_record(b"", timestamp_ms=None)) == 0.0
