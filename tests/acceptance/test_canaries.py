"""Canaries: SQL, parameters, values, file names and saved queries are found where the design allows them, and nowhere
else, of a stack with the real command line."""

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg import sql as pg

from tests.acceptance.checker import Valid
from tests.acceptance.stack import Stack, run_stack
from tests.acceptance.stranger import (
    DEAD_LETTER_TOPIC,
    REQUEST_TOPICS,
    Contract,
    Publisher,
    StatusEvent,
    StatusTail,
    Tail,
)
from tests.acceptance.workload import make_fields, to_outgoing

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
USER = "7b1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
QUERY_SECONDS = 90.0
# Below the stack's folder.
_STORE = (".queryd", "s3")

# Each kind of canary, and the columns of tables that may hold it: the user put it there.
_KEPT = {
    "sql": [],
    "parameter": [],
    "value": [],
    # A value that a query asks to be told: its event has it, wherever the event is.
    "told": ["public.query_runs.last_event", "public.outbox.payload"],
    "file": ["public.datasets.location"],
    "saved": ["public.saved_queries.query"],
}

# What a table of ours or of the datasets' may hold, their server's files hold.
_STORED = ("value", "told", "file", "saved")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with run_stack() as started:
        yield started


@pytest.mark.slow
def test_nothing_tells_sql_or_data_but_what_is_made_to(stack: Stack, tmp_path: Path) -> None:
    canaries = {kind: f"canary{kind}{uuid.uuid4().hex}" for kind in _KEPT}
    _add_datasets(stack, canaries, tmp_path)
    saved = _save(stack, f"SELECT CAST('{canaries['saved']}' AS INTEGER) AS number")
    fields = [make_fields(mode, sql=sql, org_id=ORG) for sql in _statements(canaries["sql"]) for mode in REQUEST_TOPICS]
    fields.append(
        make_fields(sql="SELECT CAST($value AS INTEGER) AS x", parameters={"value": canaries["parameter"]}, org_id=ORG)
    )
    fields.append(make_fields(sql=None, saved_query_id=saved, org_id=ORG, user_id=USER))
    fields += [
        make_fields(sql=sql, org_id=ORG)
        for sql in (
            "SELECT CAST(word AS INTEGER) AS number FROM words",
            "SELECT word::DATE AS day FROM stored",
            "SELECT 1 // (SELECT count(*) - 2 FROM words) AS x, error FROM words",
            "SELECT * FROM missing",
            "SELECT * FROM spoilt",
        )
    ]
    released = make_fields(sql="SELECT word FROM words ORDER BY ALL", org_id=ORG, output_format="csv")
    told_inline = make_fields(sql="SELECT word FROM told", org_id=ORG, delivery="inline_if_small")
    asked = (*fields, released, told_inline)
    servers, contract = stack.servers, Contract()
    with (
        Publisher(servers.bootstrap) as publisher,
        StatusTail(servers.bootstrap, contract) as told,
        Tail(servers.bootstrap, DEAD_LETTER_TOPIC) as letters,
    ):
        publisher.publish([to_outgoing(contract, Valid(each, (), ())) for each in asked])
        query_ids = [each["query_id"] for each in asked]
        told.read_terminal(query_ids, QUERY_SECONDS)
        events = [event for query_id in query_ids for event in told.events[query_id]]
        assert letters.poll() == []
    ends = {query_id: told.events[query_id][-1].fields for query_id in query_ids}
    for succeeded in (released, told_inline):
        assert ends.pop(succeeded["query_id"])["status"] == "Succeeded"
    assert {end["error_code"] for end in ends.values()} <= {"SQL_REJECTED", "QUERY_ERROR"}

    objects = _read_objects(stack)
    tells = [str(told.events[told_inline["query_id"]][-1].record.place)]
    for kind, canary in canaries.items():
        assert find_in_events(canary, events) == (tells if kind == "told" else []), kind
        for url in (servers.data_url, servers.state_url):
            assert set(find_in_tables(canary, url)) <= set(_KEPT[kind]), kind
        files = find_in_files(canary, stack.folder)
        assert [name for name in files if not (kind in _STORED and name.startswith(".queryd/postgres/"))] == [], kind
        # Errors tell their authors; the dataset and the result hold the values.
        tellers = {key for key, body in objects.items() if canary.encode() in body.lower()}
        results = {key for key in tellers if key.startswith("results/") and not key.endswith("/error.json")}
        assert all(released["query_id"] in key for key in results), kind
    # The authors are told: the search can find, and their detail is there.
    details = [json.loads(body)["detail"] for key, body in objects.items() if key.endswith("/error.json")]
    for kind in ("parameter", "value", "saved"):
        assert any(canaries[kind] in detail for detail in details), kind


def _statements(canary: str) -> list[str]:
    return [
        f"SELECT * FROM {canary}",
        f"SELECT {canary} FROM generate_series(1, 2) AS t(i)",
        f"SELECT CAST('{canary}' AS INTEGER) AS number",
        f"SELECT '{canary}' AS label, 9223372036854775807::BIGINT + i AS sum FROM generate_series(1, 1) AS t(i)",
        f"SELECT strptime('{canary}', '%Y') AS year",
        f"SELEC '{canary}'",
        f"SELECT '{canary}",
        f"SELECT '{canary}'; SELECT 2",
        f"CREATE TABLE {canary} (i INTEGER)",
        f"SELECT * FROM read_csv('/{canary}.csv')",
        f"SELECT * FROM '{canary}.parquet'",
        f"SELECT {canary}(1) AS x",
        f"SELECT 1::{canary} AS x",
        f"SELECT * FROM words WHERE {canary}.word = 1",
        f'SELECT 1 AS "{canary}" ORDER BY "{canary}x"',
    ]


