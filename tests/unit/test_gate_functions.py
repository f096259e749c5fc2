"""The reviewed lists of functions and types against what the pinned DuckDB really has."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import resources

import duckdb
import pytest

from engines.duckdb.gate import functions, grammar
from engines.duckdb.instance import extension_file

# Functions that may be called in expressions, and whose namesakes in FROM may not.
_ONLY_IN_EXPRESSIONS = {"repeat", "histogram"}

# Functions of expressions that the binder knows and the catalog does not list.
_UNLISTED = {"unnest"}


@pytest.fixture(scope="module")
def running() -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB with the extensions that the engine loads."""
    with duckdb.connect(":memory:") as connection:
        for name in ("httpfs", "postgres_scanner"):
            connection.execute(f"LOAD '{extension_file(name)}'")
        yield connection


def _catalog(running: duckdb.DuckDBPyConnection, kinds: set[str]) -> set[str]:
    found = running.execute("SELECT function_type, lower(function_name) FROM duckdb_functions()").fetchall()
    return {name for kind, name in found if kind in kinds}


def _is_refused(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in functions.listed("refused.txt"))


def test_the_grammar_knows_the_trees_of_the_duckdb_that_runs() -> None:
    assert duckdb.__version__ == grammar.TREE_VERSION


def test_every_function_of_the_running_version_was_reviewed(running: duckdb.DuckDBPyConnection) -> None:
    called = functions.listed("functions.txt") | functions.listed("tables.txt")
    every = _catalog(running, {"scalar", "aggregate", "macro", "pragma", "table", "table_macro"})
    assert {name for name in every if name not in called and not _is_refused(name)} == set()
    assert {name for name in called if _is_refused(name)} == set()


def test_every_function_for_from_was_reviewed_as_such(running: duckdb.DuckDBPyConnection) -> None:
    for name in _catalog(running, {"table", "table_macro"}):
        assert name in functions.listed("tables.txt") or name in _ONLY_IN_EXPRESSIONS or _is_refused(name), name


def test_the_lists_hold_nothing_that_does_not_exist(running: duckdb.DuckDBPyConnection) -> None:
    every = _catalog(running, {"scalar", "aggregate", "macro", "pragma", "table", "table_macro"})
    assert functions.listed("functions.txt") - every - _UNLISTED == set()
    assert functions.listed("tables.txt") - every - _UNLISTED == set()
    assert [each for each in functions.listed("refused.txt") if not any(fnmatchcase(n, each) for n in every)] == []


def test_macros_that_write_an_argument_twice_are_known(running: duckdb.DuckDBPyConnection) -> None:
    """Nested, each level doubles what is bound: they count towards `MAX_DOUBLINGS`."""
    macros = running.execute(
        "SELECT function_name, unnest(parameters), macro_definition FROM duckdb_functions()"
        " WHERE function_type = 'macro'"
    ).fetchall()
    words = {name: _words(definition) for name, _, definition in macros}
    doubling = {name for name, parameter, _ in macros if words[name].count(parameter) > 1}
    callable_doubling = doubling & functions.listed("functions.txt")
    assert callable_doubling <= functions.DOUBLING


def _words(definition: str) -> list[str]:
    spaced = "".join(character if character.isalnum() or character == "_" else " " for character in definition)
    return spaced.split()


def test_types_that_sql_may_name_are_those_of_the_running_version(running: duckdb.DuckDBPyConnection) -> None:
    every = {name.lower() for (name,) in running.execute("SELECT type_name FROM duckdb_types()").fetchall()}
    # A type as a value, and an identifier of Postgres's catalog, are nothing for a query over datasets; functions of
    # lists read a VARIANT's bytes as a list's.
    assert every - grammar.TYPE_NAMES == {"type", "oid", "variant"}
    assert grammar.TYPE_NAMES - every == set()


def test_the_lists_are_sorted_and_say_each_name_once() -> None:
    for file in ("functions.txt", "tables.txt", "refused.txt"):
        text = resources.files("engines.duckdb.gate").joinpath(file).read_text(encoding="ascii")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert len(lines) == len(set(lines))
        for group in text.split("\n\n"):
            names = [line for line in group.splitlines() if line and not line.startswith("#")]
            assert names == sorted(names)
