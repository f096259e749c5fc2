"""Which keys are a dataset's, and what their folders say."""

import pytest

from engines.duckdb.snapshot import Place, find_partitions, partition_values


@pytest.mark.parametrize(
    ("location", "key", "fits"),
    [
        ("s3://b/f/", "f/a.parquet", True),
        ("s3://b/f/", "f/x/y/a.parquet", True),
        ("s3://b/f/", "f/a.csv", False),
        ("s3://b/f/*/a.parquet", "f/x/a.parquet", True),
        ("s3://b/f/*/a.parquet", "f/x/y/a.parquet", False),
        ("s3://b/f/**/a.parquet", "f/a.parquet", True),
        ("s3://b/f/[ab].parquet", "f/b.parquet", True),
        ("s3://b/f/[!ab].parquet", "f/b.parquet", False),
        ("s3://b/f/2024-*", "f/2024-01.parquet", True),
        ("s3://b/f/**", "f/x/anything", True),
        # `+`, `?` and the like in a key mean themselves.
        ("s3://b/f/", "f/x?y+[a]*.parquet", True),
    ],
)
def test_a_key_fits_a_location(location: str, key: str, fits: bool) -> None:
    assert Place.of(location).matches(key) is fits


@pytest.mark.parametrize(
    ("location", "key", "hidden"),
    [
        ("s3://b/f/", "f/_temporary/a.parquet", True),
        ("s3://b/f/", "f/.staging/a.parquet", True),
        ("s3://b/f/", "f/x/_delta_log/a.parquet", True),
        ("s3://b/f/", "f/.a.parquet", True),
        ("s3://b/f/", "f/_a.parquet", True),
        ("s3://b/f/*/*.parquet", "f/_x/a.parquet", True),
        ("s3://b/f/", "f/a_b/c.d.parquet", False),
        # What the location says itself is meant.
        ("s3://b/_f/.g/", "_f/.g/a.parquet", False),
        ("s3://b/f/_*/a.parquet", "f/_x/a.parquet", False),
        ("s3://b/f/_*/*.parquet", "f/_x/.a.parquet", True),
    ],
)
def test_names_that_begin_with_an_underscore_or_a_dot_are_hidden(location: str, key: str, hidden: bool) -> None:
    assert Place.of(location).is_hidden(key) is hidden


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        (["7", "8"], "BIGINT"),
        (["7", "09"], "BIGINT"),
        (["01", "02"], "VARCHAR"),
        (["0", "1"], "BIGINT"),
        (["-1", "2"], "BIGINT"),
        (["7", "x"], "VARCHAR"),
        (["99999999999999999999"], "VARCHAR"),
        (["2024-01-31"], "DATE"),
        (["2024-01-31", "2024-02-31"], "VARCHAR"),
        (["2024-01-31%2012:00:00"], "TIMESTAMP"),
        (["__HIVE_DEFAULT_PARTITION__", "7"], "BIGINT"),
        (["NULL", "7", "null"], "BIGINT"),
        (["Null", "2024-01-31"], "DATE"),
        (["__HIVE_DEFAULT_PARTITION__"], "VARCHAR"),
    ],
)
def test_a_partition_columns_type_is_found_in_its_folders(values: list[str], type_: str) -> None:
    partitions, differing = find_partitions([partition_values(f"f/p={value}/a.parquet") for value in values])
    assert (partitions, differing) == ((("p", type_),), ())


def test_partition_columns_are_those_of_the_greater_part_and_several_sets_are_none() -> None:
    def find(*keys: str) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, ...], ...]]:
        return find_partitions([partition_values(key) for key in keys])

    assert find("m=7/a", "m=8/a", "readme") == ((("m", "BIGINT"),), ())
    assert find("a", "b", "m=7/a") == ((), ())
    assert find("m=7/a", "y=1/m=8/a") == ((), (("m",), ("m", "y")))
    assert find() == ((), ())


@pytest.mark.parametrize("folder", ["a=b=c", "a?=1", "a=1?x", "=1", "plain"])
def test_a_folder_that_duckdb_takes_for_no_partition_is_none(folder: str) -> None:
    assert partition_values(f"f/{folder}/a.parquet") == {}


@pytest.mark.parametrize("location", ["s3://b/org-a/", "s3://b/org-a/.*/*.parquet", "s3://b/org-a/.*/*/*.parquet"])
def test_a_key_with_a_part_that_http_takes_for_the_folder_above_is_not_read(location: str) -> None:
    for key in ("org-a/../x.parquet", "org-a/../org-b/x.parquet", "org-a/./x.parquet"):
        assert Place.of(location).is_hidden(key)
    assert not Place.of("s3://b/org-a/.*/*.parquet").is_hidden("org-a/.x/y.parquet")
