"""The variables that the embedded stack keeps from a shell, and how a shell reads `.queryd/env`."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from service.embedded.ports import pick_ports
from service.environment import (
    describe_stale_stack,
    find_sourced_stack,
    isolate,
    isolate_from_sourced_stack,
    read_env_file,
    write_env_lines,
)
from service.settings import load_env_file

VALUES = {
    "PLAIN": "postgresql://queryd:a-b_c@127.0.0.1:1234/data",
    "SPACE": "/a b/scratch",
    "LETTERS": "/Größe/数据",
    "QUOTES": """it's "so" `x` $HOME \\ #; & | <>*?~""",
    "EQUALS": "a=b=c",
    "EMPTY": "",
}


def test_a_shell_and_queryd_read_the_same_variables(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text(write_env_lines(VALUES), encoding="utf-8")
    assert read_env_file(path) == VALUES
    names = " ".join(f'"${name}"' for name in VALUES)
    script = f". '{path}'; printf '%s\\0' {names}"
    read = subprocess.run(["sh", "-euc", script], capture_output=True, env={}, check=True)
    assert read.stdout.decode().split("\0")[:-1] == list(VALUES.values())


def test_values_that_need_no_quotes_have_none() -> None:
    assert write_env_lines({"PLAIN": VALUES["PLAIN"]}) == f"PLAIN={VALUES['PLAIN']}\n"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment, to be changed: afterwards it is as it was."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return dict(os.environ)


_FOREIGN = (
    *(
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL_S3",
        "AWS_A_VARIABLE_OF_NEXT_YEAR",
        "PGSERVICE",
        "PGHOSTADDR",
    ),
    *(
        "https_proxy",
        "ALL_PROXY",
        "LC_ALL",
        "LANG",
        "SSL_CERT_FILE",
        "PYTHONPATH",
        "LD_PRELOAD",
        "WEED_JWT_SIGNING_KEY",
    ),
)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("settings", [True, False])
def test_only_named_variables_are_kept(settings: bool) -> None:
    os.environ.update(dict.fromkeys(_FOREIGN, "x") | {"QUERYD_SLOTS_BATCH": "3", "OTEL_SDK_DISABLED": "true"})
    os.environ.update({"PATH": "/bin", "COLUMNS": "60"})
    isolate(settings=settings)
    assert not set(_FOREIGN) & set(os.environ)
    assert (os.environ["PATH"], os.environ["COLUMNS"]) == ("/bin", "60")
    assert ("QUERYD_SLOTS_BATCH" in os.environ, "OTEL_SDK_DISABLED" in os.environ) == (settings, settings)
    assert os.environ["AWS_CONFIG_FILE"] == os.devnull


def _stack(folder: Path, port: int) -> dict[str, str]:
    """The folder of a stack, with the variables that its `.queryd/env` has; everything listens at one port."""
    (folder / "postgres").mkdir(parents=True)
    (folder / "postgres" / "password").write_text("secret-of-it")
    variables = {
        "QUERYD_KAFKA_BOOTSTRAP": f"127.0.0.1:{port}",
        "QUERYD_DATA_URL": f"postgresql://queryd:secret-of-it@127.0.0.1:{port}/data",
        "QUERYD_RESULTS_URL": "s3://queryd",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "OURS",
        "QUERYD_RELAY_TRANSACTIONS": "false",
        "QUERYD_SCRATCH": str(folder / "scratch"),
    }
    (folder / "env").write_text(write_env_lines(variables))
    return variables


@pytest.mark.usefixtures("environment")
def test_a_sourced_environment_is_known_by_its_folder_and_password(tmp_path: Path) -> None:
    variables = _stack(tmp_path / "a b" / ".queryd", 1)
    assert find_sourced_stack() is None
    os.environ.update(variables)
    assert find_sourced_stack() == tmp_path / "a b" / ".queryd"
    os.environ["QUERYD_DATA_URL"] = "postgresql://of-another@127.0.0.1:1/data"
    assert find_sourced_stack() is None


@pytest.mark.usefixtures("environment")
def test_a_stack_that_listens_is_not_called_stale_and_one_that_does_not_is(tmp_path: Path) -> None:
    folder = tmp_path / ".queryd"
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ.update(_stack(folder, server.getsockname()[1]))
        assert describe_stale_stack() is None
        (dead,) = pick_ports(1)
        # One server is away: the command says that best.
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{dead}"
        (folder / "env").write_text(write_env_lines({"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}))
        assert describe_stale_stack() is None
        # It listens elsewhere by now.
        (folder / "env").write_text("AWS_ENDPOINT_URL=http://127.0.0.1:2\n")
        assert "earlier start" in str(describe_stale_stack())
    (folder / "env").unlink()
    assert "is not running" in str(describe_stale_stack())


@pytest.mark.usefixtures("environment")
def test_up_in_a_shell_of_a_stack_takes_nothing_of_that_stack(tmp_path: Path) -> None:
    variables = _stack(tmp_path / ".queryd", 1)
    os.environ.update(variables | {"QUERYD_SLOTS_BATCH": "3"})
    isolate_from_sourced_stack()
    assert not set(variables) & set(os.environ)
    assert os.environ["QUERYD_SLOTS_BATCH"] == "3"


@pytest.mark.usefixtures("environment")
def test_up_keeps_a_kafka_that_the_user_has_named(tmp_path: Path) -> None:
    variables = _stack(tmp_path / ".queryd", 1)
    del variables["QUERYD_RELAY_TRANSACTIONS"]
    os.environ.pop("QUERYD_RELAY_TRANSACTIONS", None)
    os.environ.update(variables | {"QUERYD_KAFKA_BOOTSTRAP": "kafka.example:9092"})
    isolate_from_sourced_stack()
    assert os.environ["QUERYD_KAFKA_BOOTSTRAP"] == "kafka.example:9092"
    assert "QUERYD_DATA_URL" not in os.environ


@pytest.mark.usefixtures("environment")
def test_a_command_beside_a_stack_takes_all_of_its_file_or_what_the_user_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = _stack(tmp_path / ".queryd", 1)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("QUERYD_", "AWS_")):
            del os.environ[name]
    others = {"AWS_PROFILE": "x", "AWS_ACCESS_KEY_ID": "OF ANOTHER ACCOUNT", "HTTPS_PROXY": "http://127.0.0.1:1"}
    os.environ.update(others | {"QUERYD_RESULTS_URL": "s3://mine"})
    load_env_file()
    assert {name: os.environ[name] for name in others} == others
    del os.environ["QUERYD_RESULTS_URL"]
    load_env_file()
    assert {name: os.environ[name] for name in variables} == variables
    assert not {"AWS_PROFILE", "HTTPS_PROXY"} & set(os.environ)
