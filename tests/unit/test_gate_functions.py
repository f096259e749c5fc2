"""The reviewed lists of functions and types against what the pinned DuckDB really has."""

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import resources

import duckdb
import pytest

from engines.duckdb.gate import Gate, functions, grammar
from engines.duckdb.instance import extension_file
from engines.protocol import QueryFailed

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
        connection.execute("CREATE TYPE canary_type AS ENUM ('canary')")
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
    found = running.execute("SELECT type_name FROM duckdb_types() WHERE internal").fetchall()
    every = {name.lower() for (name,) in found}
    # A type as a value, and an identifier of Postgres's catalog, are nothing for a query over datasets; functions of
    # lists read a VARIANT's bytes as a list's.
    assert every - grammar.TYPE_NAMES == {"type", "oid", "variant"}
    assert grammar.TYPE_NAMES - every == set()


@pytest.mark.parametrize("name", ["user", "current_user", "current_role", "session_user"])
def test_a_name_that_means_a_function_may_be_used_where_it_is_the_same_wherever_the_session_is(name: str) -> None:
    text = Gate().judge(f"SELECT {name} AS told", (), {}).text
    with duckdb.connect(":memory:") as connection:
        told = connection.execute(text).fetchall()
        connection.execute("ATTACH ':memory:' AS other; CREATE SCHEMA other.inner; USE other.inner")
        assert connection.execute(text).fetchall() == told == [("duckdb",)]


@pytest.mark.parametrize("name", ["current_catalog", "current_schema"])
def test_a_name_that_shows_the_sessions_catalog_is_refused(name: str) -> None:
    with pytest.raises(QueryFailed):
        Gate().judge(f"SELECT {name} AS told", (), {})
    with duckdb.connect(":memory:") as connection:
        before = connection.execute(f"SELECT {name}").fetchall()
        connection.execute("ATTACH ':memory:' AS other; CREATE SCHEMA other.inner; USE other.inner")
        assert connection.execute(f"SELECT {name}").fetchall() != before


def test_no_function_that_may_be_called_makes_a_type_out_of_a_text(running: duckdb.DuckDBPyConnection) -> None:
    """What a function returns whose type is known only from its arguments' values: never the type that a text names."""
    judge = Gate()
    made = []
    for name, *types in _signatures(running):
        for place, type_ in enumerate(types):
            if type_ not in ("VARCHAR", "ANY", "JSON"):
                continue
            given = ["'\"canary_type\"'" if at == place else _sample(each) for at, each in enumerate(types)]
            quoted = name if name.isidentifier() else f'"{name}"'
            sql = f"SELECT {quoted}({', '.join(given)}) AS told"
            with contextlib.suppress(QueryFailed, duckdb.Error):
                judge.judge(sql, (), {})
                made += [sql for row in running.execute(f"DESCRIBE {sql}").fetchall() if "ENUM" in row[1]]
    assert made == []
    # The check itself: a function that may not be called does.
    [[_, type_, *_]] = running.execute("DESCRIBE SELECT from_json('0', '\"canary_type\"')").fetchall()
    assert "ENUM" in type_


def test_no_function_that_may_be_called_takes_or_makes_a_variant_or_a_type(running: duckdb.DuckDBPyConnection) -> None:
    """Functions of lists read a VARIANT's bytes as a list's, and a value of the type TYPE names a type."""
    found = running.execute(
        "SELECT lower(function_name), concat(parameter_types::VARCHAR, varargs, return_type) FROM duckdb_functions()"
        " WHERE function_type IN ('scalar', 'aggregate', 'table')"
    ).fetchall()
    may_be_called = functions.listed("functions.txt") | functions.listed("tables.txt")
    kinds = [(name, kind) for name, kind in found if "VARIANT" in kind or "TYPE" in kind]
    assert {"variant_typeof", "make_type"} <= {name for name, _ in kinds}
    assert [name for name, _ in kinds if name in may_be_called] == []


def _signatures(running: duckdb.DuckDBPyConnection) -> list[list[str]]:
    found = running.execute(
        "SELECT DISTINCT lower(function_name), parameter_types FROM duckdb_functions()"
        " WHERE function_type IN ('scalar', 'aggregate')"
    ).fetchall()
    return sorted([name, *types] for name, types in found if name in functions.listed("functions.txt"))


def _sample(type_: str) -> str:
    samples = {"VARCHAR": "'0'", "JSON": "'0'", "ANY": "'0'", "BOOLEAN": "true", "LAMBDA": "lambda x: x"}
    return samples.get(type_, "[0]" if type_.endswith("]") else f"NULL::{type_}")


def test_the_lists_are_sorted_and_say_each_name_once() -> None:
    for file in ("functions.txt", "tables.txt", "refused.txt"):
        text = resources.files("engines.duckdb.gate").joinpath(file).read_text(encoding="ascii")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert len(lines) == len(set(lines))
        for group in text.split("\n\n"):
            names = [line for line in group.splitlines() if line and not line.startswith("#")]
            assert names == sorted(names)
