"""How a result is read: by whose credentials."""

from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest

from queryd.errors import ResultExpired
from queryd.events import OutputFormat, QueryStatusChanged, ResultFile
from queryd.results import ResultReader
from tests.unit.samples import NOW, QUERY_ID, make_status


def test_a_reader_takes_the_credentials_that_stand_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process there may be readers of several stores."""
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in ("first", "second"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
        assert f"X-Amz-Credential={name}%2F" in ResultReader().link("s3://bucket/results/", "key")


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> ResultReader:
    for name, value in (("REGION", "us-east-1"), ("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(f"AWS_{name}", value)
    return ResultReader()


def _make_event(lasts: timedelta, keys: tuple[str, ...] = ("result.csv",)) -> QueryStatusChanged:
    return make_status(
        output_format=OutputFormat.CSV,
        output_location="s3://bucket/results/",
        files=tuple(ResultFile(f"results/{key}", 1, 1, "etag") for key in keys),
        expires_at=datetime.now(UTC) + lasts,
        occurred_at=NOW,
    )


@pytest.mark.parametrize(
    ("lasts", "least", "most"),
    [(timedelta(seconds=45), 40, 45), (timedelta(minutes=59), 3_535, 3_540), (timedelta(days=7), 3_600, 3_600)],
)
def test_a_link_is_good_for_an_hour_but_no_longer_than_the_result(
    reader: ResultReader, lasts: timedelta, least: int, most: int
) -> None:
    [link] = reader.links(_make_event(lasts))
    assert least <= int(parse_qs(urlsplit(link).query)["X-Amz-Expires"][0]) <= most


def test_a_result_that_has_expired_has_no_link(reader: ResultReader) -> None:
    with pytest.raises(ResultExpired):
        reader.links(_make_event(timedelta(seconds=-1)))


def test_a_browser_saves_linked_files_under_distinct_names(reader: ResultReader) -> None:
    def names(*keys: str) -> list[str]:
        links = reader.links(_make_event(timedelta(days=1), keys))
        return [parse_qs(urlsplit(link).query)["response-content-disposition"][0] for link in links]

    stem = f"query-2026-03-29-{QUERY_ID[:8]}"
    assert names("result.csv") == [f'attachment; filename="{stem}.csv"']
    assert names("part-1.parquet", "part-2.parquet") == [
        f'attachment; filename="{stem}-{number}.parquet"' for number in (1, 2)
    ]
