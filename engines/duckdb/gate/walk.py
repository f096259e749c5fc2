"""One walk over a statement's tree: every function must be listed, and every relation granted.

Names of CTEs hold where SQL lets them hold: for the CTEs after them and for the query that they stand before, and in
their own body only on the recursive side of WITH RECURSIVE. A qualified name never means a CTE, but for `recurring.x`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engines.duckdb.gate import functions, grammar, thresholds
from engines.duckdb.gate.amounts import Amounts
from engines.duckdb.gate.grammar import Field, Part
from engines.duckdb.gate.names import fold
from engines.duckdb.gate.refusals import TOO_DEEP, UnknownRelation, rejected, unknown, uses

_Node = dict[str, Any]

# Names that DuckDB reads as a function if no column has them, and that show what the session is connected to. The names
# of users (`user`, `current_user`, `current_role`, `session_user`) are harmless: each is the constant 'duckdb'.
_REFUSED_COLUMNS = frozenset({"current_catalog", "current_schema"})

# WITH RECURSIVE … USING KEY calls all rows so far by this schema.
_RECURRING = "recurring"


class Granted:
    """The relations that a statement may name, as SQL would write them."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """`names` holds each by its folded name."""
        self._names = names

    def find(self, schema: str, name: str) -> str | None:
        """The relation's own name, or None where there is none."""
        # A dotted name within quotes is one part and no qualified name.
        if "." in schema or "." in name:
            return None
        return self._names.get(fold(f"{schema}.{name}" if schema else name))


class Anything(Granted):
    """Every relation counts as granted, under the name that the statement writes."""

    def __init__(self) -> None:
        super().__init__({})

    def find(self, schema: str, name: str) -> str | None:
        """The name, unless no relation could have it."""
        if "." in schema or "." in name or not name or fold(schema) == _RECURRING:
            return None
        return f"{schema}.{name}" if schema else name


class _Place(NamedTuple):
    """Where a node stands: the CTEs in force there, those that recur there, how deep it is nested, if in UNPIVOT."""

    ctes: frozenset[str] = frozenset()
    recurring: frozenset[str] = frozenset()
    depth: int = 0
    doublings: int = 0
    unpivoted: bool = False


class Walk:
    """One walk over one tree that has the right form. What may not be used raises `QueryFailed` with SQL_REJECTED.

    Afterwards `relations` tells which BASE_TABLE, by the node's `id`, is which granted relation; any other is a CTE.
    """

    def __init__(self, granted: Granted, amounts: Amounts) -> None:
        self._granted = granted
        self._amounts = amounts
        self.relations: dict[int, str] = {}
        self._sources = 0
        self._selects = 0
        self._ahead: list[tuple[Part, Any, _Place]] = []

    def walk(self, statement: _Node) -> None:
        """Judge the whole tree."""
        self._ahead.append((Part.QUERY, statement["node"], _Place()))
        while self._ahead:
            part, node, place = self._ahead.pop()
            match part:
                case Part.EXPRESSION:
                    place = self._judge_expression(node, place)
                case Part.SOURCE:
                    self._judge_source(node, place)
                case Part.QUERY:
                    self._judge_query(node)
                    place = self._enter_ctes(node, place)
                case Part.PIVOT_ENTRY:
                    place = place._replace(unpivoted=True)
                case Part.TYPE_INFO:
                    judge_type(node)
                case _:
                    pass
            self._go_on(part, node, place)

    def _go_on(self, part: Part, node: _Node, place: _Place) -> None:
        """Queue what stands below a node. CTEs are queued where they are entered, a call in FROM is judged there."""
        shape = grammar.shape_of(part, node)
        assert shape is not None
        for name, value in node.items():
            field = shape.fields[name]
            if field.is_leaf or field.part is Part.CTES:
                continue
            if part is Part.SOURCE and name == "function":
                self._go_on(Part.EXPRESSION, value, place)
            elif field.lists:
                self._queue(field, value, place)
            else:
                self._ahead.append((field.part, value, place))

    def _queue(self, field: Field, value: Any, place: _Place) -> None:
        rows = [value] if field.lists == 1 else value
        self._ahead += [(field.part, child, place) for row in rows for child in row]

    def _judge_query(self, node: _Node) -> None:
        # Of a recursive CTE's two sides only the body of a CTE knows which sees the name.
        if node["type"] == "RECURSIVE_CTE_NODE":
            raise unknown("a recursive query outside of WITH")
        self._selects += node["type"] == "SELECT_NODE"
        if self._selects > thresholds.MAX_SELECTS:
            raise rejected(f"it has more than {thresholds.MAX_SELECTS} SELECTs")
        if len(node.get("group_sets", ())) > thresholds.MAX_GROUPING_SETS:
            raise rejected(f"it groups by more than {thresholds.MAX_GROUPING_SETS} sets")

    def _enter_ctes(self, query: _Node, place: _Place) -> _Place:
        """Queue the bodies of CTEs, each with the names defined before it; returns the place of what follows them."""
        for entry in query.get("cte_map", {}).get("map", ()):
            name, cte = fold(entry["key"]), entry["value"]
            self._queue(Field(Part.EXPRESSION, 1), cte.get("key_targets", ()), place)
            body = cte["query"]["node"]
            if body["type"] == "RECURSIVE_CTE_NODE":
                self._visit_recursive(body, name, place)
            else:
                self._ahead.append((Part.QUERY, body, place))
            place = place._replace(ctes=see_cte(place.ctes, name))
        return place

    def _visit_recursive(self, body: _Node, name: str, place: _Place) -> None:
        """Only the recursive side sees the name; the first side means the table of that name, if any."""
        if fold(body["cte_name"]) != name:
            raise unknown("a recursive query under another name")
        inner = self._enter_ctes(body, place)
        recurring = inner.recurring | {name} if "key_targets" in body else inner.recurring
        self._ahead.append((Part.QUERY, body["left"], inner))
        self._ahead.append((Part.QUERY, body["right"], inner._replace(ctes=inner.ctes | {name}, recurring=recurring)))
        self._queue(Field(Part.EXPRESSION, 1), body.get("key_targets", ()), inner)
        self._queue(Field(Part.MODIFIER, 1), body.get("modifiers", ()), inner)

    def _judge_source(self, node: _Node, place: _Place) -> None:
        if node["type"] not in ("JOIN", "EMPTY"):
            self._sources += 1
            if self._sources > thresholds.MAX_SOURCES:
                raise rejected(f"it reads from more than {thresholds.MAX_SOURCES} sources")
        if node["type"] == "BASE_TABLE":
            self._judge_table(node, place)
        elif node["type"] == "TABLE_FUNCTION":
            functions.judge_table_call(node["function"])
            self._amounts.judge(node["function"])
        elif node["type"] == "PIVOT":
            # The tree has these as texts; the binder turns them into columns or function calls.
            for name in node.get("groups", ()):
                judge_column((name,))

    def _judge_table(self, node: _Node, place: _Place) -> None:
        relation = find_relation(self._granted, node)
        if is_cte(node, place.ctes, place.recurring):
            # A relation in a schema called `recurring` would be read, or not: it counts as read.
            if "schema_name" not in node:
                return
        elif relation is None:
            raise UnknownRelation(written_name(node), node.get("query_location"))
        if relation is not None:
            self.relations[id(node)] = relation

    def _judge_expression(self, node: _Node, place: _Place) -> _Place:
        doublings = place.doublings
        match node["class"]:
            case "FUNCTION" | "WINDOW":
                functions.judge_call(node)
                if column := functions.called_on(node):
                    judge_column(column)
                self._amounts.judge(node)
                self._amounts.judge_offset(node)
                doublings += fold(node["function_name"]) in functions.DOUBLING
            case "SUBQUERY" | "LAMBDA":
                doublings += 1
            case "COLUMN_REF":
                judge_column(node["column_names"])
            case "OPERATOR":
                judge_operator(node, unpivoted=place.unpivoted)
            case _:
                pass
        check_depth(place.depth + 1, doublings)
        return _Place(place.ctes, place.recurring, place.depth + 1, doublings, place.unpivoted)


