"""Which offset may be committed when work finishes out of order.

Only the records still unfinished are remembered, not the finished ones: the position to commit is the first unfinished
record, or one past the last received when there is none. That holds across the holes that compaction and transaction
markers leave, and costs nothing for a million finished records behind one long query.
"""

from collections import OrderedDict


class PartitionOffsets:
    """The offsets of one partition during one assignment."""

    def __init__(self) -> None:
        # An OrderedDict, as a plain dict walks over everything deleted in front to find its first key.
        self._unfinished: OrderedDict[int, int] = OrderedDict()
        self._unfinished_bytes = 0
        self._after_last: int | None = None
        self._first: int | None = None
        self._taken: int | None = None

    def receive(self, offset: int, size: int) -> None:
        """A record was polled; `size` in bytes counts towards the window until it is finished."""
        if self._taken is None:
            # Below the first record there is nothing of ours to commit.
            self._first = self._taken = offset
        self._unfinished[offset] = size
        self._unfinished_bytes += size
        self._after_last = offset + 1

    def finish(self, offset: int) -> None:
        """A record's effect is durable. Finishing twice changes nothing."""
        self._unfinished_bytes -= self._unfinished.pop(offset, 0)

    def is_over(self, offset: int, start: int | None) -> bool:
        """True when the record at `offset` is finished, or will not come any more: it lies below what was received, or
        below `start`, where reading began; None is the earliest record, whichever that is."""
        reached = self._after_last if self._after_last is not None else start
        return reached is not None and offset < reached and offset not in self._unfinished

    @property
    def unfinished(self) -> tuple[int, int]:
        """How many received records are not finished, and their bytes."""
        return len(self._unfinished), self._unfinished_bytes

    def position(self) -> int | None:
        """The offset to commit: everything received below it is finished. None before the first record."""
        return next(iter(self._unfinished), self._after_last)

    def take_commit(self) -> int | None:
        """The position, if it has moved forward since it was last taken: a commit never moves back."""
        position = self.position()
        if position is None or self._taken is None or position <= self._taken:
            return None
        self._taken = position
        return position

    def retake(self) -> None:
        """What was taken did not reach the broker: the next `take_commit` gives the position again."""
        self._taken = self._first
