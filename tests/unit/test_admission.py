"""Records to verdicts: what a request asks for, and what becomes of one that comes again."""

import hashlib
import hmac
import io
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import fastavro
import pytest

from access.limits import OrgLimits
from consumers.executor import admission
from consumers.executor.admission import Done, Legible, Refused, Rules, Verdict, admit, read_record
from consumers.executor.query import Query
from db.clock import DatabaseClock
from db.connection import DataPool
from db.data.admission import NewQuery, SavedLookup
from db.data.outbox import NewEvent
from db.data.runs import RunState
from queryd.codec import decode_fields, decode_status, encode
from queryd.contract import contract
from queryd.dead_letters import DeadCode
from queryd.events import (
    ErrorCode,
    Mode,
    OutputFormat,
    Parameter,
    QueryCancelRequested,
    QueryStatusChanged,
    Status,
)
from queryd.identity import fingerprint_request, hash_sql
from queryd.kafka.record import Record
from tests.unit.samples import NOW, ORG_ID, QUERY_ID, SAVED_ID, TRACEPARENT, make_record, make_request, make_state

CANARY = "canary4711"
OTHER_ID = "11111111-2222-4333-8444-555555555555"
RULES = Rules(
    queue_seconds={Mode.INTERACTIVE: 600.0, Mode.BATCH: 86_400.0}, engines=frozenset({"duckdb", "sail"}), hash_key=None
)


def _fields(**changes: Any) -> dict[str, Any]:
    return decode_fields(encode(make_request()), "QueryRequested") | changes


def _encode_fields(fields: dict[str, Any]) -> bytes:
    """Fields that no `QueryRequested` of ours would have."""
    newest = contract().newest["QueryRequested"]
    body = io.BytesIO()
    fastavro.schemaless_writer(body, newest.parsed, fields)
    return b"\xc3\x01" + newest.fingerprint + body.getvalue()


def _read(record: Record, mode: Mode = Mode.INTERACTIVE, rules: Rules = RULES) -> Legible:
    item = read_record(record, mode, rules)
    assert isinstance(item, Legible)
    return item


def _read_fields(**changes: Any) -> Legible:
    return _read(make_record(_encode_fields(_fields(**changes))))


# What a record says.


def test_a_valid_record_is_legible_with_its_request() -> None:
    request = make_request(parameters={"a": 1}, user_id=OTHER_ID)
    item = _read(make_record(encode(request), headers=(("traceparent", TRACEPARENT.encode()),)))
    assert item.request == request
    assert item.reason is None
    assert (item.query_id, item.org_id, item.mode, item.traceparent) == (
        QUERY_ID,
        ORG_ID,
        Mode.INTERACTIVE,
        TRACEPARENT,
    )


def test_a_record_without_a_valid_trace_begins_one() -> None:
    item = _read(make_record(encode(make_request()), headers=(("traceparent", b"garbage"),)))
    assert item.traceparent.startswith("00-")
    assert item.traceparent != _read(make_record(encode(make_request()))).traceparent


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        CANARY.encode(),
        encode(QueryCancelRequested(QUERY_ID, ORG_ID, reason=CANARY)),
        encode(make_request(sql=CANARY))[:-1],
        _encode_fields(_fields(query_id=CANARY)),
        _encode_fields(_fields(org_id=CANARY)),
    ],
)
def test_a_record_without_legible_ids_is_undecodable_and_not_quoted(value: bytes | None) -> None:
    refused = read_record(make_record(value), Mode.INTERACTIVE, RULES)
    assert isinstance(refused, Refused)
    assert refused.code is DeadCode.UNDECODABLE
    assert refused.reason
    assert CANARY not in refused.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sql": None}, "exactly one of sql and saved_query_id must be given"),
        ({"output_format": CANARY}, "output_format must be one of parquet, csv, json"),
        ({"mode": "batch"}, "mode must be interactive, as the topic's"),
        ({"mode": CANARY}, "mode must be one of interactive, batch"),
        ({"engine": CANARY}, "engine must be one of duckdb, sail"),
        ({"max_rows": 0}, "max_rows must be above zero"),
        ({"user_id": CANARY}, "user_id is not a UUID"),
    ],
)
def test_an_invalid_record_keeps_its_ids_and_says_what_to_mend(changes: dict[str, Any], reason: str) -> None:
    item = _read_fields(**changes)
    assert item.request is None
    assert item.reason == reason
    assert (item.query_id, item.org_id) == (QUERY_ID, ORG_ID)


