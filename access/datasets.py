"""Registering datasets and granting them. What can be told without looking at their rows is validated here."""

import re
from collections.abc import Sequence
from dataclasses import replace

from access.visibility import InvalidRegistration, check_visibility, read_grantee
from db.connection import DataPool, statement, transaction
from db.data import datasets
from db.data.datasets import Dataset, NewDataset
from queryd.events import Column

_MAX_NAME_PART = 63

# Where DuckDB has something of its own, a schema of that name is ambiguous, or can't be made: `memory` is the name of
# the catalog in which a dataset's view stands.
_TAKEN_SCHEMAS = frozenset({"main", "memory", "system", "temp", "information_schema", "pg_catalog"})
_OUR_PREFIX = "__queryd"

# Behind a `?` DuckDB takes an S3 URL for settings, an endpoint among them; braces and the others mean nothing to it.
_PARQUET = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<path>[^?#{}\\]+)")
_WILDCARD = re.compile(r"[*\[]")


class NoSuchDataset(Exception):
    """The org has no dataset of that name."""


def fold(name: str) -> str:
    """A name as DuckDB compares it: only ASCII letters lose their case."""
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def check_dataset(dataset: NewDataset, reserved: str | None = None) -> None:
    """Judge everything but the dataset's rows. `reserved` is the `s3://…/` below which no dataset may lie.

    Raises `InvalidRegistration`.
    """
    check_visibility(dataset.visibility)
    if dataset.visibility == "private" and dataset.user_id is None:
        raise InvalidRegistration("a private dataset needs its user: give --user")
    _check_name(dataset.name)
    match dataset.kind:
        case "parquet":
            _check_objects(dataset.location, reserved)
        case "postgres":
            _check_table(dataset.location)
        case _:
            raise InvalidRegistration("a dataset's kind is parquet or postgres")
    if len({fold(column) for column in dataset.pii_columns}) < len(dataset.pii_columns):
        raise InvalidRegistration("a column is named twice among the PII columns")


def spell_pii_columns(dataset: NewDataset, columns: tuple[Column, ...]) -> NewDataset:
    """The dataset with its PII columns spelled as its columns are; raises `InvalidRegistration` where one is none."""
    spelled = {fold(column.name): column.name for column in columns} | {column.name: column.name for column in columns}
    missing = [name for name in dataset.pii_columns if name not in spelled and fold(name) not in spelled]
    if missing:
        raise InvalidRegistration(
            f"the dataset has no column {', '.join(missing)}; it has {', '.join(column.name for column in columns)}"
        )
    return replace(dataset, pii_columns=[spelled.get(name) or spelled[fold(name)] for name in dataset.pii_columns])


async def add_dataset(pool: DataPool, dataset: NewDataset, reserved: str | None = None) -> Dataset:
    """Register a dataset, or replace the org's dataset of that name, which loses its grants.

    Raises `InvalidRegistration` as `check_dataset` does, and `DatabaseUnavailable`.
    """
    check_dataset(dataset, reserved)
    async with transaction(pool) as connection:
        return await datasets.upsert_dataset(connection, dataset)


async def find_dataset(pool: DataPool, org_id: str, name: str) -> tuple[Dataset, list[str]]:
    """The org's dataset of that name and to whom it is granted; raises `NoSuchDataset` and `DatabaseUnavailable`."""
    async with transaction(pool) as connection:
        dataset = _there(await datasets.find_dataset(connection, org_id, name))
        return dataset, await datasets.read_grants(connection, dataset.id)


async def remove_dataset(pool: DataPool, org_id: str, name: str) -> Dataset:
    """Forget a dataset and its grants; its rows are not ours. What runs over it finishes.

    Raises `NoSuchDataset` and `DatabaseUnavailable`.
    """
    async with statement(pool) as connection:
        return _there(await datasets.delete_dataset(connection, org_id, name))


async def grant(pool: DataPool, org_id: str, name: str, grantees: Sequence[str]) -> tuple[Dataset, list[str]]:
    """Let others read, named as `read_grantee` takes them; returns the dataset and to whom it is granted then.

    Raises `InvalidRegistration`, `NoSuchDataset` and `DatabaseUnavailable`.
    """
    wanted = [read_grantee(each, org_id) for each in grantees]
    async with transaction(pool) as connection:
        dataset = _there(await datasets.grant(connection, org_id, name, wanted))
        return dataset, await datasets.read_grants(connection, dataset.id)


async def revoke(pool: DataPool, org_id: str, name: str, grantees: Sequence[str]) -> tuple[Dataset, list[str]]:
    """Take grants back, as `grant` gives them. Who reads the dataset by its visibility still does."""
    wanted = [read_grantee(each, org_id) for each in grantees]
    async with transaction(pool) as connection:
        dataset = _there(await datasets.revoke(connection, org_id, name, wanted))
        return dataset, await datasets.read_grants(connection, dataset.id)


def _there(dataset: Dataset | None) -> Dataset:
    if dataset is None:
        raise NoSuchDataset("the org has no dataset of that name")
    return dataset


def _check_name(name: str) -> None:
    parts = name.split(".")
    if len(parts) > 2 or not all(_is_name_part(part) for part in parts):
        raise InvalidRegistration(
            f"a dataset's name is one or two parts (schema.name) of 1 to {_MAX_NAME_PART} characters each,"
            " without double quotes and control characters"
        )
    if len(parts) == 2 and fold(parts[0]) in _TAKEN_SCHEMAS:
        raise InvalidRegistration(f"the schema can't be one of {', '.join(sorted(_TAKEN_SCHEMAS))}: the engine has it")
    if any(fold(part).startswith(_OUR_PREFIX) for part in parts):
        raise InvalidRegistration(f"names that begin with {_OUR_PREFIX} are the service's own")


def _is_name_part(part: str) -> bool:
    return 1 <= len(part) <= _MAX_NAME_PART and part.isprintable() and '"' not in part and not part.isspace()


def _check_objects(location: str, reserved: str | None) -> None:
    found = _PARQUET.fullmatch(location)
    if found is None or not location.isprintable():
        raise InvalidRegistration(
            "a parquet dataset's location is s3://bucket/key, a folder (s3://bucket/folder/), or one with wildcards"
            " (* in a name, ** over folders, [a-z]), without ? # { } and backslashes"
        )
    folders = found["path"].removesuffix("/").split("/")
    if any(folder in ("", ".", "..") for folder in folders):
        raise InvalidRegistration("a location has no empty folders and none called . or ..")
    if reserved is not None and _touches(location, reserved):
        raise InvalidRegistration(f"below {reserved} lie results, which are nobody's dataset")


def _touches(location: str, reserved: str) -> bool:
    """True if what the engine may read for that location lies below `reserved`, or holds it."""
    fixed = _WILDCARD.split(location, maxsplit=1)[0]
    # For a pattern the engine may read the whole folder before its first wildcard.
    reach = location if fixed == location else fixed[: fixed.rfind("/") + 1]
    return reach.startswith(reserved) or (reach.endswith("/") and reserved.startswith(reach))


def _check_table(location: str) -> None:
    parts = location.split(".")
    if len(parts) != 2 or not all(_is_name_part(part) for part in parts):
        raise InvalidRegistration("a postgres dataset's location is schema.table, as the server spells them")
