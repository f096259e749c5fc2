"""One case: a statement with values that are known, written by the product in each format and read back by others."""

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from engines.duckdb.columns import Naming
from engines.duckdb.export import Exported, export
from engines.duckdb.statement import StatementFailed
from engines.duckdb.watch import Limits
from engines.protocol import QueryFailed
from queryd import tables
from queryd.errors import ResultUnreadable
from queryd.events import ErrorCode, OutputFormat
from tests.result_values import kinds
from tests.result_values.kinds import INFINITY, INTEGERS, NEGATIVE_INFINITY, TIMESTAMPS, Kind
from tests.unit.samples import make_status

_WIDE = 250
_WIDE_SHARE = 0.01
_REFUSAL = re.compile(r"A (whole number has more than 38 digits|time is 24:00:00)[^.]*: cast to VARCHAR[^.]*\.")
_HUGE = 10**38
_LAST_MOMENT = 86_400 * 10**6
# Whose Arrow tables have texts for UUIDs, and microseconds for milliseconds.
_DUCKDB = "DuckDB"


@dataclass(frozen=True, slots=True)
class Case:
    """Columns with their names and types, and rows of values."""

    number: int
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    rows: tuple[tuple[Any, ...], ...]
    sql: str


def make_case(seed: int, number: int) -> Case:
    """The case of that number: the same for the same seed."""
    rng = random.Random(f"{seed}/{number}")
    is_wide = rng.random() < _WIDE_SHARE
    count = _WIDE if is_wide else rng.randint(1, 4)
    made = tuple(
        kinds.make_scalar(rng, rng.choice(("VARCHAR", "INTEGER", "DATE", "ENUM"))) if is_wide else kinds.make_kind(rng)
        for _ in range(count)
    )
    names = tuple(kinds.make_names(rng, count, unique=False))
    rows = tuple(tuple(kinds.make_value(rng, kind) for kind in made) for _ in range(rng.choice((0, 1, 1, 2, 3))))
    # No rows are written as one that is left out.
    written = rows or (tuple(None for _ in made),)
    listed = ",\n".join(
        f"({', '.join(kinds.write_sql(rng, kind, value) for kind, value in zip(made, row, strict=True))})"
        for row in written
    )
    aliases = ", ".join(f"v{place} AS {kinds.quote(name)}" for place, name in enumerate(names))
    places = ", ".join(f"v{place}" for place in range(count))
    sql = f"SELECT {aliases} FROM (VALUES {listed}) AS t({places})" + ("" if rows else " WHERE false")
    return Case(number, names, made, rows, sql)


def open_database() -> duckdb.DuckDBPyConnection:
    """As an instance of the engine's is."""
    connection = duckdb.connect(":memory:", config={"threads": 1})
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_profiling = 'no_output'")
    connection.execute("SET profiling_coverage = 'ALL'")
    connection.execute("""SET custom_profiling_settings = '{"TOTAL_BYTES_READ": "true"}'""")
    return connection


