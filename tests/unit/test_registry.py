"""Confluent's wire format beside single-object encoding, with the registry that confluent-kafka has for tests, and with
one that is away, or says no."""

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar, cast

import pytest
from confluent_kafka.schema_registry import Schema
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from queryd import registry as registry_module
from queryd.codec import (
    MAX_EVENT_BYTES,
    Event,
    EventTooLarge,
    NoRegistry,
    Undecodable,
    decode_cancel,
    decode_fields,
    decode_request,
    decode_status,
    encode,
    topic_of,
)
from queryd.contract import contract
from queryd.events import (
    Column,
    Invalid,
    Mode,
    OrgId,
    QueryCancelRequested,
    QueryId,
    Topic,
)
from queryd.identity import fingerprint_request
from queryd.kafka.record import Record
from queryd.registry import (
    EVENT_OF_TOPIC,
    Registry,
    RegistryAway,
    RegistryRefused,
    announce_schemas,
    registry_in_use,
    use,
    use_environment,
)
from queryd.status_records import read_status
from service.doctor import examine_registry
from service.settings import Settings
from tests.unit.samples import ORG_ID, QUERY_ID, make_request, make_status

MOCK = "mock://registry"
SINGLE_OBJECT_HEADER = 10
CONFLUENT_HEADER = 5
# An event of each kind, and what reads it.
EVENTS: list[tuple[Event, Any]] = [
    (make_request(parameters={"n": 1, "x": 1.0, "s": "1", "b": True, "none": None}), decode_request),
    (make_request(mode=Mode.BATCH), decode_request),
    (QueryCancelRequested(QueryId(QUERY_ID), OrgId(ORG_ID), reason="no need"), decode_cancel),
    (make_status(), decode_status),
]


@pytest.fixture(autouse=True)
def _plain_again() -> Iterator[None]:
    yield
    use(None)


def _used(url: str = MOCK, **options: Any) -> Registry:
    use(url, options)
    registry = registry_in_use()
    assert registry is not None
    return registry


def _schema_id(encoded: bytes) -> int:
    return int.from_bytes(encoded[1:CONFLUENT_HEADER], "big")


@pytest.mark.parametrize(("event", "decode"), EVENTS)
def test_an_event_comes_back_in_either_format(event: Event, decode: Any) -> None:
    plain = encode(event)
    registry = _used()
    framed = encode(event)
    assert framed[:1] == b"\0" and plain[:2] == b"\xc3\x01"
    # The format is the frame; what it frames is the same.
    assert framed[CONFLUENT_HEADER:] == plain[SINGLE_OBJECT_HEADER:]
    # Whoever has the registry reads both.
    assert decode(framed) == decode(plain) == event
    assert registry.client.get_schema(_schema_id(framed)).schema_str == contract().newest[type(event).__name__].text


@pytest.mark.parametrize(("event", "_decode"), EVENTS)
def test_confluents_own_consumer_reads_our_events(event: Event, _decode: Any) -> None:
    registry = _used()
    read = AvroDeserializer(registry.client)
    fields: Any = read(encode(event), SerializationContext(topic_of(event).value, MessageField.VALUE))
    assert str(fields["query_id"]) == QUERY_ID
    assert fields.keys() == decode_fields(encode(event), type(event).__name__).keys()


def test_confluents_own_producer_is_read_whatever_its_schemas_text() -> None:
    registry = _used()
    theirs = json.loads(contract().newest["QueryRequested"].text)
    # As code generators do: another namespace, no docs, hints for a language, a field left out, another order.
    theirs["namespace"] = "com.example"
    theirs["fields"] = [
        {key: value for key, value in field.items() if key != "doc"}
        for field in reversed(theirs["fields"])
        if field["name"] != "engine"
    ]
    next(field for field in theirs["fields"] if field["name"] == "mode")["type"] = {
        "type": "string",
        "avro.java.string": "String",
    }
    request = make_request()
    fields = decode_fields(encode(request), "QueryRequested")
    del fields["engine"]
    topic = request.mode.topic.value
    write = AvroSerializer(registry.client, json.dumps(theirs), conf={"subject.name.strategy.type": "RECORD"})
    framed = write(fields, SerializationContext(topic, MessageField.VALUE))
    assert _schema_id(framed or b"") != _schema_id(encode(request))
    assert decode_request(framed) == request


