"""What a comparison tells people and machines."""

import json

from replay.comparison import Comparison, Judged, Verdict
from replay.result_difference import Difference


def _succeeded(number: int, original_ms: int | None, new_ms: int | None) -> Judged:
    name = str(number)
    return Judged(name, f"{name}'", Verdict.SAME, (), "Succeeded", "Succeeded", original_ms, new_ms)


_DIFFERENT = Judged(
    "a", "b", Verdict.DIFFERENT, (Difference.STATUS, Difference.SQL), "Succeeded", "QUERY_TIMEOUT", 10, 60_000
)


def test_people_read_what_is_not_the_same_and_a_summary() -> None:
    comparison = Comparison(
        (
            _succeeded(1, 10, 20),
            _DIFFERENT,
            _succeeded(2, 30, 40),
            Judged("c", "d", Verdict.GONE, original_outcome="Succeeded", new_outcome="Succeeded"),
            Judged("e", "f", Verdict.UNFINISHED, original_outcome="Succeeded"),
        )
    )
    assert comparison.to_text().splitlines() == [
        "different  a → b: status, sql (Succeeded → QUERY_TIMEOUT)",
        "gone       c → d",
        "unfinished e → f (Succeeded → nothing)",
        "5 queries compared: 2 same, 1 different, 1 gone, 1 unfinished",
        "durations of the 2 that succeeded both times: in all 40 → 60 ms (×1.50); median 20 → 30 ms (×1.50); "
        "95th percentile 30 → 40 ms (×1.33)",
    ]
    assert not comparison.all_same


def test_a_long_list_is_cut_for_people_and_whole_for_machines() -> None:
    comparison = Comparison((_DIFFERENT,) * 70)
    lines = comparison.to_text().splitlines()
    assert lines[50] == "different  … and 20 more"
    assert len(lines) == 52
    assert len(comparison.to_json()["queries"]) == 70


def test_machines_read_everything() -> None:
    told = json.loads(json.dumps(Comparison((_succeeded(1, 10, 5), _DIFFERENT)).to_json()))
    assert told["counts"] == {"same": 1, "different": 1, "gone": 0, "unfinished": 0}
    assert told["durations"] == {
        "count": 1,
        "original": {"total_ms": 10, "median_ms": 10, "p95_ms": 10},
        "new": {"total_ms": 5, "median_ms": 5, "p95_ms": 5},
        "ratio": 0.5,
    }
    assert told["queries"][1] == {
        "original": "a",
        "new": "b",
        "verdict": "different",
        "differences": ["status", "sql"],
        "original_outcome": "Succeeded",
        "new_outcome": "QUERY_TIMEOUT",
        "original_ms": 10,
        "new_ms": 60_000,
    }


def test_of_no_query_at_all_it_is_not_said_that_all_are_the_same() -> None:
    assert Comparison((_succeeded(1, 10, 20),)).all_same
    assert not Comparison(()).all_same


def test_the_95th_percentile_is_a_duration_that_some_query_has_had() -> None:
    before, after = Comparison(tuple(_succeeded(number, number, 2 * number) for number in range(1, 101))).durations
    assert (before.median_ms, before.p95_ms) == (50.5, 95)
    assert (after.median_ms, after.p95_ms) == (101, 190)


def test_nothing_measured_is_no_ratio() -> None:
    nothing = Comparison((_succeeded(1, None, 5),))
    assert nothing.to_json()["durations"]["ratio"] is None
    assert nothing.to_text() == "1 queries compared: 1 same, 0 different, 0 gone, 0 unfinished"
    assert (
        Comparison((_succeeded(1, 0, 5),))
        .to_text()
        .endswith("in all 0 → 5 ms; median 0 → 5 ms; 95th percentile 0 → 5 ms")
    )
