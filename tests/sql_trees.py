"""Trees of statements as the gate gets them from DuckDB's parser."""

import json
from typing import Any

import duckdb

_ASKED = "SELECT json_serialize_sql($1, skip_null := true, skip_empty := true, skip_default := true)"


def read_tree(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    """The tree of a text that is one SELECT; raises `ValueError` for any other."""
    row = connection.execute(_ASKED, [sql]).fetchone()
    tree = json.loads(row[0]) if row else {}
    if tree.get("error") is not False or len(tree["statements"]) != 1:
        raise ValueError(f"no tree of {sql[:200]!r}: {tree}")
    statement: dict[str, Any] = tree["statements"][0]
    return statement


def runs_as_judged(connection: duckdb.DuckDBPyConnection, query: dict[str, Any], text: str) -> bool:
    """Whether a text means between brackets, where the engine runs it, the query that it was judged by."""
    around = read_tree(connection, f"SELECT * FROM (\n{text}\n)")["node"]
    return bool(_without_places(around["from_table"].get("subquery", {}).get("node")) == _without_places(query))


def _without_places(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_places(child) for child in value]
    if isinstance(value, dict):
        return {name: _without_places(child) for name, child in value.items() if name != "query_location"}
    return value
