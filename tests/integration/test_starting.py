"""A service that waits for what it needs before it works is ended by SIGTERM, also as process 1."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.run import Service

_NOBODY = "postgresql://nobody@127.0.0.1:1/data"


@pytest.fixture
def waiting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A service whose database is away, from when it has said so."""
    environment = os.environ | {
        "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "QUERYD_DATA_URL": _NOBODY,
        "QUERYD_STATE_URL": _NOBODY,
        "QUERYD_RESULTS_URL": "s3://results",
        "AWS_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "queryd", "run", request.param]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert any("dependency_unavailable" in line for line in process.stderr)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("waiting", list(Service), indirect=True)
def test_a_service_that_waits_for_its_database_ends_at_sigterm(waiting: "subprocess.Popen[str]") -> None:
    waiting.send_signal(signal.SIGTERM)
    # By its own hand: what the default action ends, process 1 of a container would ignore.
    assert waiting.wait(30) == 128 + signal.SIGTERM
