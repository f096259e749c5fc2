"""How a query ends: the row's and the event's side of it, made together so that they can't disagree."""

import builtins
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Self

from psycopg.types.json import Jsonb

from consumers.executor.status_event import QueryFacts, build_status_event
from db.data.attempts import Ending
from db.data.runs import INLINE_FILE, RunState
from queryd.events import Column, ErrorCode, OutputFormat, ResultFile, Status

# For a Parquet file, which contains its types, an event carries at most this many columns, with names of so many
# characters and types of so many bytes. For a CSV or JSON file it carries all columns; the engine has checked that they
# fit. In both cases, even with an inline result, the event stays well below its limit of 512 KiB.
_MAX_COLUMNS = 200
_MAX_NAME = 128
_MAX_TYPE = 1_000


@dataclass(frozen=True, slots=True)
class ErrorFile:
    """An attempt's `error.json` in the store. `location` is its prefix as a URL."""

    location: str
    file: ResultFile
    retention: timedelta


@dataclass(frozen=True, slots=True)
class Failure:
    """The query's own end: a code and one sentence without SQL or data.

    `detail` is the engine's own text, which may hold both; `error_file` is where it was stored for the author.
    """

    code: ErrorCode
    message: str
    detail: str | None = field(default=None, repr=False)
    error_file: ErrorFile | None = None


CANCELLED = Failure(ErrorCode.QUERY_CANCELLED, "the query was cancelled")


@dataclass(frozen=True, slots=True)
class Result:
    """A whole result: a file in the store, under `location`, its prefix as a URL; or `inline`, in the event itself, the
    bytes of the file that would have been stored."""

    rows: int
    bytes: int
    location: str | None = None
    files: tuple[ResultFile, ...] = ()
    inline: builtins.bytes | None = field(default=None, repr=False)

    @classmethod
    def stored(cls, location: str, file: ResultFile) -> Self:
        """A result that is one object."""
        return cls(file.rows, file.bytes, location, (file,))

    @classmethod
    def in_event(cls, body: builtins.bytes, rows: int) -> Self:
        """A result that its event carries."""
        return cls(rows, len(body), inline=body)


@dataclass(frozen=True, slots=True)
class Success:
    """A query's whole result. Durations in ms."""

    result: Result
    columns: tuple[Column, ...]
    bytes_scanned: int | None
    duration_ms: int
    queued_ms: int
    engine: str
    retention: timedelta


def overdue_failure(status: Status) -> Failure:
    """What a query gets whose time is over, by the status in which it waited."""
    if status is Status.QUEUED:
        return Failure(ErrorCode.QUEUE_TIMEOUT, "the query waited in the queue for too long")
    return Failure(ErrorCode.QUERY_TIMEOUT, "the query exceeded its time limit")


def fail(
    facts: QueryFacts,
    state: RunState,
    failure: Failure,
    *,
    now: datetime,
    token: str | None = None,
    stale_lease_version: int | None = None,
    duration_ms: int | None = None,
    engine: str | None = None,
) -> Ending:
    """The query ends `Failed`. Without a token it must be one that nobody holds."""
    event = build_status_event(
        facts,
        sequence=state.sequence + 1,
        previous=Status(state.status),
        status=Status.FAILED,
        attempt=state.attempt,
        now=now,
        error_code=failure.code,
        error_message=failure.message,
        duration_ms=duration_ms,
        engine=engine,
    )
    stored = failure.error_file
    return Ending(
        query_id=state.query_id,
        sequence=state.sequence,
        token=token,
        stale_lease_version=stale_lease_version,
        status=Status.FAILED.value,
        duration_ms=duration_ms,
        error_code=failure.code.value,
        error_message=failure.message,
        # The row of a failed query has no `output_location`, so the file entry has the location for retention.
        files=Jsonb([] if stored is None else [asdict(stored.file) | {"location": stored.location}]),
        retention_seconds=None if stored is None else stored.retention.total_seconds(),
        shard=event.shard,
        event_id=event.event_id,
        payload=event.payload,
        headers=event.headers,
    )


def succeed(facts: QueryFacts, state: RunState, success: Success, *, now: datetime, token: str) -> Ending:
    """The query ends `Succeeded`: from here on its result is visible."""
    result = success.result
    event = build_status_event(
        facts,
        sequence=state.sequence + 1,
        previous=Status(state.status),
        status=Status.SUCCEEDED,
        attempt=state.attempt,
        now=now,
        output_location=result.location,
        files=result.files,
        inline_result=result.inline,
        columns=_fit_columns(success.columns, facts.output_format),
        row_count=result.rows,
        bytes=result.bytes,
        bytes_scanned=success.bytes_scanned,
        duration_ms=success.duration_ms,
        queued_ms=success.queued_ms,
        engine=success.engine,
        expires_at=now + success.retention,
    )
    return Ending(
        query_id=state.query_id,
        sequence=state.sequence,
        token=token,
        stale_lease_version=None,
        status=Status.SUCCEEDED.value,
        output_location=result.location,
        row_count=result.rows,
        result_bytes=result.bytes,
        duration_ms=success.duration_ms,
        files=Jsonb([asdict(file) for file in result.files] if result.inline is None else [INLINE_FILE]),
        retention_seconds=success.retention.total_seconds(),
        shard=event.shard,
        event_id=event.event_id,
        payload=event.payload,
        headers=event.headers,
    )


def _fit_columns(columns: tuple[Column, ...], output_format: OutputFormat | None) -> tuple[Column, ...]:
    if output_format in (OutputFormat.CSV, OutputFormat.JSON):
        return columns
    return tuple(_fit(column, number) for number, column in enumerate(columns[:_MAX_COLUMNS], start=1))


def _fit(column: Column, number: int) -> Column:
    return Column(column.name if len(column.name) <= _MAX_NAME else f"column_{number}", _fit_type(column.type))


def _fit_type(described: str) -> str:
    if len(described.encode()) > _MAX_TYPE:
        described = described.partition("(")[0]
    cut = described.encode()[:_MAX_TYPE].decode(errors="ignore")
    return cut if cut == described else cut + "…"
