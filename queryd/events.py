"""The three events of the contract as Python values, following the schemas in `schemas/`.

Ids are canonical lower-case UUID strings, times are aware UTC datetimes with millisecond precision, sizes are bytes.
"""

import builtins
import re
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import NewType

QueryId = NewType("QueryId", str)
OrgId = NewType("OrgId", str)

# What a parameter may be on the wire. Avro's union keeps long and double apart, so 1 and 1.0 stay what they were.
Parameter = None | bool | int | float | str

_UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Topic(StrEnum):
    """The topics of the contract. Requests come by two lanes, so that exports never delay a person."""

    REQUESTS_INTERACTIVE = "query.requests.interactive"
    REQUESTS_BATCH = "query.requests.batch"
    CANCELLATIONS = "query.cancellations"
    STATUS = "query.status"
    DEAD_LETTERS = "query.requests.dead"


class Mode(StrEnum):
    """The two lanes: a person waits for `interactive`; `batch` is a task, a report, an export."""

    INTERACTIVE = "interactive"
    BATCH = "batch"

    @property
    def topic(self) -> Topic:
        """The topic of this lane's requests."""
        return Topic.REQUESTS_INTERACTIVE if self is Mode.INTERACTIVE else Topic.REQUESTS_BATCH


class Status(StrEnum):
    """The four words of `query_results.status`; the last two are terminal."""

    QUEUED = "Queued"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def terminal(self) -> bool:
        """True when nothing follows any more."""
        return self in (Status.SUCCEEDED, Status.FAILED)


class OutputFormat(StrEnum):
    """How a result is written; the value is also the file's ending."""

    PARQUET = "parquet"
    CSV = "csv"
    JSON = "json"


# A larger file is stored as an object whatever the delivery, so that an event stays well below what a broker takes.
MAX_INLINE_BYTES = 65_536


class Delivery(StrEnum):
    """Where a result goes: always an object, or into the event when it is at most 64 KiB."""

    OBJECT = "object"
    INLINE_IF_SMALL = "inline_if_small"


class ErrorCode(StrEnum):
    """Why a query is `Failed`."""

    INVALID_REQUEST = "INVALID_REQUEST"
    SQL_REJECTED = "SQL_REJECTED"
    ACCESS_DENIED = "ACCESS_DENIED"
    SAVED_QUERY_NOT_FOUND = "SAVED_QUERY_NOT_FOUND"
    QUERY_ERROR = "QUERY_ERROR"
    QUERY_TIMEOUT = "QUERY_TIMEOUT"
    QUERY_CANCELLED = "QUERY_CANCELLED"
    RESULT_TOO_LARGE = "RESULT_TOO_LARGE"
    SCAN_LIMIT_EXCEEDED = "SCAN_LIMIT_EXCEEDED"
    MEMORY_LIMIT_EXCEEDED = "MEMORY_LIMIT_EXCEEDED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    ENGINE_CRASHED = "ENGINE_CRASHED"
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    INTERNAL = "INTERNAL"


class Invalid(ValueError):
    """A value breaks the contract; the sentence says which field and what would be right, never the value itself."""


@dataclass(frozen=True, slots=True)
class QueryRequested:
    """A request to run one query. Exactly one of `sql` and `saved_query_id` is given."""

    query_id: QueryId
    org_id: OrgId
    mode: Mode
    user_id: str | None = None
    roles: tuple[str, ...] = ()
    sql: str | None = field(default=None, repr=False)
    saved_query_id: str | None = None
    parameters: dict[str, Parameter] = field(default_factory=dict, repr=False)
    task_id: str | None = None
    output_format: OutputFormat = OutputFormat.PARQUET
    delivery: Delivery = Delivery.OBJECT
    engine: str | None = None
    timeout_seconds: int | None = None
    max_rows: int | None = None
    max_bytes_scanned: int | None = None
    requested_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class QueryCancelRequested:
    """A request to stop one query of the same org."""

    query_id: QueryId
    org_id: OrgId
    user_id: str | None = None
    reason: str | None = None
    requested_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One object of a result: its key in the bucket, size in bytes, rows, and what it must hash to."""

    key: str
    bytes: int
    rows: int
    etag: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A result column: its name and its DuckDB type, such as `DECIMAL(18,3)`."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class QueryStatusChanged:
    """One step of a query's story. `sequence` runs 1, 2, 3 … without gaps; `event_id` follows from it."""

    query_id: QueryId
    sequence: int
    status: Status
    attempt: int
    org_id: OrgId
    mode: Mode
    sql_hash: str
    occurred_at: datetime
    previous_status: Status | None = None
    user_id: str | None = None
    task_id: str | None = None
    saved_query_id: str | None = None
    output_format: OutputFormat | None = None
    output_location: str | None = None
    files: tuple[ResultFile, ...] = ()
    columns: tuple[Column, ...] = ()
    row_count: int | None = None
    bytes: int | None = None
    bytes_scanned: int | None = None
    duration_ms: int | None = None
    queued_ms: int | None = None
    engine: str | None = None
    inline_result: builtins.bytes | None = field(default=None, repr=False)
    expires_at: datetime | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None

    @property
    def event_id(self) -> str:
        """`uuid5(query_id, str(sequence))`: the same fact always has the same id."""
        return event_id(self.query_id, self.sequence)


# An event's id is asked for several times while the event is made.
@lru_cache(maxsize=1_024)
def event_id(query_id: QueryId, sequence: int) -> str:
    """The id of a query's event number `sequence`."""
    return str(uuid.uuid5(uuid.UUID(query_id), str(sequence)))


def parse_uuid(text: object, name: str) -> str:
    """The canonical form of a UUID, or of its text in the form 8-4-4-4-12; raises `Invalid` for anything else."""
    if isinstance(text, uuid.UUID):
        return str(text)
    if not isinstance(text, str) or not _UUID.fullmatch(text):
        raise Invalid(f"{name} is not a UUID")
    return text.lower()


def to_millis(moment: datetime) -> int:
    """Milliseconds since the epoch, as the wire has it; raises `Invalid` for a naive datetime."""
    if moment.tzinfo is None:
        raise Invalid("a time needs a time zone")
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def from_millis(millis: int) -> datetime:
    """The UTC time of a timestamp-millis; raises `Invalid` outside the years 1 to 9999."""
    try:
        return _EPOCH + timedelta(milliseconds=millis)
    except OverflowError:
        raise Invalid("a time lies outside the years 1 to 9999") from None
