"""One attempt at a query, top to bottom: claim, execute, audit, store, finish."""

import asyncio
import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from access.audit import PersonalRead, record_reads
from access.limits import least
from consumers.executor.endings import CANCELLED, ErrorFile, Failure, Result, Success, fail, overdue_failure, succeed
from consumers.executor.leases import Lease, Leases, Stop
from consumers.executor.query import Attempt, Query
from consumers.executor.spacing import Spacing
from consumers.executor.status_event import QueryFacts, build_status_event
from consumers.executor.transitions import EndResult, Refusal, Transitions
from db.clock import DatabaseClock
from db.connection import DatabaseUnavailable, DataPool
from db.data.attempts import Claim, Ending, HandBack
from db.data.audit import AuditRefused
from db.data.datasets import Caller, Dataset
from db.data.runs import RunState
from db.retrying import until_available
from engines.protocol import (
    Engine,
    EngineCrashed,
    EngineUnavailable,
    Execution,
    Output,
    QueryFailed,
    Read,
    Relation,
    RelationKind,
)
from processes.failpoints import Failpoint, failpoint
from queryd.events import MAX_INLINE_BYTES, Delivery, ErrorCode, Mode, ResultFile, Status
from results.formats import ERROR_CONTENT_TYPE, content_type
from results.location import ERROR_FILE, file_name, prefix
from results.store import ResultStore, StoreRefused, StoreUnavailable
from telemetry.events import LogEvent
from telemetry.metrics import METRICS
from telemetry.traces import SpanAttribute, SpanName, Step, in_span, span, spans, within

_log = structlog.get_logger("queryd.attempt")

# Three strikes: SQL that kills its process again and again is not worth a fourth.
MAX_CRASHES = 3

_MOST_ROWS = 2**62

# Under load, uploads start in groups; a result waits this long at most.
_PUTS_APART_SECONDS = 0.08

# An operator must act on these errors, so the log contains their messages.
_OPERATORS = frozenset({ErrorCode.INTERNAL, ErrorCode.ENGINE_UNAVAILABLE})

_TERMINAL = frozenset({EndResult.ENDED, EndResult.OVER})

_Done = TypeVar("_Done")


@dataclass(frozen=True, slots=True)
class AttemptRules:
    """What an attempt needs of the settings. Times in seconds."""

    worker: str
    bucket: str
    scratch: Path
    lease_seconds: float
    default_seconds: dict[Mode, float]
    longest_seconds: dict[Mode, float]
    queue_seconds: dict[Mode, float]
    retention: timedelta


class _Stopped(Exception):
    """The attempt was asked to end: its lease is lost, it was cancelled, or the worker drains."""

    def __init__(self, why: Stop) -> None:
        super().__init__(why.name)
        self.why = why


