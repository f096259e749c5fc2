"""Events to bytes and back, and what is said of bytes and fields that are no event."""

import io
import json
import math
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from queryd.codec import (
    MAX_EVENT_BYTES,
    MAX_SQL_BYTES,
    Event,
    EventTooLarge,
    InvalidEvent,
    Undecodable,
    decode_cancel,
    decode_fields,
    decode_request,
    decode_status,
    encode,
    to_request,
)
from queryd.contract import contract, load_contract, schema_folder
from queryd.events import (
    Column,
    Delivery,
    ErrorCode,
    Invalid,
    Mode,
    OrgId,
    OutputFormat,
    Parameter,
    QueryCancelRequested,
    QueryId,
    QueryRequested,
    QueryStatusChanged,
    ResultFile,
    Status,
    from_millis,
)
from tests.unit.samples import ORG_ID, QUERY_ID, QUICK, SAVED_ID, make_request, make_status

# CRC-64-AVRO of the schema `"null"`, as the Avro specification's own test suite gives it.
NULL_FINGERPRINT = 0x63DD24E7CC258F8A
# What every value of these tests contains, so that a sentence that quotes one is found out.
CANARY = "canary4711"

_INT = st.integers(1, 2**31 - 1)
_LONG = st.integers(1, 2**63 - 1)
_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
_ID = st.uuids().map(str)
_TIME = st.integers(-62_135_596_800_000, 253_402_300_799_999).map(from_millis)
_PARAMETER = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | _TEXT


def _optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


_ASKED_REQUESTS = st.builds(
    QueryRequested,
    query_id=_ID.map(QueryId),
    org_id=_ID.map(OrgId),
    mode=st.sampled_from(Mode),
    user_id=_optional(_ID),
    roles=st.lists(_TEXT, max_size=3).map(tuple),
    sql=_TEXT,
    saved_query_id=st.none(),
    parameters=st.dictionaries(_TEXT, _PARAMETER, max_size=4),
    task_id=_optional(_ID),
    output_format=st.sampled_from(OutputFormat),
    delivery=st.sampled_from(Delivery),
    engine=_optional(_TEXT),
    timeout_seconds=_optional(_INT),
    max_rows=_optional(_LONG),
    max_bytes_scanned=_optional(_LONG),
    requested_at=_optional(_TIME),
)
_CANCELS = st.builds(
    QueryCancelRequested,
    query_id=_ID.map(QueryId),
    org_id=_ID.map(OrgId),
    user_id=_optional(_ID),
    reason=_optional(_TEXT),
    requested_at=_optional(_TIME),
)
_FILES = st.builds(ResultFile, key=_TEXT, bytes=_LONG, rows=_LONG, etag=_TEXT, sha256=_optional(_TEXT))
_STATUSES = st.builds(
    QueryStatusChanged,
    query_id=_ID.map(QueryId),
    sequence=_INT,
    status=st.sampled_from(Status),
    attempt=_INT,
    org_id=_ID.map(OrgId),
    mode=st.sampled_from(Mode),
    sql_hash=_TEXT,
    occurred_at=_TIME,
    previous_status=_optional(st.sampled_from(Status)),
    user_id=_optional(_ID),
    task_id=_optional(_ID),
    saved_query_id=_optional(_ID),
    output_format=_optional(st.sampled_from(OutputFormat)),
    output_location=_optional(_TEXT),
    files=st.lists(_FILES, max_size=2).map(tuple),
    columns=st.lists(st.builds(Column, name=_TEXT, type=_TEXT), max_size=3).map(tuple),
    row_count=_optional(_LONG),
    bytes=_optional(_LONG),
    bytes_scanned=_optional(_LONG),
    duration_ms=_optional(_INT),
    queued_ms=_optional(_LONG),
    engine=_optional(_TEXT),
    inline_result=_optional(st.binary(max_size=64)),
    expires_at=_optional(_TIME),
    error_code=_optional(st.sampled_from(ErrorCode)),
    error_message=_optional(_TEXT),
)


def _stranger_encodes(name: str, fields: dict[str, Any]) -> bytes:
    """Single-object encoding by somebody who has `schemas/` alone."""
    path = max(schema_folder().glob(f"{name}.v*.avsc"), key=lambda found: int(found.stem.split(".v")[1]))
    schema = json.loads(path.read_text(encoding="utf-8"))
    fingerprint = next(key for key, known in contract().by_fingerprint.items() if known is contract().newest[name])
    body = io.BytesIO()
    fastavro.schemaless_writer(body, fastavro.parse_schema(schema), fields)
    return b"\xc3\x01" + fingerprint + body.getvalue()


