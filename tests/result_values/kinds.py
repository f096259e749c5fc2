"""Types and values at random: how SQL writes each, and what it is, told without the code that is tested."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

# An infinity of a date or a timestamp.
INFINITY, NEGATIVE_INFINITY = "infinity", "-infinity"

_MOST_DEEP = 4
_NULL_SHARE = 0.12
_EXTREME_SHARE = 0.4

_DAY = 86_400
_MICROS = 10**6

INTEGERS = {
    "TINYINT": (-(2**7), 2**7 - 1),
    "SMALLINT": (-(2**15), 2**15 - 1),
    "INTEGER": (-(2**31), 2**31 - 1),
    "BIGINT": (-(2**63), 2**63 - 1),
    "UTINYINT": (0, 2**8 - 1),
    "USMALLINT": (0, 2**16 - 1),
    "UINTEGER": (0, 2**32 - 1),
    "UBIGINT": (0, 2**64 - 1),
    "HUGEINT": (-(2**127), 2**127 - 1),
    "UHUGEINT": (0, 2**128 - 1),
    "BIGNUM": (-(10**60), 10**60),
}
# Units a second.
TIMESTAMPS = {
    "TIMESTAMP": 10**6,
    "TIMESTAMP WITH TIME ZONE": 10**6,
    "TIMESTAMP_S": 1,
    "TIMESTAMP_MS": 10**3,
    "TIMESTAMP_NS": 10**9,
}
_SCALARS = [
    *INTEGERS,
    *TIMESTAMPS,
    *("BOOLEAN", "FLOAT", "DOUBLE", "DECIMAL", "DECIMAL", "VARCHAR", "VARCHAR", "BLOB", "BIT", "UUID", "ENUM", "JSON"),
    *("DATE", "DATE", "TIME", "TIME_NS", "TIME WITH TIME ZONE", "INTERVAL", "INTERVAL", "HUGEINT"),
]
# What can't be told apart, or told from NULL, by the text that a key is.
_KEYS = ["INTEGER", "BIGINT", "HUGEINT", "VARCHAR", "ENUM", "DATE", "TIMESTAMP", "DOUBLE", "UUID", "BOOLEAN", "DECIMAL"]

_NAMES = [
    *(
        "a",
        "b",
        "value",
        "group",
        "select",
        "key",
        "tag",
        "lat",
        "Total Amount",
        "Street Name",
        "order-id",
        "Revenue ($)",
    ),
    *(
        'q"uote',
        "it's",
        "a, b)",
        "x(y",
        "[z]",
        "é",
        "日本",
        "🦆",
        "1st",
        "TIMESTAMP",
        "struct",
        "field_1",
        "_1",
        "a_1",
        "A",
        "null",
    ),
    *("back\\slash", "tab\there", "new\nline", "{brace}", "a:b", "MAP", "column_2", "n" * 200),
]
_TEXTS = [
    *(
        "",
        " ",
        "NULL",
        "null",
        "nan",
        "007",
        "00249",
        "a,b",
        'say "x"',
        "two\nlines",
        "cr\rlf\r\n",
        "it's",
        "=1+1",
        "é🦆",
    ),
    *(
        "[1]",
        "{'a': 1}",
        "\\x00",
        "back\\",
        "\t",
        "\x01",
        "\x7f",
        "true",
        "1e5",
        "infinity",
        " lead",
        "trail ",
        ";",
        "#",
        "\ufeffx",
    ),
]
_WORDS = ["red", "green, blue", "it's", 'q"', "", "NULL", "1"]
# JSON as SQL writes it, and as a line of JSON may have it.
_JSON = [
    ('{"a":12345678901234567890123.5,"b":1.10}',) * 2,
    ("[1,  2.50, null]",) * 2,
    ('"text"',) * 2,
    ('"nan, ]"',) * 2,
    ("1e400",) * 2,
    ("-0.0",) * 2,
    ("null",) * 2,
    ("true",) * 2,
    ('{"":{"inf":[]}}',) * 2,
    ('{"rate":NaN}', '{"rate":"NaN"}'),
    ("[-Infinity, inf,nan]", '["-Infinity", "inf","nan"]'),
    ('{"a":[1,],}', '{"a":[1]}'),
    ('{\n"a": "x,]\\"NaN",\r\n"b":NaN}', '{ "a": "x,]\\"NaN",  "b":"NaN"}'),
]


@dataclass(frozen=True, slots=True)
class Kind:
    """A type. `text` is DuckDB's, or None where nothing can be cast to it: a struct whose fields have no names."""

    name: str
    text: str | None
    parts: tuple[tuple[str, "Kind"], ...] = ()
    numbers: tuple[int, ...] = ()

    def holds(self, *names: str) -> bool:
        """Whether it is one of those, or has one in it."""
        return self.name in names or any(part.holds(*names) for _, part in self.parts)


