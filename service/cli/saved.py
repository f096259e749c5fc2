"""`queryd saved`."""

import sys
from typing import Annotated, Any

import typer

from access.saved_queries import check_saved, edit_saved, find_saved, remove_saved, save_query
from access.visibility import InvalidRegistration
from db.connection import DataPool, transaction
from db.data.saved_queries import SavedQuery, list_saved, list_visible
from engines.protocol import Inspected
from queryd.events import Mode, OutputFormat
from service.cli import query
from service.cli.database import optional_uuid, uuid_argument, with_data
from service.cli.output import complain, show_fields, show_rows
from service.cli.parameters import Param, ParamText
from service.cli.query import Json
from service.looking import CantLook, look
from service.settings import load_settings

app = typer.Typer(help="Queries that their authors saved.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="The saved query's id.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Its name, for people.")],
    org: Annotated[str, typer.Option(help="The org that owns it.")],
    user: Annotated[str, typer.Option(help="Its author.")],
    sql: Annotated[str, typer.Option(help="One SELECT, with $name for parameters; `-` reads it from stdin.")],
    visibility: Annotated[str, typer.Option(help="private, org, role:<slug> or public.")] = "private",
    as_json: Json = False,
) -> None:
    """Save a query. A text that could never run is refused with the reason."""
    text = _read(sql)
    org_id, user_id = uuid_argument(org, "--org"), uuid_argument(user, "--user")
    inspected = _check(name, text, visibility)
    stored = with_data(
        lambda pool: save_query(pool, org_id=org_id, user_id=user_id, name=name, query=text, visibility=visibility)
    )
    _print(stored, inspected, as_json)


@app.command("list")
def list_(
    org: Annotated[str | None, typer.Option(help="Only this org's own.")] = None,
    user: Annotated[str | None, typer.Option(help="What this user of the org may run.")] = None,
    role: Annotated[list[str] | None, typer.Option(help="A role of the user; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """List saved queries without their text: all, an org's own, or with --user or --role what that caller may run."""
    org_id, user_id = optional_uuid(org, "--org"), optional_uuid(user, "--user")
    if org_id is None and (user_id is not None or role):
        complain("--user and --role need their --org", 2)

    async def read(pool: DataPool) -> list[SavedQuery]:
        async with transaction(pool) as connection:
            if org_id is not None and (user_id is not None or role):
                return await list_visible(connection, org_id, user_id, role or ())
            return await list_saved(connection, org_id)

    show_rows("saved queries", [_describe(each) for each in with_data(read)], as_json)


@app.command()
def show(saved_query_id: Id, as_json: Json = False) -> None:
    """Show a saved query: its text and the names of its parameters."""
    wanted = uuid_argument(saved_query_id, "the id")
    saved = with_data(lambda pool: find_saved(pool, wanted))
    _print(saved, _check(None, saved.query, None), as_json, text=True)


@app.command()
def run(
    saved_query_id: Id,
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
    task: Annotated[str | None, typer.Option(help="The task it runs for.")] = None,
    query_id: query.RequestId = None,
    timeout: query.Timeout = None,
    max_rows: query.MaxRows = None,
    max_bytes_scanned: query.MaxBytesScanned = None,
    inline: query.Inline = False,
    wait: Annotated[bool, typer.Option(help="Wait until the query is finished.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a request for a saved query, as `queryd submit --saved ID` does."""
    query.submit(
        saved=saved_query_id,
        org=org,
        user=user,
        role=role,
        mode=mode,
        format_=format_,
        param=param,
        param_text=param_text,
        task=task,
        query_id=query_id,
        timeout=timeout,
        max_rows=max_rows,
        max_bytes_scanned=max_bytes_scanned,
        inline=inline,
        wait=wait,
        as_json=as_json,
    )


@app.command()
def edit(
    saved_query_id: Id,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    sql: Annotated[str | None, typer.Option(help="Another text; `-` reads it from stdin.")] = None,
    visibility: Annotated[str | None, typer.Option(help="private, org, role:<slug> or public.")] = None,
    as_json: Json = False,
) -> None:
    """Change a saved query. A request that was admitted with another text fails instead of running the new one."""
    wanted = uuid_argument(saved_query_id, "the id")
    text = None if sql is None else _read(sql)
    if name is None and text is None and visibility is None:
        complain("give --name, --sql or --visibility", 2)
    inspected = _check(name, text, visibility)
    changed = with_data(lambda pool: edit_saved(pool, wanted, name=name, query=text, visibility=visibility))
    _print(changed, inspected, as_json)


@app.command()
def remove(saved_query_id: Id, as_json: Json = False) -> None:
    """Remove a saved query and its text. Its results stay, and so does what they say of it."""
    wanted = uuid_argument(saved_query_id, "the id")
    gone = with_data(lambda pool: remove_saved(pool, wanted))
    show_fields({"removed": wanted, "kept_for_results": not gone}, as_json)


def _read(sql: str) -> str:
    return sys.stdin.read() if sql == "-" else sql


def _check(name: str | None, text: str | None, visibility: str | None) -> Inspected | None:
    """Judge what is given, and what the text names."""
    try:
        check_saved(name, text, visibility)
        return None if text is None else look(load_settings(), lambda looker: looker.inspect(text))
    except InvalidRegistration as error:
        complain(str(error), 2)
    except CantLook as error:
        complain(str(error))


def _print(saved: SavedQuery, inspected: Inspected | None, as_json: bool, *, text: bool = False) -> None:
    fields = _describe(saved)
    if inspected is not None:
        fields |= {"parameters": sorted(inspected.parameters)}
    if text:
        fields |= {"query": saved.query}
    show_fields(fields, as_json)


def _describe(saved: SavedQuery) -> dict[str, Any]:
    return {
        "id": saved.id,
        "org_id": saved.org_id,
        "user_id": saved.user_id,
        "name": saved.name,
        "visibility": saved.visibility,
        "updated_at": saved.updated_at,
    }