def _request_fields(**changes: Any) -> dict[str, Any]:
    return decode_fields(encode(make_request()), "QueryRequested") | changes


@QUICK
@given(request=_ASKED_REQUESTS)
def test_a_request_survives_the_wire(request: QueryRequested) -> None:
    assert decode_request(encode(request)) == request


@QUICK
@given(cancel=_CANCELS)
def test_a_cancel_survives_the_wire(cancel: QueryCancelRequested) -> None:
    assert decode_cancel(encode(cancel)) == cancel


@QUICK
@given(event=_STATUSES)
def test_a_status_survives_the_wire_with_its_event_id(event: QueryStatusChanged) -> None:
    encoded = encode(event)
    assert decode_status(encoded) == event
    assert decode_fields(encoded, "QueryStatusChanged")["event_id"] == event.event_id


@QUICK
@given(parameters=st.dictionaries(_TEXT, _PARAMETER))
def test_a_parameter_keeps_its_type(parameters: dict[str, Parameter]) -> None:
    decoded = decode_request(encode(make_request(parameters=parameters))).parameters
    assert decoded == parameters
    assert {name: type(value) for name, value in decoded.items()} == {
        name: type(value) for name, value in parameters.items()
    }


def test_one_in_five_guises_stays_five_parameters() -> None:
    parameters: dict[str, Parameter] = {"long": 1, "double": 1.0, "boolean": True, "string": "1", "null": None}
    decoded = decode_request(encode(make_request(parameters=parameters))).parameters
    assert {name: repr(value) for name, value in decoded.items()} == {
        "long": "1",
        "double": "1.0",
        "boolean": "True",
        "string": "'1'",
        "null": "None",
    }


def test_a_double_that_is_no_number_survives_the_wire() -> None:
    decoded = decode_request(encode(make_request(parameters={"x": math.nan, "y": -math.inf, "z": -0.0}))).parameters
    assert repr(decoded) == "{'x': nan, 'y': -inf, 'z': -0.0}"


def test_the_fingerprint_is_the_specifications(tmp_path: Any) -> None:
    (tmp_path / "Nothing.v1.avsc").write_text('"null"', encoding="utf-8")
    (fingerprint,) = load_contract(tmp_path).by_fingerprint
    assert fingerprint == NULL_FINGERPRINT.to_bytes(8, "little")


def test_two_schemas_with_one_fingerprint_are_refused(tmp_path: Any) -> None:
    (tmp_path / "Nothing.v1.avsc").write_text('"null"', encoding="utf-8")
    (tmp_path / "Nothing.v2.avsc").write_text('{"type": "null"}', encoding="utf-8")
    with pytest.raises(ValueError, match="fingerprint"):
        load_contract(tmp_path)


@pytest.mark.parametrize("event", [make_request(), QueryCancelRequested(QUERY_ID, ORG_ID), make_status()])
def test_an_event_begins_with_the_marker_and_its_newest_fingerprint(event: Event) -> None:
    newest = contract().newest[type(event).__name__]
    assert encode(event)[:10] == b"\xc3\x01" + newest.fingerprint


def test_a_stranger_with_the_schemas_alone_is_understood() -> None:
    # Logical types as fastavro takes them: UUIDs and aware datetimes.
    encoded = _stranger_encodes(
        "QueryRequested",
        {
            "query_id": uuid.UUID(QUERY_ID),
            "org_id": uuid.UUID(ORG_ID),
            "mode": "batch",
            "saved_query_id": uuid.UUID(SAVED_ID),
            "requested_at": datetime(2026, 3, 29, 1, 30, 0, 123_000, tzinfo=UTC),
        },
    )
    assert decode_request(encoded) == QueryRequested(
        QUERY_ID,
        ORG_ID,
        Mode.BATCH,
        saved_query_id=SAVED_ID,
        requested_at=datetime(2026, 3, 29, 1, 30, 0, 123_000, tzinfo=UTC),
    )


