"""docker-compose.yml and the Dockerfile: what can be held without Docker."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from service.cli import app
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMAGE = f"queryd:{PROJECT['project']['version']}"
FILE: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"] == IMAGE)
ONCE = sorted(name for name, service in SERVICES.items() if service["restart"] == "no")
STAYING = sorted(SERVICES.keys() - set(ONCE))
# `${NAME:-default}`, and `$$`, which is a `$`.
VARIABLE = re.compile(r"(?<!\$)\$(?!\$)(\{(\w+):-([^}]*)\})?")


def _texts(value: Any) -> list[str]:
    """Every string in a part of the file."""
    match value:
        case dict():
            return [text for part in value.values() for text in _texts(part)]
        case list():
            return [text for part in value for text in _texts(part)]
        case _:
            return [str(value)]


def test_it_has_what_queryd_needs_and_what_it_is() -> None:
    assert set(STAYING) == {"kafka", "data", "state", "store", "s3", "executor", "relay", "projector"}
    assert set(ONCE) == {"upgrade", "platform", "topics", "bucket", "cli"}
    assert SERVICES["executor"]["scale"] >= 2
    assert SERVICES["relay"]["scale"] == 2


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_whatever_stays_has_a_health_check_and_the_rest_has_none(name: str) -> None:
    service = SERVICES[name]
    if name in ONCE:
        assert service["healthcheck"] == {"disable": True}
    elif name in OURS:
        assert "healthcheck" not in service
        assert "\nHEALTHCHECK " in DOCKERFILE
    else:
        assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_nothing_starts_before_what_it_needs(name: str) -> None:
    waits_for: dict[str, dict[str, str]] = SERVICES[name].get("depends_on", {})
    for other, waiting in waits_for.items():
        wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert waiting == {"condition": wanted}, other
    if name in OURS and name in STAYING:
        assert waits_for.keys() >= {"kafka", "data", "state", "s3", "upgrade", "topics", "bucket"}
    assert ("platform" in waits_for) == (name == "projector")


def test_one_service_builds_the_image_and_every_queryd_service_waits_for_it() -> None:
    """Compose builds services in parallel: two that export one tag fail with "already exists"."""
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert built == [IMAGE]
    # Compose would look for it in Docker's registry before it builds it.
    assert all(SERVICES[name]["pull_policy"] == "never" for name in OURS)
    assert all("pull_policy" not in SERVICES[name] for name in SERVICES.keys() - set(OURS))
    # What is started alone brings the service that builds along.
    [builder] = [name for name, service in SERVICES.items() if "build" in service]
    assert all(builder in SERVICES[name]["depends_on"] for name in [*(set(OURS) & set(STAYING)), "cli"])


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_image_is_of_a_fixed_version(name: str) -> None:
    image = SERVICES[name]["image"]
    assert re.fullmatch(r"[a-z]+(/[a-z]+)?:[0-9]+\.[0-9]+(\.[0-9]+)?(-alpine)?", image)
    assert (image == IMAGE) == (name in OURS)


def test_every_stage_of_our_image_is_of_a_fixed_version() -> None:
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(stages) == 2
    assert all(re.fullmatch(r"python:3\.1[12]\.[0-9]+-slim-[a-z]+", stage) for stage in stages), stages


@pytest.mark.parametrize("place", ["tests/kafka/pom.xml", "tests/kafka/tools/pom.xml"])
def test_kafka_is_the_version_that_the_tests_run_on(place: str) -> None:
    space = {"m": "http://maven.apache.org/POM/4.0.0"}
    pom = ElementTree.parse(ROOT / place)  # noqa: S314 — a file of ours
    versions = {
        each.findtext("m:groupId", None, space): each.findtext("m:version", None, space)
        for each in pom.iterfind("m:dependencies/m:dependency", space)
    }
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{versions['org.apache.kafka']}"


def test_the_s3_server_is_the_version_that_the_tests_run_on() -> None:
    (pinned,) = (each for each in PROJECT["project"]["optional-dependencies"]["embedded"] if "seaweedfs" in each)
    assert SERVICES["store"]["image"] == f"chrislusf/seaweedfs:{pinned.partition('==')[2]}"


def test_our_services_are_told_settings_that_exist() -> None:
    settings = {f"QUERYD_{field.upper()}" for field in Settings.model_fields}
    told = {name for service in OURS for name in SERVICES[service]["environment"]}
    told |= set(re.findall(r"\b(QUERYD_[A-Z_]+)=", DOCKERFILE))
    assert told >= {"QUERYD_DATA_URL", "QUERYD_SCRATCH", "QUERYD_HTTP_PORT"}
    assert {name for name in told if name.startswith("QUERYD_")} <= settings
    assert {name for name in told if not name.startswith(("QUERYD_", "OTEL_"))} == {
        "AWS_ACCESS_KEY_ID",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_SECRET_ACCESS_KEY",
    }


def test_the_settings_are_valid_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("QUERYD_")]:
        monkeypatch.delenv(name)
    for name, value in SERVICES["executor"]["environment"].items():
        if value is not None:
            monkeypatch.setenv(name, VARIABLE.sub(lambda found: found[3], str(value)))
    settings = Settings()
    assert settings.bucket == "queryd"
    assert settings.datasets_access_key_id is not None


# Settings that a container gets otherwise: from the image, or from another service's name and port.
_FIXED = {"SCRATCH", "HTTP_HOST", "HTTP_PORT", "RELAY_TRANSACTIONS"}


@pytest.mark.parametrize("name", OURS)
def test_every_setting_passes_through_and_is_unset_by_default(name: str) -> None:
    told: dict[str, str | None] = SERVICES[name]["environment"]
    assert told.keys() >= {f"QUERYD_{field.upper()}" for field in Settings.model_fields if field.upper() not in _FIXED}
    given = {variable for variable, value in told.items() if value is not None}
    passed_on = told.keys() - given
    # An empty text would be a wrong value of nearly every one of them.
    assert all(variable.startswith(("QUERYD_", "OTEL_")) for variable in passed_on)
    assert not [variable for variable in passed_on if variable.startswith("QUERYD_") and _is_required(variable)]


def _is_required(variable: str) -> bool:
    return Settings.model_fields[variable.removeprefix("QUERYD_").lower()].is_required()


def test_the_time_to_stop_is_longer_than_the_drain() -> None:
    # What still runs is handed back, and the group left, in a few seconds; twice the drain is plenty.
    drain = float(Settings.model_fields["drain_seconds"].default)
    for name in set(OURS) & set(STAYING):
        grace = VARIABLE.sub(lambda found: found[3], SERVICES[name]["stop_grace_period"])
        assert SERVICES[name]["environment"]["QUERYD_DRAIN_SECONDS"] == f"${{QUERYD_DRAIN_SECONDS:-{drain:.0f}}}"
        assert float(grace.removesuffix("s")) >= 2 * drain


def test_every_secret_can_be_overridden_and_none_comes_from_the_users_own_aws() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|KEY_ID", variable):
                assert VARIABLE.fullmatch(value), (name, variable)
            if value is not None and variable.endswith("_URL") and variable.startswith("QUERYD_D"):
                assert "PASSWORD:-" in value
    read = {found[1] for text in _texts(FILE) for found in VARIABLE.findall(text)}
    # Every `$` is one of `${NAME:-default}`.
    assert "" not in read
    assert not {name for name in read if name.startswith("AWS_")}


def test_every_port_is_on_loopback_and_can_be_moved() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            if name in OURS:
                # A free one for each container: a fixed one fails for the second, as does a range.
                assert port == "127.0.0.1::8080"
            else:
                assert "scale" not in service
                assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z0-9]+_PORT:-[0-9]+\}:[0-9]+", port), name


def test_health_and_metrics_of_every_service_are_published() -> None:
    port = re.search(r"QUERYD_HTTP_PORT=(\d+)", DOCKERFILE)
    assert port is not None
    for name in set(OURS) & set(STAYING):
        assert SERVICES[name]["ports"] == [f"127.0.0.1::{port[1]}"], name


def test_nothing_that_runs_sql_reaches_the_store_but_by_the_port_that_asks_for_a_key() -> None:
    """The S3 server's master, volumes, filer and gRPC ports ask for none, and listen on the network `store`."""
    assert set(FILE["networks"]) == {"default", "store"}
    assert {name for name, service in SERVICES.items() if "store" in service.get("networks", ())} == {"store", "s3"}
    assert SERVICES["store"]["networks"] == ["store"]
    assert "ports" not in SERVICES["store"]
    assert not [name for name in SERVICES if "network_mode" in SERVICES[name] or "extra_hosts" in SERVICES[name]]
    assert SERVICES["s3"]["volumes"] == ["./deploy/s3-port.conf:/etc/nginx/nginx.conf:ro"]
    passed_on = (ROOT / "deploy" / "s3-port.conf").read_text(encoding="utf-8")
    assert re.findall(r"^\s*(?:listen|default|proxy_pass) (\S+);", passed_on, re.MULTILINE) == [
        "store:8333",
        "8333",
        "$store",
    ]
    script = (ROOT / "deploy" / "s3.sh").read_text(encoding="utf-8")
    assert "-s3.port=8333" in script
    assert SERVICES["executor"]["environment"]["AWS_ENDPOINT_URL"] == "http://s3:8333"