class Checker:
    """Runs cases on a database of its own, with files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._connection = open_database()
        self._folder = folder

    def find(self, case: Case, output_formats: Iterable[OutputFormat] = tuple(OutputFormat)) -> list[str]:
        """What is wrong with the case, if anything is."""
        return [f"{each.value}: {finding}" for each in output_formats for finding in self._find(case, each)]

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _find(self, case: Case, output_format: OutputFormat) -> Iterator[str]:
        target = self._folder / f"result.{output_format}"
        naming = Naming(frozenset(case.names))
        limits = Limits(None, None)
        try:
            exported = export(
                self._connection, case.sql, {}, target, output_format, max_rows=None, limits=limits, naming=naming
            )
        except QueryFailed as refused:
            if not _may_refuse(case, output_format) or refused.code is not ErrorCode.QUERY_ERROR:
                yield f"refused: {refused.message}"
            elif not _REFUSAL.fullmatch(refused.message):
                yield f"refused with {refused.message!r}"
            return
        except StatementFailed as failed:
            yield f"failed: {failed.error}"
            return
        if _may_refuse(case, output_format):
            yield "written, though the format can't hold it"
            return
        if exported.rows != len(case.rows):
            yield f"{exported.rows} rows"
        try:
            match output_format:
                case OutputFormat.PARQUET:
                    yield from self._judge_parquet(case, exported, target)
                case OutputFormat.CSV:
                    yield from self._judge_csv(case, exported, target)
                case OutputFormat.JSON:
                    yield from _judge_json(case, exported, target)
            yield from self._judge_client(case, exported, target, output_format)
        except (ValueError, LookupError, TypeError, OSError, pa.ArrowException, duckdb.Error) as error:
            yield f"unreadable: {type(error).__name__}: {error}"

    def _judge_parquet(self, case: Case, exported: Exported, target: Path) -> Iterator[str]:
        yield from _judge_table(case, exported, pq.read_table(target), OutputFormat.PARQUET, "pyarrow")
        table = self._connection.execute(f"FROM read_parquet({kinds.literal(str(target))})").to_arrow_table()
        yield from _judge_table(case, exported, table, OutputFormat.PARQUET, _DUCKDB)

    def _judge_csv(self, case: Case, exported: Exported, target: Path) -> Iterator[str]:
        with target.open(newline="", encoding="utf-8") as file:
            read = list(csv.reader(file))
        names, rows = read[0], read[1:]
        yield from _judge_names(case, exported, names)
        # Python's reader takes the NULL of a file of one column for no field.
        rows = [row or [""] for row in rows]
        if len(rows) != len(case.rows):
            yield f"{len(rows)} rows for Python's csv"
            return
        for place, kind in enumerate(case.kinds):
            for row, own in zip(rows, case.rows, strict=True):
                if kind.parts:
                    if not _is_json_of(kind, own[place], row[place] or None):
                        yield f"column {place}, {kind.name}: {own[place]!r} is {row[place]!r} in Python's csv"
                elif _is_plain(kind) and row[place] != (
                    "" if own[place] is None else kinds.write_text(kind, own[place])
                ):
                    yield f"column {place}: {own[place]!r} is {row[place]!r} in Python's csv"
        yield from self._cast_back(case, target)

    def _cast_back(self, case: Case, target: Path) -> Iterator[str]:
        """What DuckDB makes of the texts again is what they were made of."""
        # The text of a long interval is none that DuckDB takes.
        places = [place for place, kind in enumerate(case.kinds) if not kind.parts and kind.name != "INTERVAL"]
        if not case.rows or not places:
            return
        listed = ", ".join(
            f"TRY_CAST(r.c{place} AS {case.kinds[place].text}) IS NOT DISTINCT FROM o.c{place}" for place in places
        )
        columns = ", ".join(f"c{place}" for place in range(len(case.names)))
        texts = ", ".join(f"c{place}: 'VARCHAR'" for place in range(len(case.names)))
        read = (
            f"read_csv({kinds.literal(str(target))}, auto_detect = false, header = true, columns = {{{texts}}},"
            " delim = ',', quote = '\"', escape = '\"', new_line = '\\r\\n', nullstr = '', allow_quoted_nulls = false)"
        )
        numbered = "SELECT row_number() OVER () AS n, * FROM"
        answers = self._connection.execute(
            f"SELECT {listed} FROM ({numbered} {read}) AS r"
            f" JOIN ({numbered} ({case.sql}) AS t({columns})) AS o USING (n)"
        ).fetchall()
        if len(answers) != len(case.rows):
            yield f"{len(answers)} rows for DuckDB's read_csv"
        for answer in answers:
            for place, is_same in zip(places, answer, strict=True):
                if not is_same:
                    yield f"column {place}, {case.kinds[place].name}, is another value when DuckDB reads the csv"

    def _judge_client(self, case: Case, exported: Exported, target: Path, output_format: OutputFormat) -> Iterator[str]:
        event = make_status(output_format=output_format, columns=exported.columns)
        try:
            table = tables.open_batches(io.BytesIO(target.read_bytes()), event).read_all()
        except ResultUnreadable as unreadable:
            yield f"unreadable by the client: {unreadable.__cause__ or unreadable.__context__ or unreadable}"
            return
        yield from _judge_table(case, exported, table, output_format, "the client")


def _is_plain(kind: Kind) -> bool:
    """Whether its text is told here without DuckDB's help."""
    others = {"LIST", "ARRAY", "STRUCT", "UNION", "MAP", "FLOAT", "DOUBLE", "DECIMAL", "DATE", "BLOB", *TIMESTAMPS}
    return kind.name not in others


