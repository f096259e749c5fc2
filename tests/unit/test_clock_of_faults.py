"""The fault runs' wall clock reaches the process that it is set for and no child of it."""

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

_CLOCK = Path(__file__).parents[1] / "faults" / "clock"
_TELL = "import time, datetime; print(time.time(), datetime.datetime.now().timestamp())"
# Starts a child as our services do, with an environment that says nothing of the clock.
_START = f"import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', {_TELL!r}, sys.argv[1]], env={{}})"


@pytest.mark.parametrize(
    ("command", "hours"),
    [([_TELL], 1), ([_START, "engines.duckdb.child"], 0)],
)
def test_a_shift_reaches_a_service_and_no_child(command: list[str], hours: int, tmp_path: Path) -> None:
    file = tmp_path / "clock"
    file.write_bytes(struct.pack("d", 3600.0))
    environment = os.environ | {"FAULTS_CLOCK": str(file), "PYTHONPATH": str(_CLOCK)}
    done = subprocess.run(
        [sys.executable, "-c", *command], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert [float(told) - time.time() for told in done.stdout.split()] == pytest.approx([hours * 3600.0] * 2, abs=60.0)
