"""Which columns with personal data a statement reads for certain, told by names and scopes alone.

A relation's columns are known here only as far as they hold personal data. What is certain: a column's name where the
relation is the only source in sight; behind the relation's own name or alias, where nothing else has that name; a plain
star of the outermost query. None, "it can't be told", is for everything else that might read such a column: the bare
name where several sources are in sight or where the statement gives the same name to something of its own, stars in
subqueries, with REPLACE or RENAME, and COLUMNS(…), the relation as a whole row, columns by position or renamed by
`people t(a, b)`, NATURAL joins and USING over such a column, PIVOT and UNPIVOT. In doubt it is None: an empty set says
that no such column is read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.duckdb.gate import functions
from engines.duckdb.gate.names import fold
from engines.protocol import Read

_Node = dict[str, Any]

_PLAIN_STAR = frozenset({"class", "type", "query_location", "exclude_list", "relation_name"})
_ALL = frozenset({"class", "type", "query_location", "columns"})


@dataclass(frozen=True, slots=True)
class _Source:
    """A source in sight: what it is called, and which relation with personal data it is, if one. Names are folded."""

    alias: str
    relation: str | None = None
    schema: str | None = None


_Chain = tuple[_Source, ...]


def read_columns(statement: _Node, relations: Mapping[int, str], pii: Mapping[str, frozenset[str]]) -> tuple[Read, ...]:
    """What is read of each relation that is named and has personal data. The tree has passed the walk, whose
    `relations` these are; `pii` has the columns of the relations that have any."""
    named = {relation for relation in relations.values() if pii.get(relation)}
    if not named:
        return ()
    lineage = _Lineage(statement["node"], relations, {relation: pii[relation] for relation in named})
    return tuple(Read(relation, lineage.columns(relation)) for relation in sorted(named))


class _Lineage:
    def __init__(self, root: _Node, relations: Mapping[int, str], pii: Mapping[str, frozenset[str]]) -> None:
        self._relations = relations
        self._names = {relation: {fold(column): column for column in columns} for relation, columns in pii.items()}
        self._certain: dict[str, set[str]] = {}
        self._doubtful: set[str] = set()
        self._given = frozenset(_given_names(root))
        self._query(root, (), outermost=True)

    def columns(self, relation: str) -> frozenset[str] | None:
        """The columns with personal data that are read of a relation, or None where that can't be told."""
        if relation in self._doubtful or relation not in self._certain:
            return None
        return frozenset(self._names[relation][name] for name in self._certain[relation])

    def _query(self, node: _Node, outer: _Chain, *, outermost: bool = False) -> None:
        for entry in node.get("cte_map", {}).get("map", ()):
            self._query(entry["value"]["query"]["node"], outer)
        match node["type"]:
            case "SELECT_NODE":
                self._select(node, outer, outermost)
            case _:
                self._query(node["left"], outer, outermost=outermost)
                self._query(node["right"], outer, outermost=outermost)
                # What stands behind a UNION names its columns, whatever they were made of.
                for field in ("modifiers", "key_targets"):
                    self._expression(node.get(field), outer, certain=False)

    def _select(self, node: _Node, outer: _Chain, outermost: bool) -> None:
        source = node.get("from_table", {"type": "EMPTY"})
        own = tuple(self._sources(source))
        chain = outer + own
        self._inside(source, outer)
        for entry in node.get("select_list", ()):
            if entry["class"] == "STAR":
                self._star(entry, own, chain, outermost)
            else:
                self._expression(entry, chain)
        for field in ("where_clause", "group_expressions", "having", "qualify"):
            self._expression(node.get(field), chain)
        for modifier in node.get("modifiers", ()):
            if not _is_order_by_all(modifier):
                self._expression(modifier, chain)

    def _sources(self, node: _Node) -> Iterator[_Source]:
        """The sources that a FROM brings in sight. What they are joined by may raise doubts about them."""
        match node["type"]:
            case "BASE_TABLE":
                yield self._table(node)
            case "JOIN":
                joined = (*self._sources(node["left"]), *self._sources(node["right"]))
                self._doubt_joined(node, joined)
                yield from joined
            case "PIVOT":
                self._doubt(self._sources(node["source"]))
                yield _Source(fold(node.get("alias", "")))
            case "EMPTY":
                pass
            case _:
                yield _Source(fold(node.get("alias", "")))

    def _table(self, node: _Node) -> _Source:
        name = fold(node["table_name"])
        alias = fold(node["alias"]) if "alias" in node else name
        relation = self._relations.get(id(node))
        if relation is None or relation not in self._names:
            return _Source(alias)
        self._certain.setdefault(relation, set())
        if "column_name_alias" in node or alias in self._names[relation]:
            self._doubtful.add(relation)
        schema = fold(node["schema_name"]) if "schema_name" in node and "alias" not in node else None
        return _Source(alias, relation, schema)

    def _doubt_joined(self, join: _Node, joined: _Chain) -> None:
        if join.get("ref_type") == "NATURAL":
            self._doubt(joined)
        using = {fold(name) for name in join.get("using_columns", ())}
        self._doubt(source for source in joined if source.relation and using & self._names[source.relation].keys())

    def _inside(self, source: _Node, chain: _Chain) -> None:
        """The queries and expressions in FROM, which see the sources to their left."""
        match source["type"]:
            case "JOIN":
                left, right = tuple(self._sources(source["left"])), tuple(self._sources(source["right"]))
                self._inside(source["left"], chain)
                self._inside(source["right"], chain + left)
                self._expression(source.get("condition"), chain + left + right)
            case "SUBQUERY":
                self._query(source["subquery"]["node"], chain)
            case "TABLE_FUNCTION":
                self._expression(source["function"].get("children"), chain)
            case "EXPRESSION_LIST":
                self._expression(source.get("values"), chain)
            case "PIVOT":
                self._inside(source["source"], chain)
                inner = chain + tuple(self._sources(source["source"]))
                self._expression([source.get("aggregates"), source.get("pivots")], inner)
            case _:
                pass

    def _star(self, star: _Node, own: _Chain, chain: _Chain, outermost: bool) -> None:
        meant, doubtful = own, own
        if "relation_name" in star:
            meant = tuple(source for source in own if source.alias == fold(star["relation_name"]))
            # A name that no source has may be a column to be taken apart.
            doubtful = meant or chain
        if not (outermost and len(meant) == 1 and star.keys() <= _PLAIN_STAR):
            self._doubt(doubtful)
            self._expression([star.get("expr"), star.get("replace_list")], chain)
        elif relation := meant[0].relation:
            left_out = {fold(name) for name in star.get("exclude_list", ())}
            self._certain[relation] |= self._names[relation].keys() - left_out

    def _expression(self, expression: Any, chain: _Chain, *, certain: bool = True) -> None:
        ahead = [expression]
        while ahead:
            node = ahead.pop()
            if isinstance(node, list):
                ahead += node
            elif isinstance(node, dict):
                self._look_at(node, chain, certain)
                ahead += (child for field, child in node.items() if field not in ("subquery", "value", "cast_type"))

    def _look_at(self, node: _Node, chain: _Chain, certain: bool) -> None:
        match node.get("class"):
            case "COLUMN_REF":
                self._mention(node["column_names"], chain, certain)
            case "FUNCTION" if parts := functions.called_on(node):
                self._mention(parts, chain, certain)
            case "STAR" | "POSITIONAL_REFERENCE":
                self._doubt(chain)
            case "SUBQUERY":
                self._query(node["subquery"]["node"], chain)
            case _:
                pass

    def _mention(self, parts: Sequence[str], chain: _Chain, certain: bool) -> None:
        names = [fold(part) for part in parts]
        for source in {source for source in chain if source.relation}:
            self._mention_of(source, names, chain, certain)

    def _mention_of(self, source: _Source, names: list[str], chain: _Chain, certain: bool) -> None:
        """What one name says of one source that has personal data."""
        assert source.relation is not None
        if names[-1] == source.alias:
            self._doubtful.add(source.relation)
        mentioned = self._names[source.relation].keys() & set(names)
        if not mentioned or (names[0] not in mentioned and _belongs_to_another(names, source, chain)):
            return
        column = _column_of(source, names, chain)
        if certain and mentioned == {column} and not mentioned & self._given:
            self._certain[source.relation] |= mentioned
        else:
            self._doubtful.add(source.relation)

    def _doubt(self, sources: Iterable[_Source]) -> None:
        self._doubtful.update(source.relation for source in sources if source.relation)


