"""Statements out of statements: each mutation takes a text and gives another that is often still SQL.

A mutant belongs to a seed and a number, so that a finding can be made again.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from engines.duckdb.gate import functions
from engines.duckdb.gate.names import words
from queryd.events import Parameter
from tests.fuzz import pools
from tests.sql_statements import read_statements

# Longer statements of the corpora are about sizes; mutated, they only cost time.
_LONGEST_SEED = 700

_TOKEN = re.compile(
    r"""--[^\r\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$|[eE]?'(?:[^']|'')*'|"(?:[^"]|"")*"|\d+(?:\.\d+)?|\$?\w+|\s+|::|->>?|[^\w\s]""",
    re.DOTALL,
)
_WORD = re.compile(r'[A-Za-z_]\w*|"[^"]*"')
_CONSTANT = re.compile(r"'.*'|\d[\d.]*|NULL|true|false", re.DOTALL | re.IGNORECASE)
_RELATIONS = frozenset(
    [
        "orders",
        "customers",
        "products",
        "prices",
        "employees",
        "events",
        '"load"',
        '"order details"',
        "invoices",
        "secret",
    ]
)
_KEYWORDS = words(
    """
    select from where group by order limit offset having qualify with as on using join left right full outer
    inner cross union all except intersect distinct case when then else end and or not in is null between like
    over partition rows range preceding following current row unbounded filter exclude replace rename values
    table pivot unpivot for asof natural semi anti positional lateral recursive materialized sample tablesample
    into name value exists any array try cast interval desc asc nulls first last sets rollup cube grouping
    window columns map struct lambda
    """
)

_Tokens = list[str]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A text and the parameters that it is run with. `pools.LISTENER` stands in both for a host that listens."""

    sql: str
    parameters: dict[str, Parameter]


def seeds() -> tuple[str, ...]:
    """The statements that mutants are made of."""
    # What may run is the better half to start from: a mutant of it is often SQL, and runs.
    allowed = [statement.sql for statement in read_statements() if statement.allowed]
    refused = [statement.sql for statement in read_statements() if not statement.allowed]
    return tuple(sql for sql in (*allowed, *allowed, *refused) if len(sql) <= _LONGEST_SEED)


class Mutator:
    """Makes the mutants of a seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._statements = seeds()

    def make(self, number: int) -> Mutant:
        """The mutant of that number."""
        random = Random(f"{self._seed}:{number}")
        sql = random.choice(self._statements)
        for _ in range(random.choice((1, 1, 1, 2, 2, 3))):
            sql = random.choice(MUTATIONS)(random, sql, self._statements)
        kinds: tuple[tuple[Parameter, ...], ...] = (pools.TEXTS, pools.PARAMETER_TEXTS, (1,))
        values = {name: random.choice(random.choice(kinds)) for name in ("p", "q")}
        return Mutant(sql, {name: values[name] for name in values if re.search(rf"\${name}\b", sql)})


def _tokens(sql: str) -> _Tokens:
    return [match[0] for match in _TOKEN.finditer(sql)]


def _places(tokens: _Tokens, fits: Callable[[str], object]) -> list[int]:
    return [place for place, token in enumerate(tokens) if fits(token)]


def _is_name(token: str) -> bool:
    return _WORD.fullmatch(token) is not None and token.lower() not in _KEYWORDS


def _replace(random: Random, sql: str, fits: Callable[[str], object], by: str) -> str:
    """The text with one of the tokens that fit replaced; itself where none does."""
    tokens = _tokens(sql)
    places = _places(tokens, fits)
    if places:
        tokens[random.choice(places)] = by
    return "".join(tokens)


def replace_relation(random: Random, sql: str, _: Sequence[str]) -> str:
    """A relation by one that nobody was granted, or by a call."""
    hidden = random.choice(pools.HIDDEN if random.random() < 0.7 else pools.CALLS_IN_FROM)
    return _replace(random, sql, lambda token: token.lower() in _RELATIONS, hidden)


def replace_name(random: Random, sql: str, statements: Sequence[str]) -> str:
    """A name by a name of another statement, or a hidden one."""
    names = [token for token in _tokens(random.choice(statements)) if _is_name(token)]
    return _replace(random, sql, _is_name, random.choice([*names, "secret", "canary", "s", "rowid", "current_schema"]))


def replace_function(random: Random, sql: str, _: Sequence[str]) -> str:
    """A function's name by that of one that may not be called, its arguments staying."""
    tokens = _tokens(sql)
    places = [place for place in _places(tokens, _is_name) if tokens[place + 1 : place + 2] == ["("]]
    if not places:
        return replace_constant(random, sql, ())
    tokens[random.choice(places)] = random.choice((*pools.CALLS, *pools.CALLS_IN_FROM)).partition("(")[0]
    return "".join(tokens)


