"""The gate itself: from a text and what its caller was granted to what may run, or a refusal."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from engines.duckdb.errors import Placed
from engines.duckdb.gate import texts
from engines.duckdb.gate.amounts import Amounts
from engines.duckdb.gate.extent import check_extent
from engines.duckdb.gate.form import check_form
from engines.duckdb.gate.lineage import read_columns
from engines.duckdb.gate.names import fold
from engines.duckdb.gate.refusals import TOO_DEEP, UnknownRelation, rejected
from engines.duckdb.gate.walk import Anything, Granted, Walk
from engines.protocol import Inspected, QueryFailed, Read, Relation
from queryd.events import ErrorCode, Parameter

_PARSER_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_unsigned_extensions": "false",
    "python_enable_replacements": "false",
    "threads": "1",
}

_PLAIN_NAME = re.compile(r"[A-Za-z_]\w{0,63}|\d{1,4}")
_PIVOT = re.compile(r"\bpivot", re.IGNORECASE)

_Node = dict[str, Any]

# The tree's fields with names that a statement gives: `t(a, b)`, `WITH t(a, b)`, `UNPIVOT … INTO NAME a VALUE b`.
_LISTS_OF_NAMES = frozenset({"column_name_alias", "aliases", "unpivot_names"})


@dataclass(frozen=True, slots=True)
class Judged:
    """A statement that may run: its text without semicolons around it, and the granted relations that it names.

    `reads` has those of them with personal data: which of its columns are read, or None where that can't be told.
    """

    text: str
    references: frozenset[str]
    reads: tuple[Read, ...] = ()
    # The names that the statement gives to columns and to fields of structs; and whether PIVOT makes more names.
    names: frozenset[str] = frozenset()
    has_pivot: bool = False


class Gate:
    """Judges statements with a parser of its own, which has no data, no extension and no way out."""

    def __init__(self) -> None:
        self._parser = duckdb.connect(":memory:", config=_PARSER_SETTINGS)
        # Its statements are calls of the parser: optimizing them takes a third of their time and changes nothing.
        self._parser.execute("PRAGMA disable_optimizer")
        self._parser.execute("SET enable_external_access = false")
        self._parser.execute("SET lock_configuration = true")

    def judge(
        self,
        sql: str,
        relations: Iterable[Relation],
        parameters: Mapping[str, Parameter],
        denied: frozenset[str] = frozenset(),
    ) -> Judged:
        """Let exactly one SELECT over granted relations through, and nothing that is not known to be harmless.

        Raises `QueryFailed`: SQL_REJECTED for what may not run, ACCESS_DENIED for a relation of `denied`, which exists
        for the caller, QUERY_ERROR for what could not run (syntax, parameters).
        """
        granted = {fold(relation.name): relation for relation in relations}
        names = {key: relation.name for key, relation in granted.items()} | {fold(name): name for name in denied}
        pii = {relation.name: relation.pii_columns for relation in granted.values() if relation.pii_columns}
        text, statement = self._read(sql)
        try:
            named, reads = _look_through(statement, Granted(names), parameters, pii)
        except UnknownRelation as refusal:
            place = Placed(sql, text, 0).locate(refusal.location) if refusal.location is not None else None
            raise (refusal.at(*place) if place else refusal) from None
        if named & denied:
            raise QueryFailed(
                ErrorCode.ACCESS_DENIED,
                "The SQL reads a relation that this request may not read: personal data needs a user or a task.",
            )
        _check_parameters(_expected(statement), parameters)
        return Judged(text, named, reads, *_read_names(statement["node"]))

    def inspect(self, sql: str) -> Inspected:
        """Judge a statement as if any relation were granted to its caller; raises `QueryFailed` as `judge` does."""
        _, statement = self._read(sql)
        named, _ = _look_through(statement, Anything(), {}, {})
        return Inspected(named, frozenset(_expected(statement).values()))

    def _read(self, sql: str) -> tuple[str, _Node]:
        """The text that would run, and its tree."""
        texts.check_size(sql)
        text = texts.trim(sql)
        if not text:
            raise rejected("the request holds no statement")
        statement = the_statement(self._parse(text), text)
        if not texts.is_one_statement(text):
            raise rejected("a request holds exactly one statement")
        return text, statement

    def _parse(self, text: str) -> _Node:
        try:
            tree: _Node = json.loads(self._serialize(as_it_runs(text)))
        except RecursionError:
            raise rejected(TOO_DEEP) from None
        except (duckdb.Error, UnicodeError, ValueError):
            raise rejected("it can't be read by the parser") from None
        return tree

    def _serialize(self, text: str) -> str:
        row = self._parser.execute(
            "SELECT json_serialize_sql($1, skip_null := true, skip_empty := true, skip_default := true)", [text]
        ).fetchone()
        return str(row[0]) if row else "{}"


def as_it_runs(text: str) -> str:
    """The text as its parser sees it when it runs: followed by more, as it stands between brackets then.

    DuckDB takes spaces of Unicode for spaces, but not in the last three bytes: `FROM secret` with such a space at the
    very end names another relation than it does with a bracket behind it.
    """
    return f"{text}\n\n\n"


def the_statement(tree: _Node, text: str) -> _Node:
    """The one statement of the parser's answer. Raises `QueryFailed` for none, for several, for any but a SELECT."""
    if tree.get("error") is not False:
        raise _unparsed(tree, text)
    statements = tree.get("statements", [])
    if len(statements) != 1 or not isinstance(statements[0], dict):
        raise rejected("a request holds exactly one statement")
    statement: _Node = statements[0]
    return statement