def _broken() -> dict[str, tuple[bytes | None, str]]:
    whole = encode(make_request(roles=(CANARY,)))
    marked = whole[:10]
    return {
        "a tombstone": (None, "empty"),
        "nothing": (b"", "empty"),
        "JSON": (b'{"sql": "canary4711"}', "C3 01"),
        "another framing": (b"\1\0\0\0\1" + whole[10:], "C3 01"),
        "half a marker": (b"\xc3", "C3 01"),
        "the marker alone": (b"\xc3\x01", "fingerprint"),
        "half a fingerprint": (whole[:6], "fingerprint"),
        "an unknown fingerprint": (b"\xc3\x01" + b"canary47" + whole[10:], "fingerprint"),
        "a fingerprint in big-endian": (b"\xc3\x01" + whole[9:1:-1] + whole[10:], "fingerprint"),
        "no body": (marked, "body"),
        "half a body": (whole[:-5], "body"),
        "a string of negative length": (marked + b"\x01", "body"),
        "a string longer than memory": (marked + b"\xfe" * 9 + b"\x01", "body"),
        "a varint without end": (marked + b"\xff" * 40, "body"),
        "text that is no UTF-8": (whole.replace(CANARY.encode(), b"\xff" * len(CANARY)), "body"),
        "a union's branch that is none": (whole[:-1] + b"\x7e", "body"),
        "a byte too many": (whole + b"\0", "left over"),
        "two events": (whole + whole, "left over"),
        "another event of ours": (
            encode(QueryCancelRequested(QUERY_ID, ORG_ID, reason=CANARY)),
            "QueryCancelRequested",
        ),
        "a status": (encode(make_status(error_message=CANARY)), "QueryStatusChanged"),
    }


@pytest.mark.parametrize("case", _broken())
def test_bytes_that_are_no_request_are_undecodable_and_never_quoted(case: str) -> None:
    encoded, words = _broken()[case]
    with pytest.raises(Undecodable, match=words) as caught:
        decode_request(encoded)
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None
    # What a traceback would show: fastavro's own error quotes what it read.
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@QUICK
@given(garbage=st.binary(max_size=200))
def test_garbage_behind_a_good_header_is_undecodable_or_judged(garbage: bytes) -> None:
    header = encode(make_request())[:10]
    for decode in (decode_request, _decode_as("QueryCancelRequested", decode_cancel)):
        with suppress(Undecodable, InvalidEvent):
            decode(header + garbage)


def _decode_as(name: str, decode: Callable[[bytes], object]) -> Callable[[bytes], object]:
    fingerprint = contract().newest[name].fingerprint
    return lambda encoded: decode(b"\xc3\x01" + fingerprint + encoded[10:])


