"""A batch's rows reach the server as they are, whatever is in them."""

from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from db.rows import to_arrays


@dataclass(frozen=True, slots=True)
class _Row:
    text: str | None
    number: int | None
    seconds: float | None
    flag: bool | None
    payload: bytes | None
    moment: datetime | None
    headers: Jsonb | None


_TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_ODD = st.sampled_from(["", "NULL", "null", '"', "\\", "{", "}", ",", "\\x00", " a ", "\n"])
_ROWS = st.builds(
    _Row,
    text=st.none() | _ODD | _TEXTS,
    number=st.none() | st.integers(-(2**63), 2**63 - 1),
    seconds=st.none() | st.floats(allow_nan=False),
    flag=st.none() | st.booleans(),
    payload=st.none() | st.binary(max_size=20),
    moment=st.none() | st.datetimes(min_value=datetime(1, 1, 2), timezones=st.just(UTC)),
    headers=st.none() | st.dictionaries(_TEXTS, _TEXTS | _ODD, max_size=3).map(Jsonb),
)
_SELECT = """
SELECT * FROM unnest(
    %(text)s::text[], %(number)s::bigint[], %(seconds)s::float8[], %(flag)s::boolean[], %(payload)s::bytea[],
    %(moment)s::timestamptz[], %(headers)s::jsonb[]
)
"""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_ROWS, max_size=5))
def test_rows_arrive_as_they_were(data_url: str, rows: list[_Row]) -> None:
    with psycopg.connect(data_url, options="-c timezone=UTC") as connection:
        received = connection.execute(_SELECT, to_arrays(_Row, rows)).fetchall()
    assert received == [
        (row.text, row.number, row.seconds, row.flag, row.payload, row.moment, row.headers and row.headers.obj)
        for row in rows
    ]


def test_text_that_postgres_cannot_store_is_an_error_of_data(data_url: str) -> None:
    row = _Row("a\0b", None, None, None, None, None, None)
    with psycopg.connect(data_url) as connection, pytest.raises(psycopg.DataError):
        connection.execute(_SELECT, to_arrays(_Row, [row]))
