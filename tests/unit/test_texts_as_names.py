"""No text that a function is given becomes a name that DuckDB looks up, or an address that it calls.

Every function that may be called is given such texts in each place that takes one, as a literal and as a parameter, on
a DuckDB where a hole would show: the canary in a result, a connection to the listener, or a change.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import duckdb
import pytest

from engines.duckdb.gate import Gate, functions
from engines.protocol import QueryFailed
from queryd.events import Parameter
from tests.fuzz.pools import LISTENER
from tests.fuzz.world import RELATIONS, World

# One of each kind: a type, a type of another catalog as JSON, a variable, a setting, a sequence, a relation, a file, an
# address with settings behind it.
_TEXTS = (
    "canary_type",
    '"__queryd_datasets.other.hidden"',
    "canary",
    "http_proxy_username",
    "canary_sequence",
    "secret",
    "canary.csv",
    f"s3://b/z.parquet?s3_endpoint={LISTENER}&s3_use_ssl=false&s3_url_style=path",
)

# What other places of a call are given, by their types.
_SAMPLES = {"VARCHAR": "'0'", "JSON": "'0'", "ANY": "'0'", "BOOLEAN": "true", "LAMBDA": "lambda x: x"}

_TAKE_TEXT = frozenset({"VARCHAR", "ANY", "JSON", "VARCHAR[]", "ANY[]", "T", "T[]"})


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # The world makes its folder the working folder: this puts the old one back.
    monkeypatch.chdir(tmp_path)
    made = World(tmp_path, Random(7))
    yield made
    made.close()


def _signatures(world: World) -> list[tuple[str, list[str]]]:
    """Each function that may be called, with up to two lists of parameters' types that take a text."""
    found = world.connection.execute(
        "SELECT DISTINCT lower(function_name), parameter_types, varargs FROM duckdb_functions()"
        " WHERE function_type IN ('scalar', 'aggregate', 'macro') ORDER BY ALL"
    ).fetchall()
    by_name: dict[str, list[list[str]]] = {}
    for name, types, more in found:
        listed = [str(each) if each else "ANY" for each in (*types, *((more,) if more else ()))]
        if name in functions.listed("functions.txt") and _TAKE_TEXT.intersection(listed):
            by_name.setdefault(name, []).append(listed)
    return [(name, types) for name, every in by_name.items() for types in every[:2]]


def _calls(name: str, types: list[str], given: str) -> Iterator[str]:
    quoted = name if name.isidentifier() else f'"{name}"'
    for at, type_ in enumerate(types):
        if type_ in _TAKE_TEXT:
            text = f"[{given}]" if type_.endswith("]") else given
            others = [text if place == at else _sample(each) for place, each in enumerate(types)]
            yield f"{quoted}({', '.join(others)})"


def _sample(type_: str) -> str:
    return _SAMPLES.get(type_, "[0]" if type_.endswith("]") else f"NULL::{type_}")


def _look_up(world: World, gate: Gate, call: str, parameters: dict[str, Parameter]) -> str | None:
    """What a call that the gate lets through has found that it should not."""
    for sql in (f"SELECT {call} FROM orders LIMIT 1", f"SELECT enum_range({call}) FROM orders LIMIT 1"):
        try:
            gate.judge(sql, RELATIONS, parameters)
            shown = world.run(sql, parameters)
        except (QueryFailed, duckdb.Error, UnicodeError) as failure:
            shown = str(failure)
        except (ValueError, ImportError):
            # Python has no value for what DuckDB gives.
            continue
        if world.canary in shown:
            return f"{sql} {parameters}: the canary"
        if world.was_called():
            return f"{sql} {parameters}: a connection"
    return None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_text_given_to_a_function_is_looked_up(world: World) -> None:
    gate, state, found = Gate(), world.state(), []
    for name, types in _signatures(world):
        for text in map(world.place, _TEXTS):
            literal = "'" + text.replace("'", "''") + "'"
            calls: list[tuple[str, dict[str, Parameter]]] = [(call, {}) for call in _calls(name, types, literal)]
            # One of the two is enough to bind most calls, and both meet the same code.
            if text.startswith('"'):
                calls += [(call, {"p": text}) for call in _calls(name, types, "$p")]
            found += [what for call, given in calls if (what := _look_up(world, gate, call, given))]
    assert found == []
    assert world.state() == state


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT enum_range(from_json('0', '\"__queryd_datasets.other.hidden\"'))",
        "SELECT enum_range(json_transform('0', '\"canary_type\"'))",
        "SELECT getvariable('canary')",
        "SELECT current_setting('http_proxy_username')",
        "SELECT * FROM read_csv('canary.csv')",
        "SELECT * FROM query_table('secret')",
    ],
)
def test_what_the_world_holds_shows_where_a_text_is_looked_up(world: World, sql: str) -> None:
    """The check itself: each of these is refused by the gate, and would find the canary."""
    with pytest.raises(QueryFailed):
        Gate().judge(sql, RELATIONS, {})
    assert world.canary in world.run(sql, {})


def test_the_listener_of_the_world_hears_where_an_address_is_called(world: World) -> None:
    with pytest.raises(duckdb.Error):
        world.run(world.place(f"SELECT * FROM read_parquet('{_TEXTS[-1]}')"), {})
    assert world.was_called()
    assert not world.was_called()


@pytest.mark.slow
def test_every_function_that_the_docs_call_refused_is_refused() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "sql.md").read_text(encoding="utf-8")
    table = page.partition("## Texts that become names")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    for path, _, verdict in rows:
        names = {name for name in re.findall(r"`(\w+)`", path) if name in functions.listed("functions.txt")}
        assert not (names and verdict.strip().startswith("refused")), names
