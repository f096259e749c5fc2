"""What an install brings: one top-level name with rooms and schemas inside, and a command that runs from anywhere."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import boto3
import pytest

from queryd.events import Column, OutputFormat, ResultFile
from service.embedded.object_store import ObjectStore
from tests.integration.queries import new_id
from tests.integration.records import prepare_topics
from tests.integration.stories import make_story, publish
from tests.servers.kafka import Kafka

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("service", "replay", "consumers", "producers", "engines", "results", "access", "db", "processes", "telemetry")
# A caller's program with packages of its own that are named as ours.
PROGRAM = """
import db, schemas, queryd
from queryd import QueryClient
assert db.WHOSE == schemas.WHOSE == "the caller's", (db.__file__, schemas.__file__)
print(queryd.__file__, QueryClient.__module__, sep="\\n")
with QueryClient.from_environment() as client:
    query = client.submit("SELECT 42 AS answer", org_id={id!r}, query_id={id!r}, output_format="csv")
    print(query.wait(60).status)
    print(query.result().to_pylist())
"""


def _run(*command: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout; where the build backend isn't installed, in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-isolation"]
    _run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel alone; what it depends on is found where the tests have it."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--root-user-action=ignore"]
    _run(sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture
def program_folder(tmp_path: Path) -> Path:
    """A caller's folder, with packages `db` and `schemas`, and one for each of our rooms besides."""
    for name in (*ROOMS, "schemas"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('WHOSE = "the caller\'s"\n', encoding="utf-8")
    return tmp_path


def _environment(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.mark.slow
def test_the_only_top_level_name_is_queryd(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top_level = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"queryd"}


def test_rooms_and_schemas_are_inside_and_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    expected = {
        f"queryd/_rooms/{path.relative_to(ROOT).as_posix()}" for room in ROOMS for path in (ROOT / room).rglob("*.py")
    }
    # What the gate lets SQL call stands in lists beside it.
    expected |= {f"queryd/_rooms/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "engines").rglob("*.txt")}
    expected |= {f"queryd/{path.relative_to(ROOT / 'queryd').as_posix()}" for path in (ROOT / "queryd").rglob("*.py")}
    expected |= {f"queryd/schemas/{path.name}" for path in (ROOT / "schemas").glob("*.avsc")}
    expected.add("queryd/py.typed")
    assert {name for name in packed if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_command_runs_from_a_folder_whose_packages_are_named_as_our_rooms(
    installed: Path, program_folder: Path
) -> None:
    help_text = _run(
        sys.executable, "-P", "-m", "queryd", "--help", cwd=program_folder, environment=_environment(installed)
    )
    assert "SQL by event" in help_text
    assert "doctor" in help_text


def test_the_rooms_of_an_install_are_its_own(installed: Path, program_folder: Path) -> None:
    # The same start as the command's, with a module of the caller's that says which rooms it sees.
    script = "import queryd.__main__ as m; m._open_rooms(); import service, db; print(service.__file__, db.__file__)"
    seen = _run(sys.executable, "-P", "-c", script, cwd=program_folder, environment=_environment(installed)).split()
    assert [Path(path).relative_to(installed).parts[:2] for path in seen] == [("queryd", "_rooms")] * 2


@pytest.mark.slow
def test_a_program_with_packages_named_db_and_schemas_submits_waits_and_reads(
    installed: Path, program_folder: Path, kafka: Kafka, object_store: ObjectStore
) -> None:
    config = prepare_topics(kafka)
    # The other side's part: the query has been run before, so that its story and its result are there.
    body = b"answer\r\n42\r\n"
    key = f"results/{new_id()}/result.csv"
    s3_settings = {
        "AWS_ENDPOINT_URL": object_store.endpoint_url,
        "AWS_REGION": object_store.region,
        "AWS_ACCESS_KEY_ID": object_store.writer.access_key,
        "AWS_SECRET_ACCESS_KEY": object_store.writer.secret_key,
    }
    boto3.client(
        "s3",
        endpoint_url=object_store.endpoint_url,
        region_name=object_store.region,
        aws_access_key_id=object_store.writer.access_key,
        aws_secret_access_key=object_store.writer.secret_key,
    ).put_object(Bucket=object_store.bucket, Key=key, Body=body)
    story = make_story(
        files=(ResultFile(key, len(body), 1, "etag", hashlib.sha256(body).hexdigest()),),
        output_location=f"s3://{object_store.bucket}/results/",
        output_format=OutputFormat.CSV,
        columns=(Column("answer", "INTEGER"),),
    )
    publish(config, *story)
    program = program_folder / "program.py"
    program.write_text(PROGRAM.format(id=story[0].query_id), encoding="utf-8")
    environment = _environment(installed) | s3_settings | {"QUERYD_KAFKA_BOOTSTRAP": kafka.bootstrap}
    where, module, status, rows = _run(
        sys.executable, "-W", "error", str(program), cwd=program_folder, environment=environment
    ).splitlines()
    assert Path(where).is_relative_to(installed)
    assert module == "queryd.client"
    assert (status, rows) == ("Succeeded", "[{'answer': 42}]")
