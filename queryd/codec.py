"""Events to bytes and back: Avro single-object encoding (`C3 01`, the schema's fingerprint, the body), or Confluent's
wire format where the process uses a registry, see `queryd.registry`. What is read may be either.

Decoding goes in two steps, because they fail differently: bytes to fields (`Undecodable`: nobody can say whose they
are) and fields to an event (`InvalidEvent`: the ids may be legible, so somebody can be told).
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

from fastavro import schemaless_reader, schemaless_writer

from queryd.contract import SchemaVersion, contract
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
    Topic,
    from_millis,
    parse_uuid,
    to_millis,
)
from queryd.registry import HEADER_BYTES, MAGIC, URL_VARIABLE, SchemaUnusable, registry_in_use

MAX_SQL_BYTES = 262_144
# An event above this could jam the relay behind a broker's default message.max.bytes of 1 MiB.
MAX_EVENT_BYTES = 524_288

_LEAST_LONG = -(2**63)
_MARKER = b"\xc3\x01"
_HEADER_BYTES = 10

Event = QueryRequested | QueryCancelRequested | QueryStatusChanged
Fields = dict[str, Any]
_Word = TypeVar("_Word", bound=StrEnum)


class Undecodable(ValueError):
    """Bytes that are no event of the contract; the sentence says what was expected."""


class NoRegistry(Undecodable):
    """The record is in Confluent's wire format, and this process has been told of no registry."""


class EventTooLarge(ValueError):
    """An event above 512 KiB once encoded."""


class InvalidEvent(Invalid):
    """Decoded fields that break the contract. `fields` are as decoded; the sentence never quotes a value."""

    def __init__(self, sentence: str, fields: Fields) -> None:
        super().__init__(sentence)
        self.fields = fields


def encode(event: Event) -> bytes:
    """One event in the newest version of its schema.

    Raises `EventTooLarge` above 512 KiB, and `Invalid` for values that the schema has no room for; with a registry that
    was not asked before, `RegistryAway` and `RegistryRefused`.
    """
    name = type(event).__name__
    with _misfits_told(name):
        fields = _to_fields(event)
    return encode_fields(fields, name, topic_of(event))


def encode_fields(fields: Fields, name: str, topic: str) -> bytes:
    """Fields as decoded, in the newest version of schema `name`, for that topic; whether they make a valid event is not
    judged. Raises as `encode`."""
    registry = registry_in_use()
    with _misfits_told(name):
        written = _write(contract().newest[name], fields) if registry is None else registry.write(Topic(topic), fields)
    if len(written) > MAX_EVENT_BYTES:
        raise EventTooLarge(f"the event takes {len(written)} bytes, more than {MAX_EVENT_BYTES}")
    return written


