"""Canaries: texts that stand in SQL, parameters and malformed records, and must come out nowhere.

All of a run's canaries begin alike, so that one pass over a file finds whichever is there, and what was cut off too.
"""

import mmap
from collections.abc import Collection, Iterable
from itertools import takewhile
from pathlib import Path

# With fewer characters in common an innocent text could be taken for a piece of a canary.
_LEAST_COMMON = 6


class Canaries:
    """The canaries of one run; raises ValueError when they don't begin alike."""

    def __init__(self, canaries: Iterable[str]) -> None:
        self._known = {canary.encode(): canary for canary in canaries}
        self.prefix = _common_beginning(self._known.values())
        if self._known and len(self.prefix) < _LEAST_COMMON:
            raise ValueError(f"the canaries of a run must begin with the same {_LEAST_COMMON} characters at least")
        # The longest first: a canary may be the beginning of another.
        self._lengths = sorted({len(canary) for canary in self._known}, reverse=True)

    def find(self, data: "bytes | mmap.mmap") -> set[str]:
        """Which canaries are in the data; one that was cut short is named by what they have in common."""
        found: set[str] = set()
        if not self._known:
            return found
        wanted = self.prefix.encode()
        at = data.find(wanted)
        while at >= 0:
            found.add(self._identify(data[at : at + self._lengths[0]]))
            at = data.find(wanted, at + 1)
        return found

    def find_in_file(self, path: Path) -> set[str]:
        """The same for a file of any size; raises FileNotFoundError."""
        with path.open("rb") as file:
            # Nothing can be mapped of an empty file.
            if not path.stat().st_size:
                return set()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return self.find(mapped)

    def _identify(self, piece: bytes) -> str:
        for length in self._lengths:
            if piece[:length] in self._known:
                return self._known[piece[:length]]
        return self.prefix


def _common_beginning(texts: Collection[str]) -> str:
    # What the first and the last in their order share, all in between share as well.
    pairs = zip(min(texts, default=""), max(texts, default=""), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
