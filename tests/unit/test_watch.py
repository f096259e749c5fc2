"""What leaves the watch: queries that are over, and those that may be claimed."""

from dataclasses import replace
from typing import Any

import pytest

from consumers.executor.admission import Admitted
from consumers.executor.watch import Watch
from db.clock import elapsed
from db.data.runs import RunState
from tests.unit.samples import ORG_ID, make_admitted, make_state

_HELD: dict[str, Any] = {"status": "Running", "attempt": 1, "lease_token": "token", "lease_renewal": 7}
_FREE: dict[str, Any] = {"lease_token": None, "lease_renewal": None}


@pytest.fixture
def watch() -> Watch:
    """Its leases live longer than a test."""
    return Watch(600.0)


def _parked(watch: Watch) -> Admitted:
    query = make_admitted(**_HELD)
    watch.park(query)
    return query


def _state(query: Admitted, **changes: object) -> dict[str, RunState]:
    query_id = query.facts.query_id
    return {query_id: make_state(query_id=query_id, org_id=ORG_ID, **_HELD | changes)}


def _observe(watch: Watch, states: dict[str, RunState]) -> tuple[list[Admitted], list[Admitted]]:
    """The answer to a question for everything that is parked."""
    return watch.observe([query.facts.query_id for query in watch.queries], states, elapsed())


def test_a_query_that_another_attempt_holds_is_left_alone(watch: Watch) -> None:
    query = _parked(watch)
    for _ in range(3):
        assert _observe(watch, _state(query)) == ([], [])
    assert watch.queries == [query]


def test_a_query_with_a_dead_lease_may_be_taken_over_as_it_is_now() -> None:
    watch = Watch(0.0)
    query = _parked(watch)
    assert _observe(watch, _state(query)) == ([], [])
    states = _state(query, attempt=3, crashes=2)
    assert _observe(watch, states) == (
        [],
        [replace(query, state=states[query.facts.query_id], stale_lease_version=7)],
    )
    assert watch.queries == []


def test_a_query_that_was_handed_back_may_be_taken_at_once(watch: Watch) -> None:
    query = _parked(watch)
    _, takeable = _observe(watch, _state(query, **_FREE))
    assert [(taken.facts, taken.stale_lease_version) for taken in takeable] == [(query.facts, None)]


@pytest.mark.parametrize("status", ["Succeeded", "Failed"])
def test_a_terminal_query_leaves_the_watch_as_finished(watch: Watch, status: str) -> None:
    query = _parked(watch)
    assert _observe(watch, _state(query, status=status)) == ([query], [])
    assert watch.queries == []


def test_a_query_that_is_gone_leaves_the_watch_as_finished(watch: Watch) -> None:
    query = _parked(watch)
    assert _observe(watch, {}) == ([query], [])


def test_what_has_waited_for_too_long_is_left_to_the_reaper(watch: Watch) -> None:
    query = _parked(watch)
    assert _observe(watch, _state(query, **_FREE, status="Queued", attempt=0, late=True)) == ([], [])
    assert watch.queries == [query]


def test_a_query_that_was_started_once_may_be_taken_past_its_deadline(watch: Watch) -> None:
    query = _parked(watch)
    assert len(_observe(watch, _state(query, **_FREE, late=True))[1]) == 1


def test_a_dropped_query_is_nobodys(watch: Watch) -> None:
    query, other = _parked(watch), _parked(watch)
    watch.drop(query.facts.query_id)
    watch.drop("never parked")
    assert watch.queries == [other]
    assert _observe(watch, {}) == ([other], [])


def test_a_second_record_of_one_id_replaces_the_first(watch: Watch) -> None:
    query = _parked(watch)
    newer = replace(query)
    watch.park(newer)
    [left] = watch.queries
    assert left is newer


def test_a_query_that_was_parked_while_the_answer_was_on_its_way_stays_parked(watch: Watch) -> None:
    early = _parked(watch)
    asked = [query.facts.query_id for query in watch.queries]
    late = _parked(watch)
    assert watch.observe(asked, _state(early), elapsed()) == ([], [])
    assert watch.queries == [early, late]
