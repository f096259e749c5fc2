"""The gate with one of its checks taken out, each by itself: a run that finds nothing then proves nothing."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from engines.duckdb import errors
from engines.duckdb.gate import amounts, functions, judge, texts, thresholds, walk
from engines.duckdb.gate.amounts import Amounts
from engines.duckdb.gate.names import fold

_Node = dict[str, Any]

_HARMLESS = json.loads('{"node": {"type": "SELECT_NODE", "from_table": {"type": "EMPTY"}}}')


@dataclass(frozen=True, slots=True)
class Sabotage:
    """A check that is taken out, and words of the findings that its absence leads to."""

    apply: Callable[[], None]
    finds: tuple[str, ...]


_LEAK = ("the canary in a result", "the canary in an error's detail")
_EXCEPTION = ("in the gate",)
_CHANGE = ("something changed", "the canary in a result", "another statement between brackets")
_COST = ("memory", "an internal error", "stuck", "died", "Error in the gate", "another statement between brackets")


def _put(module: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


def _any_relation(_: walk.Granted, table: _Node) -> str:
    return str(table["table_name"])


def _by_last_part(granted: walk.Granted, table: _Node) -> str | None:
    return granted.find("", table["table_name"])


def _cte_by_last_part(table: _Node, ctes: frozenset[str], _: frozenset[str]) -> bool:
    return fold(table["table_name"]) in ctes


def _no_scopes() -> None:
    """A CTE's name holds everywhere in the statement, before and behind."""
    go_through = walk.Walk.walk

    def walk_all(self: walk.Walk, statement: _Node) -> None:
        every = frozenset(_cte_names(statement))
        walk.is_cte = lambda table, ctes, recurring: "schema_name" not in table and fold(table["table_name"]) in every
        go_through(self, statement)

    _put(walk.Walk, "walk", walk_all)()


def _cte_names(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for child in value for name in _cte_names(child)]
    if not isinstance(value, dict):
        return []
    own = [fold(entry["key"]) for entry in value.get("map", ()) if "key" in entry]
    return own + [name for child in value.values() for name in _cte_names(child)]


def _any_statement(tree: _Node, text: str) -> _Node:
    """What is no SELECT is taken for a harmless one, and runs as it is."""
    if tree.get("error_type") == "not implemented":
        return dict(_HARMLESS)
    return _the_statement(tree, text)


def _first_statement(tree: _Node, text: str) -> _Node:
    if tree.get("error") is False and tree["statements"]:
        statement: _Node = tree["statements"][0]
        return statement
    return _the_statement(tree, text)


def _several_statements() -> None:
    """This is looked at twice: in the tree, and in the text that is left."""
    _put(judge, "the_statement", _first_statement)()
    _put(texts, "is_one_statement", lambda _: True)()


_the_statement = judge.the_statement


def _nothing(*_: object) -> None: ...


def _every_error_is_known() -> None:
    """The engine goes on with a child after any error."""
    translate = errors.translate

    def known(error: Exception, placed: errors.Placed) -> errors.Meaning:
        return replace(translate(error, placed), known=True)

    _put(errors, "translate", known)()


def _without_threshold(*names: str) -> Callable[[], None]:
    def lift() -> None:
        for name in names:
            setattr(thresholds, name, 10**9)

    return lift


def _with_functions(*names: str) -> Callable[[], None]:
    """As if these functions stood in the list of those that may be called."""
    listed = functions.listed

    def lists(file: str) -> frozenset[str]:
        return listed(file) | frozenset(names) if file == "functions.txt" else listed(file)

    return _put(functions, "listed", lists)


def _with_tables(*names: str) -> Callable[[], None]:
    """As if these functions stood in the list of those that may be called in FROM."""
    listed = functions.listed

    def lists(file: str) -> frozenset[str]:
        return listed(file) | frozenset(names) if file == "tables.txt" else listed(file)

    return _put(functions, "listed", lists)


def _without_columns_as_arguments() -> None:
    """A call behind a column is looked at as if it had none."""
    for module in (amounts, functions):
        _put(module, "arguments_of", lambda node: node.get("children", []))()


SABOTAGES: dict[str, Sabotage] = {
    "granted relations": Sabotage(_put(walk, "find_relation", _any_relation), _LEAK),
    "qualified relations": Sabotage(_put(walk, "find_relation", _by_last_part), _LEAK),
    "qualified names are no CTEs": Sabotage(_put(walk, "is_cte", _cte_by_last_part), _LEAK),
    "scopes of CTEs": Sabotage(_no_scopes, _LEAK),
    "list of functions": Sabotage(_put(functions, "judge_call", _nothing), _LEAK + _COST),
    "list of functions in FROM": Sabotage(
        _put(functions, "judge_table_call", _nothing), (*_LEAK, *_EXCEPTION, "a connection to another host")
    ),
    "names that mean functions": Sabotage(_put(walk, "judge_column", _nothing), _LEAK),
    "names of types": Sabotage(_put(walk, "judge_type", _nothing), _LEAK),
    "kind of statement": Sabotage(_put(judge, "the_statement", _any_statement), _CHANGE + _COST),
    "one statement": Sabotage(_several_statements, _CHANGE + _COST),
    "text as it runs": Sabotage(_put(judge, "as_it_runs", str), ("another statement between brackets",)),
    "form of the tree": Sabotage(_put(judge, "check_form", _nothing), _EXCEPTION),
    "size of the text": Sabotage(_put(texts, "check_size", _nothing), _COST),
    "types named by from_json": Sabotage(_with_functions("from_json", "from_json_strict"), _LEAK),
    "types named by json_transform": Sabotage(_with_functions("json_transform", "json_transform_strict"), _LEAK),
    "locales": Sabotage(_with_functions("icu_sort_key"), ("stuck",)),
    "coordinate systems": Sabotage(_put(functions, "judge_coordinate_system", _nothing), ("internal error",)),
    "offsets of LEAD and LAG": Sabotage(_put(Amounts, "judge_offset", _nothing), ("died",)),
    "columns as arguments": Sabotage(_without_columns_as_arguments, _COST),
    "parameters' Unicode": Sabotage(_put(judge, "_is_unicode", lambda _: True), ("died",)),
    "addresses": Sabotage(_with_tables("read_parquet", "read_text"), ("a connection to another host", *_LEAK)),
    "retired children": Sabotage(_every_error_is_known, ("a corrupt child was not retired",)),
    "amounts": Sabotage(_put(Amounts, "judge", _nothing), _COST),
    "extent": Sabotage(_put(judge, "check_extent", _nothing), _COST),
    "depth": Sabotage(_put(walk, "check_depth", _nothing), _COST),
    "comments": Sabotage(_without_threshold("MAX_BLOCK_COMMENTS"), _COST),
}
