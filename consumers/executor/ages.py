"""How long ago the broker took a record: the broker's stamp, judged so that no single clock decides.

A stamp is compared with the median of three clocks: the database's, this worker's, and the broker's own as its newest
stamps show it. One of them may be wrong by an hour, and no record is an hour older or younger for it.
"""

import statistics
import time

from db.clock import DatabaseClock
from queryd.subscription import Record


class RecordAges:
    """Ages of the records that one process receives."""

    def __init__(self, clock: DatabaseClock) -> None:
        self._clock = clock
        # The broker's time less our monotonic time is this at least: a record was stamped before it was polled.
        self._broker_ahead: float | None = None

    def age_at_poll(self, record: Record) -> float:
        """Seconds from the broker's append to the poll; 0 where the broker does not stamp.

        Only the broker's own stamp decides anything; a producer may put what it likes into CreateTime.
        """
        if not record.appended_by_broker or record.timestamp_ms is None:
            return 0.0
        appended = record.timestamp_ms / 1000
        ahead = appended - record.polled_at
        self._broker_ahead = ahead if self._broker_ahead is None else max(self._broker_ahead, ahead)
        since_poll = time.monotonic() - record.polled_at
        clocks = (
            self._clock.now().timestamp() - since_poll,
            time.time() - since_poll,
            self._broker_ahead + record.polled_at,
        )
        return max(0.0, statistics.median(clocks) - appended)
