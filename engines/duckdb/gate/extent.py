"""How large a statement becomes once CTEs, stars and names of columns are written out, which few bytes can multiply."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engines.duckdb.gate import thresholds
from engines.duckdb.gate.names import fold
from engines.duckdb.gate.refusals import rejected

_Node = dict[str, Any]

# Fields of expressions in which no expression of the same query stands.
_NO_EXPRESSIONS = frozenset({"subquery", "value", "cast_type"})


@dataclass(frozen=True, slots=True)
class _Extent:
    """Sources and columns. A relation's own columns are not known here and count as one."""

    sources: int
    columns: int


_Ctes = Mapping[str, _Extent]
_ONE = _Extent(1, 1)


def check_extent(statement: _Node, relations: Mapping[int, str]) -> None:
    """Raises `QueryFailed` with SQL_REJECTED. The tree has passed the walk, whose `relations` these are."""
    _Measure(relations).query(statement["node"], {})


class _Measure:
    def __init__(self, relations: Mapping[int, str]) -> None:
        self._relations = relations

    def query(self, node: _Node, ctes: _Ctes) -> _Extent:
        ctes = self._with(node, ctes)
        match node["type"]:
            case "SELECT_NODE":
                extent = self._select(node, ctes)
            case "RECURSIVE_CTE_NODE":
                left = self.query(node["left"], ctes)
                right = self.query(node["right"], {**ctes, fold(node["cte_name"]): _Extent(1, left.columns)})
                extent = _Extent(left.sources + right.sources, left.columns)
            case _:
                left, right = self.query(node["left"], ctes), self.query(node["right"], ctes)
                extent = _Extent(left.sources + right.sources, max(left.columns, right.columns))
        if extent.sources > thresholds.MAX_EXPANDED_SOURCES:
            raise rejected(
                f"with its CTEs written out it reads from more than {thresholds.MAX_EXPANDED_SOURCES} sources"
            )
        if extent.columns > thresholds.MAX_COLUMNS:
            raise rejected(f"it has more than {thresholds.MAX_COLUMNS} columns")
        return extent

    def _with(self, node: _Node, ctes: _Ctes) -> _Ctes:
        for entry in node.get("cte_map", {}).get("map", ()):
            ctes = {**ctes, fold(entry["key"]): self.query(entry["value"]["query"]["node"], ctes)}
        return ctes

    def _select(self, node: _Node, ctes: _Ctes) -> _Extent:
        source = self._source(node.get("from_table", {"type": "EMPTY"}), ctes)
        nested = sum(self.query(query, ctes).sources for query in _subqueries(node))
        entries = [(entry, _expressions_in(entry)) for entry in node.get("select_list", ())]
        stars = sum(1 for _, inner in entries if any(each["class"] == "STAR" for each in inner))
        _check_names(entries)
        return _Extent(source.sources + nested, len(entries) - stars + stars * source.columns)

    def _source(self, node: _Node, ctes: _Ctes) -> _Extent:
        match node["type"]:
            case "BASE_TABLE" if id(node) not in self._relations:
                return ctes.get(fold(node["table_name"]), _ONE)
            case "JOIN":
                left, right = self._source(node["left"], ctes), self._source(node["right"], ctes)
                return _Extent(left.sources + right.sources, left.columns + right.columns)
            case "SUBQUERY":
                return self.query(node["subquery"]["node"], ctes)
            case "EXPRESSION_LIST":
                return _Extent(1, max(map(len, node.get("values", ())), default=1))
            case "PIVOT":
                return self._pivot(node, ctes)
            case _:
                return _ONE

    def _pivot(self, node: _Node, ctes: _Ctes) -> _Extent:
        source = self._source(node["source"], ctes)
        values = 1
        for pivot in node.get("pivots", ()):
            values *= max(1, len(pivot.get("entries", ())))
        return _Extent(source.sources, source.columns + values * max(1, len(node.get("aggregates", ()))))


def _subqueries(select: _Node) -> Iterator[_Node]:
    """The queries that stand in expressions of a SELECT, not those in its FROM and WITH."""
    ahead: list[Any] = [child for field, child in select.items() if field not in ("cte_map", "from_table")]
    ahead += _expressions_of(select.get("from_table", {}))
    while ahead:
        node = ahead.pop()
        if isinstance(node, list):
            ahead += node
        elif isinstance(node, dict):
            if node.get("class") == "SUBQUERY":
                yield node["subquery"]["node"]
            ahead += _children(node)


def _children(node: _Node) -> list[Any]:
    """The child nodes that can contain expressions of the same query."""
    return [child for field, child in node.items() if isinstance(child, dict | list) and field not in _NO_EXPRESSIONS]


def _expressions_of(source: _Node) -> Iterator[Any]:
    """The expressions in FROM: conditions of joins, arguments, rows of VALUES, aggregates of a PIVOT."""
    match source.get("type"):
        case "JOIN":
            yield source.get("condition")
            yield from _expressions_of(source["left"])
            yield from _expressions_of(source["right"])
        case "PIVOT":
            yield from (source.get("aggregates"), source.get("pivots"))
            yield from _expressions_of(source["source"])
        case "TABLE_FUNCTION" | "EXPRESSION_LIST":
            yield from (source.get("function"), source.get("values"))
        case _:
            pass


def _expressions_in(expression: _Node) -> list[_Node]:
    """The expression and those in it, subqueries left out."""
    found: list[_Node] = []
    ahead: list[Any] = [expression]
    while ahead:
        node = ahead.pop()
        if isinstance(node, list):
            ahead += node
        elif isinstance(node, dict):
            if "class" in node:
                found.append(node)
            ahead += _children(node)
    return found


def _check_names(entries: list[tuple[_Node, list[_Node]]]) -> None:
    """Columns of a SELECT may stand for those before them, by name: each is counted as large as what it stands for."""
    sizes: dict[str, int] = {}
    for entry, inner in entries:
        alias = entry.get("alias")
        if not sizes and not alias:
            continue
        refers = (node["column_names"] for node in inner if node["class"] == "COLUMN_REF")
        size = 1 + sum(sizes.get(fold(names[0]), 0) for names in refers if len(names) == 1)
        if size > thresholds.MAX_EXPANDED_NAMES:
            raise rejected("its columns refer to one another too often")
        if alias:
            sizes[fold(alias)] = size
