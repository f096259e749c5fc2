"""What an install brings: one top-level name with rooms and schemas inside, and a command that runs from anywhere."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("service", "consumers", "producers", "engines", "results", "access", "db", "processes", "telemetry")
# A caller's program with packages of its own that are named as ours.
PROGRAM = """
import db, schemas, queryd
from queryd import QueryClient
from queryd.codec import encode
from queryd.events import Mode, OrgId, QueryId, QueryRequested
assert db.WHOSE == schemas.WHOSE == "the caller's", (db.__file__, schemas.__file__)
assert encode(QueryRequested(QueryId({id!r}), OrgId({id!r}), Mode.BATCH, sql="SELECT 1"))[:2] == b"\\xc3\\x01"
print(queryd.__file__, QueryClient.__module__, sep="\\n")
"""
ID = "0c7f3a52-6c1e-4f0a-9d3b-2f5e8a1b4c6d"


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


def test_a_program_with_packages_named_db_and_schemas_imports_the_client(installed: Path, program_folder: Path) -> None:
    program = program_folder / "program.py"
    program.write_text(PROGRAM.format(id=ID), encoding="utf-8")
    where, module = _run(
        sys.executable, str(program), cwd=program_folder, environment=_environment(installed)
    ).splitlines()
    assert Path(where).is_relative_to(installed)
    assert module == "queryd.client"
