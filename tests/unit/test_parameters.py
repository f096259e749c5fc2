"""Python values bind with the right type in DuckDB; errors name the unsupported parameter."""

import enum
import importlib
import math
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import duckdb
import numpy as np
import pytest

from queryd.codec import decode_request, encode
from queryd.events import Invalid
from queryd.parameters import to_wire
from queryd.requests import make_request
from tests.unit.samples import ORG_ID

_BERN = timezone(timedelta(hours=5, minutes=45))
# It comes without types.
pd: Any = importlib.import_module("pandas")
_SECRET = "canary4711"


class _Shop(enum.StrEnum):
    BERN = "bern"


class _Number(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    ("value", "wire"),
    [
        (None, None),
        (True, True),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (1.5, 1.5),
        (math.inf, math.inf),
        ("94105", "94105"),
        (_Shop.BERN, "bern"),
        (_Number.TWO, 2),
        (np.bool_(True), True),
        (np.int8(-3), -3),
        (np.uint64(7), 7),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.str_("x"), "x"),
    ],
)
def test_a_value_with_a_schema_type_is_sent_unchanged(value: Any, wire: object) -> None:
    request = make_request("SELECT $p", org_id=ORG_ID, parameters={"p": value})
    arrived = decode_request(encode(request)).parameters["p"]
    assert (arrived, type(arrived)) == (wire, type(wire))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (date(2020, 1, 31), "DATE"),
        (date(1, 1, 1), "DATE"),
        (datetime(2020, 1, 31, 23, 59, 59, 999_999), "TIMESTAMP"),
        (datetime(9999, 12, 31), "TIMESTAMP"),
        (pd.Timestamp("2020-01-31 10:00:00.000001"), "TIMESTAMP"),
        (time(12, 30, 0, 1), "TIME"),
        (timedelta(days=-1, microseconds=1), "INTERVAL"),
        (timedelta(days=400, seconds=7), "INTERVAL"),
        (Decimal("1234567890123456789012345678.1234567890"), "DECIMAL(38, 10)"),
        (Decimal("-1E+5"), "DECIMAL(38, 10)"),
        (Decimal("1E-10"), "DECIMAL(38, 10)"),
        (UUID("6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"), "UUID"),
    ],
)
def test_a_value_without_a_schema_type_is_exact_after_the_cast(value: object, kind: str) -> None:
    text = to_wire({"p": value})["p"]
    assert isinstance(text, str)
    assert _ask(f"SELECT CAST($p AS {kind})", text) == value


def test_a_moment_with_an_offset_is_the_same_moment_after_the_cast() -> None:
    for moment in (datetime(2020, 1, 31, 1, 0, tzinfo=_BERN), datetime(2020, 1, 31, 1, 0, 0, 7, UTC)):
        text = to_wire({"p": moment})["p"]
        micros = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        assert _ask("SELECT epoch_us(CAST($p AS TIMESTAMPTZ))", text) == micros


def test_a_date_and_a_decimal_compare_with_a_column_of_their_type_without_a_cast() -> None:
    wire = to_wire({"day": date(2020, 1, 31), "price": Decimal("10.25")})
    assert _ask("SELECT d = $p FROM (SELECT DATE '2020-01-31' AS d)", wire["day"]) is True
    # As text 9.5 would be the larger one.
    assert _ask("SELECT d < $p FROM (SELECT CAST(9.5 AS DECIMAL(9, 2)) AS d)", wire["price"]) is True


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (2**63, "CAST($limit AS HUGEINT)"),
        (-(2**63) - 1, "64 bits"),
        (np.uint64(2**64 - 1), "64 bits"),
        ([_SECRET], "json.dumps(list(value))"),
        ((1, 2), "json.dumps(list(value))"),
        ({1}, "json.dumps(list(value))"),
        ({"a": _SECRET}, "CAST($limit AS JSON)"),
        (_SECRET.encode(), "from_base64($limit)"),
        (bytearray(b"x"), "from_base64($limit)"),
        (1j, "parts"),
        (object(), "it may be None, bool, int"),
        (lambda: None, "it may be None, bool, int"),
        (np.array([1]), "it may be None, bool, int"),
        (np.datetime64("2020-01-01"), "astype"),
        (np.longdouble(1), "double"),
        (pd.NaT, "give None"),
        (pd.Timestamp("2020-01-01 00:00:00.000000001"), "nanoseconds"),
        (pd.NA, "it may be None, bool, int"),
        (Decimal("NaN"), "finite"),
        (Decimal("-Infinity"), "finite"),
        (Decimal(10) ** 38, "38 digits"),
        (Decimal("1E-39"), "38 digits"),
        (Decimal("1E+999999"), "38 digits"),
        (f"{_SECRET}\ud800", "UTF-8"),
    ],
)
def test_the_error_of_an_unsupported_parameter_has_its_name_and_not_its_value(value: Any, advice: str) -> None:
    with pytest.raises(Invalid, match=r"^parameter limit ") as refused:
        make_request("SELECT $limit", org_id=ORG_ID, parameters={"fine": 1, "limit": value})
    assert advice in str(refused.value)
    assert _SECRET not in str(refused.value)


@pytest.mark.parametrize("parameters", [["a"], "x=1", {1: 2}, {"": 1}, {"$x": 1}, {b"x": 1}])
def test_parameters_are_a_mapping_of_names(parameters: Any) -> None:
    with pytest.raises(Invalid, match="parameter"):
        make_request("SELECT $x", org_id=ORG_ID, parameters=parameters)


def _ask(sql: str, value: object) -> object:
    ask: Callable[..., Any] = duckdb.connect().execute
    row: tuple[object, ...] = ask(sql, {"p": value}).fetchone()
    return row[0]