def test_what_is_durable_lies_in_named_volumes() -> None:
    mounted = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert {each for each in mounted if not each.startswith("./")} == FILE["volumes"].keys()
    assert all((ROOT / each).exists() for each in mounted if each.startswith("./"))
    scratch = re.search(r"QUERYD_SCRATCH=(\S+)", DOCKERFILE)
    assert scratch is not None
    assert SERVICES["executor"]["volumes"] == [f"scratch:{scratch[1]}"]
    # A VOLUME of the image would be an anonymous one of every container that mounts nothing there.
    assert "\nVOLUME" not in DOCKERFILE
    assert SERVICES["data"]["volumes"] == ["data:/var/lib/postgresql"]
    assert SERVICES["kafka"]["volumes"] == [f"kafka:{SERVICES['kafka']['environment']['KAFKA_LOG_DIRS']}"]


def test_the_clusters_id_is_one_that_kafka_takes() -> None:
    found = VARIABLE.fullmatch(SERVICES["kafka"]["environment"]["CLUSTER_ID"])
    assert found is not None
    # 16 bytes in URL-safe base64 without padding.
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", found[3])


@pytest.mark.parametrize("name", OURS)
def test_our_commands_exist(name: str) -> None:
    command = SERVICES[name].get("command", [])
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0, shown.output


