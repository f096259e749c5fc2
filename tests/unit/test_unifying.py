"""The type that holds the values of two."""

import duckdb
import pytest

from engines.duckdb.unifying import unify


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("BIGINT", "DOUBLE", "DOUBLE"),
        ("INTEGER", "BIGINT", "BIGINT"),
        ("UBIGINT", "BIGINT", "HUGEINT"),
        ("UTINYINT", "TINYINT", "SMALLINT"),
        ("FLOAT", "INTEGER", "DOUBLE"),
        ("DECIMAL(10,2)", "DECIMAL(12,4)", "DECIMAL(12,4)"),
        ("DECIMAL(10,2)", "DECIMAL(10,8)", "DECIMAL(16,8)"),
        ("DECIMAL(10,2)", "BIGINT", "DECIMAL(22,2)"),
        ("DECIMAL(10,2)", "DOUBLE", "DOUBLE"),
        ("DATE", "TIMESTAMP", "TIMESTAMP"),
        ("TIMESTAMP", "TIMESTAMP_NS", "TIMESTAMP_NS"),
        ("JSON", "VARCHAR", "VARCHAR"),
        ('"NULL"', "VARCHAR", "VARCHAR"),
        ("INTEGER[]", "DOUBLE[]", "DOUBLE[]"),
        ("STRUCT(a INTEGER)", "STRUCT(A BIGINT, b VARCHAR)", "STRUCT(a BIGINT, b VARCHAR)"),
        ("MAP(VARCHAR, INTEGER)", "MAP(VARCHAR, BIGINT)", "MAP(VARCHAR, BIGINT)"),
    ],
)
def test_the_wider_type_is_found_whichever_comes_first(one: str, other: str, both: str) -> None:
    types = [duckdb.sqltype(name) for name in (one, other)]
    assert str(unify(*types)) == both
    # A name is spelled as it was first.
    assert str(unify(types[1], types[0])).upper() == both.upper()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("VARCHAR", "BIGINT"),
        ("VARCHAR", "DATE"),
        ("BOOLEAN", "INTEGER"),
        ("BLOB", "VARCHAR"),
        ("TIMESTAMP", "TIMESTAMPTZ"),
        ("DECIMAL(38,0)", "DECIMAL(10,2)"),
        ("DECIMAL(18,2)", "DOUBLE"),
        ("HUGEINT", "DECIMAL(10,2)"),
        ("UHUGEINT", "BIGINT"),
        ("INTEGER[]", "VARCHAR[]"),
        ("INTEGER[]", "INTEGER"),
        ("STRUCT(a INTEGER)", "STRUCT(a VARCHAR)"),
    ],
)
def test_types_without_a_common_exact_type_have_no_unified_type(one: str, other: str) -> None:
    assert unify(duckdb.sqltype(one), duckdb.sqltype(other)) is None
    assert unify(duckdb.sqltype(other), duckdb.sqltype(one)) is None
