"""DuckDB's types, as an event names a column's, in Arrow's words."""

import re
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

_Part = TypeVar("_Part")

_SCALARS = {
    "BOOLEAN": pa.bool_(),
    "TINYINT": pa.int8(),
    "SMALLINT": pa.int16(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "UTINYINT": pa.uint8(),
    "USMALLINT": pa.uint16(),
    "UINTEGER": pa.uint32(),
    "UBIGINT": pa.uint64(),
    # What a sum of integers is; Parquet has it so too.
    "HUGEINT": pa.decimal128(38, 0),
    "UHUGEINT": pa.decimal256(39, 0),
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
    "DATE": pa.date32(),
    "TIME": pa.time64("us"),
    "TIMESTAMP": pa.timestamp("us"),
    "TIMESTAMP WITH TIME ZONE": pa.timestamp("us", "UTC"),
}
# What has no counterpart, or one that text does not show, and is text in every file of text.
_TEXTS = {
    "VARCHAR",
    "BLOB",
    "BIT",
    "UUID",
    "INTERVAL",
    "TIME_NS",
    "TIME WITH TIME ZONE",
    "TIMESTAMP_S",
    "TIMESTAMP_MS",
    "TIMESTAMP_NS",
}
DATE, TIME = _SCALARS["DATE"], _SCALARS["TIME"]

_NESTED = re.compile(r"(STRUCT|MAP|UNION)\b.*|.*\[\d*\]", re.DOTALL)
_TOKEN = re.compile(r"""\s*("(?:[^"]|"")*"|'(?:[^']|'')*'|[\[\](),]|[^\s"'\[\](),]+)""")
# Ends the words of a name; "" is the end of the text.
_MARKS = {"", "[", "]", "(", ")", ","}
# Deeper than anybody's data, and far from the interpreter's own limit.
_MOST_DEEP = 50


class NoCounterpart(ValueError):
    """Arrow has no type of which it could be said that a column's text is one of its values."""


def is_nested(type_: str) -> bool:
    """True for lists, structs, maps and unions, whose parts are types."""
    return _NESTED.fullmatch(type_) is not None


def parse_or_text(type_: str) -> pa.DataType:
    """The type; text where Arrow has none."""
    try:
        return parse_type(type_)
    except NoCounterpart:
        return pa.string()


def parse_type(type_: str) -> pa.DataType:
    """The type, of whatever depth. Raises `NoCounterpart`: for a UNION, for a struct whose fields have no names, for
    JSON, whose values are of any type, and for what is none of DuckDB's 1.5."""
    return _Parser(type_).parse_all()


def replace(type_: pa.DataType, old: pa.DataType, new: pa.DataType) -> pa.DataType:
    """The type with one of its parts, wherever it stands, another."""
    if type_ == old:
        return new
    if pa.types.is_list(type_):
        return pa.list_(replace(type_.value_type, old, new))
    if pa.types.is_map(type_):
        return pa.map_(replace(type_.key_type, old, new), replace(type_.item_type, old, new))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, replace(field.type, old, new)) for field in type_])
    return type_


def holds_map(type_: pa.DataType) -> bool:
    """True where a map is anywhere in it."""
    if pa.types.is_map(type_):
        return True
    return any(holds_map(type_.field(place).type) for place in range(type_.num_fields))


class _Parser:
    """By descent: a type is a scalar, a STRUCT or a MAP, and a list for each pair of brackets behind it."""

    def __init__(self, text: str) -> None:
        self._tokens = _split(text)
        self._place = 0

    def parse_all(self) -> pa.DataType:
        parsed = self._parse(0)
        if self._place != len(self._tokens):
            raise NoCounterpart
        return parsed

    def _parse(self, depth: int) -> pa.DataType:
        if depth > _MOST_DEEP:
            raise NoCounterpart
        parsed = self._parse_unlisted(depth)
        for _ in range(_MOST_DEEP):
            if self._next() != "[":
                return parsed
            self._take()
            if self._next() != "]":
                # An array's size: Parquet has arrays as lists too.
                self._take()
            self._expect("]")
            parsed = pa.list_(parsed)
        raise NoCounterpart

    def _parse_unlisted(self, depth: int) -> pa.DataType:
        words = []
        while self._next() not in _MARKS:
            words.append(self._take())
        match " ".join(words):
            case "STRUCT":
                return pa.struct(self._parse_all_of(lambda: self._parse_field(depth)))
            case "MAP":
                key, value = self._parse_all_of(lambda: self._parse(depth + 1))
                return pa.map_(key, value)
            case "DECIMAL":
                precision, scale = self._parse_all_of(self._parse_number)
                return pa.decimal128(precision, scale)
            case "ENUM":
                # An event leaves its values out.
                if self._next() == "(":
                    self._parse_all_of(self._take)
                return pa.string()
            case name if name in _TEXTS:
                return pa.string()
            case name if name in _SCALARS:
                return _SCALARS[name]
        raise NoCounterpart

    def _parse_field(self, depth: int) -> tuple[str, pa.DataType]:
        name = self._take()
        if name.startswith('"'):
            name = name[1:-1].replace('""', '"')
        return name, self._parse(depth + 1)

    def _parse_number(self) -> int:
        if not self._next().isdecimal():
            raise NoCounterpart
        return int(self._take())

    def _parse_all_of(self, parse: Callable[[], _Part]) -> list[_Part]:
        """What stands in parentheses, with commas between."""
        self._expect("(")
        parts = [parse()]
        while self._next() == ",":
            self._take()
            parts.append(parse())
        self._expect(")")
        return parts

    def _next(self) -> str:
        """The next token, or "" behind the last."""
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self._place += 1
        return token

    def _expect(self, mark: str) -> None:
        if self._take() != mark:
            raise NoCounterpart


def _split(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise NoCounterpart
        tokens.append(found[1])
        place = found.end()
    return tokens
