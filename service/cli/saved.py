"""`queryd saved`."""

import asyncio
import sys
from typing import Annotated, Any

import typer

from access.saved_queries import save_query
from access.visibility import InvalidRegistration
from db.connection import DatabaseUnavailable, transaction
from db.data.saved_queries import SavedQuery, list_saved
from service.cli.output import complain, print_fields, print_json, print_rows
from service.cli.query import Json, uuid_argument
from service.settings import load_settings
from service.wiring import opened_data_pool

app = typer.Typer(help="Queries that their authors saved.", no_args_is_help=True)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Its name, for people.")],
    org: Annotated[str, typer.Option(help="The org that owns it.")],
    user: Annotated[str, typer.Option(help="Its author.")],
    sql: Annotated[str, typer.Option(help="One SELECT, with $name for parameters; `-` reads it from stdin.")],
    visibility: Annotated[str, typer.Option(help="private, org, role:<slug> or public.")] = "private",
    as_json: Json = False,
) -> None:
    """Save a query."""
    text = sys.stdin.read() if sql == "-" else sql

    async def store() -> SavedQuery:
        async with opened_data_pool(load_settings()) as pool:
            return await save_query(
                pool,
                org_id=uuid_argument(org, "--org"),
                user_id=uuid_argument(user, "--user"),
                name=name,
                query=text,
                visibility=visibility,
            )

    try:
        stored = asyncio.run(store())
    except InvalidRegistration as error:
        complain(str(error), 2)
    except DatabaseUnavailable as error:
        complain(f"Postgres data (QUERYD_DATA_URL) does not answer: {error}")
    if as_json:
        print_json(_show(stored))
    else:
        print_fields(_show(stored))


@app.command("list")
def list_(
    org: Annotated[str | None, typer.Option(help="Only this org's.")] = None,
    as_json: Json = False,
) -> None:
    """List saved queries, without their text."""

    async def read() -> list[SavedQuery]:
        async with opened_data_pool(load_settings()) as pool, transaction(pool) as connection:
            return await list_saved(connection, None if org is None else uuid_argument(org, "--org"))

    try:
        saved = [_show(query) for query in asyncio.run(read())]
    except DatabaseUnavailable as error:
        complain(f"Postgres data (QUERYD_DATA_URL) does not answer: {error}")
    if as_json:
        print_json(saved)
    else:
        print_rows("saved queries", saved)


def _show(saved: SavedQuery) -> dict[str, Any]:
    return {
        "id": saved.id,
        "org_id": saved.org_id,
        "user_id": saved.user_id,
        "name": saved.name,
        "visibility": saved.visibility,
        "updated_at": saved.updated_at,
    }
