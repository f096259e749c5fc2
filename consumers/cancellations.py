"""Cancel requests from Kafka into Postgres, where admission, claim, renewal and finish look at them.

Runs beside every executor, all in one group, so that any of them may be away.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import structlog

from consumers.dead_letters import DeadLetter, DeadLetters
from db.connection import DataPool, statement
from db.data.cancellations import CancelOutcome, NewCancellation, cancel
from db.retrying import until_available
from processes.failpoints import Failpoint, failpoint
from queryd.codec import InvalidEvent, Undecodable, decode_cancel
from queryd.dead_letters import DeadCode
from queryd.events import Invalid, Topic
from queryd.kafka.consumer import Subscription, SubscriptionLost
from queryd.kafka.consumer_loop import ConsumerLoop
from queryd.kafka.record import Record
from telemetry.events import LogEvent
from telemetry.metrics import METRICS

_log = structlog.get_logger("queryd.cancellations")


class Cancellations:
    """The consumer of `query.cancellations`. `run` returns once it has been asked to stop."""

    def __init__(self, pool: DataPool, subscription_config: dict[str, Any], dead_letters: DeadLetters) -> None:
        self._pool = pool
        self._dead_letters = dead_letters
        subscribe = partial(Subscription, subscription_config, [Topic.CANCELLATIONS.value])
        self._loop = ConsumerLoop(subscribe, self._cancel, on_lost=_report_lost)

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._loop.stop()

    async def run(self) -> None:
        """Follow the topic until `stop`; raises what no retry can mend, such as a dead letter that can't be written."""
        with METRICS.reading_lags(self._loop.lags):
            await self._loop.run()

    async def _cancel(self, records: list[Record]) -> list[Record]:
        wanted: list[NewCancellation] = []
        letters: list[DeadLetter] = []
        for record in records:
            match _read(record):
                case DeadLetter() as letter:
                    letters.append(letter)
                case NewCancellation() as cancellation:
                    wanted.append(cancellation)
        failpoint(Failpoint.CANCEL_BEFORE)
        if wanted:
            outcomes = await until_available(partial(self._write, wanted), "postgres data")
            for (query_id, org_id), outcome in outcomes.items():
                METRICS.cancel(outcome.value)
                _log.info(LogEvent.CANCEL_REQUESTED, query_id=query_id, org_id=org_id, outcome=outcome.value)
        failpoint(Failpoint.CANCEL_AFTER)
        await self._dead_letters.write(letters)
        return records

    async def _write(self, wanted: Sequence[NewCancellation]) -> dict[tuple[str, str], CancelOutcome]:
        async with statement(self._pool) as connection:
            return await cancel(connection, wanted)


def _report_lost(error: SubscriptionLost) -> None:
    _log.warning(LogEvent.SUBSCRIPTION_LOST, reason=str(error))


def _read(record: Record) -> NewCancellation | DeadLetter:
    try:
        asked = decode_cancel(record.value)
    except Undecodable as error:
        return DeadLetter(record, DeadCode.UNDECODABLE, str(error))
    except (InvalidEvent, Invalid) as error:
        return DeadLetter(record, DeadCode.INVALID_REQUEST, str(error))
    # The reason is for people; what can't be stored of it (NUL) is none.
    reason = None if asked.reason is None else asked.reason.replace("\0", "")
    return NewCancellation(asked.query_id, asked.org_id, asked.user_id, reason)
