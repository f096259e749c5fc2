"""What a client sends and remembers, without a broker."""

import logging
import uuid
from typing import Any

import numpy as np
import pytest

import queryd
from queryd import read_kafka
from queryd.codec import NoRegistry, encode
from queryd.errors import ClientStopped, NotSubmitted
from queryd.events import Delivery, Invalid, Mode, OutputFormat, QueryId
from queryd.feed import Seen, group_config
from queryd.headers import ReplayHeader, find_traceparent
from queryd.requests import make_cancel, make_headers, make_request
from queryd.sender import Sender
from queryd.status_records import StatusRecord, Unreadable, read_all, read_status
from tests.unit.samples import ORG_ID, QUERY_ID, make_record, make_status


def test_every_public_name_is_there() -> None:
    assert [name for name in queryd.__all__ if not hasattr(queryd, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'QueryClientele'"):
        _ = queryd.QueryClientele


# Requests.


def test_a_request_says_what_its_options_say() -> None:
    request = make_request(
        "SELECT $x",
        org_id=ORG_ID.upper(),
        query_id=QUERY_ID.upper(),
        roles=["analysts"],
        parameters={"x": 1},
        mode="batch",
        output_format="csv",
        delivery="inline_if_small",
        timeout_seconds=1,
        max_rows=2,
        max_bytes_scanned=3,
    )
    assert (request.query_id, request.org_id, request.mode) == (QUERY_ID, ORG_ID, Mode.BATCH)
    assert (request.roles, request.parameters) == (("analysts",), {"x": 1})
    assert (request.output_format, request.delivery) == (OutputFormat.CSV, Delivery.INLINE_IF_SMALL)
    assert (request.timeout_seconds, request.max_rows, request.max_bytes_scanned) == (1, 2, 3)
    assert request.requested_at is not None


def test_an_id_is_made_up_once_a_request() -> None:
    ids = {make_request("SELECT 1", org_id=ORG_ID).query_id for _ in range(3)}
    assert len(ids) == 3
    assert all(uuid.UUID(query_id).version == 4 for query_id in ids)


@pytest.mark.parametrize(
    "options", [{"org_id": "nobody"}, {"org_id": ORG_ID, "query_id": "a secret"}], ids=["org_id", "query_id"]
)
def test_a_wrong_id_is_refused_without_quoting_it(options: Any) -> None:
    with pytest.raises(Invalid, match="is not a UUID") as refused:
        make_request("SELECT 1", **options)
    assert "secret" not in str(refused.value)


def test_a_request_is_the_same_when_it_comes_again_and_each_cancel_is_its_own() -> None:
    again = [make_request("SELECT 1", org_id=ORG_ID, query_id=QUERY_ID) for _ in range(2)]
    assert [dict(make_headers(request))["ce_id"] for request in again] == [QUERY_ID.encode()] * 2
    cancels = [make_cancel(QUERY_ID, org_id=ORG_ID, user_id=None, reason=None) for _ in range(2)]
    assert len({dict(make_headers(cancel))["ce_id"] for cancel in cancels}) == 2
    headers = [(name, value) for name, value in make_headers(again[0]) if isinstance(value, bytes)]
    assert find_traceparent(headers) is not None


def test_what_is_not_acknowledged_is_not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queryd.sender._DELIVERY_SECONDS", 0.2)
    # Nobody listens on a port that only root may open.
    sender = Sender({"bootstrap.servers": "127.0.0.1:1", "log_level": 0, "linger.ms": 0})
    answer = sender.send(make_request("SELECT 1", org_id=ORG_ID))
    with pytest.raises(NotSubmitted, match="timed out"):
        answer.result(15)
    sender.close()


def test_a_close_leaves_nobody_waiting_and_nothing_is_sent_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The broker is away, and the close gives up before librdkafka does.
    monkeypatch.setattr("queryd.sender._EXPIRY_SECONDS", -29.9)
    sender = Sender({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
    answers = [sender.send(make_request("SELECT 1", org_id=ORG_ID)) for _ in range(3)]
    sender.close()
    assert all(answer.done() for answer in answers)
    with pytest.raises(NotSubmitted, match="Purged"):
        answers[0].result()
    with pytest.raises(ClientStopped, match="closed"):
        sender.send(make_request("SELECT 1", org_id=ORG_ID))
    sender.close()


# The environment.


def test_kafka_is_found_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUERYD_KAFKA_BOOTSTRAP", raising=False)
    monkeypatch.delenv("QUERYD_SCHEMA_REGISTRY_URL", raising=False)
    with pytest.raises(LookupError, match="QUERYD_KAFKA_BOOTSTRAP is not set"):
        read_kafka()
    monkeypatch.setenv("QUERYD_KAFKA_BOOTSTRAP", "broker:9092")
    assert read_kafka() == {"bootstrap.servers": "broker:9092"}
    monkeypatch.setenv("QUERYD_KAFKA_OPTIONS", '{"sasl.username": "billing"}')
    assert read_kafka() == {"bootstrap.servers": "broker:9092", "sasl.username": "billing"}
    for wrong in ('["a secret"]', '"a secret"', "a secret", "7"):
        monkeypatch.setenv("QUERYD_KAFKA_OPTIONS", wrong)
        with pytest.raises(ValueError, match="must be a JSON object") as refused:
            read_kafka()
        assert "secret" not in str(refused.value)


def test_a_members_session_is_short_and_the_brokers_affair_under_the_newer_protocol() -> None:
    assert group_config({}, "billing") == {"group.id": "billing", "session.timeout.ms": 6000}
    assert group_config({"session.timeout.ms": 9000}, "billing")["session.timeout.ms"] == 9000
    assert "session.timeout.ms" not in group_config({"group.protocol": "consumer"}, "billing")


# Records.


def test_a_record_is_an_event_or_a_deletion_and_says_which_replay_it_is_of() -> None:
    event = make_status()
    read = read_status(make_record(encode(event)))
    assert (read.query_id, read.event, read.replay_id) == (QUERY_ID, event, None)
    headers = (("ce_id", b"x"), (ReplayHeader.ID.value, b"a replay"))
    assert read_status(make_record(encode(event), headers=headers)).replay_id == "a replay"
    gone = read_status(make_record(None, key=QUERY_ID.upper().encode()))
    assert (gone.query_id, gone.event) == (QUERY_ID, None)


def test_a_record_that_is_no_event_is_told_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[int] = []
    records = [
        make_record(b"a secret", offset=1),
        make_record(None, key=b"a secret", offset=2),
        make_record(encode(make_status()), offset=3),
    ]
    read = read_all(records, lambda record, _: told.append(record.offset))
    assert [each.record.offset for each in read] == [3]
    assert told == [1, 2]
    with pytest.raises(Unreadable) as unreadable:
        read_status(records[1])
    assert "secret" not in str(unreadable.value)
    assert "secret" not in caplog.text


def test_an_event_that_needs_a_registry_is_not_passed_over() -> None:
    with pytest.raises(NoRegistry, match="QUERYD_SCHEMA_REGISTRY_URL"):
        read_all([make_record(b"\0\0\0\0\7body")], lambda *_: None)


def _hear(seen: Seen, query_id: str, *sequences: int | None) -> list[bool]:
    return [
        seen.add(
            StatusRecord(
                QueryId(query_id),
                None if sequence is None else make_status(query_id=QueryId(query_id), sequence=sequence),
                make_record(None),
            )
        )
        for sequence in sequences
    ]


def test_what_was_seen_and_what_is_older_is_a_duplicate() -> None:
    seen = Seen()
    assert _hear(seen, QUERY_ID, 1, 1, 3, 2, 3, 4) == [True, False, True, False, False, True]
    # Deletions come in numbers; a copy behind them is none of a new story, which begins at 1.
    assert _hear(seen, QUERY_ID, None, None, 4, 1, 1, 2) == [True, False, False, True, False, True]


def test_the_queries_that_were_heard_of_last_are_remembered() -> None:
    seen = Seen(size=2)
    one, two, three = (str(uuid.uuid4()) for _ in range(3))
    assert _hear(seen, one, 1) + _hear(seen, two, 1) + _hear(seen, one, 2) + _hear(seen, three, 1) == [True] * 4
    assert (_hear(seen, one, 2), _hear(seen, two, 1)) == ([False], [True])


# What is not taken.


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("format", "output_format"),
        ("timeout", "timeout_seconds"),
        ("params", "parameters"),
        ("max_row", "max_rows"),
        ("org", "org_id"),
        ("role", "roles"),
        ("max_bytes_scaned", "max_bytes_scanned"),
    ],
)
def test_an_unknown_option_is_an_error_that_suggests_a_similar_one(option: str, meant: str) -> None:
    options: Any = {"org_id": ORG_ID, option: 1}
    with pytest.raises(TypeError, match=rf"no option '{option}': did you mean {meant}\?"):
        make_request("SELECT 1", **options)


def test_an_option_that_is_like_no_other_is_named_alone() -> None:
    options: Any = {"org_id": ORG_ID, "colour": "red"}
    with pytest.raises(TypeError, match=r"no option 'colour'$"):
        make_request("SELECT 1", **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("org_id", None),
        ("org_id", 7),
        ("user_id", "nobody"),
        ("task_id", b"x"),
        ("query_id", ""),
        ("saved_query_id", ORG_ID),
        ("roles", "analysts"),
        ("roles", 1),
        ("roles", ["analysts", 7]),
        ("roles", ["\ud800"]),
        ("mode", "fast"),
        ("mode", ["batch"]),
        ("output_format", "CSV"),
        ("output_format", None),
        ("delivery", True),
        ("timeout_seconds", 1.5),
        ("timeout_seconds", "5"),
        ("timeout_seconds", True),
        ("timeout_seconds", 0),
        ("timeout_seconds", 2**31),
        ("max_rows", -1),
        ("max_rows", 2**63),
        ("max_bytes_scanned", 1e9),
    ],
)
def test_a_value_that_a_field_can_not_have_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    options: Any = {"org_id": ORG_ID, field: value}
    with pytest.raises(Invalid, match=field):
        make_request("SELECT 1", **options)


@pytest.mark.parametrize("sql", [b"SELECT 1", 7, ["SELECT 1"], "SELECT '\ud800'", None])
def test_sql_is_text(sql: Any) -> None:
    with pytest.raises(Invalid, match="sql"):
        make_request(sql, org_id=ORG_ID)


def test_ids_are_uuids_or_their_text_and_amounts_any_whole_number() -> None:
    org, user, task, query = (uuid.uuid4() for _ in range(4))
    request = make_request(
        "SELECT 1", org_id=org, user_id=user, task_id=task, query_id=query, timeout_seconds=np.int64(5)
    )
    assert (request.org_id, request.user_id, request.task_id) == (str(org), str(user), str(task))
    assert (request.query_id, request.timeout_seconds, type(request.timeout_seconds)) == (str(query), 5, int)
    cancel = make_cancel(query, org_id=org, user_id=user, reason=None)
    assert (cancel.query_id, cancel.org_id, cancel.user_id) == (str(query), str(org), str(user))
    with pytest.raises(Invalid, match="user_id"):
        make_cancel(query, org_id=org, user_id="nobody", reason=None)