def test_what_a_person_asked_for_is_in_no_repr() -> None:
    item = _read(make_record(encode(make_request(sql=CANARY, parameters={"p": CANARY}))))
    assert CANARY not in repr(item)
    assert CANARY not in repr(replace(RULES, hash_key=CANARY))


# What makes two requests the same.


def _fingerprint(**changes: Any) -> bytes:
    return fingerprint_request(_fields(**changes), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"requested_at": 1_774_747_800_123},
        {"query_id": QUERY_ID.upper()},
        {"org_id": ORG_ID.upper()},
        {"roles": [], "parameters": {}, "output_format": "parquet", "delivery": "object"},
    ],
)
def test_an_honest_retry_has_the_same_fingerprint(changes: dict[str, Any]) -> None:
    assert _fingerprint(**changes) == _fingerprint()


@pytest.mark.parametrize("name", ["user_id", "task_id", "saved_query_id"])
def test_the_case_of_an_id_is_no_difference(name: str) -> None:
    assert _fingerprint(**{name: ORG_ID.upper()}) == _fingerprint(**{name: ORG_ID}) != _fingerprint()


def test_a_field_that_an_older_schema_did_not_have_is_no_difference() -> None:
    older = {name: value for name, value in _fields().items() if value not in (None, [], {})}
    assert len(older) < len(_fields())
    assert fingerprint_request(older, None) == _fingerprint()
    assert fingerprint_request(_fields() | {"a_field_of_a_later_version": None}, None) == _fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"sql": "SELECT 8 AS seven"},
        {"sql": "select 7 as seven"},
        {"sql": None, "saved_query_id": SAVED_ID},
        {"org_id": OTHER_ID},
        {"user_id": OTHER_ID},
        {"task_id": OTHER_ID},
        {"mode": "batch"},
        {"roles": ["analyst"]},
        {"output_format": "csv"},
        {"delivery": "inline_if_small"},
        {"engine": "duckdb"},
        {"timeout_seconds": 5},
        {"max_rows": 5},
        {"max_bytes_scanned": 5},
        {"parameters": {"a": None}},
    ],
)
def test_whatever_changes_the_result_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert _fingerprint(**changes) != _fingerprint()


def test_a_parameters_type_matters() -> None:
    guises: list[Parameter] = [1, 1.0, True, "1", "true", "True", None, "null", 0, False, "", -1, 2**53, 2**53 + 1]
    fingerprints = {_fingerprint(parameters={"p": guise}) for guise in guises}
    assert len(fingerprints) == len(guises)


def test_what_moves_from_one_field_to_another_is_another_request() -> None:
    assert _fingerprint(parameters={"a": "b"}) != _fingerprint(parameters={"b": "a"})
    assert _fingerprint(roles=["a", "b"]) != _fingerprint(roles=["a,b"])
    assert _fingerprint(user_id=OTHER_ID) != _fingerprint(task_id=OTHER_ID)


def test_the_order_of_parameters_does_not_matter() -> None:
    assert _fingerprint(parameters={"a": 1, "b": 2}) == _fingerprint(parameters={"b": 2, "a": 1})


def test_a_fingerprint_can_be_keyed() -> None:
    assert len({fingerprint_request(_fields(), key) for key in (None, "k" * 16, "l" * 16)}) == 3


