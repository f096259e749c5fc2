"""Datasets: what SQL may name, who owns it and who may read it. Names are compared as DuckDB does: without ASCII case.

Whatever changes a dataset or its grants raises its version, so that nothing stays warm that was made for another.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from db.connection import Connection
from db.data.visibility import visible


@dataclass(frozen=True, slots=True)
class NewDataset:
    """A dataset to register, or a replacement of the org's dataset of that name.

    `registered` is the JSON for the column of that name: what registration read from the files.
    """

    org_id: str
    user_id: str | None
    name: str
    kind: str
    location: str
    visibility: str
    pii_columns: list[str]
    registered: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Dataset(NewDataset):
    """A dataset as registered. `version` rises with every change, so that warm instances of the old one end."""

    id: str
    version: int


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a query runs."""

    org_id: str
    user_id: str | None
    roles: tuple[str, ...]


_COLUMNS = """d.id::text, d.org_id::text, d.user_id::text, d.name, d.kind, d.location, d.visibility, d.pii_columns,
       d.version, d.registered::text"""

# The unique index on the folded name is the only one on names: two commands at once end as one dataset.
# Who was granted what is replaced was not granted what takes its place.
UPSERT = f"""
WITH stored AS (
    INSERT INTO datasets AS d (org_id, user_id, name, kind, location, visibility, pii_columns, registered)
    VALUES (%(org_id)s, %(user_id)s, %(name)s, %(kind)s, %(location)s, %(visibility)s, %(pii_columns)s,
            %(registered)s::jsonb)
    ON CONFLICT (org_id, lower(name COLLATE "C")) DO UPDATE
    SET user_id = excluded.user_id, name = excluded.name, kind = excluded.kind, location = excluded.location,
        visibility = excluded.visibility, pii_columns = excluded.pii_columns,
        registered = excluded.registered, version = d.version + 1, updated_at = now()
    RETURNING d.*
), dropped AS (
    DELETE FROM dataset_grants g USING stored WHERE g.dataset_id = stored.id
)
SELECT {_COLUMNS} FROM stored d
"""  # noqa: S608 - a text of ours

LIST = f"""
SELECT {_COLUMNS}
FROM datasets d
WHERE %(org_id)s::uuid IS NULL OR d.org_id = %(org_id)s::uuid
ORDER BY d.org_id, lower(d.name COLLATE "C")
"""  # noqa: S608

# One statement whatever is asked for: a name that the caller may not see costs what one that nobody has costs.
# A grant to a user or a role counts in the owner's own org only: ids and slugs of another mean other people. It is
# looked up from the org's datasets, so that what other orgs grant to roles of that slug costs nobody anything.
# An own dataset hides others of its name. Of two foreign ones the one registered first stands, whoever grants or
# publishes another later: so nobody can slip in under a name that is in use.
READ_GRANTED = f"""
SELECT c.place, {_COLUMNS}
FROM jsonb_to_recordset(%(callers)s::jsonb)
     AS c(place int, org_id uuid, user_id uuid, roles text[], insiders text[])
CROSS JOIN LATERAL (
    SELECT DISTINCT ON (lower(f.name COLLATE "C")) f.*
    FROM (
        SELECT v.* FROM datasets v
        WHERE {visible("v", org_id="c.org_id", user_id="c.user_id", roles="c.roles")}
           OR (v.org_id = c.org_id
               AND ARRAY(SELECT g.grantee FROM dataset_grants g WHERE g.dataset_id = v.id) && c.insiders)
        UNION ALL
        SELECT o.* FROM dataset_grants g JOIN datasets o ON o.id = g.dataset_id
        WHERE g.grantee = 'org:' || c.org_id
    ) AS f
    ORDER BY lower(f.name COLLATE "C"), (f.org_id = c.org_id) DESC, f.created_at, f.id
) AS d
ORDER BY c.place, lower(d.name COLLATE "C")
"""  # noqa: S608

_NAMED = 'd.org_id = %(org_id)s::uuid AND lower(d.name COLLATE "C") = lower(%(name)s COLLATE "C")'

