"""Requests and cancels, as a client publishes them."""

import difflib
import operator
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Required, SupportsIndex, TypedDict, TypeVar, Unpack
from uuid import UUID

from queryd.contract import contract
from queryd.events import (
    Delivery,
    Invalid,
    Mode,
    OrgId,
    OutputFormat,
    QueryCancelRequested,
    QueryId,
    QueryRequested,
    parse_uuid,
)
from queryd.headers import build_headers, continue_trace, to_kafka
from queryd.parameters import ParameterValue, to_wire

_Word = TypeVar("_Word", bound=StrEnum)


class SubmitOptions(TypedDict, total=False):
    """What a request says beside its SQL.

    `query_id` is the idempotency key; a random one is generated if it is missing. `parameters` bind as `$name`, see
    `queryd.parameters`. A request has `saved_query_id` or SQL. Ids are UUIDs or their text. Limits are in seconds, rows
    and bytes; the service reduces them to its own limits.
    """

    org_id: Required[str | UUID]
    user_id: str | UUID | None
    roles: Sequence[str]
    query_id: str | UUID | None
    saved_query_id: str | UUID | None
    parameters: Mapping[str, ParameterValue] | None
    mode: Mode | str
    task_id: str | UUID | None
    output_format: OutputFormat | str
    delivery: Delivery | str
    timeout_seconds: SupportsIndex | None
    max_rows: SupportsIndex | None
    max_bytes_scanned: SupportsIndex | None


# Names in other clients that are not similar enough to the option's name to be found by spelling.
_OTHER_NAMES = {
    "format": "output_format",
    "id": "query_id",
    "inline": "delivery",
    "lane": "mode",
    "org": "org_id",
    "params": "parameters",
    "priority": "mode",
    "role": "roles",
    "saved": "saved_query_id",
    "task": "task_id",
    "timeout": "timeout_seconds",
    "user": "user_id",
}
# The maximum of the schema's int and long.
_MOST_INT = 2**31 - 1
_MOST_LONG = 2**63 - 1


def make_request(sql: str | None, **options: Unpack[SubmitOptions]) -> QueryRequested:
    """Build the request for SQL, or for the saved query in the options.

    Raises:
        TypeError: for an unknown option; the error suggests a similar one.
        Invalid: for a wrong value; the error names the field.
    """
    check_options(options)
    if options.get("org_id") is None:
        raise Invalid("org_id is missing: give the org that the query belongs to")
    saved = _optional_id(options, "saved_query_id")
    if sql is not None:
        _check_text(sql, "sql")
    if (sql is None) == (saved is None):
        raise Invalid("give exactly one of sql and saved_query_id")
    return QueryRequested(
        query_id=QueryId(_optional_id(options, "query_id") or str(uuid.uuid4())),
        org_id=OrgId(parse_uuid(options["org_id"], "org_id")),
        mode=_read_word(Mode, options, "mode", Mode.INTERACTIVE),
        user_id=_optional_id(options, "user_id"),
        roles=_read_roles(options.get("roles")),
        sql=sql,
        saved_query_id=saved,
        parameters=to_wire(options.get("parameters")),
        task_id=_optional_id(options, "task_id"),
        output_format=_read_word(OutputFormat, options, "output_format", OutputFormat.PARQUET),
        delivery=_read_word(Delivery, options, "delivery", Delivery.OBJECT),
        timeout_seconds=_optional_amount(options, "timeout_seconds", _MOST_INT),
        max_rows=_optional_amount(options, "max_rows", _MOST_LONG),
        max_bytes_scanned=_optional_amount(options, "max_bytes_scanned", _MOST_LONG),
        requested_at=datetime.now(UTC),
    )


def check_options(options: Mapping[str, object]) -> None:
    """Raise `TypeError` for an unknown option."""
    for name in options:
        if name not in SubmitOptions.__annotations__:
            near = difflib.get_close_matches(name, SubmitOptions.__annotations__, n=1)
            meant = _OTHER_NAMES.get(name) or (near[0] if near else None)
            raise TypeError(f"submit() has no option {name!r}" + ("" if meant is None else f": did you mean {meant}?"))


def _optional_id(options: Mapping[str, Any], name: str) -> str | None:
    value = options.get(name)
    return None if value is None else parse_uuid(value, name)


def _read_roles(roles: object) -> tuple[str, ...]:
    if roles is None:
        return ()
    # A string is a sequence of letters, so it must be refused explicitly.
    if isinstance(roles, str) or not isinstance(roles, Iterable):
        raise Invalid('roles must be a list of names: roles=["analysts"]')
    listed = tuple(roles)
    for role in listed:
        _check_text(role, "each of roles")
    return listed


def _check_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise Invalid(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{name} can't be encoded as UTF-8: it contains a lone surrogate") from None


def _read_word(words: type[_Word], options: Mapping[str, Any], name: str, default: _Word) -> _Word:
    value = options.get(name, default)
    try:
        return words(value)
    except ValueError:
        known = ", ".join(words)
        raise Invalid(f"{name} must be one of {known}") from None


def _optional_amount(options: Mapping[str, Any], name: str, most: int) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise Invalid(f"{name} must be an integer, not {type(value).__name__}")
    amount = operator.index(value)
    if not 0 < amount <= most:
        raise Invalid(f"{name} must be above 0 and at most {most}")
    return amount


def make_cancel(
    query_id: str | UUID, *, org_id: str | UUID, user_id: str | UUID | None, reason: str | None
) -> QueryCancelRequested:
    """The request that a query of that org stops; raises `Invalid` where an id is no UUID."""
    if reason is not None:
        _check_text(reason, "reason")
    return QueryCancelRequested(
        QueryId(parse_uuid(query_id, "query_id")),
        OrgId(parse_uuid(org_id, "org_id")),
        user_id=None if user_id is None else parse_uuid(user_id, "user_id"),
        reason=reason,
        requested_at=datetime.now(UTC),
    )


def make_headers(request: QueryRequested | QueryCancelRequested) -> list[tuple[str, str | bytes | None]]:
    """CloudEvents headers of a request, and a trace of its own."""
    name = type(request).__name__
    return to_kafka(
        build_headers(
            event_type=f"queryd.{name}",
            # A request's own id makes it the same request when it comes again; of cancels each is one of its own.
            event_id=request.query_id if isinstance(request, QueryRequested) else str(uuid.uuid4()),
            subject=request.query_id,
            time=request.requested_at or datetime.now(UTC),
            source="queryd-client",
            traceparent=continue_trace(None),
            schema=f"{name}.v{contract().newest[name].version}.avsc",
        )
    )