def test_sql_is_hashed_as_its_utf8_bytes() -> None:
    sql = "SELECT 'naïve 🦆'"
    assert hash_sql(sql, None) == hashlib.sha256(sql.encode()).hexdigest()
    assert hash_sql("", None) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    key = "a key of sixteen"
    assert hash_sql(sql, key) == hmac.new(key.encode(), sql.encode(), hashlib.sha256).hexdigest()


# What becomes of it.


class Database:
    """Postgres data as admission sees it: who admits an id first owns it, and what stands is read back.

    Its methods stand in for the functions of `db` of the same names.
    """

    def __init__(self) -> None:
        self.states: dict[str, RunState] = {}
        self.deleted: set[str] = set()
        self.saved: dict[str, str] = {}
        self.lookups: list[SavedLookup] = []
        # What the last batch wanted to insert.
        self.queries: list[NewQuery] = []
        self.events: list[QueryStatusChanged] = []

    @asynccontextmanager
    async def statement(self, pool: object) -> AsyncIterator[object]:
        yield pool

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        yield

    async def resolve_saved(self, _connection: object, lookups: Sequence[SavedLookup]) -> dict[int, str]:
        self.lookups += lookups
        return {
            lookup.place: self.saved[lookup.saved_query_id] for lookup in lookups if lookup.saved_query_id in self.saved
        }

    async def read_limits(
        self, _connection: object, org_ids: Iterable[str], defaults: OrgLimits
    ) -> dict[str, OrgLimits]:
        return dict.fromkeys(org_ids, defaults)

    async def insert_queries(
        self, _connection: object, queries: Sequence[NewQuery], events: Sequence[NewEvent]
    ) -> dict[str, RunState]:
        self.queries = list(queries)
        self.events = [decode_status(event.payload) for event in events]
        inserted = {
            query.query_id: make_state(**{name: getattr(query, name) for name in _KEPT})
            for query in queries
            if query.query_id not in self.states.keys() | self.deleted
        }
        self.states |= inserted
        return inserted

    async def read_states(self, _connection: object, query_ids: Iterable[str]) -> dict[str, RunState]:
        return {query_id: self.states[query_id] for query_id in query_ids if query_id in self.states}


# What a query's row and run have of its admission.
_KEPT = (
    "query_id",
    "org_id",
    "user_id",
    "mode",
    "status",
    "sql_hash",
    "saved_query_id",
    "task_id",
    "output_format",
    "fingerprint",
    "topic",
    "partition",
    "record_offset",
    "traceparent",
    "sequence",
)


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    made = Database()
    for name in ("statement", "resolve_saved", "read_limits", "insert_queries", "read_states"):
        monkeypatch.setattr(admission, name, getattr(made, name))
    return made


async def _admit(database: Database, *items: Legible, rules: Rules = RULES) -> list[Verdict]:
    return await admit(cast(DataPool, database), DatabaseClock(NOW), rules, items)


async def _admit_one(database: Database, item: Legible, rules: Rules = RULES) -> Verdict:
    (verdict,) = await _admit(database, item, rules=rules)
    return verdict


def _legible(offset: int = 41, **changes: Any) -> Legible:
    return _read(make_record(encode(make_request(**changes)), offset=offset))


async def test_a_new_request_is_admitted_as_queued_with_its_first_event(database: Database) -> None:
    item = _legible()
    verdict = await _admit_one(database, item)
    assert isinstance(verdict, Query)
    assert (verdict.request, verdict.sql, verdict.record) == (item.request, "SELECT 7 AS seven", item.record)
    assert verdict.state.status == "Queued"
    (event,) = database.events
    assert (event.sequence, event.status, event.previous_status, event.attempt) == (1, Status.QUEUED, None, 0)
    assert event.sql_hash == hash_sql("SELECT 7 AS seven", None)
    # The clock goes on from when it was told.
    assert NOW <= event.occurred_at < NOW + timedelta(minutes=1)


