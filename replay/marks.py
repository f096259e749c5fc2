"""Which offsets of a range are meant, a bit each: a plan's own list of records, small enough to stand in its row."""

import base64
import zlib
from typing import Self

from replay.log import OffsetRange


class Marks:
    """Offsets of one range."""

    def __init__(self, start: int, bits: bytearray) -> None:
        self._start = start
        self._bits = bits

    @classmethod
    def of(cls, within: OffsetRange) -> Self:
        """None yet."""
        return cls(within.start, bytearray((within.end - within.start + 7) // 8))

    def add(self, offset: int) -> None:
        """Mark an offset of the range."""
        place = offset - self._start
        self._bits[place // 8] |= 1 << place % 8

    def holds(self, offset: int) -> bool:
        """Whether it is marked."""
        place = offset - self._start
        return 0 <= place < 8 * len(self._bits) and bool(self._bits[place // 8] & 1 << place % 8)

    def dump(self) -> str:
        """As text; `load` reads it."""
        return base64.b64encode(zlib.compress(bytes(self._bits))).decode()

    @classmethod
    def load(cls, within: OffsetRange, text: str) -> Self:
        """What `dump` has written for that range."""
        return cls(within.start, bytearray(zlib.decompress(base64.b64decode(text))))