def _add_datasets(stack: Stack, canaries: dict[str, str], folder: Path) -> None:
    """`words`, `told` and `stored` hold values; `missing` has no file, and that of `spoilt` is no Parquet."""
    servers = stack.servers
    prefix = f"datasets/{canaries['file']}"
    s3 = servers.s3()
    for name, kind in (("words", "value"), ("told", "told")):
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table({"word": ["a", canaries[kind]]}), path)
        s3.upload_file(str(path), servers.bucket, f"{prefix}/{path.name}")
    s3.put_object(Bucket=servers.bucket, Key=f"{prefix}/spoilt.parquet", Body=b"PAR1 and nothing more")
    with psycopg.connect(servers.data_url.removesuffix("/data") + "/datasets", autocommit=True) as connection:
        connection.execute("CREATE TABLE stored (word TEXT)")
        connection.execute("INSERT INTO stored VALUES (%s)", [canaries["value"]])
    with psycopg.connect(servers.data_url, autocommit=True) as connection:
        for name, kind, location in (
            ("words", "parquet", f"s3://{servers.bucket}/{prefix}/words.parquet"),
            ("told", "parquet", f"s3://{servers.bucket}/{prefix}/told.parquet"),
            ("missing", "parquet", f"s3://{servers.bucket}/{prefix}/missing.parquet"),
            ("spoilt", "parquet", f"s3://{servers.bucket}/{prefix}/spoilt.parquet"),
            ("stored", "postgres", "public.stored"),
        ):
            connection.execute(
                "INSERT INTO datasets (org_id, name, kind, location, visibility) VALUES (%s, %s, %s, %s, 'org')",
                [ORG, name, kind, location],
            )


def _save(stack: Stack, sql: str) -> str:
    added = stack.queryd("saved", "add", "numbers", "--org", ORG, "--user", USER, "--sql", sql, "--json")
    saved_query_id: str = json.loads(added)["id"]
    return saved_query_id


def _read_objects(stack: Stack) -> dict[str, bytes]:
    servers = stack.servers
    s3 = servers.s3()
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=servers.bucket)
    keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
    return {key: s3.get_object(Bucket=servers.bucket, Key=key)["Body"].read() for key in keys}


def find_in_events(word: str, events: Sequence[StatusEvent]) -> list[str]:
    """The places of the records that have the word in their value or in a header."""
    wanted = word.encode()
    return [
        str(event.record.place)
        for event in events
        if any(wanted in (part or b"").lower() for part in (event.record.value, *dict(event.record.headers).values()))
    ]


_COLUMNS = """
SELECT c.table_schema, c.table_name, c.column_name, c.data_type
FROM information_schema.columns AS c
JOIN information_schema.tables AS t USING (table_schema, table_name)
WHERE t.table_type = 'BASE TABLE' AND c.table_schema NOT IN ('pg_catalog', 'information_schema')
"""


def find_in_tables(word: str, url: str) -> list[str]:
    """The columns that have the word."""
    found = []
    with psycopg.connect(url) as connection:
        columns = connection.execute(_COLUMNS).fetchall()
        assert columns, "a database without tables"
        for schema, table, column, data_type in columns:
            name = pg.Identifier(column)
            text = pg.SQL("encode({}, 'escape')").format(name) if data_type == "bytea" else name
            statement = pg.SQL("SELECT count(*) FROM {} WHERE {}::text ILIKE %s").format(
                pg.Identifier(schema, table), text
            )
            if connection.execute(statement, (f"%{word}%",)).fetchall() != [(0,)]:
                found.append(f"{schema}.{table}.{column}")
    return found


def find_in_files(word: str, folder: Path) -> list[str]:
    """The files below the folder that have the word: logs, and what the databases ever wrote, deleted or not.

    The store's own are left out: its objects are looked at one by one.
    """
    wanted = word.encode()
    found = []
    for path in folder.rglob("*"):
        # A server may remove its files while we look.
        with suppress(FileNotFoundError):
            if path.is_file() and path.relative_to(folder).parts[:2] != _STORE and wanted in path.read_bytes().lower():
                found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.slow
def test_the_searches_can_find(stack: Stack) -> None:
    servers = stack.servers
    word = f"planted{uuid.uuid4().hex}"
    (stack.folder / "planted.txt").write_text(f"a {word.upper()} here")
    assert find_in_files(word, stack.folder) == ["planted.txt"]
    for url in (servers.data_url, servers.state_url):
        table = pg.Identifier(word)
        with psycopg.connect(url) as connection:
            connection.execute(pg.SQL("CREATE TABLE {} (a text, b bytea, c jsonb)").format(table))
            insert = pg.SQL("INSERT INTO {} VALUES (%s, %s, jsonb_build_object('k', %s::text))").format(table)
            connection.execute(insert, (word.upper(), b"\x00\xff" + word.encode(), [word]))
        assert find_in_tables(word, url) == [f"public.{word}.{column}" for column in "abc"]
        with psycopg.connect(url) as connection:
            connection.execute(pg.SQL("DROP TABLE {}").format(table))