async def test_the_sql_itself_reaches_neither_row_nor_event(database: Database) -> None:
    verdict = await _admit_one(database, _legible(sql=f"SELECT '{CANARY}'", parameters={"p": CANARY}))
    assert CANARY not in repr(database.queries) + repr(database.events)
    assert CANARY not in repr(verdict)


async def test_a_duplicate_at_other_coordinates_is_done_at_once(database: Database) -> None:
    await _admit_one(database, _legible(offset=41))
    assert await _admit_one(database, _legible(offset=42)) == Done()


async def test_of_two_records_in_one_batch_the_first_is_the_querys_own(database: Database) -> None:
    first, second = await _admit(database, _legible(offset=41), _legible(offset=42))
    assert isinstance(first, Query)
    assert second == Done()
    assert len(database.queries) == 1
    assert len(database.events) == 1


async def test_a_rows_own_record_redelivered_is_admitted_as_it_now_stands(database: Database) -> None:
    await _admit_one(database, _legible())
    running = replace(database.states[QUERY_ID], status="Running", sequence=2, attempt=1, lease_token="token")
    database.states[QUERY_ID] = running
    verdict = await _admit_one(database, _legible())
    assert isinstance(verdict, Query)
    assert verdict.state == running
    assert verdict.sql == "SELECT 7 AS seven"


@pytest.mark.parametrize("status", ["Succeeded", "Failed"])
async def test_a_rows_own_record_is_done_once_the_query_is_terminal(database: Database, status: str) -> None:
    await _admit_one(database, _legible())
    database.states[QUERY_ID] = replace(database.states[QUERY_ID], status=status)
    assert await _admit_one(database, _legible()) == Done()


@pytest.mark.parametrize("offset", [41, 42])
async def test_another_request_under_a_known_id_is_a_conflict(database: Database, offset: int) -> None:
    await _admit_one(database, _legible())
    before = dict(database.states)
    verdict = await _admit_one(database, _legible(offset=offset, sql=CANARY))
    assert verdict == Refused(DeadCode.CONFLICT, "another request with this query_id was accepted before")
    assert database.states == before


async def test_a_conflict_with_a_finished_query_is_a_conflict_still(database: Database) -> None:
    await _admit_one(database, _legible())
    database.states[QUERY_ID] = replace(database.states[QUERY_ID], status="Succeeded")
    verdict = await _admit_one(database, _legible(offset=42, output_format=OutputFormat.CSV))
    assert isinstance(verdict, Refused)
    assert verdict.code is DeadCode.CONFLICT


async def test_a_deleted_query_does_not_run_again(database: Database) -> None:
    database.deleted.add(QUERY_ID)
    assert await _admit_one(database, _legible()) == Done()
    assert database.states == {}


async def test_an_invalid_request_is_a_dead_letter_and_a_failed_row_with_two_events(database: Database) -> None:
    item = _read_fields(output_format=CANARY)
    verdict = await _admit_one(database, item)
    reason = "output_format must be one of parquet, csv, json"
    assert verdict == Refused(DeadCode.INVALID_REQUEST, reason)
    assert database.states[QUERY_ID].status == "Failed"
    queued, failed = database.events
    assert [queued.sequence, failed.sequence] == [1, 2]
    assert [queued.status, failed.status] == [Status.QUEUED, Status.FAILED]
    assert (failed.previous_status, failed.attempt) == (Status.QUEUED, 0)
    assert (failed.error_code, failed.error_message) == (ErrorCode.INVALID_REQUEST, reason)
    (row,) = database.queries
    assert (row.status, row.error_code, row.error_message, row.sequence) == ("Failed", "INVALID_REQUEST", reason, 2)
    assert CANARY not in repr(database.queries) + repr(database.events)