def replace_constant(random: Random, sql: str, _: Sequence[str]) -> str:
    """A constant or a name by a call, a subquery or another constant."""
    by = random.choice((*pools.CALLS, *pools.HIDDEN_QUERIES, *pools.CONSTANTS))
    if random.random() < 0.5:
        return _replace(random, sql, _CONSTANT.fullmatch, by)
    return _replace(random, sql, lambda token: token == "*" or _is_name(token), by)


def splice(random: Random, sql: str, statements: Sequence[str]) -> str:
    """A constant, a name or a relation by another whole statement between brackets."""
    other = random.choice(statements).rstrip("; \n")
    return _replace(random, sql, lambda token: _is_name(token) or _CONSTANT.fullmatch(token), f"({other})")


def wrap_in_cte(random: Random, sql: str, _: Sequence[str]) -> str:
    """The statement as the body of a CTE, under a name that may be a hidden relation's."""
    name = random.choice(pools.CTE_NAMES)
    recursive = random.choice(("", "", "RECURSIVE "))
    source = random.choice((name, name, f"main.{name}", f"(FROM {name})", f"internal.{name}"))
    return f"WITH {recursive}{name} AS ({sql.rstrip('; ')}\n) SELECT * FROM {source}"


def shadow(random: Random, sql: str, _: Sequence[str]) -> str:
    """A CTE of a hidden relation's name in one place, and the name in another."""
    made = "secret AS (SELECT 'x' AS s, 1 AS id)"
    text = sql.rstrip("; ")
    return random.choice((
        f"SELECT * FROM (WITH {made} SELECT * FROM secret) x, secret",
        f"WITH a AS (WITH {made} FROM secret) SELECT * FROM a, secret",
        f"WITH a AS (FROM secret), {made} SELECT * FROM a",
        f"WITH {made} SELECT * FROM main.secret",
        f"SELECT (WITH {made} SELECT s FROM secret), (SELECT s FROM secret)",
        f"WITH {made} SELECT * FROM secret UNION ALL SELECT *, 1 FROM internal.other_org_payroll",
        f"(WITH {made} SELECT s FROM secret) UNION ALL SELECT s FROM secret",
        f"WITH {made} {text}",
        f"WITH {made} SELECT * FROM secret, ({text}\n) z",
        "WITH RECURSIVE secret AS (SELECT s FROM secret UNION SELECT s FROM secret) SELECT * FROM secret",
        "WITH RECURSIVE t AS (SELECT 'a' AS s UNION SELECT s FROM t, recurring.secret) FROM t",
    ))  # fmt: skip


def wrap(random: Random, sql: str, _: Sequence[str]) -> str:
    """The statement in FROM, in an expression, or between brackets."""
    shapes = (
        "SELECT * FROM ({}\n) t",
        "({}\n)",
        "SELECT ({}\n)",
        "SELECT * FROM orders WHERE EXISTS ({}\n)",
        "FROM ({}\n)",
    )
    return random.choice(shapes).format(sql.rstrip("; "))


def combine(random: Random, sql: str, statements: Sequence[str]) -> str:
    """Two statements in a UNION, or joined."""
    other = random.choice(statements).rstrip("; ")
    word = random.choice(("UNION", "UNION ALL", "EXCEPT", "INTERSECT", "UNION BY NAME", "UNION ALL BY NAME"))
    if random.random() < 0.6:
        return f"({sql.rstrip('; ')}\n) {word} ({other}\n)"
    join = random.choice((",", " CROSS JOIN", " POSITIONAL JOIN", " NATURAL JOIN", ", LATERAL"))
    return f"SELECT * FROM ({sql.rstrip('; ')}\n) a{join} ({other}\n) b"


def insert_blanks(random: Random, sql: str, _statements: Sequence[str]) -> str:
    """Comments and blanks of all kinds between tokens."""
    tokens = _tokens(sql)
    for _ in range(random.randint(1, 4)):
        tokens.insert(random.randint(0, len(tokens)), random.choice(pools.BLANKS))
    return "".join(tokens)


def requote(random: Random, sql: str, _: Sequence[str]) -> str:
    """Names in other letters or quotes."""
    change = random.choice(
        (str.upper, str.lower, str.title, lambda name: f'"{name}"', lambda name: f'"{name.upper()}"')
    )
    return "".join(
        change(token) if _is_name(token) and token[0] != '"' and random.random() < 0.5 else token
        for token in _tokens(sql)
    )


def append_statement(random: Random, sql: str, _: Sequence[str]) -> str:
    """A second statement before or behind it."""
    other, sign = random.choice(pools.SECOND_STATEMENTS), random.choice((";", "; ", ";\n", " ; ;", "; -- a\n", ";/**/"))
    return f"{other}{sign}{sql}" if random.random() < 0.2 else f"{sql}{sign}{other}"