def test_the_same_request_in_both_formats_is_the_same_request() -> None:
    request = make_request(parameters={"n": 1, "x": 1.0})
    plain = encode(request)
    _used()
    framed = encode(request)
    prints = {fingerprint_request(decode_fields(encoded, "QueryRequested"), key=None) for encoded in (plain, framed)}
    assert len(prints) == 1


def test_a_subject_of_each_topic_has_the_checked_in_schema_and_keeps_its_history() -> None:
    registry = _used()
    done = registry.apply()
    registry.apply()
    registry.announce()
    subjects = {f"{topic.value}-value": name for topic, name in EVENT_OF_TOPIC.items()}
    assert set(registry.client.get_subjects()) == set(subjects) == set(done)
    for subject, name in subjects.items():
        texts = [
            registry.client.get_version(subject, version).schema.schema_str
            for version in sorted(registry.client.get_versions(subject))
        ]
        assert texts == [version.text for version in contract().versions(name)]
    # Dead letters are other topics' bytes, and each other topic has its event.
    assert {*EVENT_OF_TOPIC, Topic.DEAD_LETTERS} == set(Topic)


def test_an_event_has_at_most_512_kib_in_this_format_too() -> None:
    _used()
    names = tuple(Column("x" * 1000, "INTEGER") for _ in range(MAX_EVENT_BYTES // 1000))
    with pytest.raises(EventTooLarge):
        encode(make_status(columns=names))


def test_a_value_that_does_not_fit_is_not_quoted() -> None:
    _used()
    with pytest.raises(Invalid, match="does not fit its schema") as raised:
        encode(make_request(parameters={"n": 2**70}))
    assert str(2**70) not in str(raised.value)


def test_without_a_registry_a_record_says_what_to_set() -> None:
    _used()
    framed = encode(make_request())
    use(None)
    with pytest.raises(NoRegistry, match="set QUERYD_SCHEMA_REGISTRY_URL"):
        decode_request(framed)


def test_who_follows_the_status_topic_without_a_registry_passes_over_nothing() -> None:
    _used()
    record = Record(Topic.STATUS.value, 0, 0, None, encode(make_status()), (), None, False, 0.0, 1)
    assert read_status(record).event == make_status()
    use(None)
    with pytest.raises(NoRegistry):
        read_status(record)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (b"\0", "shorter than the 5 bytes"),
        (b"\0\0\0\0", "shorter than the 5 bytes"),
        (b"\0\0\0\0\x63body", "does not know the record's schema id"),
        (b"\x01" + bytes(20), "begins neither with"),
    ],
)
def test_a_record_that_nobody_can_read_is_undecodable(record: bytes, sentence: str) -> None:
    _used()
    with pytest.raises(Undecodable, match=sentence):
        decode_request(record)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (Schema('{"type": "object"}', "JSON"), "no self-contained Avro schema"),
        (Schema("not a schema", "AVRO"), "can't be read"),
        (Schema('{"type": "record", "name": "Other", "fields": []}', "AVRO"), "is a Other, and QueryRequested is exp"),
        (Schema('{"type": "record", "name": "QueryRequested", "fields": []}', "AVRO"), "does not fit the schema"),
    ],
)
def test_a_record_of_a_foreign_schema_is_undecodable(schema: Schema, sentence: str) -> None:
    registry = _used()
    schema_id = registry.client.register_schema("elsewhere", schema)
    with pytest.raises(Undecodable, match=sentence):
        decode_request(b"\0" + schema_id.to_bytes(4, "big") + b"body")