def test_the_image_runs_as_a_user_and_installs_what_is_pinned() -> None:
    assert re.search(r"^USER [1-9][0-9]*:[1-9][0-9]*$", DOCKERFILE, re.MULTILINE)
    assert DOCKERFILE.index("\nUSER ") < DOCKERFILE.index("\nENTRYPOINT ")
    assert "-c constraints.txt" in DOCKERFILE
    assert 'ENTRYPOINT ["queryd"]' in DOCKERFILE
    # A volume that is mounted there for the first time gets the folder's owner.
    assert "install -d -o queryd -g queryd -m 0700 /var/lib/queryd /var/lib/queryd/scratch" in DOCKERFILE


def test_the_health_check_is_a_command_that_python_can_read() -> None:
    found = re.search(r"^HEALTHCHECK .*?\\\n\s+CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    python, option, program = json.loads(found[1])
    assert (python, option) == ("python", "-c")
    compile(program, "HEALTHCHECK", "exec")
    assert "/livez" in program


def test_the_builder_gets_what_the_wheel_is_made_of_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sent == {*wheel["packages"], *wheel["force-include"], "pyproject.toml", "constraints.txt", "README.md"}
    assert not any(fnmatch.fnmatch(secret, each) for secret in (".queryd", ".env", ".git", ".venv") for each in sent)


@pytest.mark.parametrize("name", [".env", ".env.local", ".queryd/env"])
def test_git_ignores_files_with_passwords(name: str) -> None:
    rules = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert any(fnmatch.fnmatch(name.partition("/")[0], rule.rstrip("/")) for rule in rules if not rule.startswith("#"))


def test_docker_compose_takes_it() -> None:
    command = _find_compose()
    if command is None:
        pytest.skip("needs docker compose: install Docker's plugin, or the package docker-compose")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "S3_"))}
    shown = subprocess.run(
        [*command, "--file", str(COMPOSE), "--profile", "cli", "config"],
        env=environment | {"DATA_PASSWORD": "canary4711", "QUERYD_SCHEMA_REGISTRY_URL": "http://registry:8081"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    resolved = yaml.safe_load(shown.stdout)
    assert resolved["services"].keys() == SERVICES.keys()
    environment_of_relay = resolved["services"]["relay"]["environment"]
    assert environment_of_relay["QUERYD_DATA_URL"] == "postgresql://queryd:canary4711@data:5432/data"
    assert environment_of_relay["QUERYD_STATE_URL"] == "postgresql://queryd:queryd@state:5432/state"
    assert environment_of_relay["QUERYD_SCHEMA_REGISTRY_URL"] == "http://registry:8081"
    assert environment_of_relay.get("QUERYD_SCHEMA_REGISTRY_OPTIONS") is None


def _find_compose() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        asked = subprocess.run([*command, "version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return command
    return None
