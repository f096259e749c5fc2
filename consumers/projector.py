"""Status events into the state database: `query_status`, and the platform's `tasks`.

The offsets are stored with the rows, in one transaction, and reading starts from them. An event that comes twice has a
sequence that was seen, so that a second projector, or a reset, changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from db.connection import StatePool, transaction
from db.retrying import until_available
from db.state.query_status import (
    QueryStatusRow,
    delete_statuses,
    hold_offsets,
    move_tasks,
    read_offsets,
    upsert_statuses,
    write_offsets,
)
from processes.failpoints import Failpoint, failpoint
from queryd import projector as projecting
from queryd.events import QueryStatusChanged
from queryd.headers import find_traceparent
from queryd.kafka.consumer import SubscriptionLost
from queryd.kafka.record import Record
from queryd.status_records import StatusRecord
from queryd.topics import TopicIdentity
from telemetry.events import LogEvent
from telemetry.metrics import METRICS
from telemetry.traces import SpanName, spans
from telemetry.traces import Step as TraceStep

_log = structlog.get_logger("queryd.projector")


class Changes:
    """What records change: each query's row as of its highest sequence, and the deleted queries.

    Apply the deletions first: an event after a deletion belongs to a new query with the same id, whose sequence begins
    again.
    """

    def __init__(self) -> None:
        self.rows: dict[str, QueryStatusRow] = {}
        self.gone: set[str] = set()

    def add(self, statuses: Iterable[StatusRecord]) -> None:
        """Add what follows."""
        for status in statuses:
            if status.event is None:
                self.gone.add(status.query_id)
                self.rows.pop(status.query_id, None)
                continue
            known = self.rows.get(status.query_id)
            if known is None or status.event.sequence > known.sequence:
                self.rows[status.query_id] = to_row(status.event)


class Projector:
    """One projector process. `run` returns once it has been asked to stop."""

    def __init__(
        self, pool: StatePool, kafka: dict[str, Any], group: dict[str, Any], ready: Callable[[], None]
    ) -> None:
        self._projector = projecting.Projector(
            kafka | group,
            group["group.id"],
            StateStore(pool),
            ready=ready,
            unreadable=report_unreadable,
            lost=_tell_lost,
        )

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._projector.stop()

    async def run(self) -> None:
        """Project until `stop`; whatever goes away is waited for."""
        with METRICS.reading_lags(self._projector.lags):
            await self._projector.run()


class StateStore:
    """The state database as a projector's store. While it is away it is waited for."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool

    async def read_offsets(self, topic: TopicIdentity) -> dict[int, int]:
        """The next offset to read of each partition that was read before."""
        return await until_available(partial(self._read_offsets, topic), "postgres state")

    async def apply(self, topic: TopicIdentity, batch: Sequence[StatusRecord], offsets: Mapping[int, int]) -> None:
        """Write the newest status of each query, its task's, and the offsets."""
        with spans(SpanName.PROJECT, _to_trace(batch)):
            await until_available(partial(self._project, topic, batch, offsets), "postgres state")
        METRICS.project(len(batch))

    async def _read_offsets(self, topic: TopicIdentity) -> dict[int, int]:
        async with transaction(self._pool) as connection:
            return await read_offsets(connection, topic.cluster_id, topic.topic_id)

    async def _project(self, topic: TopicIdentity, batch: Sequence[StatusRecord], offsets: Mapping[int, int]) -> None:
        failpoint(Failpoint.PROJECT_BEFORE)
        async with transaction(self._pool) as connection:
            held = await hold_offsets(connection, topic.cluster_id, topic.topic_id, offsets.keys())
            # A member that was stopped and wakes may hold what another has projected since: behind a deletion it would
            # bring the query back.
            changes = Changes()
            changes.add(each for each in batch if each.record.offset >= held.get(each.record.partition, 0))
            if changes.gone:
                await delete_statuses(connection, sorted(changes.gone))
            rows = list(changes.rows.values())
            await upsert_statuses(connection, rows)
            await move_tasks(connection, rows)
            await write_offsets(connection, topic.cluster_id, topic.topic_id, dict(offsets))
        failpoint(Failpoint.PROJECT_AFTER)


def _to_trace(batch: Sequence[StatusRecord]) -> Iterator[TraceStep]:
    """Each event's projection continues the span that made it."""
    for status in batch:
        if (traceparent := find_traceparent(status.record.headers)) is not None:
            yield traceparent, {}


def report_unreadable(record: Record, reason: str) -> None:
    """Log a record that no relay of ours wrote; it is skipped."""
    _log.error(LogEvent.STATUS_UNREADABLE, reason=reason, partition=record.partition, offset=record.offset)


def _tell_lost(error: SubscriptionLost) -> None:
    _log.warning(LogEvent.SUBSCRIPTION_LOST, reason=str(error))


def to_row(event: QueryStatusChanged) -> QueryStatusRow:
    """The state database's row of an event."""
    return QueryStatusRow(
        query_id=event.query_id,
        org_id=event.org_id,
        user_id=event.user_id,
        task_id=event.task_id,
        mode=event.mode.value,
        status=event.status.value,
        sequence=event.sequence,
        attempt=event.attempt,
        row_count=event.row_count,
        bytes=event.bytes,
        error_code=None if event.error_code is None else event.error_code.value,
        error_message=event.error_message,
        output_location=event.output_location,
        occurred_at=event.occurred_at,
    )
