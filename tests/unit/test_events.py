"""Ids and times of the contract."""

import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queryd.events import Invalid, Mode, QueryId, Status, Topic, event_id, from_millis, parse_uuid, to_millis
from tests.unit.samples import QUERY_ID, QUICK, make_status


def test_the_same_fact_always_has_the_same_id() -> None:
    # Frozen: subscribers drop by it what comes twice.
    assert event_id(QueryId("00000000-0000-4000-8000-000000000000"), 1) == "7d785322-a380-512b-8bec-39b59596e66d"


@QUICK
@given(query=st.uuids(), sequence=st.integers(1, 2**31 - 1))
def test_an_event_id_is_the_uuid5_of_query_and_sequence(query: uuid.UUID, sequence: int) -> None:
    assert event_id(QueryId(str(query)), sequence) == str(uuid.uuid5(query, str(sequence)))


def test_events_of_one_query_have_ids_of_their_own() -> None:
    events = [make_status(sequence=sequence) for sequence in range(1, 100)]
    assert len({event.event_id for event in events}) == len(events)
    assert events[0].event_id == event_id(QUERY_ID, 1)


@QUICK
@given(identifier=st.uuids())
def test_a_uuid_has_one_canonical_form(identifier: uuid.UUID) -> None:
    assert parse_uuid(str(identifier), "query_id") == str(identifier)
    assert parse_uuid(str(identifier).upper(), "query_id") == str(identifier)


@pytest.mark.parametrize(
    "text",
    [
        "",
        QUERY_ID[:-1],
        QUERY_ID + "0",
        QUERY_ID + "\n",
        " " + QUERY_ID,
        "{" + QUERY_ID + "}",
        "urn:uuid:" + QUERY_ID,
        QUERY_ID.replace("-", ""),
        QUERY_ID.replace("-", "_"),
        QUERY_ID.replace("0", "g"),
        # Digits to `int`, and to nobody else.
        QUERY_ID.replace("0", "\u0660"),
        QUERY_ID.encode(),
        None,
        7,
    ],
)
def test_what_is_not_in_the_form_8_4_4_4_12_is_no_uuid(text: object) -> None:
    with pytest.raises(Invalid, match=r"^query_id is not a UUID$"):
        parse_uuid(text, "query_id")


@QUICK
@given(moment=st.datetimes(timezones=st.just(UTC)))
def test_a_time_survives_the_wire_in_milliseconds(moment: datetime) -> None:
    seen = from_millis(to_millis(moment))
    assert seen == moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    assert seen.tzinfo is UTC


def test_a_time_is_the_same_in_every_time_zone() -> None:
    east = datetime(2026, 3, 29, 3, 30, tzinfo=timezone(timedelta(hours=2)))
    assert to_millis(east) == to_millis(datetime(2026, 3, 29, 1, 30, tzinfo=UTC)) == 1_774_747_800_000


def test_a_time_before_the_epoch_is_rounded_down() -> None:
    assert to_millis(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)) == -1


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(Invalid, match="time zone"):
        to_millis(datetime(2026, 3, 29, 1, 30))


@pytest.mark.parametrize("millis", [253_402_300_800_000, -62_135_596_800_001, 2**63 - 1, -(2**63)])
def test_a_time_outside_the_years_1_to_9999_is_refused(millis: int) -> None:
    with pytest.raises(Invalid, match="years 1 to 9999"):
        from_millis(millis)


def test_a_lane_is_a_topic_of_its_own() -> None:
    assert {mode: mode.topic for mode in Mode} == {
        Mode.INTERACTIVE: Topic.REQUESTS_INTERACTIVE,
        Mode.BATCH: Topic.REQUESTS_BATCH,
    }


def test_two_of_the_four_words_are_terminal() -> None:
    assert [status.value for status in Status if status.terminal] == ["Succeeded", "Failed"]
    assert [status.value for status in Status if not status.terminal] == ["Queued", "Running"]
