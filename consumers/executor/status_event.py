"""Build the event that each status transition of a query writes to the outbox."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from psycopg.types.json import Jsonb

from db.data.outbox import NewEvent
from db.data.runs import RunState
from queryd.codec import encode
from queryd.events import Mode, OrgId, OutputFormat, QueryId, QueryStatusChanged, Status
from queryd.headers import build_status_headers, continue_trace
from telemetry.traces import find_current


@dataclass(frozen=True, slots=True)
class QueryFacts:
    """Fields that are the same in every event of a query."""

    query_id: QueryId
    org_id: OrgId
    mode: Mode
    sql_hash: str
    traceparent: str
    user_id: str | None = None
    task_id: str | None = None
    saved_query_id: str | None = None
    output_format: OutputFormat | None = None

    @classmethod
    def from_state(cls, state: RunState) -> Self:
        """The facts of a query as it was admitted."""
        return cls(
            query_id=QueryId(state.query_id),
            org_id=OrgId(state.org_id),
            mode=Mode(state.mode),
            sql_hash=state.sql_hash,
            traceparent=state.traceparent,
            user_id=state.user_id,
            task_id=state.task_id,
            saved_query_id=state.saved_query_id,
            output_format=None if state.output_format is None else OutputFormat(state.output_format),
        )


def build_status_event(
    facts: QueryFacts,
    *,
    sequence: int,
    previous: Status | None,
    status: Status,
    attempt: int,
    now: datetime,
    **details: Any,
) -> NewEvent:
    """Build event number `sequence`; `details` are further fields of `QueryStatusChanged`. Raises `EventTooLarge`."""
    event = QueryStatusChanged(
        query_id=facts.query_id,
        sequence=sequence,
        previous_status=previous,
        status=status,
        attempt=attempt,
        org_id=facts.org_id,
        user_id=facts.user_id,
        task_id=facts.task_id,
        saved_query_id=facts.saved_query_id,
        mode=facts.mode,
        sql_hash=facts.sql_hash,
        output_format=facts.output_format,
        occurred_at=now,
        **details,
    )
    # The span that makes the event, where one is recorded.
    headers = build_status_headers(event, find_current(facts.traceparent) or continue_trace(facts.traceparent))
    return NewEvent(
        query_id=facts.query_id,
        sequence=sequence,
        event_id=event.event_id,
        type=QueryStatusChanged.__name__,
        payload=encode(event),
        headers=Jsonb(headers),
    )
