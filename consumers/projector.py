"""Status events into the state database: `query_status`, and the platform's `tasks`.

The offsets are stored with the rows, in one transaction, and reading starts from them. An event that comes twice has a
sequence that was seen, so that a second projector, or a reset, changes nothing.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from confluent_kafka import OFFSET_BEGINNING

from db.connection import StatePool, transaction
from db.retrying import until_available
from db.state.query_status import (
    QueryStatusRow,
    delete_statuses,
    move_tasks,
    read_offsets,
    upsert_statuses,
    write_offsets,
)
from processes.failpoints import Failpoint, failpoint
from queryd.codec import InvalidEvent, Undecodable, decode_status
from queryd.events import Invalid, QueryStatusChanged, Topic, parse_uuid
from queryd.headers import find_traceparent
from queryd.subscription import Partition, Record, Subscription, SubscriptionLost
from queryd.topics import TopicIdentity, wait_for_topic
from telemetry.events import LogEvent
from telemetry.metrics import METRICS
from telemetry.traces import SpanName, spans
from telemetry.traces import Step as TraceStep

_log = structlog.get_logger("queryd.projector")


# A consumer that fails at once would otherwise be made anew as fast as the machine can.
_RESUBSCRIBE_SECONDS = 1.0


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
        self._pool = pool
        self._kafka = kafka
        self._group = group
        self._ready = ready
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask `run` to return after the batch under way."""
        self._stopping.set()

    async def run(self) -> None:
        """Project until `stop`; whatever goes away is waited for."""
        topic = await self._unless_stopped(wait_for_topic(self._kafka, Topic.STATUS))
        if topic is None:
            return

        async def start_offsets(partitions: list[Partition]) -> dict[Partition, int]:
            known = await until_available(lambda: self._read_offsets(topic), "postgres state")
            # What was never read from this topic of this cluster is read from its beginning, whatever the group's
            # offset says: that one is not written with our rows.
            return {partition: known.get(partition[1], OFFSET_BEGINNING) for partition in partitions}

        while not self._stopping.is_set():
            subscription = Subscription(
                self._kafka | self._group, [Topic.STATUS.value], start_offsets=start_offsets, commit=False
            )
            try:
                await self._follow(subscription, topic)
            except SubscriptionLost as error:
                _log.warning(LogEvent.SUBSCRIPTION_LOST, reason=str(error))
                await asyncio.sleep(_RESUBSCRIBE_SECONDS)

    async def _follow(self, subscription: Subscription, topic: TopicIdentity) -> None:
        await subscription.open()
        assigned = asyncio.create_task(self._announce(subscription))
        try:
            with METRICS.reading_lags(subscription.lags):
                while not self._stopping.is_set():
                    if records := await subscription.poll():
                        with spans(SpanName.PROJECT, _to_steps(records)):
                            await until_available(partial(self._project, topic, records), "postgres state")
                        METRICS.project(len(records))
                        for record in records:
                            subscription.finish(record)
        finally:
            assigned.cancel()
            await subscription.close()

    async def _announce(self, subscription: Subscription) -> None:
        await subscription.wait_assigned()
        self._ready()

    async def _unless_stopped(self, work: Coroutine[Any, Any, TopicIdentity]) -> TopicIdentity | None:
        task, stopping = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        waited: set[asyncio.Task[Any]] = {task, stopping}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        for each in waited:
            each.cancel()
        return task.result() if task.done() else None

    async def _read_offsets(self, topic: TopicIdentity) -> dict[int, int]:
        async with transaction(self._pool) as connection:
            return await read_offsets(connection, topic.cluster_id, topic.topic_id)

    async def _project(self, topic: TopicIdentity, records: Sequence[Record]) -> None:
        steps = [step for record in records if (step := read_step(record)) is not None]
        newest = _keep_newest(steps)
        rows = [step.row for step in newest.values() if step.row is not None]
        gone = [step.query_id for step in newest.values() if step.row is None]
        ends = {record.partition: record.offset + 1 for record in records}
        failpoint(Failpoint.PROJECT_BEFORE)
        async with transaction(self._pool) as connection:
            await upsert_statuses(connection, rows)
            await move_tasks(connection, rows)
            if gone:
                await delete_statuses(connection, gone)
            await write_offsets(connection, topic.cluster_id, topic.topic_id, ends)
        failpoint(Failpoint.PROJECT_AFTER)


def _to_steps(records: Sequence[Record]) -> Iterator[TraceStep]:
    """Each event's projection continues the span that made it."""
    for record in records:
        if (traceparent := find_traceparent(record.headers)) is not None:
            yield traceparent, {}


def read_step(record: Record) -> Step | None:
    """What a record says. One that can't be read was not written by our relay: it is told of and passed over."""
    try:
        if record.value is None:
            return Step(parse_uuid((record.key or b"").decode("ascii", "replace"), "the key"), None)
        event = decode_status(record.value)
    except (Undecodable, InvalidEvent, Invalid) as error:
        _log.error(LogEvent.STATUS_UNREADABLE, reason=str(error), partition=record.partition, offset=record.offset)
        return None
    return Step(event.query_id, to_row(event))


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
    """One step a query: its highest sequence, or its deletion, after which nothing of it follows."""
    newest: dict[str, Step] = {}
    for step in steps:
        known = newest.get(step.query_id)
        if known is None or step.row is None or known.row is None or step.row.sequence > known.row.sequence:
            newest[step.query_id] = step
    return newest
