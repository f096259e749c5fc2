"""Status events into the state database: `query_status`, and the platform's `tasks`.

The offsets are stored with the rows, in one transaction, and reading starts from them. An event that comes twice has a
sequence that was seen, so that a second projector, or a reset, changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from queryd.status_records import StatusRecord, Unreadable, read_status
from queryd.topics import TopicIdentity
from telemetry.events import LogEvent
from telemetry.metrics import METRICS
from telemetry.traces import SpanName, spans
from telemetry.traces import Step as TraceStep

_log = structlog.get_logger("queryd.projector")


@dataclass(frozen=True, slots=True)
class Step:
    """One record, understood: a newer status of a query, or its deletion."""

    query_id: str
    row: QueryStatusRow | None


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
            unreadable=_tell_unreadable,
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
            steps = [_to_step(each) for each in batch if each.record.offset >= held.get(each.record.partition, 0)]
            # First, for what follows a deletion is a new query under the old id, whose sequence begins again.
            if gone := [step.query_id for step in steps if step.row is None]:
                await delete_statuses(connection, gone)
            rows = [step.row for step in _keep_newest(steps).values() if step.row is not None]
            await upsert_statuses(connection, rows)
            await move_tasks(connection, rows)
            await write_offsets(connection, topic.cluster_id, topic.topic_id, dict(offsets))
        failpoint(Failpoint.PROJECT_AFTER)


def _to_trace(batch: Sequence[StatusRecord]) -> Iterator[TraceStep]:
    """Each event's projection continues the span that made it."""
    for status in batch:
        if (traceparent := find_traceparent(status.record.headers)) is not None:
            yield traceparent, {}


def read_step(record: Record) -> Step | None:
    """What a record says. One that can't be read was not written by our relay: it is told of and passed over."""
    try:
        return _to_step(read_status(record))
    except Unreadable as error:
        _tell_unreadable(record, str(error))
        return None


def _to_step(status: StatusRecord) -> Step:
    return Step(status.query_id, None if status.event is None else to_row(status.event))


def _tell_unreadable(record: Record, reason: str) -> None:
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


def _keep_newest(steps: Sequence[Step]) -> dict[str, Step]:
    """One step a query: its highest sequence, or its deletion, or what followed that."""
    newest: dict[str, Step] = {}
    for step in steps:
        known = newest.get(step.query_id)
        if known is None or step.row is None or known.row is None or step.row.sequence > known.row.sequence:
            newest[step.query_id] = step
    return newest
