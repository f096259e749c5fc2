"""`queryd datasets`."""

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer

from access.datasets import add_dataset
from access.visibility import InvalidRegistration
from db.connection import DatabaseUnavailable, transaction
from db.data.datasets import Dataset, NewDataset, list_datasets
from service.cli.output import complain, print_fields, print_json, print_rows
from service.cli.query import Json, uuid_argument
from service.settings import load_settings
from service.wiring import opened_data_pool

app = typer.Typer(help="What SQL may name, and who may read it.", no_args_is_help=True)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What SQL calls it: an identifier, or schema.identifier.")],
    org: Annotated[str, typer.Option(help="The org that owns it.")],
    kind: Annotated[str, typer.Option(help="parquet or postgres.")],
    location: Annotated[str, typer.Option(help="s3://bucket/key, with globs; or schema.table.")],
    visibility: Annotated[str, typer.Option(help="private, org, role:<slug> or public.")] = "private",
    user: Annotated[str | None, typer.Option(help="Its creator; wanted for private.")] = None,
    pii_columns: Annotated[str, typer.Option(help="Columns that hold personal data: a,b")] = "",
    as_json: Json = False,
) -> None:
    """Register a dataset, or replace the org's dataset of that name."""
    dataset = NewDataset(
        org_id=uuid_argument(org, "--org"),
        user_id=None if user is None else uuid_argument(user, "--user"),
        name=name,
        kind=kind,
        location=location,
        visibility=visibility,
        pii_columns=[column.strip() for column in pii_columns.split(",") if column.strip()],
    )

    async def store() -> Dataset:
        async with opened_data_pool(load_settings()) as pool:
            return await add_dataset(pool, dataset)

    try:
        stored = asyncio.run(store())
    except InvalidRegistration as error:
        complain(str(error), 2)
    except DatabaseUnavailable as error:
        complain(f"Postgres data (QUERYD_DATA_URL) does not answer: {error}")
    if as_json:
        print_json(asdict(stored))
    else:
        print_fields(asdict(stored))


@app.command("list")
def list_(
    org: Annotated[str | None, typer.Option(help="Only this org's.")] = None,
    as_json: Json = False,
) -> None:
    """List datasets."""

    async def read() -> list[Dataset]:
        async with opened_data_pool(load_settings()) as pool, transaction(pool) as connection:
            return await list_datasets(connection, None if org is None else uuid_argument(org, "--org"))

    try:
        datasets = [asdict(dataset) for dataset in asyncio.run(read())]
    except DatabaseUnavailable as error:
        complain(f"Postgres data (QUERYD_DATA_URL) does not answer: {error}")
    if as_json:
        print_json(datasets)
    else:
        print_rows("datasets", datasets)
