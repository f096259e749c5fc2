"""Admission: records become rows, and each record gets a verdict on what to do with it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from access.limits import OrgLimits, read_limits
from consumers.executor.endings import Failure
from consumers.executor.query import Query
from consumers.executor.status_event import QueryFacts, build_status_event
from db.clock import DatabaseClock
from db.connection import Connection, DataPool, statement
from db.data.admission import NewQuery, SavedLookup, insert_queries, resolve_saved
from db.data.limits import find_surplus
from db.data.outbox import NewEvent
from db.data.runs import RunState, read_states
from processes.failpoints import Failpoint, failpoint
from queryd.codec import InvalidEvent, Undecodable, decode_fields, to_request
from queryd.dead_letters import DeadCode
from queryd.events import (
    ErrorCode,
    Invalid,
    Mode,
    OrgId,
    QueryId,
    QueryRequested,
    Status,
    parse_uuid,
)
from queryd.headers import continue_trace, find_traceparent
from queryd.identity import fingerprint_request, hash_sql
from queryd.kafka.record import Record
from telemetry.metrics import METRICS
from telemetry.traces import begin_trace, within

if TYPE_CHECKING:
    from telemetry.recording import OtlpSpan


@dataclass(frozen=True, slots=True)
class Rules:
    """What admission needs of the settings. Times in seconds."""

    queue_seconds: dict[Mode, float]
    engines: frozenset[str]
    hash_key: str | None = field(repr=False)
    # Of an org that has none of its own.
    limits: OrgLimits = field(default_factory=OrgLimits)


@dataclass(frozen=True, slots=True)
class Refused:
    """The record is a dead letter."""

    code: DeadCode
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is left to do for the record."""


Verdict = Refused | Done | Query

_OVER_QUOTA = Failure(ErrorCode.QUOTA_EXCEEDED, "the org has as many queries waiting as its limit allows")


@dataclass(frozen=True, slots=True)
class Legible:
    """A record whose ids can be read. `request` is None when it is invalid, and `reason` says why."""

    record: Record
    query_id: QueryId
    org_id: OrgId
    mode: Mode
    fields: dict[str, Any] = field(repr=False)
    fingerprint: bytes
    traceparent: str
    request: QueryRequested | None
    reason: str | None


def read_record(record: Record, mode: Mode, rules: Rules) -> Legible | Refused:
    """Decode one record of a lane."""
    try:
        fields = decode_fields(record.value, QueryRequested.__name__)
        query_id = QueryId(parse_uuid(fields["query_id"], "query_id"))
        org_id = OrgId(parse_uuid(fields["org_id"], "org_id"))
    except (Undecodable, Invalid) as error:
        return Refused(DeadCode.UNDECODABLE, str(error))
    request, reason = None, None
    try:
        request = _judge(fields, mode, rules)
    except InvalidEvent as error:
        reason = str(error)
    return Legible(
        record=record,
        query_id=query_id,
        org_id=org_id,
        mode=mode,
        fields=fields,
        fingerprint=fingerprint_request(fields, rules.hash_key),
        traceparent=find_traceparent(record.headers) or begin_trace() or continue_trace(None),
        request=request,
        reason=reason,
    )


def _judge(fields: dict[str, Any], mode: Mode, rules: Rules) -> QueryRequested:
    request = to_request(fields)
    if request.mode is not mode:
        raise InvalidEvent(f"mode must be {mode.value}, as the topic's", fields)
    if request.engine is not None and request.engine not in rules.engines:
        raise InvalidEvent(f"engine must be one of {', '.join(sorted(rules.engines))}", fields)
    return request


async def admit(
    pool: DataPool,
    clock: DatabaseClock,
    rules: Rules,
    batch: Sequence[Legible],
    traced: Sequence["OtlpSpan"] = (),
) -> list[Verdict]:
    """Admit a batch; raises `DatabaseUnavailable`, and psycopg's errors of data for one bad row.

    Safe to repeat: a known id changes nothing, and the verdict is read from what then stands. `traced` has a span for
    each of the batch, or none.
    """
    failpoint(Failpoint.ADMIT_BEFORE)
    lookups = [lookup for place, item in enumerate(batch) if (lookup := _look_up(place, item)) is not None]
    async with statement(pool) as connection:
        limits = await read_limits(connection, {item.org_id for item in batch}, rules.limits)
        async with _open_transaction_for_locks(connection, lookups, limits):
            texts = await resolve_saved(connection, lookups)
            failures = await _find_failures(connection, batch, texts, limits)
            candidates = []
            for place, item in enumerate(batch):
                with within(traced, place):
                    candidates.append(_make_candidate(item, texts.get(place), failures[place], clock.now(), rules))
            # If two records in a batch have the same id, the first one creates the query.
            first = {candidate.query.query_id: candidate for candidate in reversed(candidates)}
            inserted = await insert_queries(
                connection,
                [candidate.query for candidate in first.values()],
                [event for candidate in first.values() for event in candidate.events],
            )
        known = first.keys() - inserted.keys()
        states = inserted | (await read_states(connection, known) if known else {})
    failpoint(Failpoint.ADMIT_AFTER)
    if states:
        clock.update(max(state.read_at for state in states.values()))
    for query_id, state in inserted.items():
        query = first[query_id].query
        if query.error_code is not None:
            waited = (state.read_at - state.queued_at).total_seconds()
            METRICS.end_query(query.mode, query.error_code, total_seconds=max(0.0, waited))
    return [
        _decide(
            candidate,
            states.get(candidate.query.query_id),
            limits[candidate.item.org_id],
        )
        for candidate in candidates
    ]


