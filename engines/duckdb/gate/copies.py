"""What the parser writes more than once into its tree, counted in the text's own words before it does so.

`CASE x WHEN 1 … WHEN 2 …` becomes `CASE WHEN x = 1 … WHEN x = 2 …`, so that a CASE as the value of a CASE doubles with
each level: 452 bytes of that are 4 MB of tree, 750 bytes more than the memory. A named window stands once for each
OVER that names it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engines.duckdb.gate import thresholds
from engines.duckdb.gate.refusals import rejected


@dataclass(slots=True)
class _Case:
    """An open CASE: how many words its value has, and its WHENs so far. Without a value it copies nothing."""

    value: int = 0
    whens: int = 0


def check_copies(words: Iterable[str]) -> None:
    """Raises `QueryFailed` with SQL_REJECTED. `words` are the text's tokens in upper case."""
    cases: list[_Case] = []
    copied = overs = total = 0
    has_windows = False
    for word in words:
        total += 1
        match word:
            case "CASE":
                if any(not case.whens for case in cases):
                    raise rejected("a CASE stands where another CASE has its value")
                cases.append(_Case())
                continue
            case "WHEN" if cases:
                cases[-1].whens += 1
                copied += cases[-1].value
            case "END" if cases:
                cases.pop()
            case "WINDOW":
                has_windows = True
            case "OVER":
                overs += 1
        if cases and not cases[-1].whens:
            cases[-1].value += 1
    if copied > thresholds.MAX_COPIES or (has_windows and overs * total > thresholds.MAX_COPIES):
        raise rejected("the value of a CASE or a named window is too long to be written out so often")