def check_depth(depth: int, doublings: int) -> None:
    """Raises `QueryFailed` for expressions that are nested too deeply."""
    if depth > thresholds.MAX_EXPRESSION_DEPTH:
        raise rejected(TOO_DEEP)
    if doublings > thresholds.MAX_DOUBLINGS:
        raise rejected(f"it nests more than {thresholds.MAX_DOUBLINGS} subqueries, lambdas and functions like nullif")


def is_cte(table: _Node, ctes: frozenset[str], recurring: frozenset[str]) -> bool:
    """Whether a BASE_TABLE means a CTE where those are in force."""
    name = fold(table["table_name"])
    if "catalog_name" in table:
        return False
    if "schema_name" in table:
        return fold(table["schema_name"]) == _RECURRING and name in recurring
    return name in ctes


def see_cte(ctes: frozenset[str], name: str) -> frozenset[str]:
    """The CTEs in force once that one is."""
    return ctes | {name}


def written_name(node: _Node) -> str:
    """The table's name as the author wrote it."""
    parts = (node.get("catalog_name"), node.get("schema_name"), node.get("table_name"))
    return ".".join(str(part) for part in parts if part)


def find_relation(granted: Granted, table: _Node) -> str | None:
    """The granted relation that a BASE_TABLE names. No name with a catalog is granted to anybody."""
    if "catalog_name" in table:
        return None
    return granted.find(table.get("schema_name", ""), table["table_name"])


def judge_column(names: Sequence[str]) -> None:
    """Raises `QueryFailed` for a name with too many parts, or one that means a function which may not be called."""
    if len(names) > thresholds.MAX_DOTTED_CHAIN:
        raise rejected(f"a name has more than {thresholds.MAX_DOTTED_CHAIN} parts")
    if len(names) == 1 and (name := fold(names[0])) in _REFUSED_COLUMNS:
        raise uses(name)


def judge_operator(node: _Node, *, unpivoted: bool) -> None:
    """Raises `QueryFailed` for TRY in a value of UNPIVOT, which kills the process (DuckDB 1.5.5, found by mutation)."""
    if unpivoted and node["type"] == "OPERATOR_TRY":
        raise uses("TRY in UNPIVOT")


def judge_type(node: _Node) -> None:
    """Raises `QueryFailed` for a type that is looked up by a name which is none of DuckDB's own."""
    if node["type"] == "UNBOUND_TYPE_INFO" and fold(node.get("name", "")) not in grammar.TYPE_NAMES:
        raise rejected("it names a type that does not exist or may not be used")
