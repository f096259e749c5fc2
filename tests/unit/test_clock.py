"""A clock that is set is found out by our own, which nobody sets; a slow answer is no jump."""

import pytest

from db.clock import DatabaseClock, JumpDetector, elapsed

_HOUR = 3600.0


def _watch(*readings: tuple[float, float, float]) -> list[float | None]:
    detector = JumpDetector()
    return [detector.observe(*reading) for reading in readings]


@pytest.mark.parametrize("jump", [_HOUR, -_HOUR, 30.0, -30.0])
def test_a_jump_is_found_and_measured(jump: float) -> None:
    first, second = _watch((1000.0, 10.0, 10.01), (1005.0 + jump, 15.0, 15.01))
    assert first is None
    assert second == pytest.approx(jump, abs=0.1)


def test_until_it_is_corrected_a_jump_changes_nothing() -> None:
    detector = JumpDetector()
    now = elapsed()
    assert detector.observe(1000.0, now, now) is None
    assert detector.observe(4600.0, now, now) is not None
    told = detector.now()
    assert told is not None
    assert 1000.0 <= told < 1060.0


def test_after_a_jump_what_is_true_again_is_no_jump() -> None:
    assert _watch((1000.0, 10.0, 10.0), (4605.0, 15.0, 15.0), (1006.0, 16.0, 16.0))[2] is None


def test_what_is_adopted_is_believed() -> None:
    detector = JumpDetector()
    now = elapsed()
    detector.observe(1000.0, now, now)
    detector.adopt(4600.0, now, now)
    told = detector.now()
    assert told is not None
    assert 4600.0 <= told < 4660.0
    assert detector.observe(4605.0, now + 5, now + 5) is None


@pytest.mark.parametrize("taken_at", [15.0, 25.0, 35.0])
def test_an_answer_that_took_twenty_seconds_is_no_jump(taken_at: float) -> None:
    slow = (990.0 + taken_at, 15.0, 35.0)
    assert _watch((1000.0, 10.0, 10.01), slow, (1030.0, 40.0, 40.01)) == [None] * 3


def test_a_slow_answer_does_not_hide_the_jump_after_it() -> None:
    found = _watch((1000.0, 10.0, 10.01), (1015.0, 15.0, 35.0), (1030.0 + 10.0, 40.0, 40.01))
    assert found[:2] == [None, None]
    assert found[2] == pytest.approx(10.0, abs=0.1)


def test_clocks_that_drift_apart_slowly_have_not_jumped() -> None:
    # NTP slews by at most 500 µs a second.
    readings = [(1000.0 + at * 1.0005, float(at), float(at) + 0.01) for at in range(0, 100_000, 5)]
    assert set(_watch(*readings)) == {None}


def test_a_step_of_a_second_harms_nobody() -> None:
    assert _watch((1000.0, 10.0, 10.01), (1006.0, 15.0, 15.01), (1007.0, 16.0, 16.01)) == [None] * 3


def test_between_answers_the_time_goes_on() -> None:
    clock = DatabaseClock()
    first = clock.now()
    began = elapsed()
    while elapsed() - began < 0.01:
        pass
    assert 0.009 <= (clock.now() - first).total_seconds() < 5.0
