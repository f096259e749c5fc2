"""Queries on their way through the data database, one step at a time, each by the executor's own functions."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from access.limits import OrgLimits
from consumers.executor.admission import Legible, Rules, Verdict, admit, read_record
from consumers.executor.endings import Failure, Result, Success, fail, succeed
from consumers.executor.query import Query
from consumers.executor.status_event import QueryFacts, build_status_event
from consumers.executor.transitions import EndResult, Refusal, Transitions
from db.clock import DatabaseClock
from db.connection import DataPool, make_pool
from db.data.attempts import Claim, Ending, HandBack
from db.data.datasets import Caller
from db.data.runs import CanonicalRow, RunState, read_canonical
from queryd.codec import decode_status, encode
from queryd.events import ErrorCode, Mode, QueryRequested, QueryStatusChanged, ResultFile, Status
from queryd.kafka.record import Record

# Longer than any test: leases and limits end when a test says so.
_LONG_SECONDS = 600.0
_CONNECTIONS = 4

RULES = Rules(
    queue_seconds={Mode.INTERACTIVE: _LONG_SECONDS, Mode.BATCH: _LONG_SECONDS},
    engines=frozenset({"duckdb"}),
    hash_key=None,
)

_NO_LIMITS = OrgLimits()

_offsets = itertools.count()


@asynccontextmanager
async def opened_pool(url: str) -> AsyncIterator[DataPool]:
    """Connections to a migrated data database."""
    pool = DataPool(make_pool(url, "test", _CONNECTIONS))
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


def new_id() -> str:
    return str(uuid.uuid4())


def make_request(**changes: Any) -> QueryRequested:
    """A valid request of an org and a user of its own."""
    fields = {"query_id": new_id(), "org_id": new_id(), "user_id": new_id(), "mode": Mode.INTERACTIVE}
    if "saved_query_id" not in changes:
        fields["sql"] = "SELECT 1"
    return QueryRequested(**(fields | changes))


def make_record(request: QueryRequested, mode: Mode | None = None, offset: int | None = None) -> Record:
    """The request as it comes out of its lane, at an offset that no other record has."""
    return Record(
        topic=(mode or request.mode).topic.value,
        partition=0,
        offset=next(_offsets) if offset is None else offset,
        key=request.query_id.encode(),
        value=encode(request),
        headers=(),
        timestamp_ms=time.time_ns() // 1_000_000,
        appended_by_broker=True,
        polled_at=time.monotonic(),
        epoch=1,
    )


def read_legible(record: Record) -> Legible:
    """A record with legible ids, decoded as its lane decodes it."""
    mode = next(mode for mode in Mode if mode.topic == record.topic)
    item = read_record(record, mode, RULES)
    assert isinstance(item, Legible)
    return item


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A row of the outbox, with its payload decoded."""

    position: int
    event_id: str
    event: QueryStatusChanged
    headers: dict[str, str]


class Worker:
    """One executor process as the database sees it, with batches and a clock of its own."""

    def __init__(self, pool: DataPool, limits: OrgLimits = _NO_LIMITS) -> None:
        """`limits` are those of orgs that have none of their own."""
        self.pool = pool
        self.clock = DatabaseClock(datetime.now(UTC))
        self.transitions = Transitions(pool, self.clock, limits.running_queries)
        self._rules = replace(RULES, limits=limits)

    async def admit(self, *records: Record) -> list[Verdict]:
        return await admit(self.pool, self.clock, self._rules, [read_legible(record) for record in records])

    async def admit_new(self, **changes: Any) -> Query:
        """Admit a new query; its state is the one that is stored."""
        [verdict] = await self.admit(make_record(make_request(**changes)))
        assert isinstance(verdict, Query)
        stored = await self.read(verdict.facts.query_id)
        assert verdict.state == replace(stored, read_at=verdict.state.read_at)
        return verdict

    async def read(self, query_id: str) -> RunState:
        return (await self.transitions.read([query_id]))[query_id]

    async def claim(
        self, facts: QueryFacts, state: RunState, token: str, stale_lease_version: int | None = None, **changes: Any
    ) -> RunState | None:
        """Claim a query of an org without a limit; returns its state afterwards."""
        answer = await self.claim_or_refuse(make_claim(facts, state, token, stale_lease_version, **changes))
        assert not isinstance(answer, Refusal)
        return answer

    async def claim_or_refuse(self, claim: Claim) -> RunState | Refusal | None:
        """Claim a query; returns its state afterwards, which agrees with the answer, or why it was refused."""
        [answer] = await self.claim_all([claim])
        return answer

    async def claim_all(self, claims: Sequence[Claim]) -> list[RunState | Refusal | None]:
        """Claim queries in one batch; as `claim_or_refuse` for each."""
        answers = await self.transitions.claim([(claim, Caller(claim.org_id, None, ())) for claim in claims])
        states = await self.transitions.read([claim.query_id for claim in claims])
        result: list[RunState | Refusal | None] = []
        for claim, answer in zip(claims, answers, strict=True):
            state = states.get(claim.query_id)
            if answer is not None and state is not None and state.token == claim.token:
                assert state.sequence == claim.sequence + 1
            result.append(answer if isinstance(answer, Refusal) else state)
        return result

    async def end(self, ending: Ending) -> RunState | None:
        """End a query; returns its state afterwards, which agrees with the answer."""
        answer = await self.transitions.end(ending)
        state = (await self.transitions.read([ending.query_id])).get(ending.query_id)
        if answer in (EndResult.ENDED, EndResult.OVER):
            assert state is None or Status(state.status).terminal
        return state

    async def start(self, facts: QueryFacts) -> RunState:
        """A claim that must succeed; what then stands."""
        token = new_id()
        state = await self.claim(facts, await self.read(facts.query_id), token)
        assert state is not None
        assert state.token == token
        return state

    async def take_over(self, facts: QueryFacts) -> RunState:
        """A claim of a query whose lease is dead; what then stands."""
        dead, token = await self.read(facts.query_id), new_id()
        state = await self.claim(facts, dead, token, stale_lease_version=dead.lease_renewal)
        assert state is not None
        assert state.token == token
        return state

    async def hand_back(self, state: RunState, *, crashed: bool = False) -> RunState | None:
        assert state.token is not None
        await self.transitions.hand_back(HandBack(state.query_id, state.token, crashed))
        return (await self.transitions.read([state.query_id])).get(state.query_id)

    async def finish(self, facts: QueryFacts, state: RunState) -> RunState | None:
        """The attempt's own success, judged against the state that its claim has made."""
        return await self.end(make_success(facts, state))


