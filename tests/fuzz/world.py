"""What mutants run on: the granted relations, and beside them, within reach of any hole, a canary everywhere.

Nothing but the gate stands between a statement and the canary here: external access is on, nothing is locked.
"""

import os
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import duckdb

from engines.duckdb.gate.judge import as_it_runs
from engines.duckdb.instance import extension_file
from engines.protocol import Relation, RelationKind
from queryd.events import Parameter
from tests.fuzz.pools import LISTENER
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

# What a DuckDB whose memory is sound answers, over most of the kinds of values that the fixture has.
_PROBE = (
    "SELECT sum(o.amount), list(o.status ORDER BY o.id), max(o.ts)::VARCHAR, histogram(c.name), count(DISTINCT p.price)"
    " FROM orders o JOIN customers c ON o.customer_id = c.id JOIN prices p USING (product_id)"
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
    _listener: socket.socket = field(init=False)
    _called: threading.Event = field(init=False, default_factory=threading.Event)
    _sound: object = field(init=False)

    def __post_init__(self) -> None:
        self.canary = f"topsecret{self.random.getrandbits(48):012x}"
        os.chdir(self.folder)
        self.connection = duckdb.connect("world.duckdb", config={"python_enable_replacements": "false"})
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()
        self._make()
        self._sound = self.connection.execute(_PROBE).fetchall()

    def _make(self) -> None:
        run, canary = self.connection.execute, self.canary
        run("SET threads = 1")
        run(f"SET memory_limit = '{_MEMORY}'")
        run("SET enable_progress_bar = false")
        run("SET errors_as_json = true")
        run(f"LOAD '{extension_file('httpfs')}'")
        # The listener hangs up.
        run("SET http_timeout = 1")
        run("SET http_retries = 0")
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
        run(f"CREATE TYPE internal.hidden_type AS ENUM ('{canary}')")
        # As the engine attaches Postgres: a catalog of another name, with types and tables of schemas that nobody was
        # granted.
        run("ATTACH ':memory:' AS __queryd_datasets")
        run("CREATE SCHEMA __queryd_datasets.other")
        run(f"CREATE TYPE __queryd_datasets.other.hidden AS ENUM ('{canary}')")
        run(f"CREATE TABLE __queryd_datasets.other.hidden_table AS SELECT '{canary}' AS s, 1 AS {canary}_column")
        run(f"SET VARIABLE canary = '{canary}'")
        run(f"CREATE SCHEMA {canary}_schema")
        run(f"SET search_path = '{canary}_schema,main'")
        for kind in ("csv", "parquet", "json"):
            run(f"COPY (SELECT '{canary}' AS s, '{canary}' AS {canary}_column) TO 'canary.{kind}' (FORMAT {kind})")
        Path("canary.txt").write_text(canary, encoding="ascii")

    def close(self) -> None:
        """Close the database; its files stay where they are."""
        self.connection.close()
        # This wakes the thread that listens.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def place(self, text: str) -> str:
        """The text with the address of this world's listener where `LISTENER` stands."""
        return text.replace(LISTENER, f"127.0.0.1:{self._listener.getsockname()[1]}")

    def _listen(self) -> None:
        """Take every connection, note it, and hang up: whoever has called goes on only then."""
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            self._called.set()
            accepted.close()

    def was_called(self) -> bool:
        """Whether anything has connected to the listener since this was last asked."""
        called = self._called.is_set()
        self._called.clear()
        return called

    def is_sound(self) -> bool:
        """Whether DuckDB still answers as it did before any mutant."""
        try:
            return bool(self.connection.execute(_PROBE).fetchall() == self._sound)
        except duckdb.Error:
            return False

    def state(self) -> tuple[object, ...]:
        """What a statement that only reads leaves as it was: the catalog, the settings, the folder."""
        found = [sorted(map(repr, self.connection.execute(query).fetchall())) for query in _STATE]
        files = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("world.duckdb"))
        return (*found, files)

    def run(self, sql: str, parameters: dict[str, Parameter]) -> str:
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