def _may_refuse(case: Case, output_format: OutputFormat) -> bool:
    """Whether the format can't hold a value of the case."""
    return output_format is OutputFormat.PARQUET and any(
        _has_no_place(kind, value) for row in case.rows for kind, value in zip(case.kinds, row, strict=True)
    )


def _has_no_place(kind: Kind, value: Any) -> bool:
    if value is None:
        return False
    if kind.name in ("HUGEINT", "UHUGEINT"):
        return bool(abs(value) >= _HUGE)
    if kind.name == "TIME":
        return bool(value == _LAST_MOMENT)
    return any(_has_no_place(part, each) for part, each in _pair(kind, value))


def _pair(kind: Kind, value: Any) -> list[tuple[Kind, Any]]:
    """A value's parts with their types."""
    match kind.name:
        case "LIST" | "ARRAY":
            return [(kind.parts[0][1], part) for part in value]
        case "STRUCT":
            return [(part, each) for (_, part), each in zip(kind.parts, value, strict=True)]
        case "UNION":
            return [(dict(kind.parts)[value[0]], value[1])]
        case "MAP":
            return [(part, each) for entry in value for (_, part), each in zip(kind.parts, entry, strict=True)]
        case _:
            return []


def _judge_names(case: Case, exported: Exported, names: Sequence[str]) -> Iterator[str]:
    if [column.name for column in exported.columns] != list(names):
        yield f"names {names} are told as {[column.name for column in exported.columns]}"
    if len({name.lower() for name in names}) != len(names):
        yield f"names {names} collide"
    if any(not name.startswith(own) for name, own in zip(names, case.names, strict=True)):
        yield f"names {names} are not those of the SQL"


def _judge_table(
    case: Case,
    exported: Exported,
    table: pa.Table,
    output_format: OutputFormat,
    reader: str,
) -> Iterator[str]:
    yield from _judge_names(case, exported, table.schema.names)
    if table.num_rows != len(case.rows):
        yield f"{table.num_rows} rows for {reader}"
        return
    for place, kind in enumerate(case.kinds):
        values = [part for chunk in table.column(place).chunks for part in _to_values(chunk)]
        for value, row in zip(values, case.rows, strict=True):
            if output_format is OutputFormat.CSV and kind.parts:
                is_right, expected = _is_json_of(kind, row[place], value), "its JSON"
            else:
                expected = _expect(kind, row[place], "" if reader == _DUCKDB else output_format)
                is_right = _is_same(value, expected)
            if not is_right:
                yield f"column {place}, {kind.name}: {row[place]!r} is {value!r} for {reader}, not {expected!r}"


def _is_same(value: Any, expected: Any) -> bool:
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_is_same, value, expected))
    if isinstance(value, float) and isinstance(expected, float):
        return repr(value) == repr(expected)
    return type(value) in (type(expected), Decimal) and value == expected


def _expect(kind: Kind, value: Any, output_format: str) -> Any:
    """The value as an Arrow table holds it: moments as numbers, structs and a map's entries as lists.

    An empty format is that of the table that DuckDB makes of a Parquet file.
    """
    if value is None:
        return None
    match kind.name:
        case "LIST" | "ARRAY" | "STRUCT":
            return [_expect(part, each, output_format) for part, each in _pair(kind, value)]
        case "MAP":
            (_, key), (_, item) = kind.parts
            return [[_expect(key, each, output_format), _expect(item, part, output_format)] for each, part in value]
        case "UNION":
            members = [
                _expect(part, value[1], output_format) if name == value[0] else None for name, part in kind.parts
            ]
            return [value[0], *members]
        case "DATE":
            return {INFINITY: 2**31 - 1, NEGATIVE_INFINITY: -(2**31 - 1)}.get(value, value)
        case name if name in TIMESTAMPS:
            factor = {"TIMESTAMP_S": 10**6, "TIMESTAMP_MS": 1 if output_format else 10**3}.get(name, 1)
            return {INFINITY: 2**63 - 1, NEGATIVE_INFINITY: -(2**63 - 1)}.get(value) or value * factor
        case "TIME" if output_format in (OutputFormat.PARQUET, ""):
            return value
        case "JSON" if output_format == OutputFormat.JSON:
            return None if value[1] == "null" else value[1]
        case "UUID" if output_format == OutputFormat.PARQUET:
            return bytes.fromhex(value.replace("-", ""))
        case "BLOB" | "FLOAT" | "DOUBLE" | "BOOLEAN" | "DECIMAL":
            return value
        case name if name in INTEGERS and name != "BIGNUM":
            return value
        case _:
            return kinds.write_text(kind, value)


