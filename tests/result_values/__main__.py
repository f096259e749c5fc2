"""`python -m tests.result_values --cases 20000 --seed 7`: a run, its counts, and exit code 1 if it found anything."""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.result_values.case import Checker, make_case

_SHOWN = 20


def main() -> int:
    """Run the cases, print what was done and every case that found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.result_values")
    parser.add_argument("--cases", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--show", type=int, help="print the statement of the case of that number, and what it finds")
    options = parser.parse_args()
    sys.stdout.write(f"seed {options.seed}\n")
    sys.stdout.flush()
    started, found = time.monotonic(), 0
    numbers = range(options.cases) if options.show is None else [options.show]
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(Path(folder))
        for number in numbers:
            case = make_case(options.seed, number)
            if options.show is not None:
                sys.stdout.write(f"{case.sql}\n")
            findings = checker.find(case)
            found += bool(findings)
            if findings and found <= _SHOWN:
                sys.stdout.write(f"{number}: {findings[0][:600]}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{len(numbers)} cases, {time.monotonic() - started:.0f} s, {found} with findings\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
