"""TPC-H by DuckDB's own extension, which makes the tables and knows the queries and their answers."""

import csv
import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import psycopg

TABLES = ("customer", "lineitem", "nation", "orders", "part", "partsupp", "region", "supplier")
# What two threads may make of a sum of doubles.
_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Question:
    """One of the 22 queries and its answer as rows of text, in the order that the query asks for."""

    number: int
    sql: str
    columns: list[str]
    rows: list[list[str]]


def open_tpch() -> duckdb.DuckDBPyConnection:
    """A DuckDB with the extension; its wheel's signature is checked at LOAD."""
    package = importlib.util.find_spec("duckdb_extension_tpch")
    assert package is not None and package.submodule_search_locations
    [file] = Path(package.submodule_search_locations[0]).glob("extensions/*/tpch.duckdb_extension")
    connection = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"})
    connection.execute(f"LOAD '{file}'")
    return connection


def make_tables(connection: duckdb.DuckDBPyConnection, scale: float) -> None:
    """Make the eight tables."""
    connection.execute(f"CALL dbgen(sf={scale})")


def write_parquet(connection: duckdb.DuckDBPyConnection, folder: Path) -> dict[str, Path]:
    """Each table as a file."""
    files = {table: folder / f"{table}.parquet" for table in TABLES}
    for table, file in files.items():
        connection.execute(f"COPY {table} TO '{file}' (FORMAT parquet)")
    return files


def copy_to_postgres(connection: duckdb.DuckDBPyConnection, url: str, tables: Sequence[str], folder: Path) -> None:
    """The tables in the schema `public` of a Postgres, with their types."""
    with psycopg.connect(url) as postgres:
        for table in tables:
            described = connection.execute(f"DESCRIBE {table}").fetchall()
            columns = ", ".join(f"{name} {kind}" for name, kind, *_ in described)
            # Made anew for every run: nothing of it has to survive a crash.
            postgres.execute(f"CREATE UNLOGGED TABLE {table} ({columns})".encode())
            file = folder / f"{table}.csv"
            connection.execute(f"COPY {table} TO '{file}' (FORMAT csv, HEADER false)")
            with (
                postgres.cursor().copy(f"COPY {table} FROM STDIN (FORMAT csv)".encode()) as copy,
                file.open("rb") as rows,
            ):
                while block := rows.read(1 << 20):
                    copy.write(block)
            file.unlink()
        postgres.execute("ANALYZE")


def read_questions(connection: duckdb.DuckDBPyConnection, scale: float) -> list[Question]:
    """The 22 queries with their answers at scale factor 0.01, 0.1 or 1."""
    found = connection.execute(
        "SELECT query_nr, query, answer FROM tpch_queries() JOIN tpch_answers() USING (query_nr)"
        " WHERE scale_factor = $1 ORDER BY query_nr",
        [scale],
    ).fetchall()
    questions = []
    for number, sql, answer in found:
        [columns, *rows] = csv.reader(io.StringIO(answer), delimiter="|", quoting=csv.QUOTE_NONE)
        questions.append(Question(number, sql, columns, rows))
    assert [question.number for question in questions] == list(range(1, 23))
    return questions


def find_difference(question: Question, body: bytes) -> str | None:
    """What a result in CSV says otherwise than the known answer; None if they are the same."""
    [columns, *rows] = csv.reader(io.StringIO(body.decode()))
    # An expression without an alias is named after itself here; the known answers call it otherwise.
    if len(columns) != len(question.columns) or any(
        name != known for name, known in zip(columns, question.columns, strict=True) if "(" not in name
    ):
        return f"the columns are {columns} instead of {question.columns}"
    if len(rows) != len(question.rows):
        return f"there are {len(rows)} rows instead of {len(question.rows)}"
    for number, (row, known) in enumerate(zip(rows, question.rows, strict=True), 1):
        if len(row) != len(known) or not all(map(_is_same, row, known)):
            return f"row {number} is {row} instead of {known}"
    return None


def _is_same(value: str, known: str) -> bool:
    if value == known:
        return True
    try:
        return math.isclose(float(value), float(known), rel_tol=_CLOSE)
    except ValueError:
        return False
