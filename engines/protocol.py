"""What an engine is: it turns SQL and the relations granted to its caller into one file of results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

from queryd.events import Column, ErrorCode, OrgId, OutputFormat, Parameter, QueryId


class RelationKind(StrEnum):
    """Where a dataset's rows lie."""

    PARQUET = "parquet"
    POSTGRES = "postgres"


@dataclass(frozen=True, slots=True)
class Registered:
    """The columns and partition columns that a Parquet dataset had when `datasets add` read it.

    All files that were last modified before `alike_until` (POSIX seconds) had exactly these columns; it is None if the
    files differed. `alike_digest` tells whether the same files are still there.
    """

    columns: tuple[Column, ...]
    partitions: tuple[Column, ...]
    alike_until: float | None
    alike_digest: str

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` made of one, as JSON carries it."""
        columns, partitions = (tuple(Column(**each) for each in fields[part]) for part in ("columns", "partitions"))
        return cls(columns, partitions, fields["alike_until"], fields["alike_digest"])


@dataclass(frozen=True, slots=True)
class Relation:
    """A dataset as an engine sees it.

    `name` is what SQL calls it, with a schema at most (`finance.invoices`). `location` is `s3://bucket/path`, a glob of
    those or a folder ending in `/`; of a Postgres relation it is `schema.table` in the datasets' server. `version`
    changes with every change of the grant or the location, so that nothing stays warm beyond it. `pii_columns` are the
    columns that hold personal data. `registered` is a `Registered` as JSON; None if nobody read the files.
    """

    name: str
    kind: RelationKind
    location: str
    version: str
    pii_columns: frozenset[str] = frozenset()
    registered: str | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """A statement's read of a relation. `columns` are the PII columns that it reads, or None if that is unknown."""

    relation: str
    columns: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Execution:
    """One attempt to run one query. `relations` is everything granted to its caller, and nothing else can be read.

    `scratch` is the attempt's own directory, which the engine makes if it needs it. `timeout_seconds` counts from the
    call of `execute`. Limits that are None don't exist.
    """

    query_id: QueryId
    org_id: OrgId
    sql: str = field(repr=False)
    parameters: dict[str, Parameter] = field(repr=False)
    relations: tuple[Relation, ...]
    output_format: OutputFormat
    scratch: Path
    timeout_seconds: float
    max_rows: int | None = None
    max_bytes: int | None = None
    max_bytes_scanned: int | None = None
    # Names of relations that the caller may see and may not read now: a statement that names one is ACCESS_DENIED.
    denied: frozenset[str] = frozenset()
    # The engine adds each read of a relation with PII columns before it reads, so that the caller can record it however
    # the query ends.
    reads: set[Read] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Output:
    """A whole result: its bytes, or a file in the attempt's scratch directory. `bytes_scanned` is None if unknown."""

    content: bytes | Path
    rows: int
    bytes: int
    columns: tuple[Column, ...]
    bytes_scanned: int | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a statement that may run names: relations as it writes them, schema included, and parameters."""

    relations: frozenset[str]
    parameters: frozenset[str]


# The description of a column that needs no conversion.
AS_IT_IS = "as it is"


@dataclass(frozen=True, slots=True)
class LookedColumn:
    """A column as SQL sees it. `how` describes how queryd reads it; `trouble` says why it can't."""

    name: str
    type: str
    how: str
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Looked:
    """A relation's current columns and, for Parquet, its files.

    `hidden` and `outside` are keys that match its location and are not read: names that begin with `_` or `.`, and
    files outside the partition folders. `unreadable` are keys of files without a readable footer.
    """

    columns: tuple[LookedColumn, ...]
    registered: Registered | None = None
    files: int = 0
    bytes: int = 0
    hidden: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` made of one, as JSON carries it."""
        registered = fields["registered"]
        return cls(
            tuple(LookedColumn(**each) for each in fields["columns"]),
            None if registered is None else Registered.from_fields(registered),
            fields["files"],
            fields["bytes"],
            *(tuple(fields[part]) for part in ("hidden", "outside", "unreadable")),
        )


class QueryFailed(Exception):
    """The query's own error: fail it with `code`. `message` is a sentence of ours, free of SQL, values and names.

    `detail` is the engine's own text for the statement's author alone: it may quote SQL and values, and goes nowhere
    but to `error.json` beside where the result would have been.
    """

    def __init__(self, code: ErrorCode, message: str, detail: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = detail


class EngineCrashed(Exception):
    """The process died under this query: try again, and count it, for the query may be the cause."""


class Outage(Enum):
    """Every outage that queryd waits for. Any other error ends its query at once.

    Each has the dependency's name for the log, and the message of a query whose time limit passes during the outage.
    docs/reliability.md lists the situations.
    """

    STORE = ("datasets' store", "The datasets' store can't be reached.")
    CLOCKS = ("clock", "The clocks of the datasets' store and of the engine's machine are too far apart.")
    POSTGRES = ("datasets' postgres", "The datasets' Postgres can't be reached.")
    SCRATCH = ("scratch", "The engine's scratch disk is full.")
    ENGINE = ("engine", "The engine's process can't be started.")

    def __init__(self, dependency: str, sentence: str) -> None:
        self.dependency = dependency
        self.sentence = sentence


class EngineUnavailable(Exception):
    """A dependency of the query is unavailable: wait and retry."""

    def __init__(self, outage: Outage) -> None:
        super().__init__(outage.sentence)
        self.outage = outage


class Engine(Protocol):
    """An engine. `name` is its product and version, as events say it."""

    name: str

    async def start(self) -> None:
        """Make ready to execute. Raises `EngineUnavailable` where that is not possible."""
        ...

    async def execute(self, execution: Execution) -> Output:
        """Run one query to its end; raises `QueryFailed`, `EngineCrashed` or `EngineUnavailable`.

        Cancelling the task that awaits this stops the query.
        """
        ...

    async def close(self) -> None:
        """Stop whatever still runs and leave nothing behind."""
        ...