async def test_every_malformed_record_is_a_dead_letter_of_its_own(database: Database) -> None:
    await _admit_one(database, _legible())
    for item in (_read_fields(max_rows=0), _read_fields(max_rows=0)):
        verdict = await _admit_one(database, item)
        assert isinstance(verdict, Refused)
        assert verdict.code is DeadCode.INVALID_REQUEST
    assert database.states[QUERY_ID].status == "Queued"


def _saved(**changes: Any) -> Legible:
    return _legible(sql=None, saved_query_id=SAVED_ID, **changes)


async def test_a_visible_saved_query_runs_its_text(database: Database) -> None:
    database.saved[SAVED_ID] = "SELECT $a"
    verdict = await _admit_one(database, _saved(user_id=OTHER_ID, roles=("analyst",)))
    assert isinstance(verdict, Query)
    assert verdict.sql == "SELECT $a"
    assert verdict.state.sql_hash == hash_sql("SELECT $a", None)
    assert verdict.facts.saved_query_id == SAVED_ID
    assert database.lookups == [SavedLookup(0, SAVED_ID, ORG_ID, OTHER_ID, ("analyst",))]


async def test_a_saved_query_that_is_not_visible_is_the_same_as_none(database: Database) -> None:
    assert await _admit_one(database, _saved()) == Done()
    assert database.states[QUERY_ID].status == "Failed"
    assert [(row.saved_query_id, row.sql_hash) for row in database.queries] == [(None, hash_sql("", None))]
    queued, failed = database.events
    assert (queued.saved_query_id, failed.saved_query_id) == (None, None)
    assert (failed.error_code, failed.error_message) == (
        ErrorCode.SAVED_QUERY_NOT_FOUND,
        "the saved query does not exist",
    )


@pytest.mark.parametrize("now", ["SELECT 2", None])
async def test_a_saved_query_edited_since_its_admission_is_not_run_as_another_text(
    database: Database, now: str | None
) -> None:
    database.saved[SAVED_ID] = "SELECT 1"
    await _admit_one(database, _saved())
    del database.saved[SAVED_ID]
    if now is not None:
        database.saved[SAVED_ID] = now
    verdict = await _admit_one(database, _saved())
    assert isinstance(verdict, Query)
    assert verdict.sql is None
    # Its story goes on under the hash that was admitted.
    assert verdict.facts.sql_hash == hash_sql("SELECT 1", None)


async def test_a_redelivered_query_keeps_the_trace_that_it_began(database: Database) -> None:
    first = await _admit_one(database, _legible())
    again = await _admit_one(database, _legible())
    assert isinstance(first, Query)
    assert isinstance(again, Query)
    assert again.facts.traceparent == first.facts.traceparent


async def test_waiting_counts_from_the_brokers_append_and_no_producer_sets_it(database: Database) -> None:
    stamped = make_record(encode(make_request()), timestamp_ms=1_500)
    unstamped = make_record(encode(make_request(query_id=OTHER_ID)), timestamp_ms=1_500, appended_by_broker=False)
    await _admit(database, _read(stamped), _read(unstamped))
    assert {row.query_id: row.appended_at for row in database.queries} == {QUERY_ID: 1.5, OTHER_ID: None}


async def test_each_lane_has_its_own_queue_time(database: Database) -> None:
    batch = _read(make_record(encode(make_request(mode=Mode.BATCH, query_id=OTHER_ID))), Mode.BATCH)
    await _admit(database, _legible(), batch)
    assert {row.query_id: row.queue_seconds for row in database.queries} == {QUERY_ID: 600.0, OTHER_ID: 86_400.0}


async def test_a_batch_answers_each_record_in_its_place(database: Database) -> None:
    database.deleted.add(OTHER_ID)
    verdicts = await _admit(
        database,
        _legible(offset=1),
        _legible(offset=2, query_id=OTHER_ID),
        _read_fields(max_rows=0),
        _legible(offset=4),
        _legible(offset=5, sql="SELECT 8"),
    )
    assert [type(verdict) for verdict in verdicts] == [Query, Done, Refused, Done, Refused]
