"""Whether a tree has the form that `grammar` describes, all through: the rest of the gate may then rely on it."""

from collections.abc import Iterator, Mapping
from typing import Any

from engines.duckdb.gate import grammar, thresholds
from engines.duckdb.gate.grammar import Field, Part
from engines.duckdb.gate.refusals import rejected, unknown, uses

_Node = dict[str, Any]

_LEAVES: Mapping[Part, type[str] | type[int] | type[bool]] = {Part.TEXT: str, Part.NUMBER: int, Part.FLAG: bool}


def check_form(statement: object) -> None:
    """Raises `QueryFailed` with SQL_REJECTED for a kind, a field, a keyword or a leaf that is not known."""
    ahead: list[tuple[Part, Any]] = [(Part.STATEMENT, statement)]
    while ahead:
        part, node = ahead.pop()
        if not isinstance(node, dict):
            raise unknown("a tree")
        fields = check_fields(part, node).fields
        # Generators instead of these loops would double the cost of the check.
        for name, value in node.items():
            field = fields[name]
            if field.lists:
                ahead += _check_list(field, value)
            elif field.is_leaf:
                check_leaf(field, value)
            else:
                ahead.append((field.part, value))


def check_fields(part: Part, node: _Node) -> grammar.Shape:
    """The node's shape. Raises `QueryFailed` for a kind or a field that is not known, or that is missing."""
    shape = grammar.shape_of(part, node)
    if shape is None:
        kind = node.get("class") or node.get("type")
        construct = grammar.REFUSED_KINDS.get(kind) if isinstance(kind, str) else None
        raise uses(construct) if construct else unknown(f"{part}")
    if not node.keys() <= shape.fields.keys():
        name = next(iter(node.keys() - shape.fields.keys()))
        construct = grammar.REFUSED_FIELDS.get(name)
        raise uses(construct) if construct else unknown(f"a part of {part}")
    if not shape.required <= node.keys():
        raise unknown("a tree")
    return shape


def check_leaf(field: Field, value: Any) -> None:
    """Raises `QueryFailed` for a keyword that is not known, and for a leaf of another type than it has."""
    if field.part is Part.WORD:
        if not isinstance(value, str) or value not in field.words:
            raise unknown("a kind of expression or clause")
    elif field.part is Part.LITERAL:
        if isinstance(value, str) and len(value) > thresholds.MAX_LITERAL_CHARACTERS:
            raise rejected("a literal is too long, bind it as a parameter")
    elif type(value) is not _LEAVES[field.part]:
        raise unknown("a tree")


def _check_list(field: Field, value: Any) -> list[tuple[Part, Any]]:
    """Check the leaves in a nested list and return its other nodes."""
    below: list[tuple[Part, Any]] = []
    for each in _each(value, field.lists):
        if field.is_leaf:
            check_leaf(field, each)
        else:
            below.append((field.part, each))
    return below


def _each(value: Any, lists: int) -> Iterator[Any]:
    """What stands in lists that are nested `lists` deep."""
    if not lists:
        yield value
        return
    if not isinstance(value, list):
        raise unknown("a tree")
    for child in value:
        yield from _each(child, lists - 1)
