"""Headers of our records: the names that strangers read, and which trace a query belongs to."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from queryd.headers import build_headers, continue_trace, find_traceparent, to_kafka
from tests.unit.samples import NOW, QUERY_ID, TRACEPARENT


def _build(time: datetime = NOW) -> dict[str, str]:
    return build_headers(
        event_type="queryd.QueryStatusChanged",
        event_id="an id",
        subject=QUERY_ID,
        time=time,
        source="queryd",
        traceparent=TRACEPARENT,
        schema="QueryStatusChanged.v1.avsc",
    )


def test_headers_are_cloudevents_in_binary_mode_and_a_traceparent() -> None:
    assert _build() == {
        "ce_specversion": "1.0",
        "ce_id": "an id",
        "ce_source": "queryd",
        "ce_type": "queryd.QueryStatusChanged",
        "ce_subject": QUERY_ID,
        "ce_time": "2026-03-29T01:30:00.123Z",
        "ce_dataschema": "QueryStatusChanged.v1.avsc",
        "content-type": "application/avro",
        "traceparent": TRACEPARENT,
    }


def test_a_headers_time_is_utc_in_milliseconds_whatever_the_zone() -> None:
    east = datetime(2026, 3, 29, 3, 30, 0, 999_999, tzinfo=timezone(timedelta(hours=2)))
    assert _build(east)["ce_time"] == "2026-03-29T01:30:00.999Z"
    assert _build(datetime(2026, 3, 29, tzinfo=UTC))["ce_time"] == "2026-03-29T00:00:00.000Z"


def test_headers_reach_kafka_as_utf8_in_their_order() -> None:
    assert to_kafka({"b": "naïve", "a": ""}) == [("b", "naïve".encode()), ("a", b"")]


@pytest.mark.parametrize("name", ["traceparent", "Traceparent", "TRACEPARENT"])
def test_a_requests_trace_is_found_by_its_name(name: str) -> None:
    assert find_traceparent([("x", b"1"), ("y", None), (name, TRACEPARENT.encode())]) == TRACEPARENT


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"garbage",
        b"\xff\xfe",
        TRACEPARENT.encode() + b"\n",
        TRACEPARENT.encode() + b"-more",
        TRACEPARENT.upper().encode(),
        TRACEPARENT[:-1].encode(),
        b"ff" + TRACEPARENT[2:].encode(),
        b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01",
        b"00-4bf92f3577b34da6a3ce929d0e0e4736-" + b"0" * 16 + b"-01",
        TRACEPARENT.replace("4", "g").encode(),
    ],
)
def test_an_invalid_traceparent_is_as_good_as_none(value: bytes | None) -> None:
    assert find_traceparent([("traceparent", value)]) is None


def test_no_header_is_no_trace() -> None:
    assert find_traceparent([]) is None


def test_a_trace_goes_on_under_a_span_of_its_own() -> None:
    continued = continue_trace(TRACEPARENT)
    assert continued[:36] == TRACEPARENT[:36]
    assert continued[-3:] == TRACEPARENT[-3:]
    assert continued != TRACEPARENT
    assert find_traceparent([("traceparent", continued.encode())]) == continued


def test_a_new_trace_is_valid_and_nobody_elses() -> None:
    first, second = continue_trace(None), continue_trace(None)
    assert find_traceparent([("traceparent", first.encode())]) == first
    assert first[3:35] != second[3:35]