def _to_values(array: pa.Array) -> list[Any]:
    """An array's values, none of them as Python's own dates, which lack some."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _to_values(array.storage)
    if pa.types.is_dictionary(kind):
        return _to_values(array.dictionary_decode())
    if pa.types.is_date32(kind):
        return list(array.view(pa.int32()).to_pylist())
    if pa.types.is_timestamp(kind) or pa.types.is_time64(kind):
        return list(array.view(pa.int64()).to_pylist())
    if pa.types.is_struct(kind):
        fields = [_to_values(field) for field in array.flatten()]
        return [
            list(parts) if valid else None
            for parts, valid in zip(zip(*fields, strict=True), _valid(array), strict=True)
        ]
    if pa.types.is_map(kind):
        keys, items = _to_values(array.keys), _to_values(array.items)
        entries = [[key, item] for key, item in zip(keys, items, strict=True)]
        start = array.offsets[0].as_py() if len(array.offsets) else 0
        return _slice(entries, array, start if len(entries) < array.offsets[-1].as_py() else 0)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _slice(_to_values(array.values), array, 0)
    if pa.types.is_fixed_size_list(kind):
        return _to_values(array.cast(pa.list_(kind.value_type)))
    return list(array.to_pylist())


def _slice(parts: list[Any], array: pa.Array, start: int) -> list[Any]:
    offsets = [offset - start for offset in array.offsets.to_pylist()]
    return [
        parts[begin:end] if valid else None
        for begin, end, valid in zip(offsets, offsets[1:], _valid(array), strict=False)
    ]


def _valid(array: pa.Array) -> list[bool]:
    return list(array.is_valid().to_pylist())


# JSON, as a strict parser reads it.


def _judge_json(case: Case, exported: Exported, target: Path) -> Iterator[str]:
    lines = target.read_bytes().split(b"\n")
    if lines.pop() != b"" or len(lines) != len(case.rows):
        yield f"{len(lines)} lines"
        return
    for line, row in zip(lines, case.rows, strict=True):
        parsed = _parse(line)
        yield from _judge_names(case, exported, [name for name, _ in parsed.pairs])
        for (name, value), kind, own in zip(parsed.pairs, case.kinds, row, strict=True):
            if not _is_as_expected(value, kinds.to_json(kind, own)):
                yield f"{name!r}, {kind.name}: {own!r} is {value!r} in JSON"


@dataclass(frozen=True, slots=True)
class _Pairs:
    """An object in the order of its keys."""

    pairs: list[tuple[str, Any]]


def _parse(text: str | bytes) -> Any:
    return json.loads(
        text, parse_constant=_refuse, object_pairs_hook=_take_pairs, parse_float=Decimal, parse_int=Decimal
    )


def _is_json_of(kind: Kind, value: Any, text: str | None) -> bool:
    """Whether a field of a CSV file is the JSON of a value with parts."""
    return (
        text is None
        if value is None
        else text is not None and _is_as_expected(_parse(text), kinds.to_json(kind, value))
    )


def _take_pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return _Pairs(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_as_expected(value: Any, expected: Any) -> bool:
    match expected:
        case ("float", number):
            return isinstance(value, Decimal) and float(value) == number
        case ("entries", values):
            return (
                isinstance(value, _Pairs)
                and len(value.pairs) == len(values)
                and all(_is_as_expected(each, other) for (_, each), other in zip(value.pairs, values, strict=True))
            )
        case "moment":
            return isinstance(value, str) and value != ""
        case dict():
            return (
                isinstance(value, _Pairs)
                and [key for key, _ in value.pairs] == list(expected)
                and all(_is_as_expected(each, expected[key]) for key, each in value.pairs)
            )
        case list():
            return (
                isinstance(value, list) and len(value) == len(expected) and all(map(_is_as_expected, value, expected))
            )
        case _:
            return type(value) is type(expected) and bool(value == expected)