@contextmanager
def _misfits_told(name: str) -> Iterator[None]:
    """Turn what a value raises for which the schema has no room into `Invalid`."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        # fastavro's own sentence quotes the value.
        raise Invalid(f"a field of the {name} does not fit its schema ({type(error).__name__})") from None


def topic_of(event: Event) -> Topic:
    """Where an event is published."""
    match event:
        case QueryRequested():
            return event.mode.topic
        case QueryCancelRequested():
            return Topic.CANCELLATIONS
        case QueryStatusChanged():
            return Topic.STATUS


def _write(schema: SchemaVersion, fields: Fields) -> bytes:
    written = io.BytesIO()
    written.write(_MARKER + schema.fingerprint)
    schemaless_writer(written, schema.parsed, fields)
    return written.getvalue()


def decode_fields(encoded: bytes | None, name: str) -> Fields:
    """The fields of an event of schema `name`, written in any version, as the newest version has them.

    Raises `Undecodable`; for Confluent's wire format also `RegistryAway`, where the registry has to be asked.
    """
    if not encoded:
        raise Undecodable("the record is empty")
    writer_name, writer, body_bytes = _find_writer(encoded)
    if writer_name != name:
        raise Undecodable(f"the record is a {writer_name}, and {name} is expected here")
    body = io.BytesIO(body_bytes)
    try:
        fields = schemaless_reader(body, writer, contract().newest[name].parsed)
    # fastavro documents no closed set of errors for broken bytes: it raises whatever reading them ran into. Nothing but
    # reading happens inside, so whatever is raised says the same thing.
    except Exception as error:  # noqa: BLE001
        raise Undecodable(f"the body does not fit the schema ({type(error).__name__})") from None
    if body.read(1):
        raise Undecodable("bytes are left over behind the body")
    if not isinstance(fields, dict):
        raise Undecodable("the body is no record")
    return fields


def _find_writer(encoded: bytes) -> tuple[str, Any, bytes]:
    """The writer's schema, its name and what it wrote."""
    if encoded[: len(MAGIC)] == MAGIC:
        registry = registry_in_use()
        if registry is None:
            raise NoRegistry(f"the record is in Confluent's wire format: set {URL_VARIABLE} to read it")
        try:
            found = registry.find_writer(encoded)
        except SchemaUnusable as error:
            raise Undecodable(str(error)) from None
        return found.name, found.parsed, encoded[HEADER_BYTES:]
    if encoded[:2] != _MARKER:
        raise Undecodable(
            "the record begins neither with C3 01, Avro's single-object encoding, nor with 00, Confluent's wire format"
        )
    writer = contract().by_fingerprint.get(encoded[2:_HEADER_BYTES])
    if writer is None:
        raise Undecodable("the schema's fingerprint is not one of this contract's")
    return writer.name, writer.parsed, encoded[_HEADER_BYTES:]


def decode_request(encoded: bytes | None) -> QueryRequested:
    """A `QueryRequested`; raises `Undecodable` or `InvalidEvent`."""
    return to_request(decode_fields(encoded, QueryRequested.__name__))


def decode_status(encoded: bytes | None) -> QueryStatusChanged:
    """A `QueryStatusChanged`; raises `Undecodable` or `InvalidEvent`."""
    return _to_status(decode_fields(encoded, QueryStatusChanged.__name__))


def decode_cancel(encoded: bytes | None) -> QueryCancelRequested:
    """A `QueryCancelRequested`; raises `Undecodable` or `InvalidEvent`."""
    return _to_cancel(decode_fields(encoded, QueryCancelRequested.__name__))


def to_request(fields: Fields) -> QueryRequested:
    """Judge decoded fields; raises `InvalidEvent` with a sentence that says what to mend."""
    try:
        request = QueryRequested(
            query_id=QueryId(parse_uuid(fields["query_id"], "query_id")),
            org_id=OrgId(parse_uuid(fields["org_id"], "org_id")),
            mode=_word(Mode, fields["mode"], "mode"),
            user_id=_optional_uuid(fields, "user_id"),
            roles=tuple(_text(role, "roles") for role in fields["roles"]),
            sql=fields["sql"],
            saved_query_id=_optional_uuid(fields, "saved_query_id"),
            parameters=fields["parameters"],
            task_id=_optional_uuid(fields, "task_id"),
            output_format=_word(OutputFormat, fields["output_format"], "output_format"),
            delivery=_word(Delivery, fields["delivery"], "delivery"),
            engine=fields["engine"],
            timeout_seconds=_optional_positive(fields, "timeout_seconds"),
            max_rows=_optional_positive(fields, "max_rows"),
            max_bytes_scanned=_optional_positive(fields, "max_bytes_scanned"),
            requested_at=_optional_time(fields, "requested_at"),
        )
        _check_statement(request)
    except Invalid as error:
        raise InvalidEvent(str(error), fields) from None
    return request


def _check_statement(request: QueryRequested) -> None:
    if (request.sql is None) == (request.saved_query_id is None):
        raise Invalid("exactly one of sql and saved_query_id must be given")
    if request.sql is not None and len(request.sql.encode()) > MAX_SQL_BYTES:
        raise Invalid(f"sql has more than {MAX_SQL_BYTES} bytes of UTF-8")


