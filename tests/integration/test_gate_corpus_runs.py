"""Every statement of the corpora through a real child, its relations being Parquet in S3."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import boto3
import duckdb
import pytest
import pytest_asyncio

from engines.duckdb.pool import DuckDBEngine
from engines.duckdb.settings import DuckDBSettings
from engines.protocol import Execution, QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode, OrgId, OutputFormat, QueryId
from service.embedded.object_store import ObjectStore
from tests.sql_fixture import GRANTED, make_fixture
from tests.sql_statements import Statement, read_statements

_MIB = 1024 * 1024

# A statement takes milliseconds; a loaded machine takes a hundred times as long.
_SECONDS = 60.0


@pytest.fixture
def relations(object_store: ObjectStore, tmp_path: Path) -> tuple[Relation, ...]:
    """The granted relations, each as one object."""
    folder = f"datasets/{uuid.uuid4()}"
    s3 = boto3.client(
        "s3",
        endpoint_url=object_store.endpoint_url,
        region_name=object_store.region,
        aws_access_key_id=object_store.writer.access_key,
        aws_secret_access_key=object_store.writer.secret_key,
    )
    made = []
    with duckdb.connect(":memory:") as connection:
        make_fixture(connection)
        for number, name in enumerate(GRANTED):
            quoted = ".".join(f'"{part}"' for part in name.split("."))
            file = tmp_path / f"{number}.parquet"
            connection.execute(f"COPY {quoted} TO '{file}' (FORMAT parquet)")
            s3.upload_file(str(file), object_store.bucket, f"{folder}/{file.name}")
            location = f"s3://{object_store.bucket}/{folder}/{file.name}"
            made.append(Relation(name, RelationKind.PARQUET, location, "1"))
    return tuple(made)


@pytest_asyncio.fixture
async def engine(object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[DuckDBEngine]:
    """One child that can read the bucket."""
    settings = DuckDBSettings(
        512 * _MIB,
        1,
        tmp_path / "engine",
        endpoint_url=object_store.endpoint_url,
        region=object_store.region,
        access_key=object_store.reader.access_key,
        secret_key=object_store.reader.secret_key,
    )
    made = DuckDBEngine(settings, 1)
    await made.start()
    yield made
    await made.close()


def _make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


async def _verdict(engine: DuckDBEngine, statement: Statement, relations: tuple[Relation, ...], scratch: Path) -> str:
    """What came of it: nothing where it ran, else the code and the sentence."""
    # CSV can say values of every type.
    execution = Execution(
        QueryId(str(uuid.uuid4())),
        OrgId(str(uuid.UUID(int=7))),
        statement.sql,
        {},
        relations,
        OutputFormat.CSV,
        scratch,
        _SECONDS,
    )
    try:
        await engine.execute(execution)
    except QueryFailed as failure:
        return f"{failure.code}: {failure.message}"
    return ""


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_what_is_allowed_runs_in_a_child_and_the_rest_is_refused(
    engine: DuckDBEngine, relations: tuple[Relation, ...], tmp_path: Path
) -> None:
    wrong = []
    for statement in read_statements():
        verdict = await _verdict(engine, statement, relations, _make_folder(tmp_path / statement.id))
        refused = verdict.startswith((ErrorCode.SQL_REJECTED, ErrorCode.QUERY_ERROR))
        if verdict if statement.allowed else not refused:
            wrong.append(f"{statement.id}: {verdict or 'it ran'}")
    assert wrong == []
