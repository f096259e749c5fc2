"""`queryd datasets`."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from access.datasets import (
    add_dataset,
    check_dataset,
    find_dataset,
    grant,
    remove_dataset,
    revoke,
    spell_pii_columns,
)
from access.grants import authorize
from access.visibility import InvalidRegistration
from db.connection import DataPool, transaction
from db.data.datasets import Dataset, NewDataset, list_datasets
from queryd.events import Column
from results.location import ROOT
from service.cli.database import optional_uuid, uuid_argument, with_data
from service.cli.output import complain, print_fields, print_json, print_rows
from service.cli.query import Json
from service.looking import CantLook, look
from service.settings import load_settings

app = typer.Typer(help="What SQL may name, and who may read it.", no_args_is_help=True)


class Kind(StrEnum):
    """Where a dataset's rows lie."""

    PARQUET = "parquet"
    POSTGRES = "postgres"


# What a person looks for; `--json` has everything.
_SHOWN = ("name", "org_id", "kind", "location", "visibility", "pii_columns")

Name = Annotated[str, typer.Argument(help="What SQL calls it: name or schema.name, without quotes.")]
Owner = Annotated[str, typer.Option(help="The org that owns it.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Read its columns with the datasets' credentials.")]
Grantees = list[str]


@app.command()
def add(
    name: Name,
    org: Owner,
    kind: Annotated[Kind, typer.Option(help="Where its rows lie.")],
    location: Annotated[str, typer.Option(help="s3://bucket/key, a folder or a pattern; or schema.table.")],
    visibility: Annotated[str, typer.Option(help="private, org, role:<slug> or public.")] = "private",
    user: Annotated[str | None, typer.Option(help="Its creator; wanted for private.")] = None,
    pii_columns: Annotated[str, typer.Option(help="Columns that hold personal data: a,b")] = "",
    check: Check = True,
    as_json: Json = False,
) -> None:
    """Register a dataset, or replace the org's dataset of that name, which keeps its grants."""
    settings = load_settings()
    dataset = NewDataset(
        org_id=uuid_argument(org, "--org"),
        user_id=optional_uuid(user, "--user"),
        name=name,
        kind=kind.value,
        location=location,
        visibility=visibility,
        pii_columns=[column.strip() for column in pii_columns.split(",") if column.strip()],
    )
    reserved = f"{settings.results_url}/{ROOT}"
    columns = None
    try:
        check_dataset(dataset, reserved)
        if check:
            columns = look(settings, lambda looker: looker.read_columns(dataset))
            dataset = spell_pii_columns(dataset, columns)
    except InvalidRegistration as error:
        complain(str(error), 2)
    except CantLook as error:
        complain(f"{error}; --no-check registers the dataset without reading it")

    async def store(pool: DataPool) -> tuple[Dataset, list[str]]:
        await add_dataset(pool, dataset, reserved)
        return await find_dataset(pool, dataset.org_id, dataset.name)

    _print(*with_data(store), columns, as_json)


@app.command("list")
def list_(
    org: Annotated[str | None, typer.Option(help="Only this org's own.")] = None,
    user: Annotated[str | None, typer.Option(help="What this user of the org may read, by whatever grant.")] = None,
    role: Annotated[list[str] | None, typer.Option(help="A role of the user; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """List datasets: all, an org's own, or with --user or --role what that caller may read, and nothing else."""
    org_id, user_id = optional_uuid(org, "--org"), optional_uuid(user, "--user")
    if org_id is None and (user_id is not None or role):
        complain("--user and --role need their --org", 2)

    async def read(pool: DataPool) -> list[Dataset]:
        if org_id is not None and (user_id is not None or role):
            return list(await authorize(pool, org_id, user_id, role or ()))
        async with transaction(pool) as connection:
            return await list_datasets(connection, org_id)

    found = [asdict(dataset) for dataset in with_data(read)]
    if as_json:
        print_json(found)
    else:
        print_rows("datasets", [{field: dataset[field] for field in _SHOWN} for dataset in found])


@app.command()
def show(name: Name, org: Owner, check: Check = True, as_json: Json = False) -> None:
    """Show one dataset: its columns, who may read it, and which columns hold personal data."""
    org_id = uuid_argument(org, "--org")
    dataset, grants = with_data(lambda pool: find_dataset(pool, org_id, name))
    columns = None
    try:
        if check:
            columns = look(load_settings(), lambda looker: looker.read_columns(dataset))
    except (InvalidRegistration, CantLook) as error:
        complain(f"{error}; --no-check shows what is registered")
    _print(dataset, grants, columns, as_json)


@app.command("grant")
def grant_(
    name: Name,
    org: Owner,
    to: Annotated[Grantees, typer.Option(help="user:<uuid>, role:<slug> or org:<uuid>; may be repeated.")],
    as_json: Json = False,
) -> None:
    """Let users or roles of the owner's org, or another org, read a dataset. Queries see it from their next attempt."""
    _change(grant, name, org, to, as_json)


@app.command("revoke")
def revoke_(
    name: Name,
    org: Owner,
    from_: Annotated[Grantees, typer.Option("--from", help="As it was granted; may be repeated.")],
    as_json: Json = False,
) -> None:
    """Take grants back. Who reads the dataset by its visibility still does, and what runs finishes."""
    _change(revoke, name, org, from_, as_json)


@app.command()
def remove(name: Name, org: Owner, as_json: Json = False) -> None:
    """Forget a dataset and its grants. Its rows stay where they are, and what runs over it finishes."""
    org_id = uuid_argument(org, "--org")
    removed = with_data(lambda pool: remove_dataset(pool, org_id, name))
    if as_json:
        print_json(asdict(removed))
    else:
        print_fields({"removed": removed.name, "id": removed.id})


def _change(
    change: Callable[[DataPool, str, str, Grantees], Awaitable[tuple[Dataset, list[str]]]],
    name: str,
    org: str,
    grantees: Grantees,
    as_json: bool,
) -> None:
    org_id = uuid_argument(org, "--org")
    _print(*with_data(lambda pool: change(pool, org_id, name, grantees)), None, as_json)


def _print(dataset: Dataset, grants: list[str], columns: tuple[Column, ...] | None, as_json: bool) -> None:
    fields: dict[str, Any] = asdict(dataset) | {"grants": grants}
    if as_json:
        print_json(fields | {"columns": None if columns is None else [asdict(column) for column in columns]})
        return
    print_fields(fields)
    if columns is not None:
        print("columns:")
        for column in columns:
            print(f"  {column.name} {column.type}" + ("  PII" if column.name in dataset.pii_columns else ""))
