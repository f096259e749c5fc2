"""When a lease counts as dead: by the database's clock, or because it stood still for its whole length on ours."""

from dataclasses import replace
from typing import Any

import pytest

from consumers.executor import watch
from consumers.executor.admission import Admitted
from consumers.executor.watch import Watch
from db.data.runs import RunState
from db.retrying import ASKED_AGAIN_SECONDS
from tests.unit.samples import ORG_ID, make_admitted, make_state

LEASE_SECONDS = 15.0
# A third of the lease, and a moment.
RENEWED_WITHIN = 6.0
# The database has been in reach for longer than anything here lasts.
_LONG_AGO = -1e9
HELD: dict[str, Any] = {"status": "Running", "lease_token": "token", "lease_renewal": 7, "lease_alive": True}


class Clock:
    """A monotonic clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(watch, "elapsed", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _parked(vigil: Watch) -> Admitted:
    query = make_admitted(**HELD)
    vigil.park(query)
    return query


def _state(query: Admitted, **changes: object) -> dict[str, RunState]:
    query_id = query.facts.query_id
    return {query_id: make_state(query_id=query_id, org_id=ORG_ID, **HELD | changes)}


def test_a_living_lease_is_left_alone(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    for renewal in range(8, 40):
        clock.now += LEASE_SECONDS - 0.1
        assert _observe(vigil, _state(query, lease_renewal=renewal)) == ([], [])
    assert len(vigil) == 1


def test_a_lease_past_its_expiry_may_be_taken_once_a_holder_would_have_renewed_it(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    clock.now += RENEWED_WITHIN - 0.1
    assert _observe(vigil, _state(query, lease_alive=False)) == ([], [])
    clock.now += 0.1
    finished, takeable = _observe(vigil, _state(query, lease_alive=False))
    assert finished == []
    assert [(taken.facts, taken.stale_lease_version) for taken in takeable] == [(query.facts, None)]
    assert len(vigil) == 0


def test_a_lease_that_stands_still_for_its_whole_length_is_dead_whatever_the_database_says(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    clock.now += LEASE_SECONDS
    assert _observe(vigil, _state(query)) == ([], [])
    clock.now += 0.001
    _, takeable = _observe(vigil, _state(query))
    assert [taken.stale_lease_version for taken in takeable] == [7]


def test_a_renewal_starts_the_observation_anew(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    clock.now += LEASE_SECONDS - 1
    assert _observe(vigil, _state(query, lease_renewal=8)) == ([], [])
    clock.now += LEASE_SECONDS - 1
    assert _observe(vigil, _state(query, lease_renewal=8)) == ([], [])
    clock.now += 2
    _, takeable = _observe(vigil, _state(query, lease_renewal=8))
    assert [taken.stale_lease_version for taken in takeable] == [8]


def test_after_an_outage_a_holder_has_a_moment_to_renew(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    # The database is away for longer than a lease, and the holder could not renew.
    clock.now += 2 * LEASE_SECONDS
    back = clock.now
    expired = _state(query, lease_alive=False)
    assert _observe(vigil, expired, back) == ([], [])
    clock.now += ASKED_AGAIN_SECONDS - 0.1
    assert _observe(vigil, expired, back) == ([], [])
    clock.now += 0.1
    assert len(_observe(vigil, expired, back)[1]) == 1


def test_an_outage_is_no_standing_still(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    clock.now += 2 * LEASE_SECONDS
    back = clock.now
    clock.now += LEASE_SECONDS - 1
    assert _observe(vigil, _state(query), back) == ([], [])
    clock.now += 1.1
    assert len(_observe(vigil, _state(query), back)[1]) == 1


def test_after_an_outage_what_was_handed_back_may_be_taken_at_once(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    given = _state(query, lease_token=None, lease_renewal=None, lease_alive=False)
    assert len(_observe(vigil, given, clock.now)[1]) == 1


def test_what_is_taken_over_is_judged_by_what_stands_now(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    clock.now += RENEWED_WITHIN
    states = _state(query, lease_alive=False, sequence=5, attempt=3, crashes=2)
    (taken,) = _observe(vigil, states)[1]
    assert taken == replace(query, state=states[query.facts.query_id])


@pytest.mark.parametrize("status", ["Succeeded", "Failed"])
def test_a_terminal_query_leaves_the_watch_as_finished(clock: Clock, status: str) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    assert _observe(vigil, _state(query, status=status)) == ([query], [])
    assert len(vigil) == 0
    assert _observe(vigil, {}) == ([], [])


def test_a_query_that_is_gone_leaves_the_watch_as_finished(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    assert _observe(vigil, {}) == ([query], [])


def test_a_lease_that_is_renewed_is_alive_whatever_the_clock_says(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    for renewal in range(8, 40):
        clock.now += LEASE_SECONDS / 3
        assert _observe(vigil, _state(query, lease_renewal=renewal, lease_alive=False)) == ([], [])


def test_what_has_waited_for_too_long_is_left_to_the_reaper(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    waiting = {"status": "Queued", "lease_token": None, "lease_renewal": None, "lease_alive": False}
    assert _observe(vigil, _state(query, **waiting, overdue=True)) == ([], [])
    assert vigil.queries == [query]


def test_a_query_handed_back_may_be_taken_at_once(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    _, takeable = _observe(vigil, _state(query, lease_token=None, lease_renewal=None, lease_alive=False))
    assert [taken.stale_lease_version for taken in takeable] == [None]


def test_a_dropped_query_is_nobodys(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query, other = _parked(vigil), _parked(vigil)
    vigil.drop(query.facts.query_id)
    vigil.drop("never parked")
    assert vigil.queries == [other]
    assert _observe(vigil, {}) == ([other], [])


def test_a_second_record_of_one_id_replaces_the_first(clock: Clock) -> None:
    vigil = Watch(LEASE_SECONDS)
    query = _parked(vigil)
    vigil.park(query)
    assert len(vigil) == 1


def test_a_query_that_was_parked_while_the_answer_was_on_its_way_stays_parked() -> None:
    vigil = Watch(LEASE_SECONDS)
    early, late = make_admitted(**HELD), make_admitted(**HELD)
    vigil.park(early)
    asked = [query.facts.query_id for query in vigil.queries]
    vigil.park(late)
    assert vigil.observe(asked, _state(early), _LONG_AGO) == ([], [])
    assert vigil.queries == [early, late]


def _observe(
    vigil: Watch, states: dict[str, RunState], reached_since: float = _LONG_AGO
) -> tuple[list[Admitted], list[Admitted]]:
    """The answer to a question for everything that is parked."""
    return vigil.observe([query.facts.query_id for query in vigil.queries], states, reached_since)
