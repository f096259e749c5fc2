"""What columns a relation has, and whether they can be read, as a query would find out."""

import csv
import uuid
from dataclasses import replace
from pathlib import Path

from engines.duckdb.sql_text import quote
from engines.protocol import Engine, Execution, Output, Relation, RelationKind
from queryd.events import Column, OrgId, OutputFormat, QueryId


async def describe(engine: Engine, relation: Relation, scratch: Path, timeout_seconds: float) -> tuple[Column, ...]:
    """The relation's columns by their own names; all of them can be read if this answers.

    `scratch` is an empty directory of the caller's, and the time limit counts for each of two statements. Raises what
    `Engine.execute` raises.
    """
    named = ".".join(quote(part) for part in relation.name.split("."))
    # This reads a Parquet file's footer, and of Postgres only the catalog.
    described = await _execute(engine, f"SELECT * FROM {named} LIMIT 0", relation, scratch, timeout_seconds)  # noqa: S608
    # The output's own names are those that an event may tell; the file has them as they are.
    with described.path.open(newline="", encoding="utf-8") as file:
        names = next(csv.reader(file))
    described.path.unlink()
    if relation.kind is RelationKind.POSTGRES:
        # Whether its role may read shows only when a row is asked for. None is kept.
        touched = f"SELECT count(*) AS n FROM (SELECT * FROM {named} LIMIT 1) AS t WHERE hash(t) IS NULL"  # noqa: S608
        await _execute(engine, touched, relation, scratch, timeout_seconds)
    return tuple(replace(column, name=name) for column, name in zip(described.columns, names, strict=True))


async def _execute(engine: Engine, sql: str, relation: Relation, scratch: Path, timeout_seconds: float) -> Output:
    return await engine.execute(
        Execution(
            query_id=QueryId(str(uuid.uuid4())),
            # Nobody's: what becomes warm for it is of use to nobody else.
            org_id=OrgId(str(uuid.uuid4())),
            sql=sql,
            parameters={},
            relations=(relation,),
            output_format=OutputFormat.CSV,
            scratch=scratch,
            timeout_seconds=timeout_seconds,
        )
    )
