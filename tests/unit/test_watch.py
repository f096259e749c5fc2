"""When a lease counts as dead: by the database's clock, or because it stood still for its whole length on ours."""

import time
from typing import Any

import pytest

from consumers.executor.admission import Admitted
from consumers.executor.watch import Takeable, Watch
from db.data.runs import RunState
from tests.unit.samples import ORG_ID, make_admitted, make_state

LEASE_SECONDS = 15.0
HELD: dict[str, Any] = {"status": "Running", "lease_token": "token", "lease_renewal": 7, "lease_alive": True}


class Clock:
    """A monotonic clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _parked(watch: Watch) -> Admitted:
    query = make_admitted(**HELD)
    watch.park(query)
    return query


def _state(query: Admitted, **changes: object) -> dict[str, RunState]:
    query_id = query.facts.query_id
    return {query_id: make_state(query_id=query_id, org_id=ORG_ID, **HELD | changes)}


def test_a_living_lease_is_left_alone(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    for renewal in range(8, 40):
        clock.now += LEASE_SECONDS - 0.1
        assert _observe(watch, _state(query, lease_renewal=renewal)) == ([], [])
    assert len(watch) == 1


def test_a_lease_past_its_expiry_may_be_taken(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    finished, takeable = _observe(watch, _state(query, lease_alive=False))
    assert finished == []
    assert [(taken.query.facts, taken.still_renewal) for taken in takeable] == [(query.facts, None)]
    assert len(watch) == 0


def test_a_lease_that_stands_still_for_its_whole_length_is_dead_whatever_the_database_says(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    clock.now += LEASE_SECONDS
    assert _observe(watch, _state(query)) == ([], [])
    clock.now += 0.001
    _, takeable = _observe(watch, _state(query))
    assert [taken.still_renewal for taken in takeable] == [7]


def test_a_renewal_starts_the_observation_anew(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    clock.now += LEASE_SECONDS - 1
    assert _observe(watch, _state(query, lease_renewal=8)) == ([], [])
    clock.now += LEASE_SECONDS - 1
    assert _observe(watch, _state(query, lease_renewal=8)) == ([], [])
    clock.now += 2
    _, takeable = _observe(watch, _state(query, lease_renewal=8))
    assert [taken.still_renewal for taken in takeable] == [8]


def test_what_is_taken_over_is_judged_by_what_stands_now(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    states = _state(query, lease_alive=False, sequence=5, attempt=3, crashes=2)
    (taken,) = _observe(watch, states)[1]
    assert taken == Takeable(taken.query, None)
    assert taken.query.state == states[query.facts.query_id]
    assert taken.query.record == query.record


@pytest.mark.parametrize("status", ["Succeeded", "Failed"])
def test_a_terminal_query_leaves_the_watch_as_finished(clock: Clock, status: str) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    assert _observe(watch, _state(query, status=status)) == ([query], [])
    assert len(watch) == 0
    assert _observe(watch, {}) == ([], [])


def test_a_query_that_is_gone_leaves_the_watch_as_finished(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    assert _observe(watch, {}) == ([query], [])


def test_a_query_handed_back_may_be_taken_at_once(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    _, takeable = _observe(watch, _state(query, lease_token=None, lease_renewal=None, lease_alive=False))
    assert [taken.still_renewal for taken in takeable] == [None]


def test_a_dropped_query_is_nobodys(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query, other = _parked(watch), _parked(watch)
    watch.drop(query.facts.query_id)
    watch.drop("never parked")
    assert watch.queries == [other]
    assert _observe(watch, {}) == ([other], [])


def test_a_second_record_of_one_id_replaces_the_first(clock: Clock) -> None:
    watch = Watch(LEASE_SECONDS)
    query = _parked(watch)
    watch.park(query)
    assert len(watch) == 1


def test_a_query_that_was_parked_while_the_answer_was_on_its_way_stays_parked() -> None:
    watch = Watch(LEASE_SECONDS)
    early, late = make_admitted(**HELD), make_admitted(**HELD)
    watch.park(early)
    asked = [query.facts.query_id for query in watch.queries]
    watch.park(late)
    assert watch.observe(asked, _state(early)) == ([], [])
    assert watch.queries == [early, late]


def _observe(watch: Watch, states: dict[str, RunState]) -> tuple[list[Admitted], list[Takeable]]:
    """The answer to a question for everything that is parked."""
    return watch.observe([query.facts.query_id for query in watch.queries], states)
