"""The table of `make bench`: a miss is never shown as a success."""

import json

import pytest

from bench import __main__ as command
from bench.plots import find_score
from bench.rows import Bound, Row, Verdict, compare_medians, find_failures, percentile, to_table


def _row(bound: Bound, reached: float | None, floor: float | None = None) -> Row:
    return Row("name", "what", "peer", bound, 4.0, "×", reached, floor, {"why": "no redis-server"})


@pytest.mark.parametrize(
    ("bound", "floor", "reached", "verdict"),
    [
        (Bound.AT_LEAST, 2.5, 4.0, Verdict.HOLDS),
        (Bound.AT_LEAST, 2.5, 3.99, Verdict.ABOVE_FLOOR),
        (Bound.AT_LEAST, 2.5, 2.49, Verdict.MISSED),
        (Bound.AT_LEAST, None, 3.99, Verdict.MISSED),
        (Bound.AT_MOST, 9.0, 4.0, Verdict.HOLDS),
        (Bound.AT_MOST, 9.0, 9.0, Verdict.ABOVE_FLOOR),
        (Bound.AT_MOST, 9.0, 9.1, Verdict.MISSED),
        (Bound.AT_MOST, None, 4.1, Verdict.MISSED),
        (Bound.AT_MOST, 9.0, None, Verdict.NOT_MEASURED),
    ],
)
def test_a_figure_holds_only_on_its_side_of_the_target(
    bound: Bound, floor: float | None, reached: float | None, verdict: Verdict
) -> None:
    row = _row(bound, reached, floor)
    assert row.verdict is verdict
    assert find_failures([row]) == ([] if verdict is Verdict.HOLDS else ["name"])


def test_ratios_are_of_medians_so_that_one_slow_run_decides_nothing() -> None:
    assert compare_medians([300.0, 310.0, 1.0], [100.0, 100.0, 1000.0]) == 3.0


def test_percentiles_stay_inside_what_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert percentile(values, 50) == 50.5
    assert 99.0 <= percentile(values, 99) <= 100.0
    assert percentile([7.0], 99) == 7.0


def test_the_table_names_what_was_not_measured_and_why() -> None:
    lines = to_table([_row(Bound.AT_LEAST, 4.2, 2.5), _row(Bound.AT_LEAST, None)]).splitlines()
    assert lines[0].split() == ["row", "what", "against", "to", "reach", "reached", "holds?"]
    assert "≥ 4× (floor 2.5)" in lines[2] and lines[2].split()[-2:] == ["4.2×", "yes"]
    assert "no redis-server" in lines[3] and lines[3].endswith("not measured")


@pytest.mark.parametrize(
    ("bound", "reached", "score"),
    [
        (Bound.AT_LEAST, 4.0, 1.0),
        (Bound.AT_LEAST, 2.0, 0.5),
        (Bound.AT_MOST, 8.0, 0.5),
        (Bound.AT_MOST, 1.0, 2.0),
        (Bound.AT_MOST, -50.0, 2.0),
        (Bound.AT_MOST, None, None),
    ],
)
def test_a_plot_shows_more_where_more_was_reached(bound: Bound, reached: float | None, score: float | None) -> None:
    assert find_score(_row(bound, reached)) == score


def test_a_row_that_fails_is_named_and_does_not_lose_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_world: object) -> list[Row]:
        raise TimeoutError("waited 900 s for 1000 terminal events")

    monkeypatch.setattr(command, "MEASURES", {"lost": fail, "good": lambda _world: [_row(Bound.AT_LEAST, 5.0)]})
    assert command.main(["--json"]) == 1
    printed = capsys.readouterr()
    assert [row["verdict"] for row in json.loads(printed.out)] == ["not measured", "yes"]
    assert printed.err.endswith("missed: lost\n")
