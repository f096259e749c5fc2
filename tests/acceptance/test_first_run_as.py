"""`make demo` from a clean clone as root in private folders and as an ordinary user, each with an install of its own.

Four minutes that need root: they run where `QUERYD_TEST_MATRIX=all` is set, as CI does.
"""

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.acceptance.clean_clone import MAKE_SECONDS, Clone
from tests.acceptance.test_first_run import HOSTILE, assert_passed, make_clone, running_in, wheels

__all__ = ["wheels"]

pytestmark = [
    pytest.mark.skipif(os.environ.get("QUERYD_TEST_MATRIX") != "all", reason="set QUERYD_TEST_MATRIX=all, as root"),
    pytest.mark.timeout(2 * MAKE_SECONDS),
]

# Exists wherever root does, and may enter nothing of root's.
_ORDINARY = "nobody"


@pytest.fixture(autouse=True, scope="module")
def root() -> None:
    assert os.geteuid() == 0, "QUERYD_TEST_MATRIX=all needs root"
    assert shutil.which("make") is not None, "QUERYD_TEST_MATRIX=all needs make"


@pytest.mark.slow
def test_the_demo_passes_as_root_in_a_private_folder(wheels: Path) -> None:
    with make_clone("private", mode=0o700) as folder:
        assert_passed(Clone(folder, wheels).run("make", "demo"))
        _assert_nothing_is_left(folder)


@pytest.mark.slow
def test_the_demo_passes_as_root_whose_files_are_private(wheels: Path) -> None:
    with make_clone("umask") as folder:
        assert_passed(Clone(folder, wheels, umask=0o077).run("make", "demo"))
        _assert_nothing_is_left(folder)


@pytest.mark.slow
def test_the_demo_passes_as_an_ordinary_user_with_every_variable_set(wheels: Path) -> None:
    with make_clone("ordinary", user=_ORDINARY) as folder:
        clone = Clone(folder, wheels, user=_ORDINARY)
        # Where pip finds its packages is the user's environment's affair.
        installed = clone.run("make", ".venv/demo-installed")
        assert installed.returncode == 0, installed.stderr
        assert_passed(clone.run("make", "demo", environment=HOSTILE))
        _assert_nothing_is_left(folder)


def _assert_nothing_is_left(folder: Path) -> None:
    """No process, and no socket of the demo's S3 server outside of the folder."""
    assert not running_in(folder)
    note = folder / ".queryd" / "demo" / "s3" / "ports"
    sockets = [path for port in note.read_text().split() for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock")]
    # A server that is killed with its supervisor leaves its socket, and another server may get the port. So sockets
    # that are older than the clone do not count, nor do those on which a server listens.
    cloned_at = folder.parent.stat().st_mtime
    ours = [path for path in sockets if path.stat().st_mtime >= cloned_at and not _is_listening(path)]
    assert not ours


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