def quote(name: str) -> str:
    """An identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string, of which DuckDB's parser takes no NUL."""
    return "'" + text.replace("'", "''") + "'"


def make_names(rng: random.Random, count: int, *, unique: bool) -> list[str]:
    """Odd names; those of a struct's fields differ in more than case."""
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(_NAMES)
        if not unique or name.lower() not in {other.lower() for other in names}:
            names.append(name)
        elif len(names) > len(_NAMES) // 2:
            names.append(f"f{len(names)}")
    return names


def make_kind(rng: random.Random, depth: int = 0, *, castable: bool = False) -> Kind:
    """A type, nested four deep at most; `castable` leaves out what nothing can be cast to."""
    if depth == _MOST_DEEP or rng.random() < (0.5 if depth == 0 else 0.55):
        return make_scalar(rng, rng.choice(_SCALARS))
    return _NESTED[rng.choice(list(_NESTED))](rng, depth + 1, castable)


def make_scalar(rng: random.Random, name: str) -> Kind:
    """A type without parts."""
    if name == "DECIMAL":
        width = rng.choice((1, 4, 9, 18, 19, 38, rng.randint(1, 38)))
        scale = rng.choice((0, width, rng.randint(0, width)))
        return Kind(name, f"DECIMAL({width},{scale})", numbers=(width, scale))
    if name == "ENUM":
        return Kind(name, f"ENUM({', '.join(map(literal, _WORDS))})")
    return Kind(name, name)


def _make_list(rng: random.Random, depth: int, castable: bool) -> Kind:
    element = make_kind(rng, depth, castable=castable)
    return Kind("LIST", None if element.text is None else f"{element.text}[]", (("", element),))


def _make_array(rng: random.Random, depth: int, castable: bool) -> Kind:
    element, size = make_kind(rng, depth, castable=castable), rng.randint(1, 3)
    return Kind("ARRAY", None if element.text is None else f"{element.text}[{size}]", (("", element),), (size,))


def _make_struct(rng: random.Random, depth: int, castable: bool) -> Kind:
    count = rng.randint(1, 3)
    parts = [make_kind(rng, depth, castable=castable) for _ in range(count)]
    if not castable and rng.random() < 0.2:
        return Kind("STRUCT", None, tuple(("", part) for part in parts))
    named = tuple(zip(make_names(rng, count, unique=True), parts, strict=True))
    return Kind("STRUCT", _write_fields("STRUCT", named), named)


def _make_union(rng: random.Random, depth: int, _castable: bool) -> Kind:
    count = rng.randint(1, 3)
    parts = [make_kind(rng, depth, castable=True) for _ in range(count)]
    named = tuple(zip(make_names(rng, count, unique=True), parts, strict=True))
    return Kind("UNION", _write_fields("UNION", named), named)


def _make_map(rng: random.Random, depth: int, castable: bool) -> Kind:
    key = make_scalar(rng, rng.choice(_KEYS)) if rng.random() < 0.8 else _make_list(rng, _MOST_DEEP, castable)
    value = make_kind(rng, depth, castable=castable)
    text = None if key.text is None or value.text is None else f"MAP({key.text}, {value.text})"
    return Kind("MAP", text, (("key", key), ("value", value)))


def _write_fields(word: str, named: tuple[tuple[str, Kind], ...]) -> str | None:
    if any(part.text is None for _, part in named):
        return None
    return f"{word}({', '.join(f'{quote(name)} {part.text}' for name, part in named)})"


