"""When a lease counts as dead: its number stands still for its whole length, on our own clock, between two outages."""

from typing import Any

import pytest

from consumers.executor import lease_monitor
from consumers.executor.lease_monitor import LeaseMonitor
from db.retrying import ASKED_AGAIN_SECONDS
from tests.unit.samples import QUERY_ID, make_state

_LEASE_SECONDS = 15.0
_LOOK_SECONDS = 0.5
_HELD: dict[str, Any] = {"status": "Running", "lease_token": "token", "lease_renewal": 7}


class Observer:
    """A monitor whose clock moves when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lease_seconds: float = _LEASE_SECONDS) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(lease_monitor, "elapsed", lambda: self.now)
        self._monitor = LeaseMonitor(lease_seconds)

    def fail_to_read(self) -> None:
        """The database does not answer."""
        self._monitor.forget()

    def see(self, answer_seconds: float = 0.0, **lease: Any) -> bool:
        """Read the lease of one query; True if it is dead."""
        asked_at = self.now
        self.now += answer_seconds
        return self._monitor.observe([make_state(**_HELD | lease)], asked_at) == {QUERY_ID}

    def see_for(self, seconds: float, **lease: Any) -> bool:
        """Look twice a second, for so long; True if the lease is dead in the end."""
        dead = self.see(**lease)
        for _ in range(round(seconds / _LOOK_SECONDS)):
            self.now += _LOOK_SECONDS
            dead = self.see(**lease)
        return dead


@pytest.fixture
def observer(monkeypatch: pytest.MonkeyPatch) -> Observer:
    return Observer(monkeypatch)


def test_a_lease_that_stands_still_for_its_whole_length_is_dead(observer: Observer) -> None:
    assert not observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS)
    observer.now += _LOOK_SECONDS
    assert observer.see()


def test_a_lease_that_is_renewed_is_alive(observer: Observer) -> None:
    for renewal in range(8, 40):
        assert not observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS, lease_renewal=renewal)


def test_a_lease_that_was_handed_back_and_claimed_again_is_another(observer: Observer) -> None:
    observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS, lease_renewal=0)
    # Between two looks.
    observer.now += _LOOK_SECONDS
    assert not observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS, lease_token="next", lease_renewal=0)


def test_a_query_without_a_lease_has_none_that_is_dead(observer: Observer) -> None:
    assert not observer.see_for(2 * _LEASE_SECONDS, lease_token=None, lease_renewal=None)


def test_an_outage_begins_the_observation_anew(observer: Observer) -> None:
    observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS)
    observer.now += 2 * _LEASE_SECONDS
    assert not observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS)
    observer.now += _LOOK_SECONDS
    assert observer.see()


def test_a_read_that_fails_begins_the_observation_anew(observer: Observer) -> None:
    observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS)
    observer.fail_to_read()
    observer.now += _LOOK_SECONDS
    assert not observer.see_for(_LEASE_SECONDS - _LOOK_SECONDS)


def test_after_an_outage_holders_have_the_time_of_their_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder of a short lease may wait for its next try for longer than its lease."""
    observer = Observer(monkeypatch, lease_seconds=3.0)
    observer.fail_to_read()
    assert not observer.see_for(ASKED_AGAIN_SECONDS - _LOOK_SECONDS)
    observer.now += _LOOK_SECONDS
    assert observer.see()


def test_the_time_that_an_answer_takes_does_not_count(observer: Observer) -> None:
    assert not observer.see(answer_seconds=3.0)
    assert not observer.see_for(_LEASE_SECONDS - 2.0)
    # It was read before the lease's length was over.
    assert not observer.see(answer_seconds=3.0)
    assert observer.see()


def test_each_query_is_observed_by_itself(observer: Observer) -> None:
    monitor = LeaseMonitor(4.0)
    early, late = (make_state(**_HELD | {"query_id": name}) for name in ("early", "late"))
    assert monitor.observe([early], observer.now) == set()
    observer.now += 2.0
    assert monitor.observe([early, late], observer.now) == set()
    observer.now += 2.0
    assert monitor.observe([early, late], observer.now) == {"early"}
