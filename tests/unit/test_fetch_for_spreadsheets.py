"""`queryd fetch --csv-safe`: what it writes, and for which results."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from queryd.events import OutputFormat, Status
from service.cli import query
from tests.unit.samples import QUERY_ID

_BODY = b'name,n\r\n"=HYPERLINK(""http://x"",""y"")",-5\r\n'
_SAFE = b'\xef\xbb\xbfname,n\r\n"\'=HYPERLINK(""http://x"",""y"")",-5\r\n'


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A row of a succeeded query whose event has the result."""
    row = SimpleNamespace(query_id=QUERY_ID, status=Status.SUCCEEDED, output_format=OutputFormat.CSV)
    event = SimpleNamespace(inline_result=_BODY, output_location=None)
    monkeypatch.setattr(query, "_read_wanted", lambda _: (row, []))
    monkeypatch.setattr(query, "_read_event", lambda _row, _files: event)
    return row


@pytest.mark.usefixtures("fetched")
def test_a_csv_result_is_written_without_formulas(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    query.fetch(QUERY_ID, tmp_path / "safe.csv", csv_safe=True)
    assert (tmp_path / "safe.csv").read_bytes() == _SAFE
    assert [path.name for path in tmp_path.iterdir()] == ["safe.csv"]
    query.fetch(QUERY_ID, csv_safe=True)
    assert capfdbinary.readouterr().out == _SAFE


@pytest.mark.usefixtures("fetched")
def test_a_file_that_can_not_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        query.fetch(QUERY_ID, tmp_path / "nowhere" / "safe.csv", csv_safe=True)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("output_format", [OutputFormat.JSON, OutputFormat.PARQUET])
def test_a_result_in_another_format_is_refused(
    fetched: SimpleNamespace, output_format: OutputFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched.output_format = output_format
    with pytest.raises(SystemExit) as ended:
        query.fetch(QUERY_ID, csv_safe=True)
    assert ended.value.code == 2
    assert f"this result is {output_format}" in capsys.readouterr().err


def test_a_link_can_not_be_without_formulas(fetched: SimpleNamespace) -> None:
    with pytest.raises(SystemExit) as ended:
        query.fetch(QUERY_ID, csv_safe=True, link=True)
    assert ended.value.code == 2