@asynccontextmanager
async def _open_transaction_for_locks(
    connection: Connection, lookups: Sequence[SavedLookup], limits: Mapping[str, OrgLimits]
) -> AsyncIterator[None]:
    """Open a transaction if admission takes locks that must last until its rows are committed."""
    if not lookups and all(each.queued_queries is None for each in limits.values()):
        yield
        return
    async with connection.transaction():
        yield


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A query as it would be admitted now, if it is new."""

    item: Legible
    query: NewQuery
    events: list[NewEvent]
    sql: str | None = field(repr=False)


def _look_up(place: int, item: Legible) -> SavedLookup | None:
    request = item.request
    if request is None or request.saved_query_id is None:
        return None
    return SavedLookup(place, request.saved_query_id, request.org_id, request.user_id, request.roles)


def _make_candidate(
    item: Legible, saved_text: str | None, failure: Failure | None, now: datetime, rules: Rules
) -> _Candidate:
    request = item.request
    sql = _choose_sql(item, saved_text)
    facts = QueryFacts(
        query_id=item.query_id,
        org_id=item.org_id,
        mode=item.mode,
        sql_hash=hash_sql(sql or "", rules.hash_key),
        traceparent=item.traceparent,
    )
    if request is not None:
        facts = replace(
            facts,
            user_id=request.user_id,
            task_id=request.task_id,
            # A saved query that the caller can't see is the same as none, in the row as well.
            saved_query_id=request.saved_query_id if saved_text is not None else None,
            output_format=request.output_format,
        )
    events = [build_status_event(facts, sequence=1, previous=None, status=Status.QUEUED, attempt=0, now=now)]
    if failure is not None:
        events.append(
            build_status_event(
                facts,
                sequence=2,
                previous=Status.QUEUED,
                status=Status.FAILED,
                attempt=0,
                now=now,
                error_code=failure.code,
                error_message=failure.message,
            )
        )
    record = item.record
    query = NewQuery(
        query_id=item.query_id,
        org_id=item.org_id,
        user_id=facts.user_id,
        mode=item.mode.value,
        status=Status.QUEUED.value if failure is None else Status.FAILED.value,
        sql_hash=facts.sql_hash,
        saved_query_id=facts.saved_query_id,
        task_id=facts.task_id,
        output_format=None if facts.output_format is None else facts.output_format.value,
        error_code=None if failure is None else failure.code.value,
        error_message=None if failure is None else failure.message,
        fingerprint=item.fingerprint,
        topic=record.topic,
        partition=record.partition,
        record_offset=record.offset,
        traceparent=item.traceparent,
        sequence=len(events),
        appended_at=_appended_at(record),
        queue_seconds=rules.queue_seconds[item.mode],
        last_event=events[-1].payload,
    )
    return _Candidate(item, query, events, sql)


def _choose_sql(item: Legible, saved_text: str | None) -> str | None:
    request = item.request
    if request is not None and request.saved_query_id is not None:
        return saved_text
    sql: str | None = item.fields["sql"]
    return sql


async def _find_failures(
    connection: Connection, batch: Sequence[Legible], texts: dict[int, str], limits: dict[str, OrgLimits]
) -> list[Failure | None]:
    """Why each of the batch's queries can never run, if it is new."""
    failures = [_find_failure(item, _choose_sql(item, texts.get(place))) for place, item in enumerate(batch)]
    # Of two records with one id the first is the query's own.
    first: dict[str, tuple[Legible, Failure | None]] = {}
    for item, failure in zip(batch, failures, strict=True):
        first.setdefault(item.query_id, (item, failure))
    waiting = [item for item, failure in first.values() if failure is None]
    most: dict[str, int] = {
        item.org_id: queued for item in waiting if (queued := limits[item.org_id].queued_queries) is not None
    }
    if not most:
        return failures
    wanted = [(item.query_id, item.org_id) for item in waiting if item.org_id in most]
    surplus = await find_surplus(connection, wanted, most)
    return [
        _OVER_QUOTA if failure is None and item.query_id in surplus else failure
        for item, failure in zip(batch, failures, strict=True)
    ]


def _find_failure(item: Legible, sql: str | None) -> Failure | None:
    if item.request is None:
        return Failure(ErrorCode.INVALID_REQUEST, item.reason or "")
    if sql is None:
        return Failure(ErrorCode.SAVED_QUERY_NOT_FOUND, "the saved query does not exist")
    return None


def _appended_at(record: Record) -> float | None:
    """The broker's own time of the append; a producer may put what it likes into CreateTime."""
    return record.timestamp_ms / 1000 if record.appended_by_broker and record.timestamp_ms is not None else None


def _is_own(query: NewQuery, state: RunState) -> bool:
    """True when the query that stands there was admitted from this very record."""
    coordinates = (query.topic, query.partition, query.record_offset)
    return coordinates == (state.topic, state.partition, state.record_offset)


def _decide(candidate: _Candidate, state: RunState | None, limits: OrgLimits) -> Verdict:
    item, record = candidate.item, candidate.item.record
    if item.request is None:
        # Every malformed record is a dead letter of its own, whatever stands under its id.
        return Refused(DeadCode.INVALID_REQUEST, item.reason or "")
    if state is None:
        # The query was deleted for good: `deleted_ids` keeps its id from being inserted again.
        return Done()
    if state.fingerprint != item.fingerprint:
        return Refused(DeadCode.CONFLICT, "another request with this query_id was accepted before")
    if not _is_own(candidate.query, state) or Status(state.status).terminal:
        return Done()
    # What runs must be what was admitted: a saved query edited since then is another text.
    sql = candidate.sql if candidate.query.sql_hash == state.sql_hash else None
    # Its events must also describe the admitted query, even if the saved query has changed since.
    facts = QueryFacts.from_state(state)
    return Query(record=record, request=item.request, facts=facts, state=state, limits=limits, sql=sql)
