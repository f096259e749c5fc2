"""Requests and cancels, as a client publishes them."""

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Required, TypedDict, Unpack

from queryd.contract import contract
from queryd.events import (
    Delivery,
    Mode,
    OrgId,
    OutputFormat,
    Parameter,
    QueryCancelRequested,
    QueryId,
    QueryRequested,
    parse_uuid,
)
from queryd.headers import build_headers, continue_trace, to_kafka


class SubmitOptions(TypedDict, total=False):
    """What a request says beside its SQL.

    `query_id` is the idempotency key, made up where it is not given; `parameters` bind as `$name`; a request has
    `saved_query_id` or SQL. Limits are in seconds, rows and bytes, and clamped to the service's own.
    """

    org_id: Required[str]
    user_id: str | None
    roles: Sequence[str]
    query_id: str | None
    saved_query_id: str | None
    parameters: Mapping[str, Parameter] | None
    mode: Mode | str
    task_id: str | None
    output_format: OutputFormat | str
    delivery: Delivery | str
    timeout_seconds: int | None
    max_rows: int | None
    max_bytes_scanned: int | None


def make_request(sql: str | None, **options: Unpack[SubmitOptions]) -> QueryRequested:
    """The request for some SQL, or for the saved query of the options; raises `Invalid` where an id is no UUID."""
    return QueryRequested(
        query_id=QueryId(parse_uuid(options.get("query_id") or str(uuid.uuid4()), "query_id")),
        org_id=OrgId(parse_uuid(options["org_id"], "org_id")),
        mode=Mode(options.get("mode", Mode.INTERACTIVE)),
        user_id=options.get("user_id"),
        roles=tuple(options.get("roles", ())),
        sql=sql,
        saved_query_id=options.get("saved_query_id"),
        parameters=dict(options.get("parameters") or {}),
        task_id=options.get("task_id"),
        output_format=OutputFormat(options.get("output_format", OutputFormat.PARQUET)),
        delivery=Delivery(options.get("delivery", Delivery.OBJECT)),
        timeout_seconds=options.get("timeout_seconds"),
        max_rows=options.get("max_rows"),
        max_bytes_scanned=options.get("max_bytes_scanned"),
        requested_at=datetime.now(UTC),
    )


def make_cancel(query_id: str, *, org_id: str, user_id: str | None, reason: str | None) -> QueryCancelRequested:
    """The request that a query of that org stops; raises `Invalid` where an id is no UUID."""
    return QueryCancelRequested(
        QueryId(parse_uuid(query_id, "query_id")),
        OrgId(parse_uuid(org_id, "org_id")),
        user_id=user_id,
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
