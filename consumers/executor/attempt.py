"""One attempt at a query, top to bottom: claim, authorize, execute, audit, store, finish."""

import asyncio
import contextlib
import errno
import json
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from access.audit import PersonalRead, record_reads
from access.grants import authorize
from access.limits import least
from consumers.executor.admission import Admitted
from consumers.executor.endings import CANCELLED, ErrorFile, Failure, Result, Success, fail, succeed
from consumers.executor.leases import Lease, Leases, Stop
from consumers.executor.story import QueryFacts, tell
from consumers.executor.transitions import Refusal, RowRefused, Transitions
from db.clock import DatabaseClock
from db.connection import DatabaseUnavailable, DataPool
from db.data.attempts import Claim, Ending, HandBack
from db.data.audit import AuditRefused
from db.data.datasets import Dataset
from db.data.runs import RunState
from db.retrying import until_available
from engines.protocol import (
    Engine,
    EngineCrashed,
    EngineUnavailable,
    Execution,
    Outage,
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
from telemetry.traces import SpanName, in_span, span

_log = structlog.get_logger("queryd.attempt")

# Three strikes: SQL that kills its process again and again is not worth a fourth.
MAX_CRASHES = 3

_MOST_ROWS = 2**62

# An operator must act on these errors, so the log contains their messages.
_OPERATORS = frozenset({ErrorCode.INTERNAL, ErrorCode.ENGINE_UNAVAILABLE})

# A process without free file descriptors gets some again within seconds. A result that can't be read for this long is
# stored as an object, since the store may still be able to read it.
_INLINE_SECONDS = 60.0

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
    retention: timedelta


@dataclass(frozen=True, slots=True)
class Running:
    """A claimed attempt. `started` is on the monotonic clock, `sequence` that of its Running event."""

    query: Admitted
    lease: Lease
    attempt: int
    sequence: int
    started: float
    run_seconds: float
    queued_ms: int
    scratch: Path
    # The reads of personal data that the engine has reported so far.
    reads: set[Read] = field(default_factory=set)


class _Stopped(Exception):
    """The attempt was asked to end: its lease is lost, it was cancelled, or the worker drains."""

    def __init__(self, why: Stop) -> None:
        super().__init__(why.name)
        self.why = why


class Attempts:
    """Runs attempts. `run` and `end_unclaimed` answer whether the query is terminal; if not, somebody must watch it.

    `run` may also answer that nothing has happened, for its org may not run more just now: then it must wait.
    """

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
        self._rules = rules

    async def run(self, query: Admitted, still_renewal: int | None, executed: Callable[[], None]) -> bool | Refusal:
        """One attempt. `executed` is called when the engine is free again and the result is still to be stored."""
        failure = _find_failure(query.state, query.sql, still_renewal)
        if failure is not None:
            return await self.end_unclaimed(query, failure, still_renewal)
        with span(SpanName.ATTEMPT, query.facts.traceparent, **_name(query.facts, query.state.attempt + 1)):
            return await self._attempt(query, still_renewal, executed)

    async def _attempt(
        self, query: Admitted, still_renewal: int | None, executed: Callable[[], None]
    ) -> bool | Refusal:
        running = await self._claim(query, Lease(query.facts.query_id, str(uuid.uuid4())), still_renewal)
        if running is None:
            return False
        if isinstance(running, Refusal):
            return running
        failpoint(Failpoint.CLAIM_AFTER)
        with self._leases.hold(running.lease), METRICS.running(query.facts.mode.value):
            async with _removed_afterwards(running.scratch):
                try:
                    outcome = await self._execute(running)
                    executed()
                    failpoint(Failpoint.EXECUTE_AFTER)
                    if running.reads:
                        outcome = await self._unless_stopped(running, self._audit(running, outcome))
                    return await self._finish(running, await self._store(running, outcome))
                except _Stopped as stopped:
                    return await self._give_up(running, stopped.why)
                except EngineCrashed:
                    _log.warning(LogEvent.ENGINE_CHILD_DIED, **_names(running))
                    # Audit now: if this crash is the query's last, no later attempt records its reads.
                    await self._audit(running, None)
                    await self._hand_back(running, crashed=True)
                    return False

    async def end_unclaimed(self, query: Admitted, failure: Failure, still_renewal: int | None) -> bool:
        """End a query that nobody holds."""
        with span(SpanName.FINISH, query.facts.traceparent, **_name(query.facts, query.state.attempt)):
            ending = fail(query.facts, query.state, failure, now=self._clock.now(), still_renewal=still_renewal)
            return bool(await self._end(ending, query.facts))

    # Claim.

    @in_span(SpanName.CLAIM)
    async def _claim(self, query: Admitted, lease: Lease, still_renewal: int | None) -> Running | Refusal | None:
        state, mode = query.state, query.facts.mode
        run_seconds = self._find_seconds(query)
        now = self._clock.now()
        queued_ms = _queued_ms(state, self._clock.steady_now())
        event = tell(
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
            token=lease.token,
            worker=self._rules.worker,
            engine=self._engine.name,
            still_renewal=still_renewal,
            lease_seconds=self._rules.lease_seconds,
            run_seconds=run_seconds,
            shard=event.shard,
            event_id=event.event_id,
            payload=event.payload,
            headers=event.headers,
            limited=query.limits.running_queries is not None,
        )
        try:
            claimed = await self._transitions.claim(claim)
        except RowRefused:
            return None
        if isinstance(claimed, Refusal):
            return claimed
        if claimed is None or claimed.token != lease.token or Status(claimed.status).terminal:
            return None
        scratch = self._rules.scratch / f"{query.facts.query_id}-{claimed.attempt}"
        running = Running(
            query, lease, claimed.attempt, claimed.sequence, time.monotonic(), run_seconds, queued_ms, scratch
        )
        METRICS.start_attempt(mode.value, None if state.attempt else queued_ms / 1000)
        _log.debug(LogEvent.QUERY_STARTED, **_names(running))
        return running

    def _find_seconds(self, query: Admitted) -> float:
        """How long the query may run: what it asks for, within its lane's and its org's limit."""
        mode, limit = query.facts.mode, query.limits.timeout_seconds
        wanted = float(query.request.timeout_seconds or self._rules.default_seconds[mode])
        longest = self._rules.longest_seconds[mode]
        return min(wanted, longest) if limit is None else min(wanted, longest, float(limit))

    # Authorize and execute.

    async def _execute(self, running: Running) -> Output | Failure:
        query = running.query
        if query.sql is None:
            return Failure(ErrorCode.SAVED_QUERY_NOT_FOUND, "the saved query has changed since it was admitted")
        request = query.request

        @in_span(SpanName.AUTHORIZE)
        async def ask() -> tuple[Dataset, ...]:
            return await authorize(self._pool, request.org_id, request.user_id, request.roles)

        granted = await self._unless_stopped(running, until_available(ask, "postgres data"))
        most_rows = least(request.max_rows, query.limits.result_rows)
        execution = Execution(
            query_id=request.query_id,
            org_id=request.org_id,
            sql=query.sql,
            parameters=request.parameters,
            relations=tuple(_to_relation(dataset) for dataset in granted),
            denied=_denied(granted, query.facts),
            output_format=request.output_format,
            scratch=running.scratch,
            timeout_seconds=running.run_seconds,
            # The engine counts one row further.
            max_rows=None if most_rows is None else min(most_rows, _MOST_ROWS),
            max_bytes=query.limits.result_bytes,
            max_bytes_scanned=least(request.max_bytes_scanned, query.limits.bytes_scanned),
            reads=running.reads,
        )
        try:
            await self._unless_stopped(running, make_scratch(running))
            return await self._unless_stopped(running, self._execute_when_available(execution, running))
        except OSError as error:
            message = "The engine's scratch folder can't be used."
            _log.error(LogEvent.ENGINE_FAILED, reason=f"{message} ({type(error).__name__})", **_names(running))
            return Failure(ErrorCode.INTERNAL, message)
        except QueryFailed as failed:
            if failed.code in _OPERATORS:
                _log.error(LogEvent.ENGINE_FAILED, reason=failed.message, **_names(running))
            return Failure(failed.code, failed.message, failed.detail)
        except EngineUnavailable as unavailable:
            return Failure(ErrorCode.ENGINE_UNAVAILABLE, unavailable.outage.sentence)

    @in_span(SpanName.EXECUTE)
    async def _execute_when_available(self, execution: Execution, running: Running) -> Output:
        # An outage is not the author's error, so the query is retried until its time limit.
        return await until_available(
            partial(self._engine.execute, execution),
            _name_dependency,
            unavailable=EngineUnavailable,
            give_up_after=_seconds_left(running),
        )

    # Audit.

    async def _audit(self, running: Running, outcome: _Done) -> _Done | Failure:
        """Record the reads of personal data before the outcome is published, since any outcome may reveal data."""
        facts, token = running.query.facts, running.lease.token
        record = partial(
            record_reads, self._pool, facts.query_id, token, [_to_personal(read) for read in running.reads]
        )
        try:
            await until_available(record, "postgres data")
        except AuditRefused as refused:
            _log.error(LogEvent.AUDIT_REFUSED, reason=str(refused), **_names(running))
            return Failure(ErrorCode.INTERNAL, "the read of personal data could not be recorded")
        return outcome

    # Store.

    async def _store(self, running: Running, outcome: Output | Failure) -> Success | Failure:
        if isinstance(outcome, Failure):
            return outcome if outcome.detail is None else await self._store_error(running, outcome)
        try:
            with span(SpanName.STORE):
                result = await self._find_inline(running, outcome) or await self._put_result(running, outcome)
        except StoreRefused as refused:
            _log.error(LogEvent.RESULT_REFUSED, reason=str(refused), **_names(running))
            return Failure(ErrorCode.INTERNAL, "the result store refused the result")
        failpoint(Failpoint.STORE_AFTER)
        return Success(
            result=result,
            columns=outcome.columns,
            bytes_scanned=outcome.bytes_scanned,
            duration_ms=_elapsed_ms(running),
            queued_ms=running.queued_ms,
            engine=self._engine.name,
            retention=self._rules.retention,
        )

    async def _put_result(self, running: Running, output: Output) -> Result:
        output_format = running.query.request.output_format
        file = await self._put(running, output.path, file_name(output_format), content_type(output_format), output.rows)
        return Result.stored(self._location(running), file)

    async def _store_error(self, running: Running, failure: Failure) -> Failure:
        """The failure with its detail stored for the author; without, where that is not to be had in time."""
        path = running.scratch / ERROR_FILE
        try:
            path.write_text(
                json.dumps({"code": failure.code, "message": failure.message, "detail": failure.detail}),
                encoding="utf-8",
            )
            file = await self._put(
                running, path, ERROR_FILE, ERROR_CONTENT_TYPE, 0, give_up_after=_seconds_left(running)
            )
        except (OSError, StoreRefused, StoreUnavailable) as error:
            _log.warning(LogEvent.ERROR_DETAIL_LOST, reason=type(error).__name__, **_names(running))
            return failure
        return replace(failure, error_file=ErrorFile(self._location(running), file, self._rules.retention))

    async def _find_inline(self, running: Running, output: Output) -> Result | None:
        """The result as its event will carry it, where that was asked for and it is small; None: it becomes an object.

        Nobody sits and waits for a batch, so one trip to the store less is nothing to it.
        """
        request = running.query.request
        if request.delivery is not Delivery.INLINE_IF_SMALL or request.mode is not Mode.INTERACTIVE:
            return None

        async def read() -> Result | None:
            try:
                return _read_inline(output)
            except FileNotFoundError:
                # Storing the result as an object raises the same error and reports it.
                return None

        reading = until_available(read, "scratch", unavailable=OSError, give_up_after=_INLINE_SECONDS)
        try:
            return await self._unless_stopped(running, reading)
        except OSError:
            return None

    async def _put(
        self,
        running: Running,
        path: Path,
        name: str,
        media_type: str,
        rows: int,
        *,
        give_up_after: float | None = None,
    ) -> ResultFile:
        """Put a file under the attempt's own prefix; raises `StoreRefused`, and `StoreUnavailable` at the end of
        `give_up_after` seconds."""
        store = partial(self._results.put, _prefix(running) + name, path, media_type)
        storing = until_available(store, "s3", unavailable=StoreUnavailable, give_up_after=give_up_after)
        stored = await self._unless_stopped(running, storing)
        return ResultFile(stored.key, stored.bytes, rows, stored.etag, stored.sha256)

    def _location(self, running: Running) -> str:
        return f"s3://{self._rules.bucket}/{_prefix(running)}"

    # Finish.

    @in_span(SpanName.FINISH)
    async def _finish(self, running: Running, outcome: Success | Failure) -> bool:
        facts, state, token = running.query.facts, _as_running(running), running.lease.token
        running.lease.ending = True
        failpoint(Failpoint.FINISH_BEFORE)
        now = self._clock.now()
        if isinstance(outcome, Success):
            over = await self._end(succeed(facts, state, outcome, now=now, token=token), facts)
            if over is not None:
                return over
            # The cancel locked the row first. Its query has no result, and the sweep takes the object away.
            outcome = CANCELLED
        ending = fail(
            facts,
            state,
            outcome,
            now=now,
            token=token,
            duration_ms=_elapsed_ms(running),
            engine=self._engine.name,
        )
        return bool(await self._end(ending, facts))

    async def _end(self, ending: Ending, facts: QueryFacts) -> bool | None:
        """Whether the query is terminal then; None if it is still ours and cancelled, so that it can't succeed."""
        try:
            state = await self._transitions.end(ending)
        except RowRefused:
            # What is in the row can't be stored, so that repeating won't help: the deadline will end the query.
            return False
        failpoint(Failpoint.FINISH_AFTER)
        if state is None:
            return True
        if state.sequence == ending.sequence + 1 and ending.token in (None, state.token):
            _log.info(
                LogEvent.QUERY_FINISHED,
                query_id=facts.query_id,
                org_id=facts.org_id,
                attempt=state.attempt,
                status=state.status,
                error_code=ending.error_code,
                duration_ms=ending.duration_ms,
            )
        if not Status(state.status).terminal and state.cancelled and state.token == ending.token is not None:
            return None
        return Status(state.status).terminal

    # Giving up.

    async def _unless_stopped(self, running: Running, work: Awaitable[_Done]) -> _Done:
        """The work's answer, or `_Stopped` when the lease says so first; the work is then cancelled and awaited.

        A worker that drains has handed the query back by then: ending the work may take longer than it has left, and
        a lease that ran out instead would count as a crash.
        """
        task = asyncio.ensure_future(work)
        waited: set[asyncio.Future[Any]] = {task, running.lease.stopped}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            why = running.lease.stopped.result()
            if why is Stop.DRAINING:
                await self._hand_back(running, crashed=False)
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

    async def _give_up(self, running: Running, why: Stop) -> bool:
        match why:
            case Stop.CANCELLED:
                return await self._finish(running, await self._audit(running, CANCELLED))
            case Stop.DRAINING:
                return False
            case Stop.LOST:
                _log.warning(LogEvent.LEASE_LOST, **_names(running))
                return False

    async def _hand_back(self, running: Running, *, crashed: bool) -> None:
        running.lease.ending = True
        failpoint(Failpoint.HAND_BACK_BEFORE)
        await self._transitions.hand_back(HandBack(running.query.facts.query_id, running.lease.token, crashed))
        if not crashed:
            _log.info(LogEvent.QUERY_HANDED_BACK, **_names(running))


def _find_failure(state: RunState, sql: str | None, still_renewal: int | None) -> Failure | None:
    """Why a query that nobody holds must end instead of being claimed."""
    left_behind = state.lease_token is not None and (not state.lease_alive or state.lease_renewal == still_renewal)
    if state.cancelled:
        return CANCELLED
    if sql is None:
        return Failure(ErrorCode.SAVED_QUERY_NOT_FOUND, "the saved query has changed since it was admitted")
    if state.crashes + left_behind >= MAX_CRASHES:
        return Failure(ErrorCode.ENGINE_CRASHED, f"the query's process died {MAX_CRASHES} times")
    return None


@asynccontextmanager
async def _removed_afterwards(folder: Path) -> AsyncIterator[None]:
    try:
        yield
    finally:
        # Removing a large file may take long, and is another thread's.
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def make_scratch(running: Running) -> None:
    """Make the attempt's folder, waiting while the disk is full.

    Raises `EngineUnavailable` at the end of the query's time, and `OSError` at once for anything else.
    """

    async def make() -> None:
        try:
            # Blocks the event loop only for microseconds.
            running.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise EngineUnavailable(Outage.SCRATCH) from None
            raise

    await until_available(make, _name_dependency, unavailable=EngineUnavailable, give_up_after=_seconds_left(running))


def _read_inline(output: Output) -> Result | None:
    """Return the result for its event; None if it is too large. Raises `OSError`."""
    # Blocks the event loop only for microseconds. Read one byte more than the limit to detect a larger file.
    with output.path.open("rb") as file:
        body = file.read(MAX_INLINE_BYTES + 1)
    return Result.in_event(body, output.rows) if len(body) <= MAX_INLINE_BYTES else None


def _prefix(running: Running) -> str:
    facts = running.query.facts
    return prefix(facts.org_id, facts.query_id, running.attempt, running.lease.token)


def _denied(granted: Sequence[Dataset], facts: QueryFacts) -> frozenset[str]:
    """Who reads personal data must be somebody."""
    if facts.user_id is not None or facts.task_id is not None:
        return frozenset()
    return frozenset(dataset.name for dataset in granted if dataset.pii_columns)


def _name_dependency(error: Exception) -> str:
    return error.outage.dependency if isinstance(error, EngineUnavailable) else "engine"


def _to_personal(read: Read) -> PersonalRead:
    return PersonalRead(read.relation, read.columns)


def _seconds_left(running: Running) -> float:
    return running.started + running.run_seconds - time.monotonic()


def _to_relation(dataset: Dataset) -> Relation:
    return Relation(
        name=dataset.name,
        kind=RelationKind(dataset.kind),
        location=dataset.location,
        version=f"{dataset.id}:{dataset.version}",
        pii_columns=frozenset(dataset.pii_columns),
        registered=dataset.registered,
    )


def _as_running(running: Running) -> RunState:
    """The state in which the attempt stands by its own token: what its ending is judged against."""
    return replace(running.query.state, status=Status.RUNNING.value, sequence=running.sequence, attempt=running.attempt)


def _names(running: Running) -> dict[str, str | int]:
    return _name(running.query.facts, running.attempt)


def _name(facts: QueryFacts, attempt: int) -> dict[str, str | int]:
    return {"query_id": facts.query_id, "org_id": facts.org_id, "attempt": attempt}


def _elapsed_ms(running: Running) -> int:
    return round((time.monotonic() - running.started) * 1000)


def _queued_ms(state: RunState, now: datetime) -> int:
    """From the broker's append to the start of the first attempt, which is now, by the steady clock, unless there was
    one before."""
    return max(0, ((state.started_at or now) - state.queued_at) // timedelta(milliseconds=1))
