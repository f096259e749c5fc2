"""`make` with a virtual environment that another Python or another place has left: a sentence, not a stack trace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = ".venv was made by another Python, or in another place: make clean, and then this again\n"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our Makefile and an environment in which `queryd` says what it was asked."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    # What pip would leave there, without the seconds that it takes.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (library,) = (folder / ".venv" / "lib").glob("python3.*/site-packages")
    (library / "pip").mkdir()
    (library / "pip" / "__init__.py").touch()
    (folder / ".venv" / "bin" / "pip").write_text(f"#!{folder}/.venv/bin/python3\n", encoding="utf-8")
    command = folder / ".venv" / "bin" / "queryd"
    command.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    (folder / ".venv" / "demo-installed").touch()
    return folder


def _make(folder: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    # Not as part of the make that runs these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    return subprocess.run(
        ["make", "--silent", *targets], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_an_environment_of_this_python_and_place_is_used(made: Path) -> None:
    done = _make(made, "demo")
    assert (done.returncode, done.stdout) == (0, "demo\n")


def test_a_moved_one_is_refused(made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(made, moved, symlinks=True)
    done = _make(moved, "demo")
    assert done.returncode != 0
    assert done.stderr.startswith(SENTENCE)
    assert done.stdout == ""


def test_one_whose_python_is_gone_is_refused_and_make_clean_mends_it(made: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(made, broken, symlinks=True)
    for python in (broken / ".venv" / "bin").glob("python*"):
        python.unlink()
    (broken / ".venv" / "bin" / "python").symlink_to(broken / "python-that-was")
    assert _make(broken, "demo").stderr.startswith(SENTENCE)
    assert _make(broken, "clean").returncode == 0
    assert not (broken / ".venv").exists()
    assert _make(broken, "usable").returncode == 0


def test_one_of_another_python_is_refused(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made, other, symlinks=True)
    (library,) = (other / ".venv" / "lib").glob("python3.*")
    library.rename(library.with_name("python3.1"))
    assert _make(other, "demo").stderr.startswith(SENTENCE)
