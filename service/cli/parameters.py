"""Read a query's parameters from the command line: typed by JSON's rules, or as text."""

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
        help='name=value. A JSON number, true, false, null or "text" has its JSON type (94105, 1e5, 1.10: numbers). '
        "Every other value is text, including NaN and Infinity. --param-text always sends text."
    ),
]
ParamText = Annotated[list[str] | None, typer.Option(help="name=value; the value is always text.")]


def read_parameters(guessed: Iterable[str], texts: Iterable[str]) -> dict[str, Parameter]:
    """Merge the parameters of both options; exits with 2 if a name occurs twice."""
    parameters: dict[str, Parameter] = {}
    given: list[tuple[str, str, Callable[[str, str], Parameter]]]
    given = [(*split_pair(each, "--param must be name=value"), _guess) for each in guessed]
    given += [(*split_pair(each, "--param-text must be name=value"), _as_text) for each in texts]
    for name, value, read in given:
        if name in parameters:
            complain(f"the parameter {name} is given twice", 2)
        parameters[name] = read(name, value)
    return parameters


def split_pair(text: str, refusal: str) -> tuple[str, str]:
    """Split `name=value`; exits with 2 and the sentence `refusal` if it is no such pair."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        complain(refusal, 2)
    return name, value


def _as_text(_name: str, value: str) -> str:
    return value


def _guess(name: str, value: str) -> Parameter:
    """Read a JSON scalar. Lists, objects and NaN are no parameter types, so they are text."""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(parsed, float) and not math.isfinite(parsed):
        return value
    if isinstance(parsed, int) and not -(2**63) <= parsed < 2**63:
        complain(f"--param {name}: an integer must fit in 64 bits; --param-text {name}=… sends text", 2)
    return parsed if parsed is None or isinstance(parsed, bool | int | float | str) else value