def make_claim(
    facts: QueryFacts, state: RunState, token: str, stale_lease_version: int | None = None, **changes: Any
) -> Claim:
    event = build_status_event(
        facts,
        sequence=state.sequence + 1,
        previous=Status(state.status),
        status=Status.RUNNING,
        attempt=state.attempt + 1,
        now=state.read_at,
    )
    fields: dict[str, Any] = {
        "query_id": facts.query_id,
        "org_id": facts.org_id,
        "sequence": state.sequence,
        "token": token,
        "worker": "worker",
        "engine": "duckdb",
        "stale_lease_version": stale_lease_version,
        "lease_seconds": _LONG_SECONDS,
        "run_seconds": _LONG_SECONDS,
        "shard": event.shard,
        "event_id": event.event_id,
        "payload": event.payload,
        "headers": event.headers,
        "limited": False,
    }
    return Claim(**(fields | changes))


def make_success(facts: QueryFacts, state: RunState, rows: int = 1) -> Ending:
    assert state.token is not None
    prefix = f"results/{facts.org_id}/{facts.query_id}/{state.attempt}-{state.token[:8]}/"
    file = ResultFile(f"{prefix}result.parquet", bytes=100, rows=rows, etag="etag", sha256="0" * 64)
    success = Success(
        result=Result.stored(f"s3://results/{prefix}", file),
        columns=(),
        bytes_scanned=None,
        duration_ms=5,
        queued_ms=1,
        engine="duckdb",
        retention=timedelta(days=7),
    )
    return succeed(facts, state, success, now=state.read_at, token=state.token)


def make_failure(
    facts: QueryFacts, state: RunState, *, token: str | None = None, stale_lease_version: int | None = None
) -> Ending:
    failure = Failure(ErrorCode.QUERY_ERROR, "the query failed")
    return fail(facts, state, failure, now=state.read_at, token=token, stale_lease_version=stale_lease_version)


def is_over(_topic: str, _partition: int, _offset: int) -> bool:
    """No record will be delivered any more."""
    return True


async def pass_deadline(pool: DataPool, query_id: str) -> None:
    """The time that the query may spend in its present status is over."""
    await _change(pool, "UPDATE query_runs SET deadline = now() - interval '1 hour' WHERE query_id = %s", query_id)


async def ask_to_cancel(pool: DataPool, query_id: str, org_id: str) -> None:
    await _change(pool, "INSERT INTO query_cancellations (query_id, org_id) VALUES (%s, %s)", query_id, org_id)


async def _change(pool: DataPool, statement: str, *values: str) -> None:
    async with pool.connection() as connection:
        cursor = await connection.execute(statement.encode(), values)
        assert cursor.rowcount == 1


async def read_row(pool: DataPool, query_id: str) -> CanonicalRow | None:
    async with pool.connection() as connection:
        return (await read_canonical(connection, [query_id])).get(query_id)


async def read_events(pool: DataPool, query_id: str) -> list[StoredEvent]:
    """A query's rows in the outbox, in order of position."""
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT position, event_id::text, payload, headers FROM outbox WHERE query_id = %s ORDER BY position",
            [query_id],
        )
        return [
            StoredEvent(position, event_id, decode_status(bytes(payload)), headers)
            for position, event_id, payload, headers in await cursor.fetchall()
        ]


async def read_story(pool: DataPool, query_id: str) -> list[tuple[int, str, int]]:
    """A query's events in order of position: (sequence, status, attempt)."""
    events = [stored.event for stored in await read_events(pool, query_id)]
    return [(event.sequence, event.status.value, event.attempt) for event in events]
