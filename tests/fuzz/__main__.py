"""`python -m tests.fuzz --mutants 100000 --seed 7`: a run, its counts, and exit code 1 if it found anything."""

import argparse
import random
import sys

from tests.fuzz.mutations import MUTATIONS, Mutator
from tests.fuzz.run import Run

# Below this the run looks at the parser's errors more than at the gate.
LEAST_PARSED = 0.4


def main() -> int:
    """Run, print what was done and every mutant that found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", type=int, help="print the mutant of that number and do nothing else")
    options = parser.parse_args()
    mutator = Mutator(options.seed)
    if options.show is not None:
        sys.stdout.write(f"{mutator.make(options.show).sql}\n")
        return 0
    sys.stdout.write(f"seed {options.seed}, {len(MUTATIONS)} operators\n")
    sys.stdout.flush()
    counts = Run(options.seed, options.mutants, workers=options.workers).go()
    parsed = counts.parsed / max(1, counts.mutants)
    sys.stdout.write(
        f"{counts.mutants} mutants, {parsed:.1%} parsed, {len(counts.trees)} distinct trees, {counts.allowed} allowed,"
        f" {counts.executed} executed, {counts.faults} faults of DuckDB, {counts.seconds:.0f} s,"
        f" {len(counts.findings)} findings\n"
    )
    for number, what in counts.findings:
        sys.stdout.write(f"{number}: {what}\n    {mutator.make(number).sql[:2_000]!r}\n")
    return 1 if counts.findings or parsed < LEAST_PARSED else 0


if __name__ == "__main__":
    sys.exit(main())
