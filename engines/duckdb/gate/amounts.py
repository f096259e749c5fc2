"""How much a call multiplies something by, as far as its literals and parameters tell."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from engines.duckdb.gate import thresholds
from engines.duckdb.gate.functions import arguments_of
from engines.duckdb.gate.names import fold
from engines.duckdb.gate.refusals import rejected
from queryd.events import Parameter

_Node = dict[str, Any]

# Functions that make as much as one argument says, and which argument that is.
_SIZED = {
    "array_resize": 1,
    "bitstring": 1,
    "equi_width_bins": 2,
    "list_resize": 1,
    "lpad": 1,
    "repeat": 1,
    # The number of values in the sample. DuckDB allocates all of it at once.
    "reservoir_quantile": 2,
    "rpad": 1,
}
_DIVISIONS = frozenset({"/", "//", "%", "mod"})
_SERIES = frozenset({"generate_series", "range"})
_FORMATS = frozenset({"format", "printf"})

# A width in a format: eight digits are more than `MAX_AMPLIFICATION`.
_HUGE_WIDTH = re.compile(r"[%{][^a-zA-Z%{}]*\d{8}")

# A text that may be meant as a number wherever it stands; eight digits may be a date.
_HUGE_TEXT = re.compile(r"\s*\d{9,}\s*")

# No expression of numbers is looked at deeper than people write one.
_MAX_DEPTH = 32


def _power(base: float, exponent: float) -> float:
    try:
        raised = base**exponent
    except (OverflowError, ZeroDivisionError):
        return math.inf
    return raised if isinstance(raised, float) else math.inf


_ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right if right else 0,
    "//": lambda left, right: left // right if right else 0,
    "**": _power,
    "^": _power,
    "pow": _power,
    "power": _power,
    "<<": lambda left, right: _power(2, right) * left,
}


class Amounts:
    """Judges calls; `parameters` are the values that the statement is run with."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = {fold(name): value for name, value in parameters.items()}

    def judge(self, node: _Node) -> None:
        """Raises `QueryFailed` for a call that is told to make more than `MAX_AMPLIFICATION` rows or characters."""
        name, arguments = fold(node["function_name"]), arguments_of(node)
        if name in _SERIES:
            made = self._series(arguments)
        elif name in _SIZED:
            made = self._sized(node, 0)
        elif name in _FORMATS and _is_huge_format(arguments):
            made = math.inf
        else:
            return
        if made > thresholds.MAX_AMPLIFICATION:
            raise rejected(f"it makes more than {thresholds.MAX_AMPLIFICATION:,} rows or characters out of one call")

    def judge_offset(self, window: _Node) -> None:
        """Raises `QueryFailed` if LEAD or LAG without PARTITION BY and ORDER BY has an unbounded offset.

        In such a window the smallest BIGINT as an offset crashes the process (DuckDB 1.5.5), even if it is computed.
        """
        if "offset_expr" not in window or window.get("partitions") or window.get("orders"):
            return
        offset = self._number(window["offset_expr"], 0)
        if offset is None:
            raise rejected("LEAD or LAG without ORDER BY has an offset that is no number")
        if abs(offset) > thresholds.MAX_AMPLIFICATION:
            raise rejected(f"LEAD or LAG reaches over more than {thresholds.MAX_AMPLIFICATION:,} rows")

    def _series(self, arguments: list[_Node]) -> float:
        """How long a series is; where not all of it is told, it may be as long as its largest number."""
        numbers = [self._number(argument, 0) for argument in arguments]
        if not numbers or None in numbers:
            return max(map(self._amount, arguments), default=0)
        told = [number for number in numbers if number is not None]
        start, stop = (0.0, told[0]) if len(told) == 1 else (told[0], told[1])
        step = told[2] if len(told) > 2 else 1.0
        return abs(stop - start) / abs(step) if step else 0

    def _sized(self, node: _Node, depth: int) -> float:
        """What a sized call makes: as much as is said, times what it is made of, which may be such a call again."""
        name, arguments = fold(node["function_name"]), arguments_of(node)
        place = _SIZED[name]
        amount = self._amount(arguments[place]) if len(arguments) > place else 0
        if name != "repeat" or not arguments or depth == _MAX_DEPTH:
            return amount
        return amount * self._length(arguments[0], depth + 1)

    def _amount(self, node: _Node) -> float:
        """The number that an expression is, or else the largest that stands in it."""
        number = self._number(node, 0)
        return self._largest(node) if number is None else abs(number)

    def _largest(self, node: _Node) -> float:
        """The largest number that stands in an expression. A text is one where it is cast to a number, or long enough;
        what something is divided by makes nothing larger."""
        largest, ahead = 0.0, [node]
        while ahead:
            value: Any = ahead.pop()
            if isinstance(value, list):
                ahead += value
            elif isinstance(value, dict):
                number = self._told(value)
                if number is not None:
                    largest = max(largest, abs(number))
                elif value.get("function_name") in _DIVISIONS:
                    ahead += value.get("children", [])[:1]
                else:
                    ahead += (child for field, child in value.items() if field not in ("cast_type", "value"))
        return largest

    def _told(self, node: _Node) -> float | None:
        """The number that a node is by itself, if it is an expression that tells one."""
        if "class" not in node or (_is_text(node) and not _HUGE_TEXT.fullmatch(node["value"]["value"])):
            return None
        return self._number(node, 0)

    def _length(self, node: _Node, depth: int) -> float:
        if node.get("class") == "CONSTANT":
            literal = node["value"].get("value")
            return len(literal) if isinstance(literal, str) else 1
        if node.get("class") == "FUNCTION" and fold(node["function_name"]) in _SIZED:
            return self._sized(node, depth)
        return 1

    def _number(self, node: _Node, depth: int) -> float | None:
        """The number that an expression of literals and parameters is; None for anything else."""
        if depth == _MAX_DEPTH:
            return None
        match node.get("class"):
            case "CONSTANT":
                return _literal(node["value"])
            case "PARAMETER":
                return _as_number(self._parameters.get(fold(node["identifier"])))
            case "CAST":
                return self._number(node["child"], depth + 1)
            case "FUNCTION":
                return self._computed(node, depth + 1)
            case _:
                return None

    def _computed(self, node: _Node, depth: int) -> float | None:
        numbers = [self._number(argument, depth) for argument in node.get("children", [])]
        compute = _ARITHMETIC.get(fold(node["function_name"]))
        match numbers:
            case [float(number)] if node["function_name"] == "-":
                return -number
            case [float(left), float(right)] if compute is not None:
                return compute(left, right)
            case _:
                return None


def _literal(value: _Node) -> float | None:
    literal = value.get("value")
    if isinstance(literal, dict):
        # A HUGEINT, in two halves of 64 bits.
        upper, lower = literal.get("upper"), literal.get("lower")
        return upper * 2.0**64 + lower if isinstance(upper, int) and isinstance(lower, int) else None
    number = _as_number(literal)
    scale = value["type"].get("type_info", {}).get("scale", 0)
    return None if number is None else number / 10.0**scale


def _is_text(node: _Node) -> bool:
    return node.get("class") == "CONSTANT" and isinstance(node["value"].get("value"), str)


def _as_number(value: Parameter | Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _is_huge_format(node: Any) -> bool:
    """Whether a width of that size stands in a format, or in what makes one."""
    if isinstance(node, list):
        return any(map(_is_huge_format, node))
    if not isinstance(node, dict):
        return False
    if _is_text(node):
        return _HUGE_WIDTH.search(node["value"]["value"]) is not None
    return any(map(_is_huge_format, node.values()))
