"""Settings: where they come from, what a wrong one says, and what they never show."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from access.limits import OrgLimits
from queryd.events import Mode
from queryd.registry import registry_in_use, use
from service.settings import WrongSetting, load_settings
from service.wiring import reader_credentials

CANARY = "canary4711"
VALID = {
    "QUERYD_KAFKA_BOOTSTRAP": "localhost:9092",
    "QUERYD_DATA_URL": f"postgresql://queryd:{CANARY}@localhost/data",
    "QUERYD_STATE_URL": f"postgres://queryd:{CANARY}@localhost/state",
    "QUERYD_RESULTS_URL": "s3://results",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory of the test's own, and an environment without our variables, given back as it was."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("QUERYD_", "AWS_")):
            del os.environ[name]
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)
    use(None)


def _write_env_file(folder: Path, lines: dict[str, str]) -> None:
    (folder / ".queryd").mkdir()
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    (folder / ".queryd" / "env").write_text(text, encoding="utf-8")


def test_the_env_file_of_the_current_directory_is_read(folder: Path) -> None:
    _write_env_file(folder, VALID | {"AWS_REGION": "eu-central-1"})
    settings = load_settings()
    assert settings.kafka_bootstrap == "localhost:9092"
    assert settings.data_url.get_secret_value() == VALID["QUERYD_DATA_URL"]
    assert settings.bucket == "results"
    # boto3 reads only the second.
    assert os.environ["AWS_REGION"] == os.environ["AWS_DEFAULT_REGION"] == "eu-central-1"


def test_the_environment_goes_before_the_env_file(folder: Path) -> None:
    _write_env_file(folder, VALID)
    os.environ["QUERYD_KAFKA_BOOTSTRAP"] = "elsewhere:9092"
    os.environ["QUERYD_LEASE_SECONDS"] = "30"
    settings = load_settings()
    assert settings.kafka == {"bootstrap.servers": "elsewhere:9092"}
    assert settings.lease_seconds == 30.0


def test_a_value_with_an_equals_sign_is_read_whole(folder: Path) -> None:
    url = VALID["QUERYD_DATA_URL"] + "?options=-c%20x=y"
    _write_env_file(folder, VALID | {"QUERYD_DATA_URL": url})
    assert load_settings().data_url.get_secret_value() == url


def test_without_an_env_file_the_environment_is_enough() -> None:
    os.environ.update(VALID)
    settings = load_settings()
    assert settings.slots().keys() == set(Mode)
    assert settings.relay_transactions
    assert (settings.lease_seconds, settings.drain_seconds, settings.child_memory) == (15.0, 12.0, 1024**3)
    assert (settings.queue_timeout_interactive, settings.queue_timeout_batch) == (600.0, 86_400.0)


def test_an_org_without_limits_of_its_own_has_the_settings() -> None:
    os.environ.update(VALID)
    assert load_settings().org_limits() == OrgLimits(bytes_scanned=1024**4, result_bytes=10 * 1024**3)
    os.environ |= {"QUERYD_ORG_RUNNING_QUERIES": "2", "QUERYD_ORG_QUEUED_QUERIES": "3", "QUERYD_ORG_TIMEOUT": "4"}
    os.environ |= {"QUERYD_ORG_BYTES_SCANNED": "5", "QUERYD_ORG_RESULT_BYTES": "6", "QUERYD_ORG_RESULT_ROWS": "7"}
    assert load_settings().org_limits() == OrgLimits(1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("value", ["0", "-1", "2147483648", "1.5", "many"])
def test_a_limit_that_is_none_is_named(value: str) -> None:
    os.environ |= VALID | {"QUERYD_ORG_RUNNING_QUERIES": value}
    with pytest.raises(WrongSetting, match=r"^QUERYD_ORG_RUNNING_QUERIES: "):
        load_settings()


@pytest.mark.parametrize("name", VALID)
def test_a_missing_setting_is_named_with_what_to_do(name: str) -> None:
    os.environ.update(VALID)
    del os.environ[name]
    with pytest.raises(
        WrongSetting, match=f"^{name}: is not set. Run `queryd up` in this directory, or export {name}$"
    ):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("QUERYD_KAFKA_BOOTSTRAP", ""),
        ("QUERYD_KAFKA_OPTIONS", f"{{{CANARY}"),
        ("QUERYD_KAFKA_OPTIONS", f'["{CANARY}"]'),
        ("QUERYD_KAFKA_OPTIONS", f'{{"sasl.password": ["{CANARY}"]}}'),
        ("QUERYD_SCHEMA_REGISTRY_URL", f"ftp://{CANARY}"),
        ("QUERYD_SCHEMA_REGISTRY_OPTIONS", f"{{{CANARY}"),
        ("QUERYD_DATA_URL", f"mysql://{CANARY}"),
        ("QUERYD_STATE_URL", CANARY),
        ("QUERYD_DATASETS_PG_URL", CANARY),
        ("QUERYD_RESULTS_URL", f"s3://bucket/{CANARY}"),
        ("QUERYD_RESULTS_URL", "file:///results"),
        ("QUERYD_SLOTS_INTERACTIVE", "0"),
        ("QUERYD_SLOTS_BATCH", CANARY),
        ("QUERYD_CHILD_MEMORY", "1024"),
        ("QUERYD_LEASE_SECONDS", "0"),
        ("QUERYD_LEASE_SECONDS", "nan"),
        ("QUERYD_DRAIN_SECONDS", "-1"),
        ("QUERYD_RELAY_TRANSACTIONS", CANARY),
        ("QUERYD_SQL_HASH_KEY", CANARY),
        ("QUERYD_LOG_LEVEL", "LOUD"),
        ("QUERYD_KAFKA_GROUP_PROTOCOL", CANARY),
        ("QUERYD_PARTITIONS", "0"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line_and_never_quoted(name: str, value: str) -> None:
    os.environ.update(VALID | {name: value})
    with pytest.raises(WrongSetting) as caught:
        load_settings()
    sentence = str(caught.value)
    assert sentence.startswith(f"{name}: ")
    assert "\n" not in sentence
    assert CANARY not in sentence


def test_a_registry_sets_the_wire_format_and_a_wrong_option_is_told() -> None:
    os.environ |= VALID | {"QUERYD_SCHEMA_REGISTRY_URL": "mock://registry"}
    load_settings()
    assert registry_in_use() is not None
    os.environ["QUERYD_SCHEMA_REGISTRY_OPTIONS"] = f'{{"{CANARY}": 1}}'
    with pytest.raises(WrongSetting, match=r"^QUERYD_SCHEMA_REGISTRY_OPTIONS: ") as caught:
        load_settings()
    assert CANARY not in str(caught.value)
    del os.environ["QUERYD_SCHEMA_REGISTRY_URL"]
    load_settings()
    assert registry_in_use() is None


def test_no_secret_is_in_a_repr() -> None:
    os.environ.update(
        VALID
        | {
            "QUERYD_DATASETS_PG_URL": f"postgresql://reader:{CANARY}@localhost/data",
            "QUERYD_DATASETS_ACCESS_KEY_ID": "reader",
            "QUERYD_DATASETS_SECRET_ACCESS_KEY": CANARY,
            "QUERYD_DATASETS_SESSION_TOKEN": CANARY,
            "QUERYD_SQL_HASH_KEY": CANARY * 2,
            "QUERYD_SCHEMA_REGISTRY_URL": f"mock://user:{CANARY}@registry",
            "QUERYD_SCHEMA_REGISTRY_OPTIONS": f'{{"proxy": "http://user:{CANARY}@proxy"}}',
            "AWS_SECRET_ACCESS_KEY": CANARY,
        }
    )
    settings = load_settings()
    assert CANARY not in repr(settings)
    assert CANARY not in str(settings)
    assert reader_credentials(settings) == ("reader", CANARY, CANARY)


def test_the_results_bucket_may_end_in_a_slash() -> None:
    os.environ.update(VALID | {"QUERYD_RESULTS_URL": "s3://my-bucket.eu/"})
    assert load_settings().bucket == "my-bucket.eu"


def test_further_options_of_kafka_reach_every_client_and_never_replace_the_brokers() -> None:
    options = '{"security.protocol": "SSL", "bootstrap.servers": "elsewhere:1", "socket.keepalive.enable": true}'
    os.environ.update(VALID | {"QUERYD_KAFKA_OPTIONS": options, "QUERYD_KAFKA_SESSION_TIMEOUT": "6"})
    settings = load_settings()
    assert settings.kafka["security.protocol"] == "SSL"
    assert settings.kafka["bootstrap.servers"] == "localhost:9092"
    assert settings.group("executor") == {"group.id": "queryd-executor", "session.timeout.ms": 6_000}


def test_without_reading_credentials_the_services_own_are_used() -> None:
    os.environ.update(VALID | {"AWS_ACCESS_KEY_ID": "own", "AWS_SECRET_ACCESS_KEY": "secret"})
    assert reader_credentials(load_settings()) == ("own", "secret", None)


@pytest.mark.slow
def test_the_command_says_one_line_and_exits_2(folder: Path) -> None:
    os.environ.update(VALID)
    del os.environ["QUERYD_STATE_URL"]
    done = subprocess.run(
        [sys.executable, "-m", "queryd", "doctor"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "queryd: QUERYD_STATE_URL: is not set. Run `queryd up` in this directory, or export QUERYD_STATE_URL\n"
    )


@pytest.mark.usefixtures("folder")
def test_a_password_among_kafkas_options_is_in_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    _export(monkeypatch, {"QUERYD_KAFKA_OPTIONS": '{"sasl.password": "canary4711"}'})
    assert "canary4711" not in repr(load_settings())


@pytest.mark.usefixtures("folder")
def test_under_kip_848_no_session_timeout_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    _export(monkeypatch, {"QUERYD_KAFKA_GROUP_PROTOCOL": "consumer"})
    assert load_settings().group("executor") == {"group.id": "queryd-executor", "group.protocol": "consumer"}


@pytest.mark.usefixtures("folder")
def test_a_groups_protocol_has_a_setting_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _export(monkeypatch, {"QUERYD_KAFKA_OPTIONS": '{"group.protocol": "consumer"}'})
    with pytest.raises(WrongSetting, match="QUERYD_KAFKA_GROUP_PROTOCOL"):
        load_settings()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "value"),
    [("QUERYD_TIMEOUT_BATCH", "inf"), ("QUERYD_DRAIN_SECONDS", "nan"), ("QUERYD_DATASETS_ACCESS_KEY_ID", "alone")],
)
def test_a_value_without_sense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    _export(monkeypatch, {name: value})
    with pytest.raises(WrongSetting, match=name):
        load_settings()


def _export(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in (VALID | variables).items():
        monkeypatch.setenv(name, value)