_NESTED: dict[str, Callable[[random.Random, int, bool], Kind]] = {
    "LIST": _make_list,
    "ARRAY": _make_array,
    "STRUCT": _make_struct,
    "UNION": _make_union,
    "MAP": _make_map,
}


def make_value(rng: random.Random, kind: Kind, *, null: bool = True) -> Any:
    """A value: numbers and texts as Python has them, parts in lists, a map's entries and a union's member in pairs."""
    if null and rng.random() < _NULL_SHARE:
        return None
    match kind.name:
        case "LIST":
            return [make_value(rng, kind.parts[0][1]) for _ in range(rng.randint(0, 3))]
        case "ARRAY":
            return [make_value(rng, kind.parts[0][1]) for _ in range(kind.numbers[0])]
        case "STRUCT":
            return [make_value(rng, part) for _, part in kind.parts]
        case "UNION":
            tag, part = rng.choice(kind.parts)
            return (tag, make_value(rng, part))
        case "MAP":
            (_, key), (_, value) = kind.parts
            entries: dict[str, Any] = {}
            for _ in range(rng.randint(0, 3)):
                made = make_value(rng, key, null=False)
                # By what DuckDB takes for the same: it refuses a key twice.
                entries.setdefault("0.0" if made == 0 else repr(made), (made, make_value(rng, value)))
            return list(entries.values())
        case _:
            return _make_scalar_value(rng, kind)


def _make_scalar_value(rng: random.Random, kind: Kind) -> Any:
    is_extreme = rng.random() < _EXTREME_SHARE
    match kind.name:
        case name if name in INTEGERS:
            least, most = INTEGERS[name]
            some = [0, 1, least, most, 9007199254740993, 10**38 - 1, 10**38, -(10**38), 10**18]
            drawn = rng.choice([number for number in some if least <= number <= most])
            return drawn if is_extreme else rng.randint(max(least, -(10**9)), min(most, 10**9))
        case name if name in TIMESTAMPS:
            return _make_timestamp(rng, TIMESTAMPS[name], is_extreme)
        case "DATE":
            # The first and the last of DuckDB's dates, the year 0 and 10000, infinities.
            days: list[int | str] = [
                INFINITY,
                NEGATIVE_INFINITY,
                2_932_897,
                -719_529,
                -719_163,
                -735_000,
                100_000_000,
                -2_147_483_646,
                2_147_483_646,
            ]
            return rng.choice(days) if is_extreme else rng.randint(-200_000, 200_000)
        case "BOOLEAN":
            return rng.random() < 0.5
        case "FLOAT" | "DOUBLE":
            some_floats = [
                float("nan"),
                float("inf"),
                float("-inf"),
                -0.0,
                0.0,
                0.1,
                1e-40,
                3.4028234663852886e38,
                16777217.0,
            ]
            some_floats += [] if kind.name == "FLOAT" else [1e300, 5e-324, 1.7976931348623157e308, 9007199254740993.0]
            drawn_float = rng.choice(some_floats) if is_extreme else rng.uniform(-1e6, 1e6)
            return drawn_float if kind.name == "DOUBLE" else struct.unpack("f", struct.pack("f", drawn_float))[0]
        case "DECIMAL":
            width, scale = kind.numbers
            most = 10**width - 1
            number = rng.choice([0, 1, -1, most, -most]) if is_extreme else rng.randint(-most, most)
            # A context would round it to 28 digits.
            return Decimal(f"{number}E-{scale}")
        case "TIME":
            return (
                rng.choice([0, _DAY * _MICROS, _DAY * _MICROS - 1, 500_000])
                if is_extreme
                else rng.randrange(_DAY * _MICROS)
            )
        case "TIME_NS":
            return rng.choice([0, _DAY * 10**9 - 1, 1]) if is_extreme else rng.randrange(_DAY * 10**9)
        case "TIME WITH TIME ZONE":
            return rng.randrange(_DAY * _MICROS), rng.choice(
                [0, 7200, -7200, 19800, -34200, 15 * 3600, -15 * 3600, 3600 + 61]
            )
        case "INTERVAL":
            return _make_interval(rng, is_extreme)
        case "BLOB":
            return (
                rng.randbytes(rng.randint(0, 6))
                if rng.random() < 0.5
                else rng.choice([b"", b"\\x00", b"plain", b'"', b"\n"])
            )
        case "BIT":
            return "".join(rng.choice("01") for _ in range(rng.randint(1, 20)))
        case "UUID":
            digits = f"{rng.getrandbits(128):032x}"
            return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
        case "ENUM":
            return rng.choice(_WORDS)
        case "JSON":
            return rng.choice(_JSON)
        case _:
            return (
                rng.choice(_TEXTS)
                if rng.random() < 0.8
                else "".join(rng.choices("ab,\"'\n\r \\[]{}=:é", k=rng.randint(0, 12)))
            )


