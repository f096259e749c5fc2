"""The names that replay still imports from here; `queryd/kafka/bounded_reader.py` has the code."""

import time

from queryd.kafka.bounded_reader import SILENCE_SECONDS, EndNotReached, read_ends, read_starts

__all__ = ["SILENCE_SECONDS", "EndNotReached", "Silence", "read_ends", "read_starts"]


class Silence:
    """How long nothing has been heard."""

    def __init__(self) -> None:
        self._heard = time.monotonic()

    def end(self) -> None:
        """Something is heard."""
        self._heard = time.monotonic()

    def lasts(self) -> bool:
        """True when it has lasted for too long."""
        return time.monotonic() - self._heard > SILENCE_SECONDS