def test_bytes_left_over_or_missing_are_told() -> None:
    _used()
    framed = encode(make_request())
    with pytest.raises(Undecodable, match="left over"):
        decode_request(framed + b"x")
    with pytest.raises(Undecodable, match="does not fit"):
        decode_request(framed[:-1])


def test_an_id_that_is_given_out_later_is_asked_about_again(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encode(make_request())[SINGLE_OBJECT_HEADER:]
    registry = _used()
    schema = Schema(contract().newest["QueryRequested"].text, "AVRO")
    taken = registry.client.register_schema("elsewhere", Schema('"string"', "AVRO"))
    record = b"\0" + (taken + 1).to_bytes(4, "big") + body
    with pytest.raises(Undecodable):
        decode_request(record)
    assert registry.client.register_schema("theirs", schema) == taken + 1
    # Not for each of ten thousand malformed records.
    assert registry.missing([record]) == set()
    monkeypatch.setattr(registry_module, "_UNKNOWN_SECONDS", 0.0)
    assert registry.missing([record]) == {taken + 1}
    registry.fetch({taken + 1})
    assert decode_request(record) == make_request()
    assert registry.missing([record, None, b"", b"\xc3\x01", b"\0"]) == set()


# What a registry over HTTP answers, and what that means.


class _Answers(BaseHTTPRequestHandler):
    """Answers every question as the test says, and counts them."""

    answer: ClassVar[tuple[int, Any]] = (200, {})
    asked: ClassVar[list[str]] = []
    bodies: ClassVar[list[bytes]] = []
    was_asked: ClassVar[threading.Event] = threading.Event()

    def _say(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        type(self).asked.append(f"{self.command} {self.path}")
        type(self).bodies.append(body)
        type(self).was_asked.set()
        status, answer = type(self).answer
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = _say  # noqa: N815 — the names that http.server looks for

    def log_message(self, format: str, *_args: Any) -> None:  # noqa: A002
        """Silence."""


@contextmanager
def _answering(status: int, body: Any) -> Iterator[str]:
    _Answers.answer, _Answers.asked, _Answers.bodies = (status, body), [], []
    _Answers.was_asked.clear()
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        registry = registry_in_use()
        if registry is not None:
            registry.client.close()


def _nobody() -> str:
    """A URL where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


RECORD = b"\0\0\0\0\x07body"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, {"error_code": 50001, "message": "canary"}),
        (503, b"<html>canary</html>"),
        (429, {"error_code": 42901, "message": "canary"}),
        (401, {"error_code": 40101, "message": "canary"}),
        # Some other server's: a wrong URL must not make dead letters.
        (404, {"error_code": 404, "message": "HTTP 404 canary"}),
        (404, b"<html>canary</html>"),
        (200, b"<html>canary</html>"),
        (200, []),
    ],
)
def test_a_record_is_not_judged_by_a_registry_that_does_not_answer(
    status: int, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with _answering(status, body) as url:
        _used(url)
        for _ in range(2):
            with pytest.raises(RegistryAway) as raised:
                decode_request(RECORD)
            assert "canary" not in str(raised.value)
    # Told once an outage.
    assert len([line for line in caplog.messages if "does not answer" in line]) == 1
    assert "canary" not in caplog.text


def test_a_registry_that_knows_no_such_schema_has_answered() -> None:
    with _answering(404, {"error_code": 40403, "message": "Schema 7 not found"}) as url:
        _used(url)
        for _ in range(3):
            with pytest.raises(Undecodable, match="does not know"):
                decode_request(RECORD)
        assert len(_Answers.asked) == 1


def test_nobody_at_the_url_is_away() -> None:
    _used(_nobody())
    with pytest.raises(RegistryAway):
        encode(make_request())
    with pytest.raises(RegistryAway):
        decode_request(RECORD)


@pytest.mark.parametrize("status", [401, 403, 409, 422])
def test_a_schema_that_is_refused_stops_whoever_writes(status: int) -> None:
    with _answering(status, {"error_code": status * 100, "message": "canary"}) as url:
        registry = _used(url)
        for ask in (registry.announce, registry.apply, lambda: encode(make_request())):
            with pytest.raises(RegistryRefused, match=f"HTTP status {status}") as raised:
                ask()
            assert "canary" not in str(raised.value)


@pytest.mark.parametrize("more", [{}, {"version": 1, "subject": "s", "schema": "{}"}], ids=["id", "all"])
@pytest.mark.parametrize("registers", [True, False])
def test_after_the_announcement_nothing_is_asked(registers: bool, more: dict[str, Any]) -> None:
    # Older registries answer with the id alone.
    with _answering(200, {"id": 7} | more) as url:
        registry = _used(url, **{"auto.register.schemas": registers})
        registry.announce()
        # Registered, or only looked up where others register.
        assert [line.split("?")[0].count("/versions") for line in _Answers.asked] == [int(registers)] * 4
        _Answers.answer = (500, {"error_code": 50001, "message": "gone"})
        for event, _ in EVENTS:
            assert encode(event)[:CONFLUENT_HEADER] == b"\0\0\0\0\x07"
        assert len(_Answers.asked) == 4


def test_applying_registers_the_schemas_under_full_transitive_compatibility() -> None:
    with _answering(200, {"id": 7, "version": 1, "subject": "s", "schema": "{}", "compatibility": "x"}) as url:
        _used(url, **{"basic.auth.user.info": "user:canary"}).apply()
        told = dict(zip(_Answers.asked, map(json.loads, _Answers.bodies), strict=True))
    for topic, name in EVENT_OF_TOPIC.items():
        assert told[f"PUT /config/{topic.value}-value"] == {"compatibility": "FULL_TRANSITIVE"}
        registered = told[f"POST /subjects/{topic.value}-value/versions?normalize=False"]
        assert json.loads(registered["schema"])["name"] == name


async def test_a_start_waits_for_the_registry(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_AGAIN_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "queryd.registry")
    with _answering(503, {"error_code": 50301, "message": "starting"}) as url:
        _used(url)
        announcing = asyncio.create_task(announce_schemas())
        assert await asyncio.to_thread(_Answers.was_asked.wait, 10)
        assert not announcing.done()
        _Answers.answer = (200, {"id": 7, "version": 1, "subject": "s", "schema": "{}"})
        await asyncio.wait_for(announcing, 10)
    assert "the schema registry is back" in caplog.messages
    use(None)
    await announce_schemas()


def test_the_doctor_says_whether_the_registry_answers_and_what_to_do() -> None:
    settings = cast(Settings, None)
    assert list(examine_registry(settings)) == []
    _used()
    assert [finding.state for finding in examine_registry(settings)] == ["well"]
    _used(_nobody())
    [away] = examine_registry(settings)
    assert (away.state, "look at QUERYD_SCHEMA_REGISTRY_URL" in away.advice) == ("wrong", True)
    with _answering(403, {"error_code": 40301, "message": "canary"}) as url:
        _used(url)
        [refused] = examine_registry(settings)
    assert (refused.state, "run `queryd topics apply`" in refused.advice) == ("wrong", True)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://user:canary@localhost", {"nonsense": 1}),
        ("localhost:8081", {}),
        (MOCK, {"auto.register.schemas": "no"}),
    ],
)
def test_what_the_client_does_not_take_is_told_at_once(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        use(url, options)


def test_the_environment_names_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("QUERYD_SCHEMA_REGISTRY"):
            monkeypatch.delenv(name)
    use_environment()
    assert registry_in_use() is None
    monkeypatch.setenv("QUERYD_SCHEMA_REGISTRY_URL", MOCK)
    monkeypatch.setenv("QUERYD_SCHEMA_REGISTRY_OPTIONS", '{"auto.register.schemas": false}')
    use_environment()
    registry = registry_in_use()
    assert registry is not None
    # Nothing is registered there, and it may not be.
    with suppress(RegistryRefused):
        registry.announce()
    assert registry.client.get_subjects() == []
