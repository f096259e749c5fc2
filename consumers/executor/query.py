"""A query on its way through the executor: from its admission, through its attempt, to its end."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from access.limits import OrgLimits
from consumers.executor.leases import Lease
from consumers.executor.status_event import QueryFacts
from db.data.datasets import Dataset
from db.data.runs import RunState
from engines.protocol import Read
from queryd.events import QueryRequested
from queryd.kafka.record import Record


@dataclass(frozen=True, slots=True)
class Query:
    """A query that this executor runs, or watches while another worker runs it.

    `state` is the query's row as this worker last saw it. `limits` are the org's limits at admission. `sql` is None if
    the saved query no longer has the text that was admitted. If `stale_lease_version` is set, the next claim takes over
    a dead lease that was renewed this many times.
    """

    record: Record
    request: QueryRequested
    facts: QueryFacts
    state: RunState
    limits: OrgLimits
    sql: str | None = field(repr=False)
    stale_lease_version: int | None = None


# Compared by identity: two attempts are never equal.
@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt of a claimed query. `query.state` is the row after the claim.

    `started` is a monotonic time in seconds: that of the claim, then that of the start.

    `datasets` is everything that the caller may read. `scratch` exists only while it contains a result that is too
    large for the engine's pipe. `reads` are the reads of personal data that the engine has reported so far.
    """

    query: Query
    lease: Lease
    run_seconds: float
    queued_ms: int
    datasets: tuple[Dataset, ...]
    scratch: Path
    started: float = field(default_factory=time.monotonic)
    reads: set[Read] = field(default_factory=set)

    @property
    def number(self) -> int:
        """The attempt's number; the first is 1."""
        return self.query.state.attempt
