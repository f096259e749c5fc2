"""Which functions SQL may call: lists that were reviewed, by name, and nothing else.

`functions.txt` holds what may be called in expressions, `tables.txt` what may be called in FROM, `refused.txt` what
DuckDB has and may not be called. A name in no list may not be called either.
"""

from functools import cache
from importlib import resources
from typing import Any

from engines.duckdb.gate.names import fold, words
from engines.duckdb.gate.refusals import rejected

# What the parser itself writes with a schema: for [1, 2], {'a': 1}, list comprehensions and the standard's own syntax,
# such as extract(year FROM x), trim(BOTH 'x' FROM y) and AT TIME ZONE.
_WRITTEN_BY_PARSER = words(
    """
    date_part ilike_escape like_escape list_apply list_filter list_value ltrim map not_ilike_escape not_like_escape
    position row rtrim struct_extract struct_pack substring timezone trim
    """
)

# Catalogs and schemas of DuckDB's own. Any other qualifier of a function is a column: `name.upper()` is `upper(name)`.
_CATALOGS = frozenset({"main", "memory", "system", "temp", "pg_catalog", "information_schema"})

# Macros that write an argument more than once.
DOUBLING = words(
    """
    array_pop_back array_to_string array_to_string_comma_default fmod json_group_array json_group_object
    map_contains_entry nullif round_even roundbankers split_part wavg weighted_avg
    """
)

_Node = dict[str, Any]


@cache
def listed(file: str) -> frozenset[str]:
    """The names in one of the lists beside this module."""
    lines = resources.files(__package__).joinpath(file).read_text(encoding="ascii").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def judge_call(node: _Node) -> None:
    """A call in an expression, windows included. Raises `QueryFailed` unless the function may be called."""
    name = fold(node["function_name"])
    if name not in listed("functions.txt"):
        raise _not_callable(name)
    judge_coordinate_system(node)
    if "catalog" not in node and "schema" not in node:
        return
    if called_on(node) is None and not (_by_parser(node) and name in _WRITTEN_BY_PARSER):
        raise rejected("it calls a function by a qualified name")


def judge_coordinate_system(node: _Node) -> None:
    """Raises `QueryFailed` unless the coordinate system is a plain string.

    DuckDB reads a value of any other type as a string and fails with an internal error.
    """
    if fold(node["function_name"]) != "st_setcrs":
        return
    for argument in arguments_of(node)[1:]:
        if argument["class"] not in ("CONSTANT", "PARAMETER"):
            raise rejected("the coordinate system of st_setcrs is neither a literal nor a parameter")


def judge_table_call(node: _Node) -> None:
    """A call in FROM. Raises `QueryFailed` unless the function may be called there."""
    if node.get("class") != "FUNCTION" or "catalog" in node or "schema" in node:
        raise rejected("it calls a function by a qualified name")
    name = fold(node["function_name"])
    if name not in listed("tables.txt"):
        raise _not_callable(name)


def called_on(node: _Node) -> tuple[str, ...] | None:
    """The column that a call stands behind, as in `t.name.upper()`, by its parts; None for any other call."""
    parts = tuple(node[field] for field in ("catalog", "schema") if field in node)
    if not parts or node["class"] != "FUNCTION" or _CATALOGS.intersection(map(fold, parts)):
        return None
    return parts


def arguments_of(node: _Node) -> list[_Node]:
    """The arguments of a call, in order. For `column.f(x)` the column comes first."""
    given: list[_Node] = node.get("children", [])
    column = called_on(node)
    return given if column is None else [{"class": "COLUMN_REF", "column_names": list(column)}, *given]


def _by_parser(node: _Node) -> bool:
    return "catalog" not in node and node["schema"] == "main"


def _not_callable(name: str) -> Exception:
    """Names a function only out of our own list: any other name is the text's."""
    if name in listed("refused.txt"):
        return rejected(f"it calls the function {name}, which may not be called")
    return rejected("it calls a function that does not exist or may not be called")
