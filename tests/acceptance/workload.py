"""What the acceptance tests send: requests whose right answers are computed here, without any SQL engine.

Everything follows from a number, so that a run can be repeated; only the ids are new in every run.
"""

import random
import uuid
from collections.abc import Sequence
from decimal import Decimal
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.acceptance.checker import Cell, Malformed, Valid
from tests.acceptance.stranger import REQUEST_TOPICS, Contract, Outgoing, Place, cloud_event_headers

FORMATS = ("parquet", "csv", "json")
MODES = ("interactive", "batch")

_DATASET_ROWS = 5_000
_CARRIERS = ("AA", "B6", "DL", "EV", "UA")
_ORGS = 5


class Dataset:
    """A small table of flights: number, carrier, and a delay in minutes that is sometimes unknown."""

    def __init__(self, name: str) -> None:
        source = random.Random(name)
        self.name = name
        self.rows = [
            (number, source.choice(_CARRIERS), source.choice((None, *range(-20, 120))))
            for number in range(_DATASET_ROWS)
        ]

    def parquet(self) -> bytes:
        """The table as a Parquet file."""
        number, carrier, delay = zip(*self.rows, strict=True)
        table = pa.table(
            {
                "number": pa.array(number, pa.int64()),
                "carrier": pa.array(carrier, pa.string()),
                "delay": pa.array(delay, pa.int64()),
            }
        )
        file = BytesIO()
        pq.write_table(table, file)
        return file.getvalue()

    def late(self, over: int) -> tuple[str, tuple[str, ...], list[dict[str, Cell]]]:
        """SQL, columns and rows of: how many flights of each carrier were later than `over` minutes."""
        sql = (
            f"SELECT carrier, count(*) AS flights, sum(delay)::BIGINT AS minutes FROM {self.name} "
            f"WHERE delay > {over} GROUP BY carrier ORDER BY carrier"
        )
        rows: list[dict[str, Cell]] = []
        for carrier in _CARRIERS:
            delays = [delay for _, name, delay in self.rows if name == carrier and delay is not None and delay > over]
            if delays:
                rows.append({"carrier": carrier, "flights": len(delays), "minutes": sum(delays)})
        return sql, ("carrier", "flights", "minutes"), rows


def make_requests(count: int, dataset: Dataset, owner: str) -> list[Valid]:
    """`count` requests over both lanes and all formats; every third one reads the dataset of the org `owner`."""
    orgs = [owner, *(str(uuid.uuid4()) for _ in range(_ORGS - 1))]
    return [_make_request(number, dataset, orgs) for number in range(count)]


def _make_request(number: int, dataset: Dataset, orgs: Sequence[str]) -> Valid:
    org = orgs[number % len(orgs)]
    parameters: dict[str, Any] = {}
    rows: list[dict[str, Cell]]
    match number % 3:
        case 0:
            sql, columns, rows = _typed_row(number)
        case 1:
            org = orgs[0]
            sql, columns, rows = dataset.late(number % 90)
        case _ if number % 2:
            sql = "SELECT $number AS number, $label AS label"
            columns = ("number", "label")
            parameters = {"number": number, "label": f"Nº {number}"}
            rows = [parameters]
        case _:
            last = number % 40
            sql = f"SELECT i, i * {number} AS product FROM generate_series(0, {last}) AS t(i) ORDER BY i DESC"
            columns = ("i", "product")
            rows = [{"i": i, "product": i * number} for i in range(last, -1, -1)]
    # Each format meets each kind of query and each lane.
    fields = make_fields(
        org_id=org,
        mode=MODES[(number // 9) % 2],
        sql=sql,
        parameters=parameters,
        output_format=FORMATS[(number // 3) % 3],
    )
    return Valid(fields, columns, tuple(rows))


def _typed_row(number: int) -> tuple[str, tuple[str, ...], list[dict[str, Cell]]]:
    price = Decimal(number) / 100
    label = f'Zürich, "{number}"\nsecond line'
    even = number % 2 == 0
    sql = (
        f"SELECT {number}::BIGINT AS number, '{label}' AS label, {price:.2f}::DECIMAL(18,2) AS price, "
        f"{str(even).lower()} AS even, NULL::INTEGER AS nothing"
    )
    row: dict[str, Cell] = {
        "number": number,
        "label": label,
        "price": price.quantize(Decimal("0.01")),
        "even": even,
        "nothing": None,
    }
    return sql, tuple(row), [row]


def make_fields(mode: str = "interactive", **fields: Any) -> dict[str, Any]:
    """The fields of a request with ids of its own; a user asks interactively, a task in batch."""
    return {
        "query_id": str(uuid.uuid4()),
        "org_id": str(uuid.uuid4()),
        "user_id": str(uuid.uuid4()) if mode == "interactive" else None,
        "task_id": str(uuid.uuid4()) if mode == "batch" else None,
        "mode": mode,
        "output_format": "parquet",
    } | fields


def make_answer(mode: str = "interactive") -> Valid:
    """The smallest well-formed request."""
    return Valid(make_fields(mode, sql="SELECT 42 AS answer"), ("answer",), ({"answer": 42},))


def to_outgoing(contract: Contract, request: Valid, partition: int | None = None) -> Outgoing:
    """The request on its own lane's topic."""
    return Outgoing(
        REQUEST_TOPICS[request.fields["mode"]],
        request.query_id.encode(),
        contract.encode("QueryRequested", request.fields),
        cloud_event_headers("QueryRequested", request.query_id),
        partition,
    )


def make_garbage(contract: Contract, count: int) -> list[Outgoing]:
    """`count` undecodable records of several kinds, on both lanes, no two alike."""
    source = random.Random(count)
    garbage = []
    for number in range(count):
        whole = contract.encode("QueryRequested", make_fields(sql=f"SELECT {number}"))
        values = (
            source.randbytes(64 + number),
            whole[: 11 + number],
            b"\xc3\x01" + source.randbytes(8) + whole[10:],
            f'{{"query_id": "{number}"}}'.encode(),
        )
        garbage.append(
            Outgoing(
                REQUEST_TOPICS[MODES[number % 2]],
                f"garbage-{number}".encode(),
                values[number // 2 % len(values)],
                (("sent-by", str(number).encode()),),
            )
        )
    return garbage


def to_malformed(message: Outgoing, place: Place) -> Malformed:
    """What was sent and where it lies, as the checker wants it."""
    return Malformed(place, message.key, message.value, message.headers)
