"""Datasets: what SQL may name, who owns it and who may read it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from psycopg.rows import class_row

from db.connection import Connection


@dataclass(frozen=True, slots=True)
class NewDataset:
    """A dataset to be registered, or to replace the org's dataset of that name."""

    org_id: str
    user_id: str | None
    name: str
    kind: str
    location: str
    visibility: str
    pii_columns: list[str]


@dataclass(frozen=True, slots=True)
class Dataset(NewDataset):
    """A dataset as registered. `version` rises with every change, so that warm instances of the old one end."""

    id: str
    version: int


UPSERT = """
INSERT INTO datasets AS d (org_id, user_id, name, kind, location, visibility, pii_columns)
VALUES (%(org_id)s, %(user_id)s, %(name)s, %(kind)s, %(location)s, %(visibility)s, %(pii_columns)s)
ON CONFLICT (org_id, name) DO UPDATE
SET user_id = excluded.user_id, kind = excluded.kind, location = excluded.location,
    visibility = excluded.visibility, pii_columns = excluded.pii_columns, version = d.version + 1, updated_at = now()
RETURNING id::text, org_id::text, user_id::text, name, kind, location, visibility, pii_columns, version
"""

LIST = """
SELECT id::text, org_id::text, user_id::text, name, kind, location, visibility, pii_columns, version
FROM datasets
WHERE %(org_id)s::uuid IS NULL OR org_id = %(org_id)s::uuid
ORDER BY org_id, name
"""

# An org's own dataset hides a public one of the same name.
READ_GRANTED = """
SELECT DISTINCT ON (name)
       id::text, org_id::text, user_id::text, name, kind, location, visibility, pii_columns, version
FROM datasets
WHERE visibility = 'public'
   OR (org_id = %(org_id)s
       AND (visibility = 'org'
            OR (visibility = 'private' AND user_id = %(user_id)s)
            OR (visibility LIKE 'role:%%' AND substr(visibility, 6) = ANY(%(roles)s::text[]))))
ORDER BY name, (org_id = %(org_id)s) DESC, org_id
"""


async def upsert_dataset(connection: Connection, dataset: NewDataset) -> Dataset:
    """Register or replace."""
    async with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        await cursor.execute(UPSERT, asdict(dataset))
        stored = await cursor.fetchone()
        assert stored is not None
        return stored


async def list_datasets(connection: Connection, org_id: str | None) -> list[Dataset]:
    """All datasets, or one org's."""
    async with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        await cursor.execute(LIST, {"org_id": org_id})
        return await cursor.fetchall()


async def read_granted(connection: Connection, org_id: str, user_id: str | None, roles: Sequence[str]) -> list[Dataset]:
    """Everything that the caller may read, one dataset a name."""
    async with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        await cursor.execute(READ_GRANTED, {"org_id": org_id, "user_id": user_id, "roles": list(roles)})
        return await cursor.fetchall()
