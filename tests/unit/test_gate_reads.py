"""Which personal data a statement reads for certain: never too little, and None in doubt."""

import pytest

from engines.duckdb.gate import Gate
from engines.protocol import Read, Relation, RelationKind

_PEOPLE = frozenset({"Name", "email"})
RELATIONS = (
    Relation("people", RelationKind.PARQUET, "s3://lake/people.parquet", "1", _PEOPLE),
    Relation("hr.staff", RelationKind.PARQUET, "s3://lake/staff.parquet", "1", frozenset({"phone", "name"})),
    Relation("orders", RelationKind.PARQUET, "s3://lake/orders.parquet", "1"),
)


@pytest.fixture(scope="module")
def judge() -> Gate:
    return Gate()


def _columns(judge: Gate, sql: str, relation: str) -> frozenset[str] | None:
    reads = {read.relation: read.columns for read in judge.judge(sql, RELATIONS, {}).reads}
    return reads[relation]


@pytest.mark.parametrize(
    ("sql", "columns"),
    [
        ("SELECT id FROM people", set()),
        ("SELECT count(*) FROM people", set()),
        ("SELECT name FROM people", {"Name"}),
        ("SELECT NAME, 1 FROM People p WHERE p.\"EMAIL\" LIKE '%x'", {"Name", "email"}),
        ("SELECT id FROM people ORDER BY email", {"email"}),
        ("SELECT id FROM people GROUP BY id HAVING max(name) > 'a' QUALIFY rank() OVER (ORDER BY email) = 1", _PEOPLE),
        ("SELECT * FROM people", _PEOPLE),
        ("FROM people", _PEOPLE),
        ("SELECT p.* FROM people p ORDER BY ALL", _PEOPLE),
        ("SELECT * EXCLUDE (name) FROM people", {"email"}),
        ("SELECT * EXCLUDE (NAME, email) FROM people", set()),
        ("SELECT upper(name), name.lower(), people.email.lower() FROM people", _PEOPLE),
        ("SELECT name.given FROM people", {"Name"}),
        ("SELECT id FROM (SELECT id, name FROM people) x", {"Name"}),
        ("SELECT name FROM (SELECT name FROM people) x", {"Name"}),
        ("WITH x AS (SELECT id, email FROM people) SELECT * FROM x", {"email"}),
        ("WITH people AS (SELECT name FROM people) SELECT * FROM people", {"Name"}),
        ("SELECT p.name, o.id FROM people p JOIN orders o ON o.id = p.id", {"Name"}),
        ("SELECT p.id, o.name FROM people p JOIN orders o ON o.id = p.id", set()),
        ("SELECT p.*, o.id FROM people p, orders o", _PEOPLE),
        ("SELECT id FROM orders WHERE id IN (SELECT people.id FROM people)", set()),
        ("SELECT name FROM people UNION SELECT status FROM orders", {"Name"}),
        ("SELECT id FROM people p JOIN orders USING (id)", set()),
        ("SELECT a.name FROM people a JOIN people b ON a.id = b.id", {"Name"}),
        ("SELECT (SELECT name) FROM people", {"Name"}),
        ("SELECT id FROM people, LATERAL (SELECT name) x", {"Name"}),
        ("SELECT 'name', $$email$$, id AS x FROM people", set()),
        ("SELECT sum(id) OVER (PARTITION BY email) FROM people", {"email"}),
    ],
)
def test_what_is_certain_is_told(judge: Gate, sql: str, columns: set[str]) -> None:
    assert _columns(judge, sql, "people") == frozenset(columns)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT people FROM people",
        # A schema or a catalog comes before an alias.
        "SELECT main.people.email, people.name FROM people, orders AS main",
        "SELECT memory.main.people.email FROM people, orders AS memory",
        "SELECT p FROM people p",
        "SELECT (p).name FROM people p",
        "SELECT p['name'] FROM people p",
        "SELECT to_json(people) FROM people",
        "SELECT count(people) FROM people",
        "SELECT main.people FROM people",
        "SELECT #1 FROM people",
        "SELECT a FROM people p(a, b)",
        "SELECT COLUMNS('n.*') FROM people",
        "SELECT COLUMNS(*) FROM people",
        "SELECT max(COLUMNS(['id'])) FROM people",
        "SELECT * REPLACE (1 AS name) FROM people",
        "SELECT * RENAME (name AS n) FROM people",
        "SELECT * LIKE 'n%' FROM people",
        "SELECT * EXCLUDE (people.name) FROM people",
        "SELECT name.* FROM people",
        "SELECT id FROM people WHERE COLUMNS(*) IS NOT NULL",
        "SELECT * FROM people NATURAL JOIN orders",
        "SELECT 1 FROM people JOIN orders USING (name)",
        "SELECT name FROM people, orders",
        "SELECT * FROM people, orders",
        "SELECT people.name FROM people, (SELECT 1 AS name) people",
        "SELECT name FROM people, unnest([1]) u",
        "SELECT id AS name FROM people ORDER BY name",
        "SELECT {'name': id}, name FROM people",
        "SELECT list_transform([1], lambda name: name) FROM people",
        "SELECT id FROM (SELECT * FROM people) x",
        "SELECT EXISTS (SELECT * FROM people)",
        "WITH x AS (FROM people) SELECT id FROM x",
        "FROM people PIVOT (count(*) FOR id IN (1))",
        "UNPIVOT people ON id INTO NAME k VALUE v",
        "SELECT (SELECT max(name) FROM orders) FROM people",
        "SELECT id FROM people UNION SELECT name FROM people, orders",
        "SELECT memory.main.people.name FROM people",
        "SELECT other.name FROM people",
        "SELECT name.email FROM people",
    ],
)
def test_what_is_in_doubt_is_not_told(judge: Gate, sql: str) -> None:
    columns = _columns(judge, sql, "people")
    # Where a part of a name is a struct's, telling the column itself is as right.
    assert columns is None or (sql == "SELECT other.name FROM people" and columns == frozenset())


def test_a_relation_with_a_schema_is_known_by_all_its_names(judge: Gate) -> None:
    for sql in (
        "SELECT hr.staff.phone FROM hr.staff",
        "SELECT staff.phone FROM HR.Staff",
        "SELECT phone FROM hr.staff",
    ):
        assert _columns(judge, sql, "hr.staff") == frozenset({"phone"})
    assert _columns(judge, "SELECT staff FROM hr.staff", "hr.staff") is None
    assert _columns(judge, "SELECT hr.staff FROM hr.staff", "hr.staff") is None
    joined = "SELECT people.name, hr.staff.phone FROM people JOIN hr.staff ON people.id = staff.id"
    assert judge.judge(joined, RELATIONS, {}).reads == (
        Read("hr.staff", frozenset({"phone"})),
        Read("people", frozenset({"Name"})),
    )


def test_only_relations_with_personal_data_are_told(judge: Gate) -> None:
    assert judge.judge("SELECT * FROM orders", RELATIONS, {}).reads == ()
    assert judge.judge("WITH people AS (SELECT 1 AS name) SELECT name FROM people", RELATIONS, {}).reads == ()


def test_a_struct_behind_the_name_of_another_source_is_no_escape(judge: Gate) -> None:
    """`email.host` is a column of the source `email`, or else a part of the struct `people.email`."""
    assert _columns(judge, "SELECT email.host FROM people, orders email", "people") is None