def _make_timestamp(rng: random.Random, unit: int, is_extreme: bool) -> Any:
    if not is_extreme:
        return rng.randrange(-(10**9), 4 * 10**9) * unit + rng.choice((0, rng.randrange(unit)))
    if unit == 10**9:
        # As many nanoseconds as 64 bits have.
        return rng.choice([INFINITY, NEGATIVE_INFINITY, 9_000_000_000 * unit + 1, -9_000_000_000 * unit + 1])
    years = [253_402_300_800, -62_167_219_200, -62_135_596_801, -99_000_000_000, 8_000_000_000_000, -9_000_000_000_000]
    return rng.choice([INFINITY, NEGATIVE_INFINITY, *(seconds * unit + unit - 1 for seconds in years)])


def _make_interval(rng: random.Random, is_extreme: bool) -> tuple[int, int, int]:
    if is_extreme:
        return (
            rng.choice([0, 0, -1, 13, -13, 2**31 - 1]),
            rng.choice([0, 0, -1, 40, 2**31 - 1]),
            rng.choice([0, 1, -1, 5_000_000 * _MICROS, -(2**62), 2**62, 500_000]),
        )
    return rng.randint(-50, 50), rng.randint(-50, 50), rng.randint(-(10**12), 10**12)


def write_sql(rng: random.Random, kind: Kind, value: Any) -> str:
    """SQL that has the value, with exactly that type."""
    if value is None:
        # A CASE can't have arrays.
        return f"([{write_sql(rng, kind, make_value(rng, kind, null=False))}])[2]"
    match kind.name:
        case "LIST":
            if not value:
                return f"([{write_sql(rng, kind.parts[0][1], None)}])[1:0]"
            return f"[{', '.join(write_sql(rng, kind.parts[0][1], part) for part in value)}]"
        case "ARRAY":
            return f"array_value({', '.join(write_sql(rng, kind.parts[0][1], part) for part in value)})"
        case "STRUCT":
            parts = [write_sql(rng, part, each) for (_, part), each in zip(kind.parts, value, strict=True)]
            if not kind.parts[0][0]:
                return f"row({', '.join(parts)})"
            named = [f"{literal(name)}: {part}" for (name, _), part in zip(kind.parts, parts, strict=True)]
            return f"{{{', '.join(named)}}}"
        case "UNION":
            tag, part = value
            return f"CAST(union_value({quote(tag)} := {write_sql(rng, dict(kind.parts)[tag], part)}) AS {kind.text})"
        case "MAP":
            (_, key), (_, item) = kind.parts
            if not value:
                sample = write_sql(rng, key, make_value(rng, key, null=False))
                return f"map(([{sample}])[1:0], ([{write_sql(rng, item, None)}])[1:0])"
            keys = ", ".join(write_sql(rng, key, each) for each, _ in value)
            return f"map([{keys}], [{', '.join(write_sql(rng, item, each) for _, each in value)}])"
        case _:
            return _write_scalar(kind, value)