def _look_through(
    statement: _Node,
    granted: Granted,
    parameters: Mapping[str, Parameter],
    pii: Mapping[str, frozenset[str]],
) -> tuple[frozenset[str], tuple[Read, ...]]:
    """Every check of the tree, in order; gives the relations that it names and what it reads of their `pii`."""
    walk = Walk(granted, Amounts(parameters))
    try:
        check_form(statement)
        walk.walk(statement)
        check_extent(statement, walk.relations)
        reads = read_columns(statement, walk.relations, pii)
    except RecursionError:
        raise rejected(TOO_DEEP) from None
    return frozenset(walk.relations.values()), reads


def _unparsed(tree: _Node, text: str) -> QueryFailed:
    """What to say about a text that gives no tree."""
    message, position = str(tree.get("error_message")), str(tree.get("position", ""))
    if _is_too_deep(message):
        return rejected(TOO_DEEP)
    if tree.get("error_subtype") != "SYNTAX_ERROR":
        return rejected(_unfit(message, text))
    if not position.isdecimal():
        return QueryFailed(ErrorCode.QUERY_ERROR, "The SQL has a syntax error.")
    # The parser counts characters here, not bytes.
    before = text[: int(position)]
    line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    return QueryFailed(ErrorCode.QUERY_ERROR, f"The SQL has a syntax error at line {line}, column {column}.")


def _is_too_deep(message: str) -> bool:
    return "Max expression depth" in message or message.startswith("memory exhausted")


def _unfit(message: str, text: str) -> str:
    """Why a text that is whole SQL has no tree. DuckDB's own text may quote it, so that only its kind is told."""
    if message.startswith("Mixing named and positional"):
        return "it has parameters with names and others without"
    if not message.startswith("Only SELECT"):
        return "it is not a SELECT whose every part can be looked at"
    if _PIVOT.search(text):
        return "only a SELECT statement may run, and a PIVOT only with its values written out"
    return "only a SELECT statement may run"


def _read_names(root: _Node) -> tuple[frozenset[str], bool]:
    """Read the names that aliases and name lists give, and whether a PIVOT makes names from values."""
    names: set[str] = set()
    has_pivot = False
    ahead: list[Any] = [root]
    while ahead:
        node = ahead.pop()
        if isinstance(node, list):
            ahead += node
        elif isinstance(node, dict):
            if isinstance(alias := node.get("alias"), str):
                names.add(alias)
            if not _LISTS_OF_NAMES.isdisjoint(node):
                for key in _LISTS_OF_NAMES & node.keys():
                    names.update(name for name in node[key] if isinstance(name, str))
            if "rename_list" in node:
                names.update(renamed["value"] for renamed in node["rename_list"])
            if node.get("type") == "PIVOT" and not node.get("unpivot_names"):
                has_pivot = True
            # A pivot's entries are values, or aliases that replace them.
            ahead += [value for key, value in node.items() if isinstance(value, dict | list) and key != "entries"]
    return frozenset(names), has_pivot


def _expected(statement: _Node) -> dict[str, str]:
    """The statement's parameters by their folded names; those without a name have numbers."""
    return {fold(entry["key"]): entry["key"] for entry in statement.get("named_param_map", ())}


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
    for name, value in given.items():
        if isinstance(value, str) and not _is_unicode(value):
            raise QueryFailed(ErrorCode.QUERY_ERROR, f"The value of the parameter{_named(name)} is not valid Unicode.")


def _is_unicode(text: str) -> bool:
    """False for a text with a lone surrogate, which DuckDB can't bind."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(name: str) -> str:
    return f" ${name}" if _PLAIN_NAME.fullmatch(name) else ""