def change_statement(random: Random, sql: str, _: Sequence[str]) -> str:
    """The statement as a part of one that is no SELECT."""
    return random.choice(pools.STATEMENTS).format(sql=sql.rstrip("; "), n=random.randint(0, 99_999))


def parameterize(random: Random, sql: str, _: Sequence[str]) -> str:
    """A constant or a name by a parameter."""
    name = random.choice(("$p", "$q"))
    return _replace(random, sql, lambda token: _CONSTANT.fullmatch(token) or _is_name(token), name)


def nest(random: Random, sql: str, _statements: Sequence[str]) -> str:
    """A constant or a name inside of other expressions, a few times."""
    tokens = _tokens(sql)
    places = _places(tokens, lambda token: _is_name(token) or _CONSTANT.fullmatch(token))
    if places:
        place = random.choice(places)
        for _ in range(random.randint(1, 3)):
            shape = random.choice(pools.WRAPPED)
            tokens[place] = shape.replace("{}", tokens[place]).replace("{{", "{").replace("}}", "}")
    return "".join(tokens)


def delete(random: Random, sql: str, _: Sequence[str]) -> str:
    """A few tokens less."""
    tokens = _tokens(sql)
    start = random.randint(0, max(0, len(tokens) - 1))
    del tokens[start : start + random.randint(1, 5)]
    return "".join(tokens)


def duplicate(random: Random, sql: str, _: Sequence[str]) -> str:
    """A few tokens twice, with a comma between them or without."""
    tokens = _tokens(sql)
    start = random.randint(0, max(0, len(tokens) - 1))
    again = tokens[start : start + random.randint(1, 5)]
    tokens[start:start] = [*again, random.choice((", ", " "))]
    return "".join(tokens)


def swap(random: Random, sql: str, _: Sequence[str]) -> str:
    """Two names or two constants in each other's place."""
    tokens = _tokens(sql)
    places = _places(tokens, random.choice((_is_name, _CONSTANT.fullmatch)))
    if len(places) > 1:
        one, other = random.sample(places, 2)
        tokens[one], tokens[other] = tokens[other], tokens[one]
    return "".join(tokens)


def qualify(random: Random, sql: str, _: Sequence[str]) -> str:
    """A name with a schema or a catalog before it."""
    before = random.choice(
        ("main", "internal", "world", "world.main", "world.internal", "finance", "temp", "recurring")
    )
    tokens = _tokens(sql)
    places = _places(tokens, lambda token: token.lower() in _RELATIONS) or _places(tokens, _is_name)
    if places:
        place = random.choice(places)
        tokens[place] = f"{before}.{tokens[place]}"
    return "".join(tokens)


def cast(random: Random, sql: str, _: Sequence[str]) -> str:
    """A constant or a name as another type."""
    tokens = _tokens(sql)
    places = _places(tokens, lambda token: _CONSTANT.fullmatch(token) or _is_name(token))
    if places:
        tokens[random.choice(places)] += f"::{random.choice(pools.TYPES)}"
    return "".join(tokens)


def add_clause(random: Random, sql: str, _: Sequence[str]) -> str:
    """One more clause, with something in it that may be hidden."""
    what = random.choice((*pools.HIDDEN_QUERIES, *pools.CALLS, "1", "ALL", "true"))
    return sql.rstrip("; ") + random.choice(pools.CLAUSES).replace("{}", what)


def add_column(random: Random, sql: str, _: Sequence[str]) -> str:
    """One more entry after the first SELECT."""
    what = random.choice((*pools.HIDDEN_QUERIES, *pools.CALLS, "COLUMNS(*)", "#1", "*", "count(*)"))
    return re.sub(r"\bselect\b", lambda found: f"{found[0]} {what},", sql, count=1, flags=re.IGNORECASE)


def multiply(random: Random, sql: str, _: Sequence[str]) -> str:
    """Something small, many times: seldom, for it costs the parser where nobody stops it."""
    if random.random() < 0.7:
        return sql
    opening, closing = random.choice(pools.DEEP)
    count = random.choice((24, 24, 70, 2_000))
    if opening == "/*":
        count *= 25
    columns = ", ".join(f"a{number} + a{number} AS a{number + 1}" for number in range(24))
    ctes = ", ".join(f"a{number + 1} AS (FROM a{number} p, a{number} q)" for number in range(24))
    return random.choice((
        f"SELECT {opening * count}1{closing * count}",
        f"SELECT {opening * count}1{closing * count}",
        f"SELECT {opening * count}1",
        f"{sql}{opening * count}",
        f"SELECT 1 AS a0, {columns}",
        f"WITH a0 AS (SELECT 1 AS x), {ctes} SELECT count(*) FROM a24",
    ))  # fmt: skip


