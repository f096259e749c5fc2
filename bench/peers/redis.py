"""Debian's redis-server: from the PATH, or unpacked from Debian's packages into `build/tools`."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.embedded.ports import LOOPBACK, accepts, pick_ports

# Unpacked, not installed, so that no rights are needed; with the libraries that a small image lacks.
_PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1")
_TOOLS = Path(__file__).resolve().parents[2] / "build" / "tools"
_START_SECONDS = 10.0
_LOOK_SECONDS = 0.05


class RedisMissing(RuntimeError):
    """There is no redis-server; the message says how to install it."""


@contextmanager
def run_redis() -> Iterator[str]:
    """A server in memory alone, for as long as the context lasts; its URL."""
    program, environment = _find()
    [port] = pick_ports(1)
    command = [program, "--bind", LOOPBACK, "--port", str(port), "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            latest = time.monotonic() + _START_SECONDS
            while not accepts(port):
                if time.monotonic() > latest or server.poll() is not None:
                    raise RedisMissing("redis-server did not start")
                time.sleep(_LOOK_SECONDS)
            yield f"redis://{LOOPBACK}:{port}/0"
        finally:
            server.kill()


def _find() -> tuple[str, dict[str, str]]:
    if (found := shutil.which("redis-server")) is not None:
        return found, dict(os.environ)
    unpacked = _TOOLS / "usr" / "bin" / "redis-server"
    if not unpacked.exists():
        _unpack()
    libraries = ":".join(str(folder) for folder in (_TOOLS / "usr" / "lib").iterdir())
    return str(unpacked), os.environ | {"LD_LIBRARY_PATH": libraries}


def _unpack() -> None:
    """Raises `RedisMissing` where Debian's tools or packages are out of reach."""
    _TOOLS.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "--quiet", *_PACKAGES], cwd=_TOOLS, check=True, capture_output=True)
        for package in _TOOLS.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", str(package), str(_TOOLS)], check=True, capture_output=True)
            package.unlink()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RedisMissing("redis-server is missing: apt-get install redis-server") from error
