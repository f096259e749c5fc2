"""What a query will scan at least, told before it runs from its plan and from the footers of the files it reads.

Only where that is certain: no row group of a scan can be left out (no filter on it, no limit or join above it that ends
it early), and all that is not in DuckDB's cache has to be fetched. Everything else is left to the watch and to DuckDB's
own figure at the end.
"""

import json
from typing import Any

from engines.duckdb.instance import Instance
from engines.duckdb.sql_text import literal
from engines.duckdb.statement import Wrapped
from queryd.events import Parameter

# Above these a scan is read to its end, whatever stands further above.
_READ_ALL = frozenset(
    {"UNGROUPED_AGGREGATE", "HASH_GROUP_BY", "PERFECT_HASH_GROUP_BY", "PARTITIONED_AGGREGATE", "ORDER_BY", "WINDOW"}
)
# These pass on whatever is asked of them.
_PASS_ON = frozenset({"PROJECTION", "FILTER", "STREAMING_WINDOW", "UNION"})

_SCAN = "READ_PARQUET"
# What a scan says besides what it reads. Any other word, such as a filter, may mean that it reads less.
_PLAIN_SCAN = frozenset({"Function", "Projections", "Estimated Cardinality"})


def forecast_scan(
    instance: Instance,
    statement: Wrapped,
    values: dict[str, Parameter] | None,
    references: frozenset[str],
    limit: int,
) -> int:
    """Bytes that the statement will fetch from Parquet files at least; 0 where nothing is certain.

    Costs nothing unless the files have more than `limit` together. Raises DuckDB's exceptions and `StatementFailed`.
    """
    sizes = {name: size for name in references if (size := instance.bytes_of(name)) is not None}
    # A plan does not say which relation a scan reads, so there has to be but one.
    if len(sizes) != 1:
        return 0
    [(name, size)] = sizes.items()
    if size <= limit:
        return 0
    explained = statement.within("EXPLAIN (FORMAT json) ", "").run(instance.connection, values)
    plan = json.loads(str(explained[0][1]))
    scans = [columns for root in plan for columns in certain_scans(root)]
    # Of two scans of the same columns, the second may find them in the cache.
    most = max((_bytes_of_columns(instance, name, columns) for columns in scans), default=0)
    return max(0, most - instance.bytes_cached())


def certain_scans(node: dict[str, Any], to_the_end: bool = True) -> list[list[str]]:
    """The columns of each scan below a node of a plan that is certain to be read as a whole."""
    name, facts = node["name"], node.get("extra_info", {})
    if name == _SCAN:
        whole = to_the_end and facts.keys() <= _PLAIN_SCAN
        return [_columns(facts.get("Projections", []))] if whole else []
    if name in _READ_ALL:
        to_the_end = True
    elif name not in _PASS_ON:
        to_the_end = False
    return [scan for child in node.get("children", ()) for scan in certain_scans(child, to_the_end)]


def _columns(projections: str | list[str]) -> list[str]:
    """One projected column stands alone, and none is an empty text."""
    return [projections] if isinstance(projections, str) else projections


def _bytes_of_columns(instance: Instance, relation: str, columns: list[str]) -> int:
    """Bytes of these columns' chunks in all files of the relation, by their footers."""
    listed = ", ".join(map(literal, columns))
    # A nested column's chunks are named `column, element, …`.
    sql = (
        f"SELECT sum(total_compressed_size) FROM parquet_metadata({instance.files_of(relation)})"  # noqa: S608
        f" WHERE path_in_schema IN ({listed})"
        f" OR list_contains([{listed}], string_split(path_in_schema, ', ')[1])"
    )
    [[total]] = instance.connection.execute(sql).fetchall()
    return int(total or 0)
