"""Sizes as people write them, in settings and on the command line."""

import os
from collections.abc import Iterator

import pytest

from service.settings import WrongSetting, load_settings
from service.sizes import read_size, show_size

_REQUIRED = {
    "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:1",
    "QUERYD_DATA_URL": "postgresql://127.0.0.1:1/data",
    "QUERYD_STATE_URL": "postgresql://127.0.0.1:1/state",
    "QUERYD_RESULTS_URL": "s3://queryd",
}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1073741824", 2**30),
        ("1GB", 10**9),
        ("1gb", 10**9),
        ("1GiB", 2**30),
        ("512MiB", 512 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("0.1kB", 100),
        ("9.007199254740993PB", 9_007_199_254_740_993),
        ("7 b", 7),
        ("2TB", 2 * 10**12),
    ],
)
def test_a_size_is_read_to_the_byte(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1G", "1 GX", "1,5GB", "1e9", "1.5", "0.0001kB", "१GB", "1GB 2", "nan", "0x10", "1" * 20]
)
def test_a_size_that_is_no_whole_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a"):
        read_size(text)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (2**30, "1 GiB"),
        (1024 * 2**30, "1 TiB"),
        (10**9, "1 GB"),
        (1536 * 2**20, "1,536 MiB"),
        (1500, "1,500 B"),
        (0, "0 B"),
    ],
)
def test_a_size_is_shown_with_its_unit_and_read_back(size: int, shown: str) -> None:
    assert show_size(size) == shown
    assert read_size(shown.replace(",", "")) == size


@pytest.fixture(autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    for name in before:
        if name.startswith("QUERYD_"):
            del os.environ[name]
    os.environ |= _REQUIRED
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("field", "text", "size"),
    [
        ("child_memory", "1GB", 10**9),
        ("child_memory", "1073741824", 2**30),
        ("scratch_bytes", "20 GiB", 20 * 2**30),
        ("org_bytes_scanned", "1TB", 10**12),
        ("org_result_bytes", "512MiB", 2**29),
    ],
)
def test_every_setting_that_is_a_size_takes_a_suffix(field: str, text: str, size: int) -> None:
    os.environ[f"QUERYD_{field.upper()}"] = text
    assert getattr(load_settings(), field) == size


@pytest.mark.parametrize(
    ("variable", "text", "sentence"),
    [
        ("QUERYD_CHILD_MEMORY", "1MB", "QUERYD_CHILD_MEMORY: must be at least 64 MiB"),
        ("QUERYD_CHILD_MEMORY", "plenty", "QUERYD_CHILD_MEMORY: must be a size"),
        ("QUERYD_SCRATCH_BYTES", "1kB", "QUERYD_SCRATCH_BYTES: must be at least 1 MiB"),
        ("QUERYD_ORG_RESULT_BYTES", "10 gigs", "QUERYD_ORG_RESULT_BYTES: must be a size"),
        ("QUERYD_RESULTS_URL", "s3://a/b", "QUERYD_RESULTS_URL: must be s3://bucket"),
    ],
)
def test_a_wrong_one_is_one_sentence_of_ours(variable: str, text: str, sentence: str) -> None:
    os.environ[variable] = text
    with pytest.raises(WrongSetting) as wrong:
        load_settings()
    assert str(wrong.value).startswith(sentence)
    assert "Value error" not in str(wrong.value)
