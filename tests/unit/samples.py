"""Requests, records and states as the tests of this folder need them: valid, and different only where asked."""

import dataclasses
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from hypothesis import settings

from access.limits import OrgLimits
from consumers.executor.query import Query
from consumers.executor.status_event import QueryFacts
from db.data.runs import RunState
from queryd.codec import encode
from queryd.events import Mode, OrgId, QueryId, QueryRequested, QueryStatusChanged, Status
from queryd.kafka.record import Record

# Few examples, as all unit tests together take seconds; no deadline, as the machine may be busy; no database, so that
# no run depends on the one before.
QUICK = settings(max_examples=40, deadline=None, database=None)

QUERY_ID = QueryId("0c7f3a52-6c1e-4f0a-9d3b-2f5e8a1b4c6d")
ORG_ID = OrgId("a1b2c3d4-e5f6-4a7b-8c9d-0e1f2a3b4c5d")
SAVED_ID = "5d8c1f4e-2b7a-4c3d-9e6f-7a8b9c0d1e2f"
NOW = datetime(2026, 3, 29, 1, 30, 0, 123_000, tzinfo=UTC)
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

_NO_LIMITS = OrgLimits()


def make_request(**changes: Any) -> QueryRequested:
    """A valid interactive request for plain SQL."""
    return dataclasses.replace(QueryRequested(QUERY_ID, ORG_ID, Mode.INTERACTIVE, sql="SELECT 7 AS seven"), **changes)


def make_status(**changes: Any) -> QueryStatusChanged:
    """A query's first event."""
    event = QueryStatusChanged(QUERY_ID, 1, Status.QUEUED, 0, ORG_ID, Mode.INTERACTIVE, "ab" * 32, NOW)
    return dataclasses.replace(event, **changes)


def make_record(value: bytes | None, **changes: Any) -> Record:
    """A record of the interactive lane, stamped by the broker."""
    record = Record(
        topic=Mode.INTERACTIVE.topic.value,
        partition=3,
        offset=41,
        key=QUERY_ID.encode(),
        value=value,
        headers=(),
        timestamp_ms=1_774_747_800_123,
        appended_by_broker=True,
        polled_at=time.monotonic(),
        epoch=1,
    )
    return dataclasses.replace(record, **changes)


def make_facts(**changes: Any) -> QueryFacts:
    """What stays the same in a query's story."""
    return dataclasses.replace(QueryFacts(QUERY_ID, ORG_ID, Mode.INTERACTIVE, "ab" * 32, TRACEPARENT), **changes)


def make_state(**changes: Any) -> RunState:
    """A queued query that nobody holds."""
    state = RunState(
        query_id=QUERY_ID,
        org_id=ORG_ID,
        user_id=None,
        mode=Mode.INTERACTIVE.value,
        status="Queued",
        sql_hash="ab" * 32,
        saved_query_id=None,
        task_id=None,
        output_format=None,
        fingerprint=b"\1" * 32,
        topic=Mode.INTERACTIVE.topic.value,
        partition=3,
        record_offset=41,
        traceparent=TRACEPARENT,
        sequence=1,
        attempt=0,
        crashes=0,
        token=None,
        queued_at=NOW,
        started_at=None,
        late=False,
        cancelled=False,
        lease_token=None,
        lease_renewal=None,
        read_at=NOW,
    )
    return dataclasses.replace(state, **changes)


def make_admitted(
    org: str = ORG_ID, *, limits: OrgLimits = _NO_LIMITS, stale_lease_version: int | None = None, **state: Any
) -> Query:
    """An admitted query of an org, under an id of its own."""
    query_id = QueryId(str(uuid.uuid4()))
    request = make_request(query_id=query_id, org_id=OrgId(org))
    return Query(
        record=make_record(encode(request)),
        request=request,
        facts=make_facts(query_id=query_id, org_id=OrgId(org)),
        state=make_state(query_id=query_id, org_id=org, **state),
        limits=limits,
        sql=request.sql,
        stale_lease_version=stale_lease_version,
    )
