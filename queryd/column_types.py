"""Parse and write the DuckDB types of an event's columns."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

_Part = TypeVar("_Part")

_SCALARS = frozenset(
    {
        "BOOLEAN",
        "TINYINT",
        "SMALLINT",
        "INTEGER",
        "BIGINT",
        "HUGEINT",
        "UTINYINT",
        "USMALLINT",
        "UINTEGER",
        "UBIGINT",
        "UHUGEINT",
        "FLOAT",
        "DOUBLE",
        "DATE",
        "TIME",
        "TIME_NS",
        "TIME WITH TIME ZONE",
        "TIMESTAMP",
        "TIMESTAMP_S",
        "TIMESTAMP_MS",
        "TIMESTAMP_NS",
        "TIMESTAMP WITH TIME ZONE",
        "INTERVAL",
        "VARCHAR",
        "BLOB",
        "BIT",
        "UUID",
        "ENUM",
        "JSON",
        "BIGNUM",
        "GEOMETRY",
    }
)
_NESTED = frozenset({"LIST", "ARRAY", "STRUCT", "MAP", "UNION"})

_TOKEN = re.compile(r"""\s*("(?:[^"]|"")*"|'(?:[^']|'')*'|[\[\](),]|[^\s"'\[\](),]+)""")
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*")
# Ends the words of a name; "" is the end of the text.
_MARKS = {"", "[", "]", "(", ")", ","}
# Deeper than anybody's data, and far from the interpreter's own limit.
_MOST_DEEP = 50


class NoCounterpart(ValueError):
    """A result can't have a type with this text."""


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A DuckDB type. `name` is DuckDB's name for it, or LIST or ARRAY.

    `parts` are fields and members with their names ("" for an unnamed field), a map's key and value, or a list's
    element; `numbers` are a decimal's width and scale.
    """

    name: str
    parts: tuple[tuple[str, "ColumnType"], ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def is_nested(self) -> bool:
        """Whether its values contain other values."""
        return self.name in _NESTED

    @property
    def element(self) -> "ColumnType":
        """The type of a list's elements."""
        return self.parts[0][1]

    def walk(self) -> Iterator["ColumnType"]:
        """Yield this type and all types inside it."""
        yield self
        for _, part in self.parts:
            yield from part.walk()

    def holds(self, *names: str) -> bool:
        """Whether this type, or a type inside it, is one of these."""
        return any(each.name in names for each in self.walk())


def parse_type(text: str) -> ColumnType:
    """Parse DuckDB's text of a type. Raises `NoCounterpart`."""
    if text in _SCALARS:
        return ColumnType(text)
    return _Parser(text).parse_all()


def write_type(type_: ColumnType, name_field: Callable[[str, int], str] = lambda name, _: name) -> str:
    """Write the type as DuckDB does, but without possible data: an ENUM's values and a GEOMETRY's coordinate system.

    `name_field` maps a field's name and its number (from 1) to the name to write.
    """
    parts = [
        (name_field(name, number) if type_.name in ("STRUCT", "UNION") and name else name, write_type(part, name_field))
        for number, (name, part) in enumerate(type_.parts, 1)
    ]
    match type_.name:
        case "LIST":
            return f"{parts[0][1]}[]"
        case "ARRAY":
            return f"{parts[0][1]}[{type_.numbers[0]}]"
        case "MAP":
            return f"MAP({parts[0][1]}, {parts[1][1]})"
        case "STRUCT" | "UNION":
            return f"{type_.name}({', '.join(f'{_quote(name)} {part}' if name else part for name, part in parts)})"
        case "DECIMAL":
            return f"DECIMAL({type_.numbers[0]},{type_.numbers[1]})"
        case name:
            return name


def name_fields(type_: ColumnType) -> list[str]:
    """The names of a STRUCT's fields, or of a UNION's members, in a result; an unnamed one is `field_N`, N from 1."""
    own = [name for name, _ in type_.parts]
    named = [name or f"field_{number}" for number, name in enumerate(own, 1)]
    if type_.name == "UNION":
        return make_unique(["tag", *named])
    return named if all(own) else make_unique(named)


def make_unique(names: Sequence[str]) -> list[str]:
    """Make names unique, ignoring case, by a suffix where needed: `a`, `A` become `a`, `A_1`."""
    taken = {name.lower() for name in names}
    seen: set[str] = set()
    unique = []
    for name in names:
        candidate, number = name, 0
        while candidate.lower() in seen or (number and candidate.lower() in taken):
            number += 1
            candidate = f"{name}_{number}"
        seen.add(candidate.lower())
        unique.append(candidate)
    return unique


def _quote(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"'


class _Parser:
    """Recursive descent: a scalar, STRUCT, UNION or MAP, then one list level for each pair of brackets."""

    def __init__(self, text: str) -> None:
        self._tokens = _split(text)
        self._place = 0

    def parse_all(self) -> ColumnType:
        parsed = self._parse(0)
        if self._place != len(self._tokens):
            raise NoCounterpart
        return parsed

    def _parse(self, depth: int) -> ColumnType:
        if depth > _MOST_DEEP:
            raise NoCounterpart
        parsed = self._parse_unlisted(self._take_words(), depth)
        for _ in range(_MOST_DEEP):
            if self._next() != "[":
                return parsed
            self._take()
            parsed = ColumnType("LIST", (("", parsed),)) if self._next() == "]" else self._parse_array(parsed)
            self._expect("]")
        raise NoCounterpart

    def _parse_array(self, element: ColumnType) -> ColumnType:
        return ColumnType("ARRAY", (("", element),), (self._parse_number(),))

    def _take_words(self) -> list[str]:
        words = []
        while self._next() not in _MARKS:
            words.append(self._take())
        return words

    def _parse_unlisted(self, words: list[str], depth: int) -> ColumnType:
        match " ".join(words):
            case "STRUCT" | "UNION" as name:
                return ColumnType(name, tuple(self._parse_all_of(lambda: self._parse_field(depth))))
            case "MAP":
                parts = self._parse_all_of(lambda: self._parse(depth + 1))
                if len(parts) != len(("key", "value")):
                    raise NoCounterpart
                return ColumnType("MAP", tuple(zip(("key", "value"), parts, strict=True)))
            case "DECIMAL":
                width, scale = self._parse_all_of(self._parse_number)
                return ColumnType("DECIMAL", numbers=(width, scale))
            case "ENUM" | "GEOMETRY" as name:
                # An event omits the arguments.
                if self._next() == "(":
                    self._parse_all_of(self._take)
                return ColumnType(name)
            case '"NULL"':
                # The element type of an empty list or map literal; no value has it.
                return ColumnType("INTEGER")
            case name if name in _SCALARS:
                return ColumnType(name)
        raise NoCounterpart

    def _parse_field(self, depth: int) -> tuple[str, ColumnType]:
        """Parse a name and a type, or only a type."""
        start = self._place
        words = self._take_words()
        self._place = start
        # Several words are a name and a type, unless they are one type, such as `TIMESTAMP WITH TIME ZONE`.
        if len(words) <= 1 or " ".join(words) in _SCALARS:
            return "", self._parse(depth + 1)
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
