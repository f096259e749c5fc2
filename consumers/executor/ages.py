"""How long a record has waited since the broker took it: the broker's stamp, judged so that no single clock decides.

A stamp is compared with five clocks: the database's and this worker's, each as it is set now and as it has gone on
steadily, and the broker's own as its newest stamps show it. The second lowest of them decides. So no record is older
for any two that are ahead, nor where database, worker and broker are one host whose clock has jumped. One that is
behind changes nothing; two may make a record younger, and its query then waits for longer than its time, never shorter.
"""

import math
import time
from collections.abc import Sequence

from db.clock import DatabaseClock, elapsed
from queryd.kafka.record import Record


class RecordAges:
    """Ages of the records that one process receives."""

    def __init__(self, clock: DatabaseClock) -> None:
        """The clock must have asked the database before records are judged: until then it goes by this worker's."""
        self._clock = clock
        # This worker's clock at its start less the monotonic one: the time as if nobody had set it since.
        self._started_ahead = time.time() - elapsed()
        # The broker's time less our monotonic time is this at least: a record was stamped before it was polled.
        self._broker_ahead = -math.inf

    def waited_seconds(self, records: Sequence[Record]) -> list[float]:
        """Seconds from the broker's append of each until now; since its poll where the broker does not stamp.

        Only the broker's own stamp decides anything; a producer may put what it likes into CreateTime.
        """
        appended = [_appended_at(record) for record in records]
        for record, stamp in zip(records, appended, strict=True):
            if stamp is not None:
                self._broker_ahead = max(self._broker_ahead, stamp - record.polled_at)
        ours = time.monotonic()
        clocks = (
            self._clock.now().timestamp(),
            self._clock.steady_now().timestamp(),
            time.time(),
            self._started_ahead + elapsed(),
            self._broker_ahead + ours,
        )
        now = sorted(clocks)[1]
        since_polls = (ours - record.polled_at for record in records)
        return [
            since_poll if stamp is None else max(since_poll, now - stamp)
            for stamp, since_poll in zip(appended, since_polls, strict=True)
        ]


def _appended_at(record: Record) -> float | None:
    """The broker's own stamp, in seconds since the epoch."""
    return record.timestamp_ms / 1000 if record.appended_by_broker and record.timestamp_ms is not None else None
