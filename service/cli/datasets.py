"""`queryd datasets`."""

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from access.datasets import add_dataset
from db.connection import DataPool, transaction
from db.data.datasets import Dataset, NewDataset, list_datasets
from service.cli.database import optional_uuid, uuid_argument, with_data
from service.cli.output import print_fields, print_json, print_rows
from service.cli.query import Json

app = typer.Typer(help="What SQL may name, and who may read it.", no_args_is_help=True)


class Kind(StrEnum):
    """Where a dataset's rows lie."""

    PARQUET = "parquet"
    POSTGRES = "postgres"


# What a person looks for; `--json` has everything.
_SHOWN = ("name", "org_id", "kind", "location", "visibility", "pii_columns")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What SQL calls it: an identifier, or schema.identifier.")],
    org: Annotated[str, typer.Option(help="The org that owns it.")],
    kind: Annotated[Kind, typer.Option(help="Where its rows lie.")],
    location: Annotated[str, typer.Option(help="s3://bucket/key, with globs; or schema.table.")],
    visibility: Annotated[str, typer.Option(help="private, org, role:<slug> or public.")] = "private",
    user: Annotated[str | None, typer.Option(help="Its creator; wanted for private.")] = None,
    pii_columns: Annotated[str, typer.Option(help="Columns that hold personal data: a,b")] = "",
    as_json: Json = False,
) -> None:
    """Register a dataset, or replace the org's dataset of that name."""
    dataset = NewDataset(
        org_id=uuid_argument(org, "--org"),
        user_id=optional_uuid(user, "--user"),
        name=name,
        kind=kind.value,
        location=location,
        visibility=visibility,
        pii_columns=[column.strip() for column in pii_columns.split(",") if column.strip()],
    )

    stored = with_data(lambda pool: add_dataset(pool, dataset))
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

    org_id = optional_uuid(org, "--org")

    async def read(pool: DataPool) -> list[Dataset]:
        async with transaction(pool) as connection:
            return await list_datasets(connection, org_id)

    datasets = [asdict(dataset) for dataset in with_data(read)]
    if as_json:
        print_json(datasets)
    else:
        print_rows("datasets", [{name: dataset[name] for name in _SHOWN} for dataset in datasets])
