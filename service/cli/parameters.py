"""A query's parameters on the command line: guessed by JSON's rules, or text."""

import json
import math
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from queryd.events import Parameter
from service.cli.output import complain

Param = Annotated[
    list[str] | None,
    typer.Option(
        help='name=value. What JSON reads as a number, true, false, null or "text" is that (94105, 1e5 and 1.10 are '
        "numbers); everything else is text, NaN and Infinity too. For text in any case: --param-text."
    ),
]
ParamText = Annotated[list[str] | None, typer.Option(help="name=value; the value is text, whatever it looks like.")]


def read_parameters(guessed: Iterable[str], texts: Iterable[str]) -> dict[str, Parameter]:
    """The parameters of both options; exits with 2 for one that is given twice."""
    parameters: dict[str, Parameter] = {}
    given: list[tuple[str, str, Callable[[str, str], Parameter]]]
    given = [(*_split(each, "--param"), _guess) for each in guessed]
    given += [(*_split(each, "--param-text"), _as_text) for each in texts]
    for name, value, read in given:
        if name in parameters:
            complain(f"the parameter {name} is given twice", 2)
        parameters[name] = read(name, value)
    return parameters


def _split(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        complain(f"{option} wants name=value", 2)
    return name, value


def _as_text(_name: str, value: str) -> str:
    return value


def _guess(name: str, value: str) -> Parameter:
    """Only what a parameter may be: a JSON list or object was meant as text, and so was a number that is none."""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(parsed, float) and not math.isfinite(parsed):
        return value
    if isinstance(parsed, int) and not -(2**63) <= parsed < 2**63:
        complain(f"--param {name}: an integer must fit in 64 bits; --param-text {name}=… sends text", 2)
    return parsed if parsed is None or isinstance(parsed, bool | int | float | str) else value
