"""A record's age is judged by five clocks: those that are an hour ahead make none older, any two or one host's."""

import itertools
import time
from datetime import UTC, datetime, timedelta

import pytest

from consumers.executor.ages import RecordAges
from db.clock import DatabaseClock
from queryd.kafka.record import Record
from tests.unit.samples import make_record

_HOUR = 3600.0
# As a broker's stamp and ours may differ on a busy machine.
_NEAR = 5.0
_CLOCKS = ("database", "steady", "worker", "start", "broker")


class _Clock(DatabaseClock):
    """The database's clock as it is set, and as it has gone on, each so many seconds ahead."""

    def __init__(self, database: float, steady: float) -> None:
        super().__init__()
        self._ahead = timedelta(seconds=steady)
        self.tell(datetime.now(UTC) + timedelta(seconds=database))

    def steady_now(self) -> datetime:
        return datetime.now(UTC) + self._ahead


def _record(seconds_ago: float, **changes: object) -> Record:
    return make_record(b"", timestamp_ms=round((_true_time() - seconds_ago) * 1000), **changes)


_true_time = time.time


def _ages(database: float = 0.0, steady: float = 0.0) -> RecordAges:
    return RecordAges(_Clock(database, steady))


def _judge(ages: RecordAges, *records: Record) -> float:
    """The last one's age."""
    return ages.waited_seconds(records)[-1]


def test_a_record_is_as_old_as_its_stamp_says() -> None:
    assert _judge(_ages(), _record(100.0)) == pytest.approx(100.0, abs=_NEAR)


def test_it_goes_on_waiting_after_its_poll() -> None:
    old = _record(100.0, polled_at=time.monotonic() - 40.0)
    assert _judge(_ages(), old) == pytest.approx(100.0, abs=_NEAR)


@pytest.mark.parametrize("clock", _CLOCKS[:4])
def test_one_clock_that_is_behind_makes_no_record_younger(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ages = _make_wrong({clock}, -_HOUR, monkeypatch)
    assert _judge(ages, _record(0.0), _record(100.0)) == pytest.approx(100.0, abs=_NEAR)


_PAIRS = list(itertools.combinations(_CLOCKS, 2))


@pytest.mark.parametrize("clocks", [*((clock,) for clock in _CLOCKS), *_PAIRS, ("database", "worker", "broker")])
def test_clocks_that_are_ahead_make_no_record_older(clocks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ages = _make_wrong(set(clocks), _HOUR, monkeypatch)
    if "broker" in clocks:
        _judge(ages, _record(-_HOUR))
    assert _judge(ages, _record(0.0), _record(100.0)) == pytest.approx(100.0, abs=_NEAR)


def test_the_brokers_clock_goes_on_since_the_poll_of_its_newest_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the worker's an hour behind the broker's is the second lowest.
    ages = _make_wrong({"worker"}, -_HOUR, monkeypatch)
    newest = _record(500.0, polled_at=time.monotonic() - 500.0)
    assert _judge(ages, newest, _record(700.0)) == pytest.approx(700.0, abs=_NEAR)


def test_no_clock_makes_a_record_younger_than_its_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = _make_wrong({"database", "steady", "worker", "start"}, -_HOUR, monkeypatch)
    assert _judge(ages, _record(40.0, polled_at=time.monotonic() - 40.0)) == pytest.approx(40.0, abs=_NEAR)


def test_after_an_outage_a_new_process_knows_how_old_records_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest that it has seen is old itself, and its own clock is an hour ahead."""
    ages = _make_wrong({"worker", "start"}, _HOUR, monkeypatch)
    assert _judge(ages, _record(700.0)) == pytest.approx(700.0, abs=_NEAR)


def _make_wrong(clocks: set[str], wrong: float, monkeypatch: pytest.MonkeyPatch) -> RecordAges:
    def shift(clock: str) -> float:
        return wrong if clock in clocks else 0.0

    monkeypatch.setattr(time, "time", lambda: _true_time() + shift("start"))
    ages = _ages(shift("database"), shift("steady"))
    monkeypatch.setattr(time, "time", lambda: _true_time() + shift("worker"))
    return ages


@pytest.mark.parametrize("wrong", [_HOUR, -_HOUR])
def test_a_brokers_clock_that_jumps_does_not_make_new_records_old(wrong: float) -> None:
    ages = _ages()
    age = _judge(ages, _record(0.0), _record(-wrong))
    # Of a broker that is set back, the others can't know; it is the one that all stamps come from.
    assert age == pytest.approx(0.0 if wrong > 0 else _HOUR, abs=_NEAR)


def test_a_producers_stamp_says_nothing() -> None:
    unstamped = [_record(100.0, appended_by_broker=False), make_record(b"", timestamp_ms=None)]
    assert _ages().waited_seconds(unstamped) == pytest.approx([0.0, 0.0], abs=_NEAR)
