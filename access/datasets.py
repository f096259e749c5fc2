"""Registering datasets, validated on entry."""

import re

from access.visibility import InvalidRegistration, check_visibility
from db.connection import DataPool, transaction
from db.data.datasets import Dataset, NewDataset, upsert_dataset

# One identifier, or two with a dot: what SQL can name without quotes.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?")
_TABLE = re.compile(r"[^.\s]+\.[^.\s]+")


async def add_dataset(pool: DataPool, dataset: NewDataset) -> Dataset:
    """Register a dataset, or replace the org's dataset of that name; raises `InvalidRegistration`."""
    _check(dataset)
    async with transaction(pool) as connection:
        return await upsert_dataset(connection, dataset)


def _check(dataset: NewDataset) -> None:
    check_visibility(dataset.visibility, dataset.user_id)
    if not _NAME.fullmatch(dataset.name):
        raise InvalidRegistration("a dataset's name is an identifier, or schema.identifier")
    match dataset.kind:
        case "parquet":
            if not re.fullmatch(r"s3://[^/*]+/[^*].*", dataset.location):
                raise InvalidRegistration(
                    "a parquet dataset's location is s3://bucket/key or s3://bucket/prefix/*.parquet"
                )
        case "postgres":
            if not _TABLE.fullmatch(dataset.location):
                raise InvalidRegistration("a postgres dataset's location is schema.table")
        case _:
            raise InvalidRegistration("a dataset's kind is parquet or postgres")
