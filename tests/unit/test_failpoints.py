"""A failpoint does nothing until it is armed, and then ends the first process that passes it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from processes.failpoints import FAILPOINTS_VARIABLE, Failpoint

_PASS = "from processes.failpoints import Failpoint, failpoint\nfailpoint(Failpoint.CLAIM_AFTER)\n"


def _pass_by(folder: Path | None) -> int:
    environment = {name: value for name, value in os.environ.items() if name != FAILPOINTS_VARIABLE}
    if folder is not None:
        environment[FAILPOINTS_VARIABLE] = str(folder)
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", _PASS], env=environment, cwd=root, check=False).returncode


def test_an_armed_failpoint_ends_the_first_process_that_passes_it(tmp_path: Path) -> None:
    (tmp_path / Failpoint.CLAIM_AFTER).touch()
    assert _pass_by(tmp_path) == -signal.SIGKILL
    assert _pass_by(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_signal_is_what_the_file_names(tmp_path: Path) -> None:
    (tmp_path / Failpoint.CLAIM_AFTER).write_text("TERM\n", encoding="ascii")
    assert _pass_by(tmp_path) == -signal.SIGTERM


def test_without_the_variable_nothing_happens(tmp_path: Path) -> None:
    (tmp_path / Failpoint.CLAIM_AFTER).touch()
    assert _pass_by(None) == 0


def test_another_failpoint_that_is_armed_ends_nobody(tmp_path: Path) -> None:
    (tmp_path / Failpoint.RELAY_BEFORE).touch()
    assert _pass_by(tmp_path) == 0