@QUICK
@given(cut=st.integers(0, 400), place=st.integers(0, 400), octet=st.integers(0, 255))
def test_a_damaged_event_is_undecodable_or_judged(cut: int, place: int, octet: int) -> None:
    damaged = bytearray(encode(make_request(roles=("analyst",), parameters={"a": 1, "b": "two"})))
    damaged[place % len(damaged)] = octet
    with suppress(Undecodable, InvalidEvent):
        decode_request(bytes(damaged[: len(damaged) - cut % len(damaged)]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"query_id": CANARY}, "query_id is not a UUID"),
        ({"query_id": ""}, "query_id is not a UUID"),
        ({"org_id": CANARY}, "org_id is not a UUID"),
        ({"user_id": CANARY}, "user_id is not a UUID"),
        ({"task_id": CANARY}, "task_id is not a UUID"),
        ({"sql": None, "saved_query_id": CANARY}, "saved_query_id is not a UUID"),
        ({"mode": CANARY}, "mode must be one of interactive, batch"),
        ({"mode": "Interactive"}, "mode must be one of interactive, batch"),
        ({"output_format": CANARY}, "output_format must be one of parquet, csv, json"),
        ({"delivery": CANARY}, "delivery must be one of object, inline_if_small"),
        ({"roles": [f"{CANARY}\0"]}, "roles holds a NUL character"),
        ({"sql": None}, "exactly one of sql and saved_query_id must be given"),
        ({"sql": CANARY, "saved_query_id": SAVED_ID}, "exactly one of sql and saved_query_id must be given"),
        ({"sql": CANARY * (MAX_SQL_BYTES // 10 + 1)}, "sql has more than 262144 bytes of UTF-8"),
        ({"sql": "é" * (MAX_SQL_BYTES // 2 + 1)}, "sql has more than 262144 bytes of UTF-8"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above zero"),
        ({"timeout_seconds": -4711}, "timeout_seconds must be above zero"),
        ({"max_rows": 0}, "max_rows must be above zero"),
        ({"max_rows": -(2**63)}, "max_rows must be above zero"),
        ({"max_bytes_scanned": -4711}, "max_bytes_scanned must be above zero"),
        ({"requested_at": 2**62}, "a time lies outside the years 1 to 9999"),
        ({"requested_at": -(2**62)}, "a time lies outside the years 1 to 9999"),
    ],
)
def test_an_invalid_field_is_named_and_its_value_never_quoted(changes: dict[str, Any], sentence: str) -> None:
    fields = _request_fields(**changes)
    with pytest.raises(InvalidEvent) as caught:
        to_request(fields)
    assert str(caught.value) == sentence
    assert caught.value.fields is fields
    assert CANARY not in repr(caught.value)


def test_sql_of_exactly_the_limit_is_accepted() -> None:
    sql = "é" * (MAX_SQL_BYTES // 2)
    assert decode_request(encode(make_request(sql=sql))).sql == sql


def test_empty_sql_is_sql() -> None:
    assert decode_request(encode(make_request(sql=""))).sql == ""


def test_an_id_in_capitals_is_the_same_id() -> None:
    fields = _request_fields(query_id=QUERY_ID.upper(), org_id=ORG_ID.upper(), user_id=ORG_ID.upper())
    request = to_request(fields)
    assert (request.query_id, request.org_id, request.user_id) == (QUERY_ID, ORG_ID, ORG_ID)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"query_id": CANARY}, "query_id is not a UUID"),
        ({"status": CANARY}, "status must be one of Queued, Running, Succeeded, Failed"),
        ({"previous_status": CANARY}, "previous_status must be one of Queued, Running, Succeeded, Failed"),
        ({"mode": CANARY}, "mode must be one of interactive, batch"),
        ({"occurred_at": 2**62}, "a time lies outside the years 1 to 9999"),
    ],
)
def test_an_invalid_status_is_told_field_by_field(changes: dict[str, Any], sentence: str) -> None:
    fields = decode_fields(encode(make_status()), "QueryStatusChanged") | changes
    encoded = encode(make_status())[:10] + _body("QueryStatusChanged", fields)
    with pytest.raises(InvalidEvent) as caught:
        decode_status(encoded)
    assert str(caught.value) == sentence


def test_an_invalid_cancel_is_told_too() -> None:
    cancel = encode(QueryCancelRequested(QUERY_ID, ORG_ID))
    fields = decode_fields(cancel, "QueryCancelRequested") | {"org_id": CANARY}
    with pytest.raises(InvalidEvent, match=r"^org_id is not a UUID$"):
        decode_cancel(cancel[:10] + _body("QueryCancelRequested", fields))


def _body(name: str, fields: dict[str, Any]) -> bytes:
    body = io.BytesIO()
    fastavro.schemaless_writer(body, contract().newest[name].parsed, fields)
    return body.getvalue()


def test_an_event_takes_512_kib_and_not_a_byte_more() -> None:
    # The length of a text costs the same three bytes at both sizes.
    room = MAX_EVENT_BYTES - len(encode(make_status(error_message="x" * 100_000))) + 100_000
    assert len(encode(make_status(error_message="x" * room))) == MAX_EVENT_BYTES
    with pytest.raises(EventTooLarge) as caught:
        encode(make_status(error_message=CANARY + "x" * room))
    assert CANARY not in str(caught.value)


def test_nothing_that_a_person_asked_for_is_in_a_repr() -> None:
    request = make_request(sql=CANARY, parameters={"name": CANARY})
    assert CANARY not in repr(request)
    assert CANARY not in repr(make_status(inline_result=CANARY.encode()))


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_an_integer_beyond_64_bits_is_refused_and_not_rounded(value: int) -> None:
    with pytest.raises(Invalid):
        encode(make_request(parameters={"n": value}))


def test_a_value_that_does_not_fit_is_refused_without_being_quoted() -> None:
    unfit: Any = ["canary4711"]
    with pytest.raises(Invalid) as refused:
        encode(make_request(parameters={"n": unfit}))
    assert "canary4711" not in str(refused.value)
