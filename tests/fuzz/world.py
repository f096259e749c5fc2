"""What mutants run on: the granted relations, and beside them, within reach of any hole, a canary everywhere.

Nothing but the gate stands between a statement and the canary here: external access is on, nothing is locked.
"""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import duckdb

from engines.duckdb.gate.judge import as_it_runs
from engines.protocol import Relation, RelationKind
from tests.sql_fixture import GRANTED, make_fixture

# A relation's personal data is no secret of the run: it only makes the gate tell what is read.
RELATIONS = tuple(
    Relation(name, RelationKind.PARQUET, "s3://lake/x.parquet", "1", frozenset({"name", "payload"})) for name in GRANTED
)

# Small enough that one call can't grow beyond it by accident of the fixture's twenty rows.
_MEMORY = "512MB"

# Statements over twenty rows take milliseconds; a loaded machine takes a hundred times as long.
_SECONDS = 1.0
_ROWS = 50

# What a statement may leave behind is looked for in these.
_STATE = (
    "SELECT table_name, estimated_size FROM duckdb_tables()",
    "SELECT view_name FROM duckdb_views()",
    "SELECT name, value FROM duckdb_settings() WHERE name <> 'profiling_coverage'",
    "SELECT name, value::VARCHAR FROM duckdb_variables()",
    "SELECT database_name FROM duckdb_databases()",
    "SELECT function_name FROM duckdb_functions() WHERE NOT internal",
    "SELECT type_name FROM duckdb_types() WHERE NOT internal",
    "SELECT name, statement FROM duckdb_prepared_statements()",
    "SELECT current_schema(), current_database()",
)


@dataclass(slots=True)
class World:
    """A DuckDB in a folder of its own, with the canary in every place that a statement could read from.

    It becomes the process's working folder.
    """

    folder: Path
    random: Random = field(default_factory=Random)
    canary: str = field(init=False)
    connection: duckdb.DuckDBPyConnection = field(init=False)

    def __post_init__(self) -> None:
        self.canary = f"topsecret{self.random.getrandbits(48):012x}"
        os.chdir(self.folder)
        self.connection = duckdb.connect("world.duckdb", config={"python_enable_replacements": "false"})
        self._make()

    def _make(self) -> None:
        run, canary = self.connection.execute, self.canary
        run("SET threads = 1")
        run(f"SET memory_limit = '{_MEMORY}'")
        run("SET enable_progress_bar = false")
        run(f"SET http_proxy_username = '{canary}'")
        make_fixture(self.connection)
        run("CREATE SCHEMA internal")
        run(f"CREATE TABLE internal.other_org_payroll AS SELECT '{canary}' AS s")
        run(f"CREATE TABLE secret AS SELECT '{canary}' AS s, 1 AS id, 1 AS {canary}_column")
        for name in ("orders", "customers"):
            run(f"CREATE TABLE internal.{name} AS SELECT '{canary}' AS canary, 1 AS id, '{canary}' AS s")
        run(f"CREATE VIEW {canary}_view AS SELECT '{canary}' AS s")
        run(f"CREATE TYPE canary_type AS ENUM ('{canary}')")
        run(f"CREATE MACRO canary_macro() AS '{canary}'")
        run("CREATE SEQUENCE canary_sequence")
        run(f"SET VARIABLE canary = '{canary}'")
        run(f"CREATE SCHEMA {canary}_schema")
        run(f"SET search_path = '{canary}_schema,main'")
        for kind in ("csv", "parquet", "json"):
            run(f"COPY (SELECT '{canary}' AS s, '{canary}' AS {canary}_column) TO 'canary.{kind}' (FORMAT {kind})")
        Path("canary.txt").write_text(canary, encoding="ascii")

    def close(self) -> None:
        """Close the database; its files stay where they are."""
        self.connection.close()

    def state(self) -> tuple[object, ...]:
        """What a statement that only reads leaves as it was: the catalog, the settings, the folder."""
        found = [sorted(map(repr, self.connection.execute(query).fetchall())) for query in _STATE]
        files = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("world.duckdb"))
        return (*found, files)

    def run(self, sql: str, parameters: dict[str, int]) -> str:
        """Run all statements of a text, as the gate reads it, and give what the last one shows; raises DuckDB's
        exceptions."""
        timer = threading.Timer(_SECONDS, self.connection.interrupt)
        timer.start()
        try:
            result = self.connection.execute(as_it_runs(sql), parameters or None)
            return repr((result.description, result.fetchmany(_ROWS)))
        finally:
            timer.cancel()
            timer.join()
