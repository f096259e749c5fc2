"""`queryd submit`, `cancel`, `status` and `fetch`."""

import base64
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from confluent_kafka import KafkaException

from db.connection import DataPool, transaction
from db.data.runs import CanonicalRow, read_canonical, read_files, read_last_event
from queryd.client import QueryClient, QueryHandle
from queryd.codec import Undecodable, decode_status
from queryd.errors import ClientError, NotSubmitted
from queryd.events import Delivery, ErrorCode, Invalid, Mode, OutputFormat, Parameter, QueryStatusChanged, Status
from queryd.registry import RegistryAway
from queryd.results import ResultReader
from service.cli.database import optional_uuid, uuid_argument, with_data
from service.cli.output import complain, print_fields, print_json
from service.settings import load_settings

# How often a waiting submit asks for the row besides listening for events.
_LOOK_SECONDS = 2.0

Json = Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(submit)
    app.command()(cancel)
    app.command()(status)
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
    param: Annotated[list[str] | None, typer.Option(help="name=value; the value is JSON, or else text.")] = None,
    saved: Annotated[str | None, typer.Option(help="A saved query's id, instead of SQL.")] = None,
    task: Annotated[str | None, typer.Option(help="The task it runs for.")] = None,
    query_id: Annotated[str | None, typer.Option("--id", help="The request's own id; made up where not given.")] = None,
    timeout: Annotated[int | None, typer.Option(help="Time limit in seconds.", min=1, max=2**31 - 1)] = None,
    inline: Annotated[
        bool, typer.Option("--inline", help="A result of at most 64 KiB comes with its event; interactive only.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait until the query is finished.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a request. Exit code 1 when it was waited for and failed."""
    settings = load_settings()
    if (sql is None) == (saved is None):
        complain("give the SQL, or --saved with a saved query's id; one of them and not both", 2)
    if inline and mode is Mode.BATCH:
        complain("--inline is for the interactive lane: leave it out, or --mode batch", 2)
    text = sys.stdin.read() if sql == "-" else sql
    if text is not None and not text.strip():
        complain("the SQL is empty", 2)
    try:
        with QueryClient(settings.kafka) as client:
            handle = client.submit(
                text,
                org_id=uuid_argument(org, "--org"),
                user_id=optional_uuid(user, "--user"),
                roles=role or (),
                query_id=optional_uuid(query_id, "--id"),
                saved_query_id=optional_uuid(saved, "--saved"),
                parameters=dict(_read_parameter(each) for each in param or ()),
                mode=mode,
                task_id=optional_uuid(task, "--task"),
                output_format=format_,
                delivery=Delivery.INLINE_IF_SMALL if inline else Delivery.OBJECT,
                timeout_seconds=timeout,
            )
            sql_hash = None if text is None or settings.sql_hash_key is not None else _hash(text)
            ended = _wait(handle, sql_hash) if wait else None
    except (NotSubmitted, KafkaException) as error:
        complain(f"the request could not be published: {error}")
    except ClientError as error:
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
    """Ask for a query to stop. A finished one stays as it is; exit code 1 when it was waited for and had succeeded."""
    settings = load_settings()
    wanted = uuid_argument(query_id, "the id")
    try:
        with QueryClient(settings.kafka) as client:
            handle = client.cancel(
                wanted, org_id=uuid_argument(org, "--org"), user_id=optional_uuid(user, "--user"), reason=reason
            )
            ended = _wait(handle, None) if wait else None
    except (NotSubmitted, KafkaException) as error:
        complain(f"the cancel could not be published: {error}")
    except ClientError as error:
        complain(str(error))
    except Invalid as error:
        complain(str(error), 2)
    fields: dict[str, Any] = {"query_id": wanted} | (ended or {})
    if as_json:
        print_json(fields)
    else:
        print_fields({name: fields[name] for name in ("query_id", "status", "error_code") if name in fields})
    if ended is not None and ended["status"] == Status.SUCCEEDED:
        raise SystemExit(1)


def status(query_id: Annotated[str, typer.Argument(help="The query's id.")], as_json: Json = False) -> None:
    """Show where a query stands."""
    row, _ = _read_wanted(query_id)
    fields = asdict(row)
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)


def fetch(
    query_id: Annotated[str, typer.Argument(help="The query's id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of to stdout.")] = None,
    link: Annotated[bool, typer.Option(help="Print presigned links of one hour instead.")] = False,
    why: Annotated[bool, typer.Option("--error", help="The engine's own words on why the query failed.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a result, or with --error what the author of a failed query may know."""
    row, files = _read_wanted(query_id)
    if why:
        _print_error(row, files)
        return
    if row.status != Status.SUCCEEDED:
        known = f", {row.error_code}: {row.error_message}" if row.error_code else ""
        more = f"; what the engine said: queryd fetch {query_id} --error" if files else ""
        complain(f"the query is {row.status}{known}{more}")
    if output is not None and (link or as_json):
        complain("-o writes the result; --link and --json print where it is: one of them at a time", 2)
    inline = _read_inline(row.query_id) if row.output_location is None else None
    if inline is None and row.output_location is None:
        complain("the result has expired and was removed")
    if link or as_json:
        _print_place(row, files, inline, as_json=as_json)
        return
    if output is None and row.output_format == OutputFormat.PARQUET and sys.stdout.isatty():
        complain("Parquet is not for a terminal: give -o FILE, or send it through a pipe", 2)
    _write(output, inline if inline is not None else _read_objects(row, files))


def _read_inline(query_id: str) -> bytes | None:
    """The result in the query's last event; None when it has left it."""

    async def read(pool: DataPool) -> bytes | None:
        async with transaction(pool) as connection:
            return await read_last_event(connection, query_id)

    encoded = with_data(read)
    if encoded is None:
        complain("the query was deleted at this moment")
    try:
        return decode_status(encoded).inline_result
    except (Undecodable, Invalid, RegistryAway) as error:
        complain(f"its last event can't be read: {error}")


def _read_objects(row: CanonicalRow, files: list[dict[str, Any]]) -> bytes:
    reader = ResultReader()
    return b"".join(reader.read_object(row.output_location or "", file["key"]) for file in files)


def _print_place(row: CanonicalRow, files: list[dict[str, Any]], inline: bytes | None, *, as_json: bool) -> None:
    """Where the result is, with links; an inline one is nowhere else, so JSON has it as base64."""
    place: dict[str, Any] = {"query_id": row.query_id, "output_location": row.output_location, "files": []}
    if inline is not None:
        if not as_json:
            complain("the result is in the query's event, so there is no object to link to: leave --link out", 2)
        print_json(place | {"inline_result": base64.b64encode(inline).decode()})
        return
    reader = ResultReader()
    links = [{**file, "link": reader.link(row.output_location or "", file["key"])} for file in files]
    if as_json:
        print_json(place | {"files": links})
        return
    for each in links:
        print(each["link"])


def _write(output: Path | None, body: bytes) -> None:
    try:
        if output is None:
            sys.stdout.buffer.write(body)
            sys.stdout.buffer.flush()
        else:
            _write_whole(output, body)
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f"can't write {output or 'the output'}: {error.strerror}")


def _print_error(row: CanonicalRow, files: list[dict[str, Any]]) -> None:
    """`error.json` as it lies in the store: it may quote the SQL and its data."""
    if row.status != Status.FAILED:
        complain(f"the query is {row.status}, so there is no error")
    if not files:
        complain(f"nothing is known beyond {row.error_code}: {row.error_message}")
    print(ResultReader().read_object(files[0]["location"], files[0]["key"]).decode())


def _wait(handle: QueryHandle, sql_hash: str | None) -> dict[str, Any]:
    """How the query ended. The row is asked besides the events: those of an id that was used before have gone by."""
    try:
        while True:
            try:
                event = handle.wait(_LOOK_SECONDS)
                _check_same(handle.query_id, event.sql_hash, sql_hash)
                return _show_event(event)
            except TimeoutError:
                row, files = _read(handle.query_id)
            if row is not None and Status(row.status).terminal:
                _check_same(handle.query_id, row.sql_hash, sql_hash)
                return _show_row(row, files)
    except KeyboardInterrupt:
        complain(f"no longer waiting; the query goes on: queryd status {handle.query_id}", 130)


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
    fields: dict[str, Any] = {"query_id": query_id} | (ended or {})
    inline = None
    if ended is not None and ended["status"] == Status.SUCCEEDED and ended["output_location"] is None:
        inline = _read_inline(query_id)
    if as_json:
        print_json(fields | ({} if inline is None else {"inline_result": base64.b64encode(inline).decode()}))
        return
    print_fields(fields | {"files": ", ".join(file["key"] for file in fields.get("files", ())) or None})
    if ended is not None and ended["status"] == Status.SUCCEEDED:
        if inline is None or output_format is OutputFormat.PARQUET:
            print(f"fetch it: queryd fetch {query_id}")
        else:
            print(flush=True)
            _write(None, inline)
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


def _write_whole(path: Path, body: bytes) -> None:
    """The whole file or none: a reader never sees half a result here either."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_bytes(body)
    try:
        draft.replace(path)
    except OSError:
        draft.unlink()
        raise


def _read_parameter(text: str) -> tuple[str, Parameter]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        complain("--param wants name=value", 2)
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    if isinstance(parsed, int) and not -(2**63) <= parsed < 2**63:
        complain(f"--param {name}: an integer must fit in 64 bits; quote it to send text", 2)
    # Only what a parameter may be; a JSON list or object was meant as text.
    return name, parsed if parsed is None or isinstance(parsed, bool | int | float | str) else value