def _to_status(fields: Fields) -> QueryStatusChanged:
    try:
        previous, output_format, code = fields["previous_status"], fields["output_format"], fields["error_code"]
        return QueryStatusChanged(
            query_id=QueryId(parse_uuid(fields["query_id"], "query_id")),
            sequence=fields["sequence"],
            status=_word(Status, fields["status"], "status"),
            attempt=fields["attempt"],
            org_id=OrgId(parse_uuid(fields["org_id"], "org_id")),
            mode=_word(Mode, fields["mode"], "mode"),
            sql_hash=fields["sql_hash"],
            occurred_at=from_millis(fields["occurred_at"]),
            previous_status=None if previous is None else _word(Status, previous, "previous_status"),
            user_id=_optional_uuid(fields, "user_id"),
            task_id=_optional_uuid(fields, "task_id"),
            saved_query_id=_optional_uuid(fields, "saved_query_id"),
            output_format=None if output_format is None else _word(OutputFormat, output_format, "output_format"),
            output_location=fields["output_location"],
            files=tuple(ResultFile(**file) for file in fields["files"]),
            columns=tuple(Column(**column) for column in fields["columns"]),
            row_count=fields["row_count"],
            bytes=fields["bytes"],
            bytes_scanned=fields["bytes_scanned"],
            duration_ms=fields["duration_ms"],
            queued_ms=fields["queued_ms"],
            engine=fields["engine"],
            inline_result=fields["inline_result"],
            expires_at=_optional_time(fields, "expires_at"),
            error_code=None if code is None else _word(ErrorCode, code, "error_code"),
            error_message=fields["error_message"],
        )
    except Invalid as error:
        raise InvalidEvent(str(error), fields) from None


def _to_cancel(fields: Fields) -> QueryCancelRequested:
    try:
        return QueryCancelRequested(
            query_id=QueryId(parse_uuid(fields["query_id"], "query_id")),
            org_id=OrgId(parse_uuid(fields["org_id"], "org_id")),
            user_id=_optional_uuid(fields, "user_id"),
            reason=fields["reason"],
            requested_at=_optional_time(fields, "requested_at"),
        )
    except Invalid as error:
        raise InvalidEvent(str(error), fields) from None


def _to_fields(event: Event) -> Fields:
    fields = {name: _to_wire(getattr(event, name)) for name in event.__dataclass_fields__}
    if isinstance(event, QueryStatusChanged):
        fields["event_id"] = event.event_id
    if isinstance(event, QueryRequested):
        fields["parameters"] = {name: _check_width(value) for name, value in event.parameters.items()}
    return fields


def _check_width(value: Parameter) -> Parameter:
    # Avro's union would take a wider integer for a double, and round it.
    if isinstance(value, int) and not _LEAST_LONG <= value <= -_LEAST_LONG - 1:
        raise OverflowError
    return value


# Most fields: only what is none of these is worth asking what it is.
_PLAIN = frozenset({str, int, float, bool, bytes, dict, type(None)})


def _to_wire(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    match value:
        case datetime():
            return to_millis(value)
        case StrEnum():
            return value.value
        case tuple():
            return [_to_wire(part) for part in value]
        case ResultFile() | Column():
            return {name: getattr(value, name) for name in value.__dataclass_fields__}
        case _:
            return value


def _word(words: type[_Word], value: str, name: str) -> _Word:
    try:
        return words(value)
    except ValueError:
        raise Invalid(f"{name} must be one of {', '.join(words)}") from None


def _text(value: str, name: str) -> str:
    if "\0" in value:
        raise Invalid(f"{name} holds a NUL character")
    return value


def _optional_uuid(fields: Fields, name: str) -> str | None:
    return None if fields[name] is None else parse_uuid(fields[name], name)


def _optional_positive(fields: Fields, name: str) -> int | None:
    value: int | None = fields[name]
    if value is not None and value <= 0:
        raise Invalid(f"{name} must be above zero")
    return value


def _optional_time(fields: Fields, name: str) -> datetime | None:
    return None if fields[name] is None else from_millis(fields[name])
