"""What a dataset may be called, where it may lie, and whom it may be granted to."""

import pytest

from access.datasets import check_dataset, spell_pii_columns
from access.visibility import InvalidRegistration, read_grantee
from db.data.datasets import NewDataset
from queryd.events import Column

ORG = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
RESERVED = "s3://queryd/results/"


def _dataset(
    name: str = "sales", kind: str = "parquet", location: str = "s3://bucket/sales.parquet", **fields: str
) -> NewDataset:
    return NewDataset(
        org_id=ORG,
        user_id=fields.get("user_id"),
        name=name,
        kind=kind,
        location=location,
        visibility=fields.get("visibility", "org"),
        pii_columns=fields.get("pii_columns", "").split(),
    )


@pytest.mark.parametrize(
    "name",
    [
        "sales",
        "finance.invoices",
        "Order Details",
        "load",
        "Main",
        "x" * 63,
        f"{'s' * 63}.{'t' * 63}",
        "日本.売上",
        "it's",
        "a;b--",
        "duckdb_tables",
        "1",
        "$1",
        "memory",
        "a b.c d",
    ],
)
def test_a_name_is_what_sql_can_name_with_quotes(name: str) -> None:
    check_dataset(_dataset(name))


@pytest.mark.parametrize(
    "name",
    ["", ".", "a.", ".a", "a.b.c", "x" * 64, 'a"b', "a\nb", "a\0", " ", "a.\t", "a\u200bb", "\u202ea", "a\x7f"]
    + [f"{schema}.x" for schema in ("main", "MAIN", "memory", "temp", "System", "information_schema", "pg_catalog")]
    + ["__queryd_datasets", "__QUERYD.x", "x.__queryd"],
)
def test_no_name_can_shadow_or_hide(name: str) -> None:
    with pytest.raises(InvalidRegistration):
        check_dataset(_dataset(name))


@pytest.mark.parametrize(
    "path",
    [
        "sales.parquet",
        "sales/",
        "sales/*.parquet",
        "sales/year=2024/month=*/part-[0-9].parquet",
        "sales/**/*.parquet",
        "*.parquet",
        "a b/ü=%20/x",
        "o'brien/x.parquet",
        "results.parquet",
        "result/x*",
        "resultset/",
    ],
)
def test_a_location_is_a_file_a_folder_or_a_pattern(path: str) -> None:
    check_dataset(_dataset(location=f"s3://bucket/{path}"), RESERVED)


@pytest.mark.parametrize(
    "location",
    [
        "",
        "sales.parquet",
        "/etc/passwd",
        "http://host/x",
        "file:///x",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3://*/x",
        "s3://bu*ket/x",
        "s3://B/x",
        "s3://bucket//x",
        "s3://bucket/a/../b",
        "s3://bucket/..",
        "s3://bucket/./x",
        "s3://bucket/x?s3_endpoint=host",
        "s3://bucket/x#y",
        "s3://bucket/{a,b}",
        "s3://bucket/a\\b",
        "s3://bucket/a\nb",
    ],
)
def test_other_locations_are_refused(location: str) -> None:
    with pytest.raises(InvalidRegistration):
        check_dataset(_dataset(location=location))


@pytest.mark.parametrize(
    "path",
    ["results/x.parquet", "results/", "results/*/x", "*/x.parquet", "**", "res*/x", "[r]esults/x", f"results/{ORG}/**"],
)
def test_results_are_nobodys_dataset(path: str) -> None:
    check_dataset(_dataset(location=f"s3://bucket/{path}"), RESERVED)
    with pytest.raises(InvalidRegistration, match="results"):
        check_dataset(_dataset(location=f"s3://queryd/{path}"), RESERVED)


@pytest.mark.parametrize("location", ["shops", "a.b.c", "public.", ".shops", 'public."x"', "public.x\ny"])
def test_a_tables_location_is_schema_and_table(location: str) -> None:
    check_dataset(_dataset(kind="postgres", location="public.Order Details"))
    with pytest.raises(InvalidRegistration):
        check_dataset(_dataset(kind="postgres", location=location))


def test_a_private_dataset_has_a_user() -> None:
    check_dataset(_dataset(visibility="private", user_id=OTHER))
    with pytest.raises(InvalidRegistration, match="--user"):
        check_dataset(_dataset(visibility="private"))
    for visibility in ("", "Org", "role:", "role:A", f"org:{OTHER}"):
        with pytest.raises(InvalidRegistration, match="visibility"):
            check_dataset(_dataset(visibility=visibility))


@pytest.mark.parametrize(
    ("text", "grantee"),
    [
        (f"user:{OTHER}", f"user:{OTHER}"),
        (f"org:{OTHER.upper()}", f"org:{OTHER}"),
        (f"user:{ORG}", f"user:{ORG}"),
        ("role:analysts", "role:analysts"),
    ],
)
def test_a_grant_goes_to_a_user_a_role_or_another_org(text: str, grantee: str) -> None:
    assert read_grantee(text, ORG) == grantee


@pytest.mark.parametrize(
    "text", ["", "analysts", "role:", "role:A B", "user:me", f"org:{ORG}", f"team:{OTHER}", "public"]
)
def test_a_grant_goes_to_nobody_else(text: str) -> None:
    with pytest.raises(InvalidRegistration):
        read_grantee(text, ORG)


def test_pii_columns_are_spelled_as_the_dataset_spells_them() -> None:
    columns = tuple(Column(name, "VARCHAR") for name in ("Id", "E-Mail", "Ärger", "name", "NAME"))
    spelled = spell_pii_columns(_dataset(pii_columns="e-mail NAME id"), columns)
    assert spelled.pii_columns == ["E-Mail", "NAME", "Id"]
    for wrong in ("phone", "ärger", "e_mail"):
        with pytest.raises(InvalidRegistration, match=f"no column {wrong}; it has Id, E-Mail"):
            spell_pii_columns(_dataset(pii_columns=wrong), columns)
    with pytest.raises(InvalidRegistration, match="twice"):
        check_dataset(_dataset(pii_columns="id ID"))
