"""TPC-H at scale factor 1 through the whole service: over Parquet in S3, and with half of the tables in Postgres."""

import uuid
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import boto3
import duckdb
import psycopg
import pytest

from queryd.client import QueryClient
from queryd.events import OutputFormat, Status
from queryd.results import ResultReader
from tests.acceptance import tpch
from tests.acceptance.stack import Stack, run_stack

_SCALE = 1
# The four that differ most in size: nothing, a little, and most of the rows that are not lineitem's.
_IN_POSTGRES = ("customer", "nation", "orders", "supplier")
_PARQUET_ORG, _MIXED_ORG = (str(uuid.uuid5(uuid.NAMESPACE_DNS, name)) for name in ("parquet", "mixed"))
_PREFIX = "datasets/tpch/"
# Some take seconds on a busy machine with two cores; this guards against hanging only.
_PATIENCE_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Warehouse:
    """A running stack with the tables in both stores, granted to one org each."""

    client: QueryClient
    reader: ResultReader
    questions: list[tpch.Question]

    def ask(self, question: tpch.Question, org_id: str) -> bytes:
        """The answer as CSV."""
        handle = self.client.submit(
            question.sql, org_id=org_id, output_format=OutputFormat.CSV, timeout_seconds=_PATIENCE_SECONDS
        )
        ended = handle.wait(_PATIENCE_SECONDS)
        assert ended.status is Status.SUCCEEDED, (question.number, ended.error_code, ended.error_message)
        [file] = ended.files
        return self.reader.read_object(ended.output_location or "", file.key)


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warehouse]:
    folder = tmp_path_factory.mktemp("tpch")
    with tpch.open_tpch() as source, ThreadPoolExecutor(1) as beside:
        # Seconds of work each: the tables, and the stack's start.
        made = beside.submit(tpch.make_tables, source, _SCALE)
        with run_stack() as stack, pytest.MonkeyPatch.context() as environment:
            settings = _read_settings(stack)
            for name in (name for name in settings if name.startswith("AWS_")):
                environment.setenv(name, settings[name])
            environment.setenv("AWS_DEFAULT_REGION", settings["AWS_REGION"])
            made.result()
            _fill(source, settings, folder, beside)
            with QueryClient({"bootstrap.servers": settings["QUERYD_KAFKA_BOOTSTRAP"]}) as client:
                yield Warehouse(client, ResultReader(), tpch.read_questions(source, _SCALE))


def _read_settings(stack: Stack) -> dict[str, str]:
    lines = (stack.folder / ".queryd" / "env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def _fill(source: duckdb.DuckDBPyConnection, settings: dict[str, str], folder: Path, beside: Executor) -> None:
    owner = settings["QUERYD_DATA_URL"].removesuffix("/data") + "/datasets"
    # A cursor is a connection of its own to the same tables.
    copied = beside.submit(tpch.copy_to_postgres, source.cursor(), owner, _IN_POSTGRES, folder)
    bucket = settings["QUERYD_RESULTS_URL"].removeprefix("s3://")
    s3 = boto3.session.Session().client("s3")
    for table, file in tpch.write_parquet(source, folder).items():
        s3.upload_file(str(file), bucket, f"{_PREFIX}{table}.parquet")
        file.unlink()
    copied.result()
    parquet = {table: ("parquet", f"s3://{bucket}/{_PREFIX}{table}.parquet") for table in tpch.TABLES}
    mixed = parquet | {table: ("postgres", f"public.{table}") for table in _IN_POSTGRES}
    with psycopg.connect(settings["QUERYD_DATA_URL"]) as connection:
        for org_id, places in ((_PARQUET_ORG, parquet), (_MIXED_ORG, mixed)):
            for table, (kind, location) in places.items():
                connection.execute(
                    "INSERT INTO datasets (org_id, name, kind, location, visibility) VALUES (%s, %s, %s, %s, 'org')",
                    [org_id, table, kind, location],
                )


@pytest.mark.slow
@pytest.mark.parametrize("org_id", [_PARQUET_ORG, _MIXED_ORG], ids=["parquet", "half in postgres"])
@pytest.mark.timeout(1200)
def test_all_22_queries_have_the_known_answers(warehouse: Warehouse, org_id: str) -> None:
    differences = {}
    for question in warehouse.questions:
        difference = tpch.find_difference(question, warehouse.ask(question, org_id))
        if difference is not None:
            differences[question.number] = difference
    assert differences == {}
    assert len(warehouse.questions) == 22


@pytest.mark.slow
def test_a_wrong_answer_is_found(warehouse: Warehouse) -> None:
    """The comparison can fail: another query's answer, and one digit."""
    first, second = warehouse.questions[:2]
    body = warehouse.ask(first, _PARQUET_ORG)
    assert tpch.find_difference(first, body) is None
    assert tpch.find_difference(second, body) is not None
    count = first.rows[0][-1]
    other = str(int(count) + 1)
    assert tpch.find_difference(first, body.replace(count.encode(), other.encode())) is not None
    assert tpch.find_difference(first, b"\r\n".join(body.split(b"\r\n")[:-2])) is not None
