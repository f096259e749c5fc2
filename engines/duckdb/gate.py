"""The first gate: what DuckDB's own parser says about a statement, judged against what its caller was granted.

It is one of two layers. The second is the instance itself, which could do no harm if this one were wrong.
The tree that is walked belongs to one version of DuckDB: a kind of node or expression not known here is refused.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from engines.protocol import QueryFailed
from queryd.events import ErrorCode, Parameter

# The version whose trees `_KINDS` and `_EXPRESSIONS` describe; a test fails on any other.
TREE_VERSION = "1.5.5"

MAX_SQL_BYTES = 262_144

# Deep brackets cost the parser quadratic time, and 1,800 of them hang it. What people write stays below 20.
MAX_BRACKET_DEPTH = 64
MAX_DOTTED_CHAIN = 16
MAX_EXPRESSION_DEPTH = 250

# Joins of hundreds of sources keep the optimizer busy without end.
MAX_SOURCES = 64

# A single value larger than this belongs into a parameter, which no parser has to read.
MAX_LITERAL_CHARACTERS = 131_072

# What one function call may be told to multiply a value by, rows or characters.
MAX_AMPLIFICATION = 10_000_000

_PARSER_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_unsigned_extensions": "false",
    "python_enable_replacements": "false",
    "threads": "1",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TABLE_FUNCTIONS = _words("range generate_series unnest json_each json_tree")

# Functions that the parser itself writes with a schema: for [1, 2], {'a': 1}, list comprehensions and the syntax of the
# standard, such as extract(year FROM x), trim(BOTH ...) and AT TIME ZONE.
_WRITTEN_BY_PARSER = _words(
    """
    date_part ilike_escape like_escape list_apply list_filter list_value ltrim map not_ilike_escape not_like_escape
    overlaps overlay position row rtrim struct_extract struct_pack substring timezone trim
    """
)

# Functions that read files, catalogs, settings or other sessions, change state, run SQL held in a string, or call a
# function named by a string.
_REFUSED_FUNCTIONS = _words(
    """
    add_parquet_key aggregate array_aggr array_aggregate col_description combine current_catalog current_connection_id
    current_database current_query current_query_id current_role current_schema current_schemas current_setting
    current_transaction_id current_user currval error finalize format_pg_type format_type from_substrait
    from_substrait_json get_block_size get_substrait get_substrait_json getenv getvariable glob has_any_column_privilege
    has_column_privilege has_database_privilege has_foreign_data_wrapper_privilege has_function_privilege
    has_language_privilege has_schema_privilege has_sequence_privilege has_server_privilege has_table_privilege
    has_tablespace_privilege in_search_path inet_client_addr inet_client_port inet_server_addr inet_server_port
    json_deserialize_sql json_execute_serialized_sql json_serialize_plan json_serialize_sql list_aggr list_aggregate
    nextval obj_description parse_duckdb_log_message query query_table read_blob read_csv read_csv_auto read_json
    read_json_auto read_json_objects read_json_objects_auto read_ndjson read_ndjson_auto read_ndjson_objects
    read_parquet read_text session_user setseed shobj_description sleep_ms sql_auto_complete stats txid_current user
    vector_type version which_secret write_log
    """
)
_REFUSED_PREFIXES = ("__internal", "duckdb_", "http_", "mysql_", "parquet_", "pg_", "postgres_", "pragma_", "sqlite_")

# Functions that make as much of something as an argument says.
_AMPLIFIERS = _words("array_resize bitstring generate_series list_resize lpad range repeat rpad")

# Queries, sources and modifiers: nodes without a class.
_KINDS = _words(
    """
    SELECT_NODE SET_OPERATION_NODE RECURSIVE_CTE_NODE CTE_NODE
    BASE_TABLE TABLE_FUNCTION SUBQUERY JOIN EXPRESSION_LIST EMPTY PIVOT
    ORDER_MODIFIER LIMIT_MODIFIER LIMIT_PERCENT_MODIFIER DISTINCT_MODIFIER
    ORDER_DEFAULT ASCENDING DESCENDING
    """
)
_SOURCES = frozenset({"BASE_TABLE", "TABLE_FUNCTION", "SUBQUERY", "EXPRESSION_LIST", "PIVOT"})
_EXPRESSIONS = _words(
    """
    BETWEEN CASE CAST COLLATE COLUMN_REF COMPARISON CONJUNCTION CONSTANT FUNCTION LAMBDA OPERATOR PARAMETER
    POSITIONAL_REFERENCE STAR SUBQUERY WINDOW
    """
)
_OPENING, _CLOSING = "([{", ")]}"
_DOTTED = re.compile(rf'(?:\s*\.\s*(?:\w+|"[^"]*")){{{MAX_DOTTED_CHAIN}}}')
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w{0,63}|\d{1,4}")

_Node = dict[str, Any]
_Scope = frozenset[str]


@dataclass(frozen=True, slots=True)
class Judged:
    """A statement that may run: its text without semicolons around it, and the granted relations that it names."""

    text: str
    references: frozenset[str]


def fold(name: str) -> str:
    """A name as DuckDB compares it: only ASCII letters lose their case."""
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


class Gate:
    """Judges statements with a parser of its own, which has no data, no extension and no way out."""

    def __init__(self) -> None:
        self._parser = duckdb.connect(":memory:", config=_PARSER_SETTINGS)
        self._parser.execute(f"SET max_expression_depth = {MAX_EXPRESSION_DEPTH}")
        self._parser.execute("SET enable_external_access = false")
        self._parser.execute("SET lock_configuration = true")

    def judge(self, sql: str, granted: Iterable[str], parameters: Mapping[str, Parameter]) -> Judged:
        """Let exactly one SELECT over granted relations through. `granted` holds names as SQL would write them.

        Raises `QueryFailed`: SQL_REJECTED for what may not run, QUERY_ERROR for what could not (syntax, parameters).
        """
        _check_size(sql)
        text = _trim(sql)
        if not text:
            raise _rejected("the request holds no statement")
        statement = self._parse(text)
        references = _Walk({fold(name): name for name in granted}).walk(statement["node"])
        expected = {fold(entry["key"]): entry["key"] for entry in statement.get("named_param_map", ())}
        _check_parameters(expected, parameters)
        return Judged(text, references)

    def _parse(self, text: str) -> _Node:
        try:
            row = self._parser.execute(
                "SELECT json_serialize_sql($1, skip_null := true, skip_empty := true, skip_default := true)", [text]
            ).fetchone()
            tree = json.loads(row[0]) if row else {}
        except RecursionError:
            raise _rejected("the statement is nested too deeply") from None
        except (duckdb.Error, UnicodeError, ValueError):
            raise _rejected("the statement can't be read by the parser") from None
        if tree.get("error") is not False:
            raise _unparsed(tree, text)
        statements = tree.get("statements", [])
        if len(statements) != 1:
            raise _rejected("a request holds exactly one statement")
        statement: _Node = statements[0]
        return statement


def _rejected(reason: str) -> QueryFailed:
    return QueryFailed(ErrorCode.SQL_REJECTED, f"The SQL was rejected: {reason}.")


def _check_size(sql: str) -> None:
    """Refuse, before any parser sees it, what is known to hang or blow one up."""
    try:
        size = len(sql.encode())
    except UnicodeEncodeError:
        raise _rejected("it is not valid Unicode") from None
    if size > MAX_SQL_BYTES:
        raise _rejected(f"it is longer than {MAX_SQL_BYTES} bytes")
    if "\0" in sql:
        raise _rejected("it holds a NUL character")
    if sum(map(sql.count, _OPENING)) > MAX_BRACKET_DEPTH and _bracket_depth(sql) > MAX_BRACKET_DEPTH:
        raise _rejected(f"brackets are nested deeper than {MAX_BRACKET_DEPTH}")
    if sql.count(".") >= MAX_DOTTED_CHAIN and _DOTTED.search(sql):
        raise _rejected(f"a name has more than {MAX_DOTTED_CHAIN} parts")


def _operators(sql: str) -> Iterator[tuple[int, str]]:
    """Where in the UTF-8 bytes of the text a bracket or a semicolon stands that is no part of a string or comment."""
    encoded = sql.encode()
    for offset, kind in duckdb.tokenize(sql):
        if kind == duckdb.token_type.operator:
            yield offset, chr(encoded[offset])


def _bracket_depth(sql: str) -> int:
    steps = ((character in _OPENING) - (character in _CLOSING) for _, character in _operators(sql))
    return max(itertools.accumulate(steps), default=0)


def _trim(sql: str) -> str:
    """The text without the semicolons, blanks and comments before and after the statement.

    What is left can stand inside brackets: it neither ends early nor swallows the bracket that follows on a new line.
    """
    if ";" not in sql:
        return sql.strip() and sql
    encoded = sql.encode()
    tokens = duckdb.tokenize(sql)
    is_semicolon = [kind == duckdb.token_type.operator and encoded[at : at + 1] == b";" for at, kind in tokens]
    first = next((number for number, semicolon in enumerate(is_semicolon) if not semicolon), None)
    if first is None:
        return ""
    last = len(tokens) - 1 - is_semicolon[::-1].index(False)
    start = tokens[first][0] if first else 0
    end = tokens[last + 1][0] if last + 1 < len(tokens) else len(encoded)
    return encoded[start:end].decode()


def _unparsed(tree: _Node, text: str) -> QueryFailed:
    """What to say about a text that gives no tree."""
    if tree.get("error_type") == "not implemented":
        return _rejected("only a SELECT statement may run")
    position = str(tree.get("position", ""))
    if not position.isdecimal():
        return QueryFailed(ErrorCode.QUERY_ERROR, "The SQL has a syntax error.")
    # The parser counts characters here, not bytes.
    before = text[: int(position)]
    line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    return QueryFailed(ErrorCode.QUERY_ERROR, f"The SQL has a syntax error at line {line}, column {column}.")


def _check_parameters(expected: Mapping[str, str], given: Mapping[str, Parameter]) -> None:
    """Every parameter has exactly one value. Raises `QueryFailed`, naming a parameter only if its name is plain."""
    folded = [fold(name) for name in given]
    if len(set(folded)) != len(folded):
        raise QueryFailed(ErrorCode.QUERY_ERROR, "Two parameters differ only in case, and SQL takes them for the same.")
    for name in expected.keys() - set(folded):
        raise QueryFailed(ErrorCode.QUERY_ERROR, f"The SQL's parameter{_named(expected[name])} has no value.")
    for name in given:
        if fold(name) not in expected:
            message = f"A value was given for the parameter{_named(name)}, which the SQL does not have."
            raise QueryFailed(ErrorCode.QUERY_ERROR, message)


def _named(name: str) -> str:
    return f" ${name}" if _PLAIN_NAME.fullmatch(name) else ""


class _Walk:
    """One walk over one tree. Every branch that is not known to be harmless raises."""

    def __init__(self, granted: Mapping[str, str]) -> None:
        self._granted = granted
        self._references: set[str] = set()
        self._sources = 0
        # Nodes yet to be seen, each with the names of the CTEs in force there and how deep in expressions it stands.
        self._ahead: list[tuple[Any, _Scope, int]] = []

    def walk(self, root: _Node) -> frozenset[str]:
        """The granted relations that the tree names. Raises `QueryFailed` with SQL_REJECTED."""
        self._ahead.append((root, frozenset(), 0))
        while self._ahead:
            node, scope, depth = self._ahead.pop()
            if isinstance(node, list):
                self._ahead.extend((child, scope, depth) for child in node)
            elif isinstance(node, dict):
                self._visit(node, scope, depth)
        return frozenset(self._references)

    def _visit(self, node: _Node, scope: _Scope, depth: int) -> None:
        if "class" in node:
            depth += 1
            self._judge_expression(node, depth)
        elif isinstance(node.get("type"), str):
            self._judge_node(node, scope)
        if "cte_map" in node:
            scope = self._enter(node["cte_map"], scope, depth)
        seen = _seen_with(node)
        self._ahead.extend((child, scope, depth) for key, child in node.items() if key not in seen)

    def _enter(self, cte_map: _Node, scope: _Scope, depth: int) -> _Scope:
        """Queue the bodies of CTEs, each with the names defined before it; returns the scope of what follows them."""
        for entry in cte_map.get("map", ()):
            name, cte = fold(entry["key"]), entry["value"]
            body = cte["query"]["node"]
            if body.get("type") == "RECURSIVE_CTE_NODE":
                # Only the recursive side sees the name; the first side means the table of that name, if any.
                self._ahead.append((body["right"], scope | {name}, depth))
                body = {key: child for key, child in body.items() if key != "right"}
            self._ahead.append((body, scope, depth))
            self._ahead.append((cte.get("key_targets"), scope, depth))
            scope |= {name}
        return scope

    def _judge_node(self, node: _Node, scope: _Scope) -> None:
        kind = node["type"]
        if kind not in _KINDS:
            raise _rejected("it uses a clause that may not be used here")
        if kind in _SOURCES:
            self._sources += 1
            if self._sources > MAX_SOURCES:
                raise _rejected(f"it reads from more than {MAX_SOURCES} sources")
        if kind == "BASE_TABLE":
            self._judge_table(node, scope)
        elif kind == "TABLE_FUNCTION":
            if fold(node["function"]["function_name"]) not in _TABLE_FUNCTIONS:
                raise _rejected("it calls a table function that may not be called")
        elif kind == "PIVOT" and any(pivot.get("pivot_enum") or pivot.get("subquery") for pivot in node["pivots"]):
            raise _rejected("a PIVOT needs its values written out")

    def _judge_table(self, node: _Node, scope: _Scope) -> None:
        if node.get("catalog_name") or node.get("at_clause"):
            raise _rejected("it names a relation that does not exist or is not granted")
        schema, name = fold(node.get("schema_name", "")), fold(node["table_name"])
        if not schema and name in scope:
            return
        granted = self._granted.get(f"{schema}.{name}" if schema else name)
        # A dotted name within quotes is one part and no qualified name.
        if granted is None or ("." in name):
            raise _rejected("it names a relation that does not exist or is not granted")
        self._references.add(granted)

    def _judge_expression(self, node: _Node, depth: int) -> None:
        kind = node["class"]
        if kind not in _EXPRESSIONS:
            raise _rejected("it uses an expression that may not be used here")
        if depth > MAX_EXPRESSION_DEPTH:
            raise _rejected("the statement is nested too deeply")
        if kind in ("FUNCTION", "WINDOW"):
            _judge_function(node)
        elif kind == "CONSTANT":
            literal = node["value"].get("value")
            if isinstance(literal, str) and len(literal) > MAX_LITERAL_CHARACTERS:
                raise _rejected("a literal is too long, bind it as a parameter")
        elif kind == "COLUMN_REF" and len(node["column_names"]) > MAX_DOTTED_CHAIN:
            raise _rejected(f"a name has more than {MAX_DOTTED_CHAIN} parts")


def _seen_with(node: _Node) -> tuple[str, ...]:
    """The fields of a node that need no visit of their own: names, types and values hold no expressions."""
    match node.get("class"):
        case "CONSTANT":
            return ("value",)
        case "CAST":
            return ("cast_type",)
        case _:
            return ("cte_map",)


def _judge_function(node: _Node) -> None:
    name = fold(node.get("function_name", ""))
    qualified = node.get("catalog") or (node.get("schema") and name not in _WRITTEN_BY_PARSER)
    if qualified or name in _REFUSED_FUNCTIONS or name.startswith(_REFUSED_PREFIXES):
        raise _rejected("it calls a function that may not be called")
    if name in _AMPLIFIERS and any(_amount(child) > MAX_AMPLIFICATION for child in node.get("children", ())):
        raise _rejected(f"it makes more than {MAX_AMPLIFICATION:,} rows or characters out of one call")


def _amount(node: _Node) -> float:
    """The number that a literal is, also below casts; zero for anything else."""
    while node.get("class") == "CAST":
        node = node["child"]
    literal = node["value"].get("value") if node.get("class") == "CONSTANT" else None
    return abs(literal) if isinstance(literal, int | float) else 0
