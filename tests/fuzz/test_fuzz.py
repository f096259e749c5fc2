"""The fuzz run as a test: a short one that must find nothing, and one for each check of the gate that is taken out."""

import pytest

from tests.fuzz.__main__ import LEAST_PARSED
from tests.fuzz.mutations import MUTATIONS, Mutator
from tests.fuzz.run import Counts, Run
from tests.fuzz.sabotage import SABOTAGES

_SEED = 7

# In CI the run may take a minute in all; a free core does 10,000 mutants in that time, a busy one fewer.
_MUTANTS, _SECONDS = 10_000, 45.0

# Where a check is missing the first finding comes within two thousand mutants; some are that the process hangs.
_SABOTAGED_MUTANTS, _SABOTAGED_STUCK_SECONDS = 6_000, 10.0


def _told(counts: Counts) -> list[str]:
    mutator = Mutator(_SEED)
    return [f"{what}: {mutator.make(number).sql[:300]!r}" for number, what in counts.findings]


def test_a_mutant_is_made_again_by_its_seed_and_number() -> None:
    assert [Mutator(3).make(number) for number in range(50)] == [Mutator(3).make(number) for number in range(50)]
    assert Mutator(3).make(1) != Mutator(4).make(1)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_mutants_find_no_way_through_the_gate() -> None:
    assert len(MUTATIONS) >= 10
    counts = Run(_SEED, _MUTANTS, max_seconds=_SECONDS).go()
    assert _told(counts) == []
    assert counts.parsed >= LEAST_PARSED * counts.mutants > 0
    # What is refused all the same proves little: many a mutant has to run.
    assert counts.executed > 0.05 * counts.mutants
    assert len(counts.trees) > 0.2 * counts.mutants


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", SABOTAGES)
def test_the_run_finds_the_hole_that_a_missing_check_leaves(check: str) -> None:
    run = Run(_SEED, _SABOTAGED_MUTANTS, workers=1, stuck_seconds=_SABOTAGED_STUCK_SECONDS, sabotage=check)
    findings = run.go().findings
    assert findings, "the check is missing, and nothing was found"
    assert any(sign in findings[0][1] for sign in SABOTAGES[check].finds), findings[0]
