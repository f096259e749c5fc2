"""What the command says before any command runs: its version, and variables that nothing reads."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app, query, saved
from service.doctor import examine
from service.settings import Settings, find_unknown_variables

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "queryd",
    "telemetry",
    "processes",
    "db",
    "access",
    "results",
    "engines",
    "producers",
    "consumers",
    "replay",
    "service",
)
CANARY = "canary4711"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory of the test's own, and an environment without our variables, given back as it was."""
    before = dict(os.environ)
    for name in before:
        if name.upper().startswith("QUERYD_"):
            del os.environ[name]
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def test_the_version_is_the_packages() -> None:
    said = CliRunner().invoke(app, ["--version"])
    assert (said.exit_code, said.output) == (0, f"queryd {version('queryd')}\n")


def test_a_misspelt_setting_is_told_of_in_one_line_and_is_no_error() -> None:
    os.environ |= {"QUERYD_LEASE_SECOND": CANARY, "QUERYD_XYZZY": CANARY, "QUERYD_ORG": CANARY}
    said = CliRunner().invoke(app, ["run", "relay"])
    warning, _ = said.stderr.split("\n", 1)
    assert warning == (
        "queryd: ignored: QUERYD_LEASE_SECOND is no setting (QUERYD_LEASE_SECONDS is one); QUERYD_XYZZY is no setting"
    )
    assert CANARY not in said.output
    # What stops it is the setting that is missing.
    assert type(said.exception).__name__ == "WrongSetting"


def test_a_saved_query_runs_with_every_option_of_submit() -> None:
    taken_from_the_saved_query = {"sql", "saved"}
    submit, run = (inspect.signature(each).parameters for each in (query.submit, saved.run))
    assert set(run) - {"saved_query_id"} == set(submit) - taken_from_the_saved_query
    assert all(run[name].default == submit[name].default for name in set(run) - {"saved_query_id"})


def test_a_saved_query_passes_every_option_to_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, object] = {}
    monkeypatch.setattr(query, "submit", lambda **options: passed.update(options))
    saved.run("a saved query", org="an org", query_id="an id", inline=True)
    assert set(passed) == set(inspect.signature(saved.run).parameters) - {"saved_query_id"} | {"saved"}
    assert (passed["saved"], passed["query_id"], passed["inline"]) == ("a saved query", "an id", True)


def test_no_command_waits_for_the_import_of_pandas() -> None:
    # The demo's data brings pandas with it; it takes a fifth of a command's start.
    program = "import sys, service.cli; sys.exit('pandas' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


def test_without_one_nothing_is_said() -> None:
    assert CliRunner().invoke(app, ["db", "--help"]).stderr == ""


@pytest.mark.slow
def test_doctor_tells_of_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = "127.0.0.1:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{nobody}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr("service.doctor._SECONDS", 1)
    os.environ |= {
        "QUERYD_KAFKA_BOOTSTRAP": nobody,
        "QUERYD_DATA_URL": f"postgresql://{nobody}/data",
        "QUERYD_STATE_URL": f"postgresql://{nobody}/state",
        "QUERYD_RESULTS_URL": "s3://results",
        "QUERYD_SLOT_BATCH": CANARY,
    }
    findings = examine(Settings())
    (finding,) = (each for each in findings if each.what == "settings")
    assert finding.state == "warning"
    assert finding.advice == "QUERYD_SLOT_BATCH is no setting (QUERYD_SLOTS_BATCH is one): it is ignored"
    assert {each.what for each in findings if each.state == "wrong"} == {
        "kafka",
        "postgres data",
        "postgres state",
        "s3",
    }


def test_every_variable_that_our_code_names_is_known() -> None:
    named = {
        name
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for name in re.findall(r"\"(QUERYD_[A-Z][A-Z_]*[A-Z])\"", path.read_text(encoding="utf-8"))
    }
    assert named >= {"QUERYD_LIFELINE_FD", "QUERYD_FAILPOINTS", "QUERYD_READY_FILE", "QUERYD_ORG", "QUERYD_USER"}
    os.environ |= dict.fromkeys(named | {"QUERYD_TEST_BROKER"}, CANARY)
    assert find_unknown_variables() == {}