def replace_string(random: Random, sql: str, _: Sequence[str]) -> str:
    """A string by a text that might be a name, as a literal, a parameter or a computed value."""
    return _replace(random, sql, lambda token: token[0] == "'" or token[:2] in ("e'", "E'"), _text(random, pools.TEXTS))


def replace_by_text(random: Random, sql: str, _: Sequence[str]) -> str:
    """A constant or a name by such a text, or by a type or a collation of that name."""
    text = random.choice(pools.TEXTS)
    name = '"' + text.replace('"', '""') + '"'
    by = random.choice((*(_text(random, pools.TEXTS) for _ in "ab"), f"NULL::{name}", f"'a' COLLATE {name}", name))
    return _replace(random, sql, lambda token: _is_name(token) or _CONSTANT.fullmatch(token), by)


def call_with_text(random: Random, sql: str, _: Sequence[str]) -> str:
    """One more column, or the only one: a call with such a text, of a function that takes one or of any that may be
    called."""
    kind = random.random()
    if kind < 0.35:
        call = _fill(random, random.choice(pools.TYPE_CALLS), pools.TYPE_TEXTS)
    elif kind < 0.6:
        call = _fill(random, random.choice(pools.NAME_CALLS), pools.NAME_TEXTS)
    elif kind < 0.85:
        call = _fill(random, random.choice(pools.TEXT_CALLS), pools.TEXTS)
    else:
        others = ["1", "'a'", "[1]", "['a']", "{'a': 1}", "'a'::BLOB", "DATE '2024-01-01'", "true", "0.5", "'{}'::JSON"]
        given = [random.choice(others) for _ in range(random.randint(0, 2))]
        given.insert(random.randint(0, len(given)), _text(random, pools.TEXTS))
        call = f"{random.choice(_CALLABLE)}({', '.join(given)})"
    told = random.choice(pools.TOLD).replace("{}", call) if random.random() < 0.6 else call
    if random.random() < 0.5:
        return f"SELECT {told} FROM orders LIMIT 1"
    return re.sub(r"\bselect\b", lambda found: f"{found[0]} {told},", sql, count=1, flags=re.IGNORECASE)


def read_from_text(random: Random, sql: str, _: Sequence[str]) -> str:
    """A relation, or the whole statement, by such a text or by a call in FROM that takes one."""
    texts = random.choice((pools.FILE_TEXTS, pools.FILE_TEXTS, pools.TEXTS))
    text = random.choice(texts)
    called = _fill(random, random.choice(pools.TEXT_CALLS_IN_FROM), texts)
    by = random.choice((_literal(text), '"' + text.replace('"', '""') + '"', called, called, called))
    if random.random() < 0.5:
        return f"SELECT * FROM {by}"
    return _replace(random, sql, lambda token: token.lower() in _RELATIONS, by)


def crash(random: Random, sql: str, _: Sequence[str]) -> str:
    """One more column that DuckDB does not survive, or a constant or a name replaced by it."""
    if random.random() < 0.5:
        return _replace(random, sql, lambda token: _is_name(token) or _CONSTANT.fullmatch(token), _crash(random))
    return re.sub(r"\bselect\b", lambda found: f"{found[0]} {_crash(random)},", sql, count=1, flags=re.IGNORECASE)


def _crash(random: Random) -> str:
    return random.choice(pools.CRASHES)


# Functions of expressions that are called by a name, not by a sign.
_CALLABLE = sorted(name for name in functions.listed("functions.txt") if name.isidentifier())


def _text(random: Random, texts: Sequence[str]) -> str:
    """An expression that is one of the texts: a literal, a parameter, or computed."""
    text = random.choice(texts)
    if random.random() < 0.2:
        return random.choice(("$p", "$q"))
    if random.random() < 0.7:
        return _literal(text)
    half = len(text) // 2
    shape = random.choice(pools.COMPUTED)
    if "{0}" in shape:
        return shape.format(_literal(text[:half]), _literal(text[half:]))
    return shape.replace("{}", _literal(text))


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _fill(random: Random, call: str, texts: Sequence[str]) -> str:
    """A call with a text in each of its places."""
    return call.format(*(_text(random, texts) for _ in range(call.count("{}"))))


_Mutation = Callable[[Random, str, Sequence[str]], str]

MUTATIONS: tuple[_Mutation, ...] = (
    replace_relation, replace_name, replace_function, replace_constant, splice, wrap_in_cte, shadow, wrap, combine,
    insert_blanks, requote, append_statement, change_statement, parameterize, nest, delete, duplicate, swap, qualify,
    cast, add_clause, add_column, multiply, replace_string, replace_by_text, call_with_text, read_from_text, crash,
)  # fmt: skip
