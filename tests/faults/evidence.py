"""What a fault run hands to its judge: what was sent, what was broken, and where everything lies.

It knows nothing of the product's code. Times are seconds on the host's wall clock, `time.time()`, which nobody shifts:
clocks that jump are those of one process or of one database.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SentQuery:
    """One accepted request.

    `outcomes` are the ends it may have: "Succeeded", or error codes. `content` are the rows of a result, as text per
    cell and in order, or None where only the numbers are judged. `deadline_seconds` is its own time limit. A request
    that was sent twice under one id stands here once. `cancelled`: somebody asked to cancel it, at any time.
    `task_id` names a row of `tasks` that was made before the request was sent. `inline`: its event must carry the
    result if that is small.
    """

    query_id: str
    org_id: str
    task_id: str | None
    mode: str
    output_format: str
    canary: str
    sent_at: float
    deadline_seconds: float
    outcomes: frozenset[str]
    columns: tuple[str, ...] = ()
    content: tuple[tuple[str, ...], ...] | None = None
    cancelled: bool = False
    inline: bool = False


@dataclass(frozen=True, slots=True)
class SentMalformed:
    """A record that must become one dead letter, where it lies in its topic, and the canary that it may hold.

    `answered_id` is the query's id when the record is decodable and invalid, so that it has a row and events as well.
    `code` is what its dead letter must say (UNDECODABLE, INVALID_REQUEST, CONFLICT), where that is judged.
    """

    topic: str
    partition: int
    offset: int
    canary: str | None = None
    answered_id: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `row` is its row of the table of faults, 1 to 6; `ended` is when what was broken was whole again."""

    kind: str
    row: int
    target: str
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Place:
    """How to reach the servers themselves, by no proxy. URLs are libpq URIs; `bucket` is a name without `s3://`."""

    bootstrap: str
    data_url: str
    state_url: str
    bucket: str
    endpoint_url: str
    region: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything of one run, gathered once it is quiet and swept.

    `logs` are all files in which a canary must not be: logs of our services, scraped metrics, exported traces.
    `scratch` are the folders that must hold no attempt's files any more. `lease_seconds` is the stack's setting.
    All canaries begin with the same six characters at least, which stand nowhere else.
    """

    place: Place
    queries: tuple[SentQuery, ...]
    malformed: tuple[SentMalformed, ...]
    faults: tuple[Fault, ...]
    lease_seconds: float
    logs: tuple[Path, ...]
    scratch: tuple[Path, ...]
