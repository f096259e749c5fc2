"""Stories of queries, published as the relay publishes them: keyed by the query's id."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from confluent_kafka import Producer

from queryd.codec import encode
from queryd.events import ErrorCode, Mode, OrgId, QueryId, QueryStatusChanged, Status, Topic
from tests.integration.queries import new_id
from tests.integration.records import PATIENCE_SECONDS

_START = datetime(2026, 1, 1, tzinfo=UTC)


def make_story(query_id: str | None = None, *, code: ErrorCode | None = None, **end: Any) -> list[QueryStatusChanged]:
    """The three events of a query; `end` are facts of the last one, and `org_id` of all."""
    queued = QueryStatusChanged(
        query_id=QueryId(query_id or new_id()),
        sequence=1,
        status=Status.QUEUED,
        attempt=0,
        org_id=OrgId(end.pop("org_id", None) or new_id()),
        mode=Mode.INTERACTIVE,
        sql_hash="0" * 64,
        occurred_at=_START,
    )
    running = replace(
        queued, sequence=2, previous_status=Status.QUEUED, status=Status.RUNNING, attempt=1, occurred_at=_START
    )
    ended = replace(
        running,
        sequence=3,
        previous_status=Status.RUNNING,
        status=Status.SUCCEEDED if code is None else Status.FAILED,
        occurred_at=_START + timedelta(seconds=1),
        error_code=code,
        error_message=None if code is None else "it failed",
        **end,
    )
    return [queued, running, ended]


def publish(
    kafka: dict[str, Any],
    *told: QueryStatusChanged | QueryId,
    headers: list[tuple[str, str | bytes | None]] | None = None,
) -> None:
    """Publish events, and tombstones of the ids among them, in their order."""
    producer = Producer(kafka | {"enable.idempotence": True})
    for each in told:
        event = each if isinstance(each, QueryStatusChanged) else None
        key = each.query_id if isinstance(each, QueryStatusChanged) else each
        value = None if event is None else encode(event)
        producer.produce(Topic.STATUS, key=key.encode(), value=value, headers=headers or [])
    assert producer.flush(PATIENCE_SECONDS) == 0


async def publish_async(kafka: dict[str, Any], *told: QueryStatusChanged | QueryId) -> None:
    """`publish` beside a running event loop."""
    await asyncio.to_thread(publish, kafka, *told)