class Attempts:
    """Claims queries and runs their attempts."""

    def __init__(
        self,
        *,
        pool: DataPool,
        clock: DatabaseClock,
        transitions: Transitions,
        leases: Leases,
        engine: Engine,
        store: ResultStore,
        rules: AttemptRules,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._transitions = transitions
        self._leases = leases
        self._engine = engine
        self._results = store
        self._puts = Spacing(_PUTS_APART_SECONDS)
        self._rules = rules

    async def run(self, attempt: Attempt, executed: Callable[[], None]) -> bool:
        """Run an attempt. Returns True if the query is terminal afterwards; otherwise the caller must watch it.

        `executed` is called when the engine is free again and the result is still to be stored.
        """
        facts = attempt.query.facts
        attempt.started = time.monotonic()
        try:
            with (
                span(SpanName.ATTEMPT, facts.traceparent, **_names(attempt)),
                METRICS.running(facts.mode.value),
            ):
                return await self._run(attempt, executed)
        finally:
            self._leases.remove(attempt.lease)
            if attempt.scratch.exists():
                # Removing a large file may take long, and is another thread's.
                await asyncio.to_thread(shutil.rmtree, attempt.scratch, ignore_errors=True)

    async def _run(self, attempt: Attempt, executed: Callable[[], None]) -> bool:
        try:
            outcome = await self._execute(attempt)
            executed()
            failpoint(Failpoint.EXECUTE_AFTER)
            if attempt.reads:
                outcome = await self._unless_stopped(attempt, self._audit(attempt, outcome))
            return await self._finish(attempt, await self._store(attempt, outcome))
        except _Stopped as stopped:
            return await self._give_up(attempt, stopped.why)
        except EngineCrashed:
            _log.warning(LogEvent.ENGINE_CHILD_DIED, **_names(attempt))
            # Audit now: if this crash is the query's last, no later attempt records its reads.
            await self._audit(attempt, None)
            await self._hand_back(attempt, crashed=True)
            return False

    async def end_unclaimed(self, query: Query, failure: Failure) -> bool:
        """End a query that nobody holds; True if it is terminal then."""
        with span(SpanName.FINISH, query.facts.traceparent, **_name(query.facts, query.state.attempt)):
            ending = fail(
                query.facts,
                query.state,
                failure,
                now=self._clock.now(),
                stale_lease_version=query.stale_lease_version,
            )
            return await self._end(ending, query.facts, query.state.attempt) in _TERMINAL

    async def return_unstarted(self, attempt: Attempt) -> None:
        """Hand back an attempt that could not start soon enough."""
        # It goes on waiting in the queue, for as long as it may.
        queue_seconds = self._rules.queue_seconds[attempt.query.facts.mode]
        await self._hand_back(attempt, crashed=False, queue_seconds=queue_seconds)
        self._leases.remove(attempt.lease)

    # Claim.

    async def claim(self, queries: Sequence[Query]) -> list[Attempt | Refusal | None]:
        """Claim queries in one statement; None for one that is somebody else's, cancelled or over, to be watched."""
        now = self._clock.now()
        # One clock that is ahead makes no query older.
        earlier = min(now, datetime.now(UTC))
        leases = [Lease(query.facts.query_id, str(uuid.uuid4())) for query in queries]
        queued = [_queued_ms(query.state, earlier) for query in queries]
        wanted = []
        with spans(SpanName.CLAIM, map(_to_step, queries)) as traced:
            for place, query in enumerate(queries):
                with within(traced, place):
                    wanted.append(self._to_claim(query, leases[place].token, now, queued[place]))
            answers = await self._transitions.claim(wanted)
        claimed: list[Attempt | Refusal | None] = []
        for query, lease, queued_ms, answer in zip(queries, leases, queued, answers, strict=True):
            if answer is None or isinstance(answer, Refusal):
                claimed.append(answer)
                continue
            self._leases.add(lease)
            METRICS.start_attempt(query.facts.mode.value, None if query.state.attempt else queued_ms / 1000)
            attempt = self._build_attempt(query, lease, queued_ms, answer)
            _log.debug(LogEvent.QUERY_STARTED, **_names(attempt))
            claimed.append(attempt)
        # After the log, by which the fault suite counts the attempts that died.
        failpoint(Failpoint.CLAIM_AFTER)
        return claimed

    def _build_attempt(self, query: Query, lease: Lease, queued_ms: int, datasets: tuple[Dataset, ...]) -> Attempt:
        before = query.state
        state = replace(before, status=Status.RUNNING.value, sequence=before.sequence + 1, attempt=before.attempt + 1)
        return Attempt(
            query=replace(query, state=state),
            lease=lease,
            run_seconds=self._find_seconds(query),
            queued_ms=queued_ms,
            datasets=datasets,
            scratch=self._rules.scratch / f"{query.facts.query_id}-{state.attempt}",
        )

    def _to_claim(self, query: Query, token: str, now: datetime, queued_ms: int) -> tuple[Claim, Caller]:
        state, request = query.state, query.request
        event = build_status_event(
            query.facts,
            sequence=state.sequence + 1,
            previous=Status(state.status),
            status=Status.RUNNING,
            attempt=state.attempt + 1,
            now=now,
            engine=self._engine.name,
            queued_ms=queued_ms,
        )
        claim = Claim(
            query_id=query.facts.query_id,
            org_id=query.facts.org_id,
            sequence=state.sequence,
            token=token,
            worker=self._rules.worker,
            engine=self._engine.name,
            stale_lease_version=query.stale_lease_version,
            lease_seconds=self._rules.lease_seconds,
            run_seconds=self._find_seconds(query),
            shard=event.shard,
            event_id=event.event_id,
            payload=event.payload,
            headers=event.headers,
            limited=query.limits.running_queries is not None,
        )
        return claim, Caller(request.org_id, request.user_id, request.roles)

    def _find_seconds(self, query: Query) -> float:
        """How long the query may run: what it asks for, within its lane's and its org's limit."""
        mode, limit = query.facts.mode, query.limits.timeout_seconds
        wanted = float(query.request.timeout_seconds or self._rules.default_seconds[mode])
        longest = self._rules.longest_seconds[mode]
        return min(wanted, longest) if limit is None else min(wanted, longest, float(limit))

    # Execute.

    async def _execute(self, attempt: Attempt) -> Output | Failure:
        query = attempt.query
        # Never None here: for a query without SQL text `find_failure` returns a failure, so it is not claimed.
        assert query.sql is not None
        request, granted = query.request, attempt.datasets
        most_rows = least(request.max_rows, query.limits.result_rows)
        execution = Execution(
            query_id=request.query_id,
            org_id=request.org_id,
            sql=query.sql,
            parameters=request.parameters,
            relations=tuple(_to_relation(dataset) for dataset in granted),
            denied=_denied(granted, query.facts),
            output_format=request.output_format,
            scratch=attempt.scratch,
            timeout_seconds=attempt.run_seconds,
            # The engine counts one row further.
            max_rows=None if most_rows is None else min(most_rows, _MOST_ROWS),
            max_bytes=query.limits.result_bytes,
            max_bytes_scanned=least(request.max_bytes_scanned, query.limits.bytes_scanned),
            reads=attempt.reads,
        )
        try:
            return await self._unless_stopped(attempt, self._execute_when_available(execution, attempt))
        except QueryFailed as failed:
            if failed.code in _OPERATORS:
                _log.error(LogEvent.ENGINE_FAILED, reason=failed.message, **_names(attempt))
            return Failure(failed.code, failed.message, failed.detail)
        except EngineUnavailable as unavailable:
            return Failure(ErrorCode.ENGINE_UNAVAILABLE, unavailable.outage.sentence)

    @in_span(SpanName.EXECUTE)
    async def _execute_when_available(self, execution: Execution, attempt: Attempt) -> Output:
        # An outage is not the author's error, so the query is retried until its time limit.
        return await until_available(
            partial(self._engine.execute, execution),
            _name_dependency,
            unavailable=EngineUnavailable,
            give_up_after=_seconds_left(attempt),
        )

    # Audit.

    async def _audit(self, attempt: Attempt, outcome: _Done) -> _Done | Failure:
        """Record the reads of personal data before the outcome is published, since any outcome may reveal data."""
        facts, token = attempt.query.facts, attempt.lease.token
        record = partial(
            record_reads, self._pool, facts.query_id, token, [_to_personal(read) for read in attempt.reads]
        )
        try:
            await until_available(record, "postgres data")
        except AuditRefused as refused:
            _log.error(LogEvent.AUDIT_REFUSED, reason=str(refused), **_names(attempt))
            return Failure(ErrorCode.INTERNAL, "the read of personal data could not be recorded")
        return outcome

    # Store.

    async def _store(self, attempt: Attempt, outcome: Output | Failure) -> Success | Failure:
        if isinstance(outcome, Failure):
            return outcome if outcome.detail is None else await self._store_error(attempt, outcome)
        try:
            with span(SpanName.STORE):
                result = _find_inline(attempt, outcome) or await self._put_result(attempt, outcome)
        except StoreRefused as refused:
            _log.error(LogEvent.RESULT_REFUSED, reason=str(refused), **_names(attempt))
            return Failure(ErrorCode.INTERNAL, "the result store refused the result")
        failpoint(Failpoint.STORE_AFTER)
        return Success(
            result=result,
            columns=outcome.columns,
            bytes_scanned=outcome.bytes_scanned,
            duration_ms=_elapsed_ms(attempt),
            queued_ms=attempt.queued_ms,
            engine=self._engine.name,
            retention=self._rules.retention,
        )

    async def _put_result(self, attempt: Attempt, output: Output) -> Result:
        output_format = attempt.query.request.output_format
        media_type = content_type(output_format)
        file = await self._put(attempt, output.content, file_name(output_format), media_type, output.rows)
        return Result.stored(self._location(attempt), file)

    async def _store_error(self, attempt: Attempt, failure: Failure) -> Failure:
        """The failure with its detail stored for the author; without, where that is not to be had in time."""
        detail = json.dumps({"code": failure.code, "message": failure.message, "detail": failure.detail}).encode()
        try:
            file = await self._put(
                attempt, detail, ERROR_FILE, ERROR_CONTENT_TYPE, 0, give_up_after=_seconds_left(attempt)
            )
        except (StoreRefused, StoreUnavailable) as error:
            _log.warning(LogEvent.ERROR_DETAIL_LOST, reason=type(error).__name__, **_names(attempt))
            return failure
        return replace(failure, error_file=ErrorFile(self._location(attempt), file, self._rules.retention))

    async def _put(
        self,
        attempt: Attempt,
        content: bytes | Path,
        name: str,
        media_type: str,
        rows: int,
        *,
        give_up_after: float | None = None,
    ) -> ResultFile:
        """Put an object under the attempt's own prefix; raises `StoreRefused`, and `StoreUnavailable` at the end of
        `give_up_after` seconds."""
        await self._puts.wait()
        store = partial(self._results.put, _prefix(attempt) + name, content, media_type)
        storing = until_available(store, "s3", unavailable=StoreUnavailable, give_up_after=give_up_after)
        stored = await self._unless_stopped(attempt, storing)
        return ResultFile(stored.key, stored.bytes, rows, stored.etag, stored.sha256)

    def _location(self, attempt: Attempt) -> str:
        return f"s3://{self._rules.bucket}/{_prefix(attempt)}"

    # Finish.

    @in_span(SpanName.FINISH)
    async def _finish(self, attempt: Attempt, outcome: Success | Failure) -> bool:
        facts, state, token = attempt.query.facts, attempt.query.state, attempt.lease.token
        attempt.lease.ending = True
        failpoint(Failpoint.FINISH_BEFORE)
        now = self._clock.now()
        if isinstance(outcome, Success):
            result = await self._end(succeed(facts, state, outcome, now=now, token=token), facts, attempt.number)
            if result is not EndResult.CANCELLED:
                return result in _TERMINAL
            # The cancel locked the row first. Its query has no result, and the sweep takes the object away.
            outcome = CANCELLED
        ending = fail(
            facts,
            state,
            outcome,
            now=now,
            token=token,
            duration_ms=_elapsed_ms(attempt),
            engine=self._engine.name,
        )
        return await self._end(ending, facts, attempt.number) in _TERMINAL

    async def _end(self, ending: Ending, facts: QueryFacts, attempt: int) -> EndResult:
        result = await self._transitions.end(ending)
        failpoint(Failpoint.FINISH_AFTER)
        if result is EndResult.ENDED:
            _log.info(
                LogEvent.QUERY_FINISHED,
                query_id=facts.query_id,
                org_id=facts.org_id,
                attempt=attempt,
                status=ending.status,
                error_code=ending.error_code,
                duration_ms=ending.duration_ms,
            )
        elif ending.token is not None and result is not EndResult.CANCELLED:
            _log.warning(LogEvent.LEASE_LOST, **_name(facts, attempt))
        return result

    # Giving up.

    async def _unless_stopped(self, attempt: Attempt, work: Awaitable[_Done]) -> _Done:
        """The work's answer, or `_Stopped` when the lease says so first; the work is then cancelled and awaited.

        A worker that drains has handed the query back by then: ending the work may take longer than it has left, and
        a lease that ran out instead would count as a crash.
        """
        task = asyncio.ensure_future(work)
        waited: set[asyncio.Future[Any]] = {task, attempt.lease.stopped}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            why = attempt.lease.stopped.result()
            if why is Stop.DRAINING:
                await self._hand_back(attempt, crashed=False)
            raise _Stopped(why)
        finally:
            # Where it has answered already, both do nothing.
            task.cancel()
            # Whatever the work still runs into, its attempt has ended for another reason.
            with contextlib.suppress(
                asyncio.CancelledError,
                QueryFailed,
                EngineCrashed,
                EngineUnavailable,
                StoreRefused,
                StoreUnavailable,
                DatabaseUnavailable,
            ):
                await task

    async def _give_up(self, attempt: Attempt, why: Stop) -> bool:
        match why:
            case Stop.CANCELLED:
                return await self._finish(attempt, await self._audit(attempt, CANCELLED))
            case Stop.DRAINING:
                return False
            case Stop.LOST:
                _log.warning(LogEvent.LEASE_LOST, **_names(attempt))
                return False

    async def _hand_back(self, attempt: Attempt, *, crashed: bool, queue_seconds: float | None = None) -> None:
        attempt.lease.ending = True
        failpoint(Failpoint.HAND_BACK_BEFORE)
        await self._transitions.hand_back(
            HandBack(attempt.query.facts.query_id, attempt.lease.token, crashed, queue_seconds)
        )
        if not crashed:
            _log.info(LogEvent.QUERY_HANDED_BACK, **_names(attempt))


def find_failure(query: Query) -> Failure | None:
    """Why a query that nobody holds must end instead of being claimed."""
    state = query.state
    left_behind = query.stale_lease_version is not None
    if state.cancelled:
        return CANCELLED
    if state.overdue:
        return overdue_failure(Status(state.status))
    if query.sql is None:
        return Failure(ErrorCode.SAVED_QUERY_NOT_FOUND, "the saved query has changed since it was admitted")
    if state.crashes + left_behind >= MAX_CRASHES:
        return Failure(ErrorCode.ENGINE_CRASHED, f"the query's process died {MAX_CRASHES} times")
    return None


def _find_inline(attempt: Attempt, output: Output) -> Result | None:
    """The result for its event, if that was requested and it is small enough; else it becomes an object.

    Nobody sits and waits for a batch, so one trip to the store less is nothing to it.
    """
    request, content = attempt.query.request, output.content
    if request.delivery is not Delivery.INLINE_IF_SMALL or request.mode is not Mode.INTERACTIVE:
        return None
    if isinstance(content, Path) or len(content) > MAX_INLINE_BYTES:
        return None
    return Result.in_event(content, output.rows)


def _prefix(attempt: Attempt) -> str:
    facts = attempt.query.facts
    return prefix(facts.org_id, facts.query_id, attempt.number, attempt.lease.token)


def _denied(granted: Sequence[Dataset], facts: QueryFacts) -> frozenset[str]:
    """Who reads personal data must be somebody."""
    if facts.user_id is not None or facts.task_id is not None:
        return frozenset()
    return frozenset(dataset.name for dataset in granted if dataset.pii_columns)


def _name_dependency(error: Exception) -> str:
    return error.outage.dependency if isinstance(error, EngineUnavailable) else "engine"


def _to_personal(read: Read) -> PersonalRead:
    return PersonalRead(read.relation, read.columns)


def _seconds_left(attempt: Attempt) -> float:
    return attempt.started + attempt.run_seconds - time.monotonic()


def _to_relation(dataset: Dataset) -> Relation:
    return Relation(
        name=dataset.name,
        kind=RelationKind(dataset.kind),
        location=dataset.location,
        version=f"{dataset.id}:{dataset.version}",
        pii_columns=frozenset(dataset.pii_columns),
        registered=dataset.registered,
    )


def _to_step(query: Query) -> Step:
    facts = query.facts
    return facts.traceparent, {SpanAttribute.QUERY_ID: facts.query_id, SpanAttribute.ORG_ID: facts.org_id}


def _names(attempt: Attempt) -> dict[str, str | int]:
    return _name(attempt.query.facts, attempt.number)


def _name(facts: QueryFacts, attempt: int) -> dict[str, str | int]:
    return {"query_id": facts.query_id, "org_id": facts.org_id, "attempt": attempt}


def _elapsed_ms(attempt: Attempt) -> int:
    return round((time.monotonic() - attempt.started) * 1000)


def _queued_ms(state: RunState, now: datetime) -> int:
    """From the broker's append to the start of the first attempt, which is now unless there was one before."""
    return max(0, ((state.started_at or now) - state.queued_at) // timedelta(milliseconds=1))
