"""The content of two results: the same or not, whatever bytes they were written as.

Two threads and a version string are enough to change a file's bytes, and the order of rows, and the last digits of a
sum of floats. The content is the schema, the number of rows, and the rows as a multiset, floats rounded to 12
significant digits: the sum of a digest of each row, so that neither the order nor the batches matter and a row that is
there twice counts twice.

Rounding alone would tell apart two floats that differ in the 16th digit and stand on both sides of a rounding boundary,
which one in some thousand noisy values does. So the sum is kept in parts, by the digest's last bits; where only few
parts differ, their rows are read once more, and floats nearer to each other than a tenth of the 12th digit's unit count
as one value.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from itertools import chain

from producers.replay.cells import WriteFloat
from producers.replay.rows import Chunk, Rows

# Significant digits of a float, one before the point.
_DIGITS = 12
_ROUNDED = f".{_DIGITS - 1}e"
# Of a billion different rows two have one digest with a chance of 2**-69.
_DIGEST_BYTES = 16
# Some megabytes of sums for a result. Of a result without noise one changed row shows in two parts.
_PARTS = 65_536
# Above an eighth of all parts more than boundaries is different.
_MOST_PARTS = _PARTS // 8
# What is kept of each result for the second look. Ten of them would fit into a small machine.
_MOST_BYTES = 64 * 1024 * 1024


class Difference(StrEnum):
    """What differs between two queries, or their results."""

    STATUS = "status"
    ERROR_CODE = "error code"
    FORMAT = "output format"
    SCHEMA = "schema"
    ROWS = "row count"
    VALUES = "values"
    # Of the query itself: a saved query was edited in between. It is told beside another difference only.
    SQL = "sql"
    # An object is not what its event says.
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Content:
    """What a result holds. `sums` are the digests of its rows, added up in the parts that have any."""

    columns: tuple[tuple[str, str], ...]
    row_count: int
    sums: Mapping[int, int] = field(repr=False)

    @property
    def checksum(self) -> str:
        """Of all rows in whatever order, in hex; floats rounded to 12 significant digits."""
        return f"{sum(self.sums.values()) % 2 ** (8 * _DIGEST_BYTES):032x}"


def read_content(rows: Rows) -> Content:
    """The content of a result, read in chunks; raises `ValueError` where the file is broken."""
    sums: dict[int, int] = defaultdict(int)
    count = 0
    for chunk in rows.read():
        texts = chunk.write(round_float)
        count += len(texts)
        for text in texts:
            digest = _digest(text)
            sums[digest % _PARTS] += digest
    return Content(rows.columns, count, dict(sums))


def find_differences(original: Rows, new: Rows) -> tuple[Difference, ...]:
    """What differs in the content of two results: schema, row count, values; empty if they are the same.

    Values are not compared where the schema or the number of rows differs. Raises `ValueError` where a file is broken.
    """
    before, after = read_content(original), read_content(new)
    found = []
    if before.columns != after.columns:
        found.append(Difference.SCHEMA)
    if before.row_count != after.row_count:
        found.append(Difference.ROWS)
    if found or before.sums == after.sums:
        return tuple(found)
    return () if original.has_floats and _agree_at_boundaries(original, before, new, after) else (Difference.VALUES,)


def round_float(value: float) -> str:
    """A float with 12 significant digits. Both zeros are one, and so is whatever is not a number."""
    return format(value, _ROUNDED) if value else "0"


def _digest(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=_DIGEST_BYTES).digest(), "little")


def _agree_at_boundaries(original: Rows, before: Content, new: Rows, after: Content) -> bool:
    """Whether rows differ only by floats on the two sides of a rounding boundary; False if there are too many."""
    parts = frozenset(part for part, _ in before.sums.items() ^ after.sums.items())
    if len(parts) > _MOST_PARTS:
        return False
    ours, theirs = _keep(original, parts), _keep(new, parts)
    if ours is None or theirs is None:
        return False
    merge = merge_neighbours(_list_floats(chain(ours, theirs)))
    return _add_up(ours, merge) == _add_up(theirs, merge)


def _keep(rows: Rows, parts: frozenset[int]) -> list[Chunk] | None:
    """The rows of some parts; None if they are too large to be kept."""
    kept: list[Chunk] = []
    size = 0
    for chunk in rows.read():
        texts = chunk.write(round_float)
        places = [place for place, text in enumerate(texts) if _digest(text) % _PARTS in parts]
        if places:
            kept.append(chunk.take(places))
            size += kept[-1].size
        if size > _MOST_BYTES:
            return None
    return kept


def _list_floats(chunks: Iterable[Chunk]) -> set[float]:
    found: set[float] = set()

    def note(value: float) -> str:
        found.add(value)
        return ""

    for chunk in chunks:
        chunk.write(note)
    return found


def merge_neighbours(floats: Iterable[float]) -> WriteFloat:
    """Writes each of the `floats` so that neighbours look alike: those that round to the same 12 digits, and those that
    are nearer to each other than a tenth of the last digit's unit."""
    written: dict[float, str] = {}
    previous, head = math.nan, ""
    for value in sorted(value for value in set(floats) if math.isfinite(value)):
        if not (
            value - previous <= _nearness(max(abs(value), abs(previous))) or round_float(value) == round_float(previous)
        ):
            head = repr(value)
        written[value] = head
        previous = value
    return lambda value: written[value] if math.isfinite(value) else round_float(value)


def _nearness(value: float) -> float:
    """A tenth of the unit of the last digit that counts."""
    exponent = int(format(value, _ROUNDED).partition("e")[2])
    return float(10.0 ** (exponent - _DIGITS))


def _add_up(chunks: Iterable[Chunk], write_float: WriteFloat) -> int:
    return sum(_digest(text) for chunk in chunks for text in chunk.write(write_float))
