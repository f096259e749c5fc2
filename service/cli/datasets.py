"""`queryd datasets`."""

import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from access.datasets import (
    NoSuchDataset,
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
from engines.protocol import AS_IT_IS, Looked, LookedColumn, RelationKind
from queryd.events import Column
from results.location import ROOT
from service.cli.database import optional_uuid, uuid_argument, with_data
from service.cli.output import complain, print_fields, print_json, show_rows
from service.cli.query import Json
from service.looking import CantLook, check_looked, look
from service.settings import load_settings

app = typer.Typer(help="What SQL may name, and who may read it.", no_args_is_help=True)


# What a person looks for; `--json` has everything.
_SHOWN = ("name", "org_id", "kind", "location", "visibility", "pii_columns")

# A folder may contain many unread files; a few examples show their kind.
_MAX_KEYS = 5

Name = Annotated[str, typer.Argument(help="What SQL calls it: name or schema.name, without quotes.")]
Owner = Annotated[str, typer.Option(help="The org that owns it.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Read its columns with the datasets' credentials.")]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]
Grantees = list[str]


@app.command()
def add(
    name: Name,
    org: Owner,
    kind: Annotated[RelationKind, typer.Option(help="Where its rows lie.")],
    location: Annotated[str, typer.Option(help="s3://bucket/key, a folder or a pattern; or schema.table.")],
    visibility: Annotated[str, typer.Option(help="private, org, role:<slug> or public.")] = "private",
    user: Annotated[str | None, typer.Option(help="Its creator; wanted for private.")] = None,
    pii_columns: Annotated[str, typer.Option(help="Columns that hold personal data: a,b")] = "",
    check: Check = True,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Register a dataset, or replace the org's dataset of that name and delete its grants.

    Prints how queryd reads each column. Registration fixes the columns and partition columns: later files must match
    them. Asks before it deletes grants.
    """
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
    looked = None
    try:
        check_dataset(dataset, reserved)
        if check:
            looked = look(settings, lambda looker: looker.look(dataset))
            check_looked(looked, location)
            dataset = spell_pii_columns(dataset, tuple(Column(column.name, column.type) for column in looked.columns))
            if looked.registered is not None:
                dataset = replace(dataset, registered=json.dumps(asdict(looked.registered)))
    except InvalidRegistration as error:
        complain(str(error), 2)
    except CantLook as error:
        complain(f"{str(error).removesuffix('.')}; --no-check registers the dataset without reading it")

    if not yes:
        _ask_for_grants(dataset)

    async def store(pool: DataPool) -> tuple[Dataset, list[str]]:
        await add_dataset(pool, dataset, reserved)
        return await find_dataset(pool, dataset.org_id, dataset.name)

    _print(*with_data(store), looked, as_json)


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

    show_rows("datasets", [asdict(dataset) for dataset in with_data(read)], as_json, _SHOWN)


@app.command()
def show(name: Name, org: Owner, check: Check = True, as_json: Json = False) -> None:
    """Show one dataset: how queryd reads its columns, which files it does not read, and who may read the dataset."""
    org_id = uuid_argument(org, "--org")
    dataset, grants = with_data(lambda pool: find_dataset(pool, org_id, name))
    looked = None
    try:
        if check:
            looked = look(load_settings(), lambda looker: looker.look(dataset))
    except (InvalidRegistration, CantLook) as error:
        complain(f"{str(error).removesuffix('.')}; --no-check shows what is registered")
    _print(dataset, grants, looked, as_json)


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
def remove(name: Name, org: Owner, yes: Yes = False, as_json: Json = False) -> None:
    """Delete a dataset's registration and its grants. Its files or rows stay, and running queries finish.

    Asks first on a terminal; a script need not confirm.
    """
    org_id = uuid_argument(org, "--org")
    if not yes and sys.stdin.isatty() and not typer.confirm(f"Delete dataset {name} and its grants?", err=True):
        complain("nothing was deleted")
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


def _ask_for_grants(dataset: NewDataset) -> None:
    """Ask before a replacement deletes a dataset's grants. Exits unless the user agrees."""

    async def read_grants(pool: DataPool) -> list[str]:
        try:
            return (await find_dataset(pool, dataset.org_id, dataset.name))[1]
        except NoSuchDataset:
            return []

    grants = with_data(read_grants)
    if not grants:
        return
    sentence = f"this replaces {dataset.name} and deletes its grants ({', '.join(grants)})"
    if not sys.stdin.isatty():
        complain(f"{sentence}: confirm with --yes", 2)
    if not typer.confirm(f"{sentence}. Continue?", err=True):
        complain("nothing was changed")


def _print(dataset: Dataset, grants: list[str], looked: Looked | None, as_json: bool) -> None:
    fields: dict[str, Any] = asdict(dataset) | {"grants": grants}
    registered = fields.pop("registered")
    if as_json:
        print_json(
            fields
            | {"registered": None if registered is None else json.loads(registered)}
            | {"columns": None if looked is None else [asdict(column) for column in looked.columns]}
            | {"files": None if looked is None or not looked.files else _to_file_fields(looked)}
        )
        return
    print_fields(fields)
    if looked is not None:
        for line in _list_lines(dataset, looked):
            print(line)


def _to_file_fields(looked: Looked) -> dict[str, Any]:
    return {
        "count": looked.files,
        "bytes": looked.bytes,
        "hidden": list(looked.hidden),
        "outside_partitions": list(looked.outside),
        "unreadable": list(looked.unreadable),
    }


def _list_lines(dataset: Dataset, looked: Looked) -> Iterator[str]:
    yield "columns:"
    for column in looked.columns:
        yield f"  {column.name} {column.type}" + "".join(f"  {note}" for note in _list_notes(dataset, column))
    if not looked.files:
        return
    yield f"files: {looked.files}, {looked.bytes} bytes"
    if looked.hidden:
        yield f"not read, because a name begins with _ or .: {_format_keys(looked.hidden)}"
    if looked.outside:
        yield f"not read, because they are outside the partition folders: {_format_keys(looked.outside)}"
    if looked.unreadable:
        yield f"can't be read: {_format_keys(looked.unreadable)}"


def _list_notes(dataset: Dataset, column: LookedColumn) -> Iterator[str]:
    if column.name in dataset.pii_columns:
        yield "PII"
    if column.trouble is not None:
        yield f"({column.trouble})"
    elif column.how != AS_IT_IS:
        yield f"({column.how})"


def _format_keys(keys: Sequence[str]) -> str:
    more = len(keys) - _MAX_KEYS
    return ", ".join(keys[:_MAX_KEYS]) + (f" and {more} more" if more > 0 else "")