def _column_of(source: _Source, names: list[str], chain: _Chain) -> str | None:
    """The part of a name that is the source's column, or None where it might be another's."""
    if sum(each.alias == source.alias for each in chain) == 1:
        if len(names) > 1 and names[0] == source.alias:
            return names[1]
        if len(names) > 2 and source.schema and names[:2] == [source.schema, source.alias]:
            return names[2]
    return names[0] if len(chain) == 1 else None


def _belongs_to_another(names: list[str], source: _Source, chain: _Chain) -> bool:
    """Whether a name stands behind the name of exactly one other source.

    Where the source's own name follows, DuckDB takes what stands before it for a schema or a catalog first.
    """
    if len(names) == 1 or source.alias in names[:-1]:
        return False
    return sum(each.alias == names[0] for each in chain) == 1


def _given_names(root: _Node) -> Iterator[str]:
    """Names that the statement gives itself, which may hide columns: aliases, fields of structs, parameters."""
    ahead: list[Any] = [root]
    while ahead:
        node = ahead.pop()
        if isinstance(node, list):
            ahead += node
        elif isinstance(node, dict):
            if "class" in node and "alias" in node:
                yield fold(node["alias"])
            if node.get("class") == "LAMBDA":
                yield from _parameters(node["lhs"])
            ahead += (child for field, child in node.items() if field not in ("value", "cast_type"))


def _parameters(left: _Node) -> Iterator[str]:
    """What may be a lambda's parameters; `->` also takes JSON apart, and then it is a column."""
    ahead: list[Any] = [left]
    while ahead:
        node = ahead.pop()
        if isinstance(node, list):
            ahead += node
        elif isinstance(node, dict):
            if node.get("class") == "COLUMN_REF":
                yield from map(fold, node["column_names"])
            ahead += node.values()


def _is_order_by_all(modifier: _Node) -> bool:
    """ORDER BY ALL is a lone star in the tree, and means the columns of the result."""
    match modifier.get("orders"):
        case [{"expression": {"class": "STAR"} as star}]:
            return set(star) <= _ALL
        case _:
            return False
