"""`queryd submit`, `cancel`, `status`, `list` and `fetch`."""

import base64
import hashlib
import io
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from botocore.exceptions import BotoCoreError

from db.connection import DataPool, transaction
from db.data.runs import CanonicalRow, QueryFilter, list_canonical, read_canonical, read_files, read_last_event
from queryd.client import QueryClient, QueryHandle
from queryd.codec import Undecodable, decode_status
from queryd.errors import QueryDeleted, ResultDamaged, ResultExpired
from queryd.events import Delivery, ErrorCode, Invalid, Mode, OutputFormat, QueryStatusChanged, ResultFile, Status
from queryd.results import ResultReader
from queryd.spreadsheets import write_for_spreadsheet
from service.cli.database import optional_uuid, uuid_argument, with_data
from service.cli.output import complain, print_fields, print_json, read_size_option, read_time, show_fields, show_rows
from service.cli.parameters import Param, ParamText, read_parameters
from service.settings import load_settings
from service.topics import require_topics

# How often a waiting submit asks for the row besides listening for events.
_LOOK_SECONDS = 2.0
# The delay before an event is shown: too short for a person to notice, and cheap.
_SHOW_SECONDS = 0.05
# The time limit to find a cancelled query's status: the client starts in about a second and reads one partition.
_KNOWN_SECONDS = 5.0

Json = Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")]
Timeout = Annotated[int | None, typer.Option(help="Time limit in seconds.", min=1, max=2**31 - 1)]
Inline = Annotated[
    bool, typer.Option("--inline", help="A result of at most 64 KiB comes with its event; interactive only.")
]
RequestId = Annotated[str | None, typer.Option("--id", help="The request's own id; made up where not given.")]
MaxRows = Annotated[int | None, typer.Option(help="Fail when the result has more rows.", min=1, max=2**63 - 1)]
MaxBytesScanned = Annotated[
    str | None, typer.Option(help="Fail when the query reads more than this: bytes, or 512MiB, 10GB.")
]

_CopyFile = Callable[[IO[bytes], IO[bytes]], None]

# The columns that people need most; `--json` has all.
_LISTED = ("query_id", "status", "mode", "created_at", "duration_ms", "row_count", "bytes", "error_code")


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(submit)
    app.command()(cancel)
    app.command()(status)
    app.command("list")(list_)
    app.command()(fetch)


