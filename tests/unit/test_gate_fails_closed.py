"""Whatever a tree holds that the gate was not told of is refused: kinds, fields, words and leaves."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pytest

from engines.duckdb.gate import grammar
from engines.duckdb.gate.amounts import Amounts
from engines.duckdb.gate.extent import check_extent
from engines.duckdb.gate.form import check_form
from engines.duckdb.gate.lineage import read_columns
from engines.duckdb.gate.texts import trim
from engines.duckdb.gate.walk import Granted, Walk
from engines.protocol import QueryFailed
from queryd.events import ErrorCode
from tests.sql_statements import read_statements
from tests.sql_trees import read_tree

_NAMES = {"orders": "orders", "customers": "customers"}

# Between them, every kind of node that may run, and nearly every field.
_RICH = (
    "WITH RECURSIVE c(a, b) USING KEY (a) AS (SELECT 1, 2 UNION SELECT a, b + 1 FROM c WHERE b < 5)"
    " SELECT DISTINCT ON (o.id) o.* EXCLUDE (qty) REPLACE (1 AS amount), CASE WHEN id > 1 THEN $p ELSE 'x' END AS k,"
    " CAST(id AS DECIMAL(9, 2)), status COLLATE NOCASE, id BETWEEN 1 AND 2, [1, 2][1], list_transform([1], x -> x + 1),"
    " (SELECT max(id) FROM customers), id IN (SELECT 1), sum(id ORDER BY id) FILTER (WHERE id > 0),"
    " lag(id, 1, 0) OVER (PARTITION BY qty ORDER BY ts DESC NULLS LAST), NOT (id = 1 AND id = 2), 'a'::ENUM('a')"
    " FROM orders o TABLESAMPLE 10% LEFT JOIN customers c2 ON o.id = c2.id, range(3) r(x), (VALUES (1)) v(y), c"
    " WHERE id IS NOT NULL GROUP BY ROLLUP (id) HAVING count(*) > 0 QUALIFY true ORDER BY ALL LIMIT 10% OFFSET 1",
    "SELECT id FROM orders UNION ALL SELECT id FROM customers ORDER BY 1 LIMIT 3",
    "SELECT * RENAME (orders.id AS i), COLUMNS('a'), #1 FROM orders JOIN customers USING (id)",
    "SELECT * FROM orders PIVOT (sum(amount) FOR status IN ('paid' AS p) GROUP BY qty) AS x(a, b)",
    "SELECT sum(id) OVER (ORDER BY id ROWS BETWEEN 1 PRECEDING AND 1 FOLLOWING EXCLUDE TIES) FROM orders",
)


def _tree(sql: str) -> dict[str, Any]:
    return read_tree(duckdb.default_connection(), sql)


def _walk(tree: dict[str, Any]) -> None:
    check_form(tree)
    walk = Walk(Granted(_NAMES), Amounts({}))
    walk.walk(tree)
    check_extent(tree, walk.relations)
    read_columns(tree, walk.relations, {"orders": frozenset({"status"})})


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every node of a tree whose fields are known; a literal's inside is anything."""
    if isinstance(value, list):
        for child in value:
            yield from _nodes(child)
    elif isinstance(value, dict):
        yield value
        yield from (node for name, child in value.items() for node in _nodes(child) if not _is_literal(value, name))


def _is_literal(node: dict[str, Any], field: str) -> bool:
    return field == "value" and "is_null" in node


def _refused(tree: dict[str, Any]) -> None:
    with pytest.raises(QueryFailed) as caught:
        _walk(tree)
    assert caught.value.code is ErrorCode.SQL_REJECTED


@pytest.mark.parametrize("sql", _RICH)
def test_a_field_that_is_not_known_is_refused_wherever_it_stands(sql: str) -> None:
    tree = _tree(sql)
    _walk(tree)
    for number, _ in enumerate(_nodes(tree)):
        strange = copy.deepcopy(tree)
        list(_nodes(strange))[number]["ranking_expression"] = {"class": "CONSTANT"}
        _refused(strange)


def _change(kind: str) -> Callable[[dict[str, Any]], bool]:
    def change(node: dict[str, Any]) -> bool:
        if not isinstance(node.get(kind), str):
            return False
        node[kind] = "READ_FILE"
        return True

    return change


@pytest.mark.parametrize(
    "field", ["class", "type", "join_type", "setop_type", "subquery_type", "start", "id", "method"]
)
@pytest.mark.parametrize("sql", _RICH)
def test_a_kind_that_is_not_known_is_refused_wherever_it_stands(sql: str, field: str) -> None:
    tree = _tree(sql)
    change = _change(field)
    for number, node in enumerate(_nodes(tree)):
        if not isinstance(node.get(field), str):
            continue
        strange = copy.deepcopy(tree)
        assert change(list(_nodes(strange))[number])
        _refused(strange)


@pytest.mark.parametrize("sql", _RICH)
@pytest.mark.parametrize("wrong", [None, 1.5, "x", {}, [[[]]], {"class": "SUBQUERY"}])
def test_a_leaf_of_another_kind_is_refused_and_never_an_exception(sql: str, wrong: object) -> None:
    tree = _tree(sql)
    for number, node in enumerate(_nodes(tree)):
        for field in node:
            strange = copy.deepcopy(tree)
            list(_nodes(strange))[number][field] = wrong
            # An empty node or a text may be right there; nothing else than a refusal may come of the others.
            try:
                _walk(strange)
            except QueryFailed as refusal:
                assert refusal.code is ErrorCode.SQL_REJECTED


def test_the_corpora_use_nearly_all_of_the_grammar() -> None:
    """What no statement uses would be allowed without need."""
    used = {"PARAMETER"}
    for statement in read_statements():
        if statement.allowed and len(statement.sql) < 5_000:
            used.update(str(node.get("class", node.get("type"))) for node in _nodes(_tree(trim(statement.sql))))
    for _, shapes in grammar._KINDS.values():
        assert set(shapes) - used <= {"STRING_TYPE_INFO", "GENERIC_TYPE_INFO"}
