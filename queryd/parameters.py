"""Convert a query's parameters to the schema's types: null, boolean, 64-bit integer, double and text.

Other SQL values are sent as text that DuckDB casts exactly; the query names the type: `CAST($day AS DATE)`. A value
without such a text is an error that names the parameter.
"""

from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from queryd.events import Invalid, Parameter

# The values that a caller may give, and numpy's scalars of these kinds.
ParameterValue = None | bool | int | float | str | date | datetime | time | timedelta | Decimal | UUID

_LONG = range(-(2**63), 2**63)
# DuckDB's widest DECIMAL.
_DECIMAL_DIGITS = 38
_MAY_BE = "it may be None, bool, int, float, str, date, datetime, time, timedelta, Decimal, UUID or a numpy number"


def to_wire(parameters: object) -> dict[str, Parameter]:
    """Convert a request's parameters; the names have no `$`.

    Raises `Invalid`. The error names the parameter and the allowed types, never the value.
    """
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise Invalid('parameters must map names to values: parameters={"name": value} binds $name')
    return {_check_name(name): _convert(name, value) for name, value in parameters.items()}


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise Invalid("parameter names must be text: 'name' binds $name")
    if name.startswith("$"):
        raise Invalid(f"the name of the parameter {name!r} must not start with $: use {name.lstrip('$')!r}")
    return name


def _convert(name: str, value: object) -> Parameter:
    value = _from_numpy(name, value)
    if value is None or isinstance(value, bool):
        return value
    # Convert subclasses of text and numbers, such as enum members, to the plain type.
    if isinstance(value, str):
        return _check_text(name, str.__str__(value))
    if isinstance(value, int):
        return _check_long(name, int(value))
    if isinstance(value, float):
        return float(value)
    for kind, write in _WRITERS:
        if isinstance(value, kind):
            return write(name, value)
    raise _refuse(name, f"is a {type(value).__name__}: {_advise(name, value)}")


def _from_numpy(name: str, value: object) -> object:
    """Convert a numpy scalar to a Python value. The module's name identifies it, since numpy is no dependency."""
    # Arrays and texts have a length; scalars do not.
    if type(value).__module__ != "numpy" or not hasattr(value, "item") or hasattr(value, "__len__"):
        return value
    kind = type(value).__name__
    if kind in ("datetime64", "timedelta64"):
        # `item()` returns an integer if the unit is finer than a microsecond.
        raise _refuse(name, f"is a numpy.{kind}: convert it, value.astype('{kind}[us]').item()")
    converted = value.item()
    if type(converted) is type(value):
        raise _refuse(name, f"is a numpy.{kind}, which is wider than a double: give a float or a Decimal")
    return converted


def _check_text(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refuse(name, "is text that can't be encoded as UTF-8: it contains a lone surrogate") from None
    return text


def _check_long(name: str, number: int) -> int:
    if number not in _LONG:
        raise _refuse(name, f"must fit in 64 bits: give it as text, str(n), and write CAST(${name} AS HUGEINT)")
    return number


def _write_moment(name: str, moment: datetime) -> str:
    # pandas' NaT is a datetime that is not equal to itself.
    if moment != moment:  # noqa: PLR0124
        raise _refuse(name, "is NaT: give None for an unknown time")
    if getattr(moment, "nanosecond", 0):
        raise _refuse(name, "has nanoseconds: round it to microseconds, or give text and cast it to TIMESTAMP_NS")
    return datetime.isoformat(moment, sep=" ")


def _write_interval(_name: str, span: timedelta) -> str:
    return f"{span // timedelta(microseconds=1)} microseconds"


def _write_decimal(name: str, number: Decimal) -> str:
    if not number.is_finite():
        raise _refuse(name, "is not a finite Decimal: give a float")
    _, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    if max(len(digits) + max(exponent, 0), -exponent) > _DECIMAL_DIGITS:
        raise _refuse(name, f"must have at most {_DECIMAL_DIGITS} digits, or be a float")
    return format(number, "f")


# datetime is a subclass of date, so it comes first.
_WRITERS: tuple[tuple[type, Callable[[str, Any], str]], ...] = (
    (datetime, _write_moment),
    (date, lambda _name, day: date.isoformat(day)),
    (time, lambda _name, clock: time.isoformat(clock)),
    (timedelta, _write_interval),
    (Decimal, _write_decimal),
    (UUID, lambda _name, value: str(value)),
)


def _advise(name: str, value: object) -> str:
    match value:
        case bytes() | bytearray() | memoryview():
            return f"give base64 text, and write from_base64(${name})"
        case list() | tuple() | set() | frozenset():
            return f"give json.dumps(list(value)), and write CAST(${name} AS BIGINT[]), or another type of list"
        case dict():
            return f"give json.dumps(value), and write CAST(${name} AS JSON)"
        case complex():
            return "give its parts"
        case _:
            return _MAY_BE


def _refuse(name: str, sentence: str) -> Invalid:
    return Invalid(f"parameter {name} {sentence}")
