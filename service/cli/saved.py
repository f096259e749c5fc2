"""`queryd saved`."""

import sys
from typing import Annotated, Any

import typer

from access.saved_queries import save_query
from db.connection import DataPool, transaction
from db.data.saved_queries import SavedQuery, list_saved
from service.cli.database import optional_uuid, uuid_argument, with_data
from service.cli.output import print_fields, print_json, print_rows
from service.cli.query import Json

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

    org_id, user_id = uuid_argument(org, "--org"), uuid_argument(user, "--user")
    stored = with_data(
        lambda pool: save_query(pool, org_id=org_id, user_id=user_id, name=name, query=text, visibility=visibility)
    )
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

    org_id = optional_uuid(org, "--org")

    async def read(pool: DataPool) -> list[SavedQuery]:
        async with transaction(pool) as connection:
            return await list_saved(connection, org_id)

    saved = [_show(query) for query in with_data(read)]
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
