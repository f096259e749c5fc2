"""Writing a judged statement's result to a file by `COPY`, every value exactly or not at all.

CSV: header, lines end in CR LF, NULL is an empty field without quotes and the empty string is `""`. So in a file of one
column a NULL is an empty line, which some readers skip: ask for such results in another format.
JSON: one object per line, which a strict parser accepts.
docs/results.md lists how each type is written. In all formats repeated names get `_1`, `_2` and so on.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb

from engines.duckdb.columns import Naming, ResultColumn, read_columns, redact_columns
from engines.duckdb.json_lines import write_json, write_json_row
from engines.duckdb.parquet_values import LAST_MOMENT, WHOLE_NUMBER, write_parquet
from engines.duckdb.sql_text import literal, quote
from engines.duckdb.statement import StatementFailed, Wrapped
from engines.duckdb.watch import Limits
from engines.protocol import QueryFailed
from queryd.column_types import ColumnType
from queryd.events import Column, ErrorCode, OutputFormat, Parameter

_COPY_OPTIONS = {
    # In Parquet version 2 DuckDB writes INT32 deltas of up to 33 bits, which Arrow can't read.
    OutputFormat.PARQUET: "FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v1",
    OutputFormat.CSV: r"FORMAT csv, HEADER, NULLSTR '', NEW_LINE '\r\n'",
    # The lines are JSON already. JSON never contains the delimiter, so COPY quotes nothing.
    OutputFormat.JSON: r"FORMAT csv, HEADER false, QUOTE '', ESCAPE '', DELIMITER E'\x01', NEW_LINE '\n'",
}

_NOTHING_WRITTEN = Naming()

# A repeated statement, such as a saved query, is planned for its column types once.
_MAX_PLANS = 64
_MAX_PLANNED_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True)
class Exported:
    """A written file: its rows, its size in bytes and its columns as an event may name them.

    `bytes_read` is what DuckDB has fetched from files for it; what lay in its cache, and what Postgres sent, is not in.
    """

    rows: int
    bytes: int
    columns: tuple[Column, ...]
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a statement's result is written: its columns in the file and for the event, and the SELECT to export."""

    columns: list[ResultColumn]
    told: tuple[Column, ...]
    source: Wrapped


class Plans:
    """The plans of statements over one set of views, the least recently used go first.

    `clear` it when a view changes. Values of parameters are part of the key, since they decide their types.
    """

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[str, str, OutputFormat], Plan] = OrderedDict()

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()

    def find(
        self, text: str, parameters: dict[str, Parameter], output_format: OutputFormat, make: Callable[[], Plan]
    ) -> Plan:
        """Return the statement's plan, made by `make` if it is not known."""
        values = json.dumps(parameters, sort_keys=True)
        if len(text) + len(values) > _MAX_PLANNED_CHARACTERS:
            return make()
        key = (text, values, output_format)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = make()
            if len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan


def export(
    connection: duckdb.DuckDBPyConnection,
    text: str,
    parameters: dict[str, Parameter],
    target: Path,
    output_format: OutputFormat,
    *,
    max_rows: int | None,
    limits: Limits,
    naming: Naming = _NOTHING_WRITTEN,
    plans: Plans | None = None,
) -> Exported:
    """Run a judged statement and write its rows to `target`, in its own order.

    `text` must have passed the gate: this function puts it between brackets, on separate lines. Raises `QueryFailed`
    with RESULT_TOO_LARGE or SCAN_LIMIT_EXCEEDED above a limit, or with QUERY_ERROR for a value that the format can't
    store; and `StatementFailed`. `target` may then hold a part of the result. `plans` are those of the connection.
    """
    values = parameters or None

    def make_plan() -> Plan:
        columns = read_columns(Wrapped("(\n", text, "\n)").describe(connection, values))
        told = redact_columns(columns, naming, output_format)
        return Plan(columns, told, _write_exactly(text, columns, output_format))

    # The columns of a PIVOT depend on its data.
    known = Plans() if plans is None or naming.has_pivot else plans
    plan = known.find(text, parameters, output_format, make_plan)
    copy = plan.source.at_most(max_rows).within(
        "COPY (", f") TO {literal(str(target))} ({_COPY_OPTIONS[output_format]})"
    )
    try:
        [[counted, *_]] = copy.run(connection, values)
    except StatementFailed as failed:
        raise _find_refusal(failed.error, plan.columns, output_format) or failed from None
    rows, size, read = int(str(counted)), target.stat().st_size, _bytes_read(connection)
    if max_rows is not None and rows > max_rows:
        raise QueryFailed(ErrorCode.RESULT_TOO_LARGE, f"The result has more than {max_rows} rows.")
    limits.judge_written(size)
    limits.judge_scanned(read)
    return Exported(rows, size, plan.told, read)


def _bytes_read(connection: duckdb.DuckDBPyConnection) -> int:
    """What the connection's last statement has read, by its profile."""
    return int(json.loads(connection.get_profiling_information(format="json"))["total_bytes_read"])


def _write_exactly(text: str, columns: list[ResultColumn], output_format: OutputFormat) -> Wrapped:
    """Wrap the statement if its names are not unique or the format can't store its values as they are."""
    places = [f"c{number}" for number in range(len(columns))]
    names = [column.name for column in columns]
    if output_format is OutputFormat.JSON:
        listed = write_json_row(list(zip(places, names, (column.type for column in columns), strict=True)))
    else:
        write = _write_in_csv if output_format is OutputFormat.CSV else write_parquet
        written = [write(place, column.type) for place, column in zip(places, columns, strict=True)]
        if written == places and names == [column.own_name for column in columns]:
            return Wrapped("\n", text, "\n")
        listed = ", ".join(f"{expression} AS {quote(name)}" for expression, name in zip(written, names, strict=True))
    return Wrapped(f"SELECT {listed} FROM (\n", text, f"\n) AS result({', '.join(places)})")  # noqa: S608 - judged by the gate


def _write_in_csv(place: str, type_: ColumnType) -> str:
    """Write nested values as JSON: in DuckDB's own text different nested values may look alike."""
    return write_json(place, type_) if type_.is_nested else place


def _find_refusal(error: Exception, columns: list[ResultColumn], output_format: OutputFormat) -> QueryFailed | None:
    """The error to report if queryd's own expression met a value that the format can't store."""
    if output_format is not OutputFormat.PARQUET:
        return None
    has_whole_numbers = any(column.type.holds("HUGEINT", "UHUGEINT") for column in columns)
    # If the statement itself casts to that type, its error has the same text for the same value.
    if has_whole_numbers and isinstance(error, duckdb.ConversionException) and f"to {WHOLE_NUMBER}" in str(error):
        return QueryFailed(
            ErrorCode.QUERY_ERROR,
            "A whole number has more than 38 digits: cast to VARCHAR, or ask for csv or json instead of parquet.",
        )
    if LAST_MOMENT in str(error):
        return QueryFailed(
            ErrorCode.QUERY_ERROR,
            "A time is 24:00:00, which Parquet doesn't have: cast to VARCHAR, or ask for csv or json.",
        )
    return None