def _write_scalar(kind: Kind, value: Any) -> str:
    match kind.name:
        case "JSON":
            return f"CAST({literal(value[0])} AS JSON)"
        case "BLOB":
            return f"CAST({literal(write_blob(value))} AS BLOB)"
        case "VARCHAR":
            return literal(value)
        case "INTERVAL":
            months, days, micros = value
            return f"(to_months({months}) + to_days({days}) + to_microseconds({micros}))"
        case "DATE" if isinstance(value, int):
            return f"CAST(DATE '1970-01-01' + ({value}) AS DATE)"
        case "TIME":
            return f"TIME {literal(write_time(value, 6))}"
        case "TIMESTAMP WITH TIME ZONE" if isinstance(value, int):
            # Of an instance whose zone is UTC.
            return f"CAST(make_timestamp({value}) AS TIMESTAMPTZ)"
        case "TIMESTAMP" if isinstance(value, int):
            return f"make_timestamp({value})"
        case "TIMESTAMP_MS" if isinstance(value, int):
            return f"CAST(make_timestamp({value * 1000}) AS TIMESTAMP_MS)"
        case "TIMESTAMP_S" if isinstance(value, int):
            return f"CAST(make_timestamp({value * _MICROS}) AS TIMESTAMP_S)"
        case "TIMESTAMP_NS" if isinstance(value, int):
            return f"make_timestamp_ns({value})"
        case _:
            return f"CAST({literal(write_text(kind, value))} AS {kind.text})"


def write_text(kind: Kind, value: Any) -> str:
    """The text of a scalar; of moments only that of infinities."""
    match kind.name:
        case "TIME":
            return write_time(value, 6)
        case "TIME_NS":
            return write_time(value, 9)
        case "TIME WITH TIME ZONE":
            micros, offset = value
            return write_time(micros, 6) + _write_offset(offset)
        case "INTERVAL":
            return write_interval(*value)
        case "BLOB":
            return write_blob(value)
        case "BOOLEAN":
            return str(value).lower()
        case "DECIMAL":
            return f"{value:f}"
        case "JSON":
            return str(value[0])
        case _:
            return str(value)


def write_time(units: int, digits: int) -> str:
    """Since midnight, with no more digits than are needed."""
    seconds, fraction = divmod(units, 10**digits)
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{text}.{fraction:0{digits}}".rstrip("0") if fraction else text


def _write_offset(seconds: int) -> str:
    left = abs(seconds)
    text = f"{'-' if seconds < 0 else '+'}{left // 3600:02}"
    if left % 3600:
        text += f":{left // 60 % 60:02}"
    return f"{text}:{left % 60:02}" if left % 60 else text


def write_interval(months: int, days: int, micros: int) -> str:
    """`1 year 2 months -3 days 04:05:06.7`."""
    years = int(months / 12)
    amounts = [(years, "year"), (months - years * 12, "month"), (days, "day")]
    words = [f"{amount} {word}{'' if abs(amount) == 1 else 's'}" for amount, word in amounts if amount]
    if micros or not words:
        words.append(("-" if micros < 0 else "") + write_time(abs(micros), 6))
    return " ".join(words)


def write_blob(value: bytes) -> str:
    r"""Bytes as DuckDB writes them: what is printable, and `\x00`."""
    return "".join(chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'\"" else f"\\x{byte:02X}" for byte in value)


def to_json(kind: Kind, value: Any) -> Any:
    """The value as a strict parser of JSON reads it, numbers as decimals; a callable where the text is to be judged."""
    if value is None:
        return None
    match kind.name:
        case "LIST" | "ARRAY":
            return [to_json(kind.parts[0][1], part) for part in value]
        case "STRUCT":
            names = [name or f"field_{number}" for number, (name, _) in enumerate(kind.parts, 1)]
            return {name: to_json(part, each) for name, (_, part), each in zip(names, kind.parts, value, strict=True)}
        case "UNION":
            return {value[0]: to_json(dict(kind.parts)[value[0]], value[1])}
        case "MAP":
            (_, key), (_, item) = kind.parts
            if key.name in _NESTED:
                return [{"key": to_json(key, each), "value": to_json(item, part)} for each, part in value]
            # What the keys' texts are the client's reader shows.
            return ("entries", [to_json(item, part) for _, part in value])
        case "FLOAT" | "DOUBLE":
            return ("float", value) if value - value == 0 else str(value)
        case name if name in INTEGERS or name == "DECIMAL":
            return Decimal(value)
        case "BOOLEAN":
            return value
        case "JSON":
            return json.loads(value[1], parse_float=Decimal, parse_int=Decimal)
        case "DATE":
            return "moment"
        case name if name in TIMESTAMPS:
            return "moment"
        case _:
            return write_text(kind, value)