FIND = f"SELECT {_COLUMNS} FROM datasets d WHERE {_NAMED}"  # noqa: S608
# Whoever changes the grants holds the row, so that the dataset can't be removed meanwhile.
LOCK = f"{FIND} FOR UPDATE"
DELETE = f"DELETE FROM datasets d WHERE {_NAMED} RETURNING {_COLUMNS}"  # noqa: S608

READ_GRANTS = "SELECT grantee FROM dataset_grants WHERE dataset_id = %(id)s::uuid ORDER BY grantee"
GRANT = """
INSERT INTO dataset_grants (dataset_id, grantee)
SELECT %(id)s::uuid, g.grantee FROM unnest(%(grantees)s::text[]) AS g(grantee)
ON CONFLICT DO NOTHING
"""
REVOKE = "DELETE FROM dataset_grants WHERE dataset_id = %(id)s::uuid AND grantee = ANY(%(grantees)s::text[])"
RAISE_VERSION = f"""
UPDATE datasets d SET version = d.version + 1, updated_at = now() WHERE d.id = %(id)s::uuid
RETURNING {_COLUMNS}
"""  # noqa: S608


async def upsert_dataset(connection: Connection, dataset: NewDataset) -> Dataset:
    """Register or replace a dataset. A replacement deletes its grants."""
    stored = await _fetch(connection, UPSERT, asdict(dataset))
    assert stored is not None
    return stored


async def list_datasets(connection: Connection, org_id: str | None) -> list[Dataset]:
    """All datasets, or one org's."""
    async with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        await cursor.execute(LIST, {"org_id": org_id})
        return await cursor.fetchall()


async def read_granted(connection: Connection, callers: Sequence[Caller]) -> dict[Caller, tuple[Dataset, ...]]:
    """Read every dataset that each caller may read, one of each name, with one statement."""
    distinct = list(dict.fromkeys(callers))
    asked = [
        {
            "place": place,
            "org_id": caller.org_id,
            "user_id": caller.user_id,
            "roles": caller.roles,
            "insiders": [f"role:{role}" for role in caller.roles]
            + ([] if caller.user_id is None else [f"user:{caller.user_id}"]),
        }
        for place, caller in enumerate(distinct)
    ]
    granted: list[list[Dataset]] = [[] for _ in distinct]
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(READ_GRANTED, {"callers": Jsonb(asked)})
        for row in await cursor.fetchall():
            granted[row.pop("place")].append(Dataset(**row))
    return {caller: tuple(datasets) for caller, datasets in zip(distinct, granted, strict=True)}


async def find_dataset(connection: Connection, org_id: str, name: str) -> Dataset | None:
    """The org's dataset of that name."""
    return await _fetch(connection, FIND, {"org_id": org_id, "name": name})


async def delete_dataset(connection: Connection, org_id: str, name: str) -> Dataset | None:
    """Delete the org's dataset of that name with its grants; what it was."""
    return await _fetch(connection, DELETE, {"org_id": org_id, "name": name})


async def read_grants(connection: Connection, dataset_id: str) -> list[str]:
    """To whom it was granted, sorted."""
    cursor = await connection.execute(READ_GRANTS, {"id": dataset_id})
    return [row[0] for row in await cursor.fetchall()]


async def grant(connection: Connection, org_id: str, name: str, grantees: Sequence[str]) -> Dataset | None:
    """Grant the org's dataset of that name, in the caller's transaction; None if there is none."""
    return await _change_grants(connection, GRANT, org_id, name, grantees)


async def revoke(connection: Connection, org_id: str, name: str, grantees: Sequence[str]) -> Dataset | None:
    """Take grants back, in the caller's transaction; None if there is no such dataset."""
    return await _change_grants(connection, REVOKE, org_id, name, grantees)


async def _change_grants(
    connection: Connection, change: str, org_id: str, name: str, grantees: Sequence[str]
) -> Dataset | None:
    dataset = await _fetch(connection, LOCK, {"org_id": org_id, "name": name})
    if dataset is None:
        return None
    changed = await connection.execute(change, {"id": dataset.id, "grantees": list(grantees)})
    return await _fetch(connection, RAISE_VERSION, {"id": dataset.id}) if changed.rowcount else dataset


async def _fetch(connection: Connection, statement: str, values: dict[str, Any]) -> Dataset | None:
    async with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        await cursor.execute(statement, values)
        return await cursor.fetchone()
