"""A result has the SQL's values, in every format and for every reader, or the query is refused."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.result_values.case import Checker, make_case
from tests.result_values.sabotage import SABOTAGES

# In CI the run may take a minute; a free core does 1,500 cases in that time, a busy one fewer.
_CASES, _SECONDS = 1_500, 50.0
_LEAST_CASES = 50

# Where something is broken, the first finding comes within some hundred cases: one of a hundred has 250 columns.
_SEED, _SABOTAGED_CASES = 7, 1_200


def test_a_case_is_made_again_by_its_seed_and_number() -> None:
    first, again, other = ([make_case(seed, number).sql for number in range(50)] for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_value_of_every_type_is_exact_for_every_reader_or_refused(tmp_path: Path) -> None:
    seed = int(os.environ.get("QUERYD_TEST_SEED") or random.SystemRandom().randrange(2**32))
    again = f"seed {seed}: python -m tests.result_values --seed {seed} --show "
    print(again)
    checker, started = Checker(tmp_path), time.monotonic()
    for number in range(_CASES):
        assert checker.find(make_case(seed, number)) == [], f"{again}{number}"
        if number >= _LEAST_CASES and time.monotonic() - started > _SECONDS:
            break
    checker.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", SABOTAGES)
def test_the_cases_find_a_fault_of_the_writer_or_the_reader(fault: str, tmp_path: Path) -> None:
    sabotage, checker = SABOTAGES[fault], Checker(tmp_path)
    with sabotage.commit():
        found = any(
            checker.find(make_case(_SEED, number), [sabotage.output_format]) for number in range(_SABOTAGED_CASES)
        )
    checker.close()
    assert found