def submit(
    sql: Annotated[str | None, typer.Argument(help="One SELECT; `-` reads it from stdin.")] = None,
    *,
    org: Annotated[str, typer.Option(help="The org that asks.", envvar="QUERYD_ORG")],
    user: Annotated[str | None, typer.Option(help="The user who asks.", envvar="QUERYD_USER")] = None,
    role: Annotated[list[str] | None, typer.Option(help="A role of the user; may be repeated.")] = None,
    mode: Annotated[Mode, typer.Option(help="The lane.")] = Mode.INTERACTIVE,
    format_: Annotated[
        OutputFormat, typer.Option("--format", help="How the result is written.")
    ] = OutputFormat.PARQUET,
    param: Param = None,
    param_text: ParamText = None,
    saved: Annotated[str | None, typer.Option(help="A saved query's id, instead of SQL.")] = None,
    task: Annotated[str | None, typer.Option(help="The task it runs for.")] = None,
    query_id: RequestId = None,
    timeout: Timeout = None,
    max_rows: MaxRows = None,
    max_bytes_scanned: MaxBytesScanned = None,
    inline: Inline = False,
    wait: Annotated[bool, typer.Option(help="Wait until the query is finished.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a request and print its query id.

    With --wait, print each status on stderr; exit code 1 if the query fails.
    """
    settings = load_settings()
    if (sql is None) == (saved is None):
        complain("give the SQL, or --saved with a saved query's id; one of them and not both", 2)
    if inline and mode is Mode.BATCH:
        complain("--inline is for the interactive lane: leave it out, or --mode batch", 2)
    text = sys.stdin.read() if sql == "-" else sql
    if text is not None and not text.strip():
        complain("the SQL is empty", 2)
    most_bytes = None if max_bytes_scanned is None else read_size_option(max_bytes_scanned, "--max-bytes-scanned")
    parameters = read_parameters(param or (), param_text or ())
    require_topics(settings.kafka)
    try:
        with QueryClient(settings.kafka) as client:
            handle = client.submit(
                text,
                org_id=uuid_argument(org, "--org"),
                user_id=optional_uuid(user, "--user"),
                roles=role or (),
                query_id=optional_uuid(query_id, "--id"),
                saved_query_id=optional_uuid(saved, "--saved"),
                parameters=parameters,
                mode=mode,
                task_id=optional_uuid(task, "--task"),
                output_format=format_,
                delivery=Delivery.INLINE_IF_SMALL if inline else Delivery.OBJECT,
                timeout_seconds=timeout,
                max_rows=max_rows,
                max_bytes_scanned=most_bytes,
            )
            if not as_json:
                print(f"query id: {handle.query_id}", flush=True)
            sql_hash = None if text is None or settings.sql_hash_key is not None else _hash(text)
            ended = _wait(handle, sql_hash, quiet=as_json) if wait else None
    except QueryDeleted as error:
        complain(str(error))
    except Invalid as error:
        complain(str(error), 2)
    _print_submitted(handle.query_id, ended, format_, as_json)
    if ended is not None and ended["status"] == Status.FAILED:
        raise SystemExit(1)


def cancel(
    query_id: Annotated[str, typer.Argument(help="The query's id.")],
    *,
    org: Annotated[str, typer.Option(help="The org that the query belongs to.", envvar="QUERYD_ORG")],
    user: Annotated[str | None, typer.Option(help="The user who cancels.", envvar="QUERYD_USER")] = None,
    reason: Annotated[str | None, typer.Option(help="Why, for people to read.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the query has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Request a query's cancel and print its status. A finished query does not change.

    With --wait, exit code 1 if the query succeeded.
    """
    settings = load_settings()
    wanted, org_id = uuid_argument(query_id, "the id"), uuid_argument(org, "--org")
    user_id = optional_uuid(user, "--user")
    require_topics(settings.kafka)
    try:
        with QueryClient(settings.kafka) as client:
            handle = client.cancel(wanted, org_id=org_id, user_id=user_id, reason=reason)
            known, note = _judge_cancelled(handle, org_id)
            if wait:
                print(f"queryd: {note}", file=sys.stderr, flush=True)
            ended = _wait(handle, None, quiet=as_json) if wait else None
    except QueryDeleted as error:
        complain(str(error))
    fields: dict[str, Any] = {"query_id": wanted, "status": known} | (ended or {"note": note})
    if as_json:
        print_json(fields)
    else:
        print_fields({name: fields[name] for name in ("query_id", "status", "error_code", "note") if name in fields})
    if ended is not None and ended["status"] == Status.SUCCEEDED:
        raise SystemExit(1)


def status(query_id: Annotated[str, typer.Argument(help="The query's id.")], as_json: Json = False) -> None:
    """Show where a query stands."""
    row, _ = _read_wanted(query_id)
    show_fields(asdict(row), as_json)


def list_(
    *,
    org: Annotated[str, typer.Option(help="Org the queries belong to.", envvar="QUERYD_ORG")],
    user: Annotated[str | None, typer.Option(help="Only queries of this user.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Only queries created at this UTC time or later: 2026-11-23T10:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Only queries created before this UTC time.")] = None,
    status: Annotated[list[Status] | None, typer.Option(help="Only queries with this status; may be repeated.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Only queries of this mode.")] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of queries.", min=1, max=10_000)] = 20,
    as_json: Json = False,
) -> None:
    """List an org's queries, newest first."""
    wanted = QueryFilter(
        org_id=uuid_argument(org, "--org"),
        user_id=optional_uuid(user, "--user"),
        since=read_time(since, "--since"),
        until=read_time(until, "--until"),
        statuses=[each.value for each in status or Status],
        mode=None if mode is None else mode.value,
    )

    async def read(pool: DataPool) -> list[CanonicalRow]:
        async with transaction(pool) as connection:
            return await list_canonical(connection, wanted, limit)

    show_rows("queries", [asdict(row) for row in with_data(read)], as_json, _LISTED)


def fetch(
    query_id: Annotated[str, typer.Argument(help="The query's id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of to stdout.")] = None,
    link: Annotated[bool, typer.Option(help="Print presigned links of one hour instead.")] = False,
    why: Annotated[bool, typer.Option("--error", help="The engine's own words on why the query failed.")] = False,
    csv_safe: Annotated[
        bool,
        typer.Option("--csv-safe", help="Make a csv result safe to open in a spreadsheet: no text becomes a formula."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a result, or with --error what the author of a failed query may know."""
    row, files = _read_wanted(query_id)
    if csv_safe and (link or why or as_json):
        complain("--csv-safe can't be combined with --link, --json or --error", 2)
    if csv_safe and row.output_format != OutputFormat.CSV:
        complain(f"--csv-safe is for csv, and this result is {row.output_format}: submit it with --format csv", 2)
    if why:
        _print_error(row, files)
        return
    if row.status != Status.SUCCEEDED:
        known = f", {row.error_code}: {(row.error_message or '').rstrip('.')}" if row.error_code else ""
        more = f"; what the engine said: queryd fetch {query_id} --error" if files else ""
        complain(f"the query is {row.status}{known}{more}")
    if output is not None and (link or as_json):
        complain("-o writes the result; --link and --json print where it is: one of them at a time", 2)
    event = _read_event(row, files)
    if event.inline_result is None and event.output_location is None:
        complain("the result has expired and was removed")
    if link or as_json:
        _print_place(event, as_json=as_json)
        return
    if output is None and row.output_format == OutputFormat.PARQUET and sys.stdout.isatty():
        complain("Parquet is not for a terminal: give -o FILE, or send it through a pipe", 2)
    try:
        _write(output, ResultReader().open_files(event), write_for_spreadsheet if csv_safe else shutil.copyfileobj)
    except (ResultDamaged, ResultExpired) as error:
        complain(str(error))


def _read_event(row: CanonicalRow, files: list[dict[str, Any]]) -> QueryStatusChanged:
    """Return the query's last event, which contains an inline result, with the files from the row."""

    async def read(pool: DataPool) -> bytes | None:
        async with transaction(pool) as connection:
            return await read_last_event(connection, row.query_id)

    encoded = with_data(read)
    if encoded is None:
        complain("the query was deleted at this moment")
    try:
        event = decode_status(encoded)
    except (Undecodable, Invalid) as error:
        complain(f"its last event can't be read: {error}")
    named = tuple(
        ResultFile(file["key"], file["bytes"], file["rows"], file["etag"], file.get("sha256")) for file in files
    )
    return replace(event, output_location=row.output_location, files=named)


def _print_place(event: QueryStatusChanged, *, as_json: bool) -> None:
    """Where the result is, with links; an inline one is nowhere else, so JSON has it as base64."""
    place: dict[str, Any] = {"query_id": event.query_id, "output_location": event.output_location, "files": []}
    if event.inline_result is not None:
        if not as_json:
            complain("the result is in the query's event, so there is no object to link to: leave --link out", 2)
        print_json(place | {"inline_result": base64.b64encode(event.inline_result).decode()})
        return
    try:
        links = ResultReader().links(event)
    except (ResultDamaged, ResultExpired) as error:
        complain(str(error))
    if as_json:
        print_json(
            place | {"files": [asdict(file) | {"link": link} for file, link in zip(event.files, links, strict=True)]}
        )
        return
    for link in links:
        print(link)


def _write(output: Path | None, files: Iterable[IO[bytes]], copy: _CopyFile = shutil.copyfileobj) -> None:
    """Write files one after the other; each is downloaded and verified before its first byte is written."""
    try:
        _write_files(output, files, copy)
    except (BrokenPipeError, BotoCoreError):
        # Some of botocore's errors are OSErrors too; they must not be reported as errors of the output file.
        raise
    except OSError as error:
        complain(f"can't write {output or 'the output'}: {error.strerror}")


def _write_files(output: Path | None, files: Iterable[IO[bytes]], copy: _CopyFile) -> None:
    if output is None:
        for file in files:
            with file:
                copy(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    # Write a temporary file and rename it, so that a reader never sees a part of a result.
    draft = output.with_name(f"{output.name}.draft")
    try:
        with draft.open("wb") as written:
            for file in files:
                with file:
                    copy(file, written)
        draft.replace(output)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _print_error(row: CanonicalRow, files: list[dict[str, Any]]) -> None:
    """`error.json` as it lies in the store: it may quote the SQL and its data."""
    if row.status != Status.FAILED:
        complain(f"the query is {row.status}, so there is no error")
    if not files:
        complain(f"nothing is known beyond {row.error_code}: {row.error_message}")
    print(ResultReader().read_object(files[0]["location"], files[0]["key"]).decode())


def _judge_cancelled(handle: QueryHandle, org_id: str) -> tuple[str | None, str]:
    """Return the status of a query after its cancel was requested, and what the status means for the cancel."""
    try:
        event = handle.latest(_KNOWN_SECONDS)
    except TimeoutError:
        return None, f"can't find the query's status; check: queryd status {handle.query_id}"
    if event is None or event.org_id != org_id:
        return None, "the org has no query with this id yet; if it arrives within a week, it is cancelled"
    if event.status is Status.FAILED and event.error_code is ErrorCode.QUERY_CANCELLED:
        return event.status.value, "the query is cancelled"
    if event.status.terminal:
        return event.status.value, "too late: the query had already ended; nothing changes"
    return (
        event.status.value,
        f"it ends as QUERY_CANCELLED unless it finishes first; check: queryd status {handle.query_id}",
    )


def _wait(handle: QueryHandle, sql_hash: str | None, *, quiet: bool) -> dict[str, Any]:
    """Wait for the query and return its outcome; print each status on stderr, unless `quiet`.

    Read the row as well as the events: if the id was used before, the events are already in the past.
    """
    told: QueryStatusChanged | None = None
    next_look = time.monotonic() + _LOOK_SECONDS
    try:
        while True:
            try:
                ended = handle.wait(_SHOW_SECONDS)
            except TimeoutError:
                ended = None
            event = handle.event
            if event is not None and event != told and not quiet:
                told = event
                print(_describe_step(event.occurred_at, event.status, event.attempt), file=sys.stderr, flush=True)
            if ended is not None:
                _check_same(handle.query_id, ended.sql_hash, sql_hash)
                return _show_event(ended)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_SECONDS
                row, files = _read(handle.query_id)
                if row is not None and Status(row.status).terminal:
                    _check_same(handle.query_id, row.sql_hash, sql_hash)
                    if not quiet:
                        print(_describe_step(row.updated_at, row.status), file=sys.stderr, flush=True)
                    return _show_row(row, files)
    except KeyboardInterrupt:
        complain(f"no longer waiting; the query goes on: queryd status {handle.query_id}", 130)


def _describe_step(occurred_at: datetime, status: str, attempt: int = 1) -> str:
    again = f", attempt {attempt}" if attempt > 1 else ""
    return f"{occurred_at.astimezone(UTC):%H:%M:%S}Z {status}{again}"


def _check_same(query_id: str, ran: str, asked: str | None) -> None:
    if asked is not None and ran != asked:
        complain(f"{query_id} was used before, for another query: queryd replay dead-letters --list --key {query_id}")


def _show_event(event: QueryStatusChanged) -> dict[str, Any]:
    return {
        "status": event.status.value,
        "attempt": event.attempt,
        "row_count": event.row_count,
        "bytes": event.bytes,
        "duration_ms": event.duration_ms,
        "output_location": event.output_location,
        "files": [asdict(file) for file in event.files],
        "error_code": None if event.error_code is None else event.error_code.value,
        "error_message": event.error_message,
    }


def _show_row(row: CanonicalRow, files: list[dict[str, Any]]) -> dict[str, Any]:
    shown = ("status", "row_count", "bytes", "duration_ms", "output_location", "error_code", "error_message")
    # A failed query's files are its error's, see `fetch --error`.
    return {name: getattr(row, name) for name in shown} | {"files": files if row.status == Status.SUCCEEDED else []}


def _print_submitted(query_id: str, ended: dict[str, Any] | None, output_format: OutputFormat, as_json: bool) -> None:
    """Print the result of a submit after the query id."""
    fields: dict[str, Any] = ended or {}
    inline = None
    if ended is not None and ended["status"] == Status.SUCCEEDED and ended["output_location"] is None:
        row, files = _read_wanted(query_id)
        inline = _read_event(row, files).inline_result
    if as_json:
        told = {} if inline is None else {"inline_result": base64.b64encode(inline).decode()}
        print_json({"query_id": query_id} | fields | told)
        return
    print_fields(fields | {"files": ", ".join(file["key"] for file in fields.get("files", ())) or None})
    if ended is not None and ended["status"] == Status.SUCCEEDED:
        if inline is None or output_format is OutputFormat.PARQUET:
            print(f"fetch it: queryd fetch {query_id}")
        else:
            print(flush=True)
            _write(None, [io.BytesIO(inline)])
    if ended is not None and ended["error_code"] == ErrorCode.QUERY_ERROR:
        print(f"what the engine said: queryd fetch {query_id} --error")


def _read_wanted(query_id: str) -> tuple[CanonicalRow, list[dict[str, Any]]]:
    row, files = _read(uuid_argument(query_id, "the id"))
    if row is None:
        complain(f"there is no query {query_id}")
    return row, files


def _read(query_id: str) -> tuple[CanonicalRow | None, list[dict[str, Any]]]:
    async def read(pool: DataPool) -> tuple[CanonicalRow | None, list[dict[str, Any]]]:
        async with transaction(pool) as connection:
            rows = await read_canonical(connection, [query_id])
            return rows.get(query_id), await read_files(connection, query_id)

    return with_data(read)


def _hash(sql: str) -> str:
    return hashlib.sha256(sql.encode()).hexdigest()
