"""Starts the real command line, `queryd up`, in a folder of its own, and ends it with real signals."""

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Self

import psutil

from tests.acceptance.stranger import Servers

# A first start makes two databases and starts five servers; on a loaded machine with two cores that takes a while.
READY_SECONDS = 60.0
# The promise: SIGTERM to the group ends everything within 15 s.
END_SECONDS = 15.0
# `up` notices a dead service and starts it again; an interpreter with its imports takes seconds on a loaded machine.
RESTART_SECONDS = 60.0
# Pid files change by a rename that nothing announces: look this often.
_LOOK_SECONDS = 0.05
_TAIL_LINES = 60


class Stack:
    """A running `queryd up`. Services are named as their pid files: executor, relay, projector."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.log = folder / "up.stderr"
        self._environment = _clean_environment() | settings
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "queryd", "up"],
                cwd=folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                # A group of its own, so that a signal to the group is a signal to queryd alone.
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self._lines = _read_lines(self.process.stdout)

    def await_ready(self) -> Self:
        """Wait for the line `ready`; raises TimeoutError, or RuntimeError where `up` ended before it."""
        latest = time.monotonic() + READY_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, latest - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no line `ready` within {READY_SECONDS:.0f} s\n{self.log_tail()}") from None
            if line is None:
                raise RuntimeError(f"`queryd up` ended with {self.process.wait()}\n{self.log_tail()}")
            if line == "ready\n":
                return self

    @property
    def servers(self) -> Servers:
        """Where everything is, as `.queryd/env` says."""
        return Servers.from_env_file(self.folder / ".queryd" / "env")

    def queryd(self, *arguments: str) -> str:
        """Run a queryd command in the stack's folder and return its stdout; raises when it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "queryd", *arguments],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RESTART_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"`queryd {arguments[0]}` ended with {done.returncode}\n{done.stderr}")
        return done.stdout

    def pid_of(self, service: str) -> int | None:
        """The service's pid; None while its file is missing or being written."""
        try:
            text = (self.folder / ".queryd" / "run" / f"{service}.pid").read_text()
        except FileNotFoundError:
            return None
        return int(text) if text else None

    def kill(self, service: str) -> int:
        """`kill -9` the service and return the pid that it had."""
        pid = self.pid_of(service)
        ours = {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        # A stale file could name a stranger's process by now.
        assert pid is not None and pid in ours, (
            f"the pid file of {service} names {pid}, which is no process of this stack"
        )
        os.kill(pid, signal.SIGKILL)
        return pid

    def await_restart(self, service: str, killed: int) -> None:
        """Wait until `up` has started the service again; raises TimeoutError."""
        latest = time.monotonic() + RESTART_SECONDS
        while True:
            pid = self.pid_of(service)
            if pid not in (None, killed) and psutil.pid_exists(pid):
                return
            if time.monotonic() > latest:
                raise TimeoutError(f"{service} was not started again\n{self.log_tail()}")
            time.sleep(_LOOK_SECONDS)

    def end(self) -> list[str]:
        """SIGTERM to the group; returns what is left 15 s later (killed then), and so ideally nothing."""
        latest = time.monotonic() + END_SECONDS
        started = [process for process in psutil.process_iter() if self._is_ours(process)]
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        # Not psutil's own wait: it fails where a process ends between two of its steps.
        while any(process.is_running() for process in started) and time.monotonic() < latest:
            time.sleep(_LOOK_SECONDS)
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        found = [_describe(process) for process in left]
        for process in left:
            process.kill()
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        """True for a process that works in our folder or has it on its command line."""
        folder = str(self.folder)
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return Path(process.cwd()).is_relative_to(folder) or any(folder in part for part in process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def log_tail(self) -> str:
        """The last lines of what `up` wrote to stderr."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"{process.pid}: just gone"


def _clean_environment() -> dict[str, str]:
    """Our own environment without anything that would point queryd at other servers."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("QUERYD_", "AWS_"))}


def _read_lines(stream: IO[str]) -> "queue.Queue[str | None]":
    """The stream's lines as they come, then None. The thread also keeps the pipe from filling."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with stream:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


@contextmanager
def run_stack(bootstrap: str | None = None) -> Iterator[Stack]:
    """A stack that is ready, in a fresh folder: with its own embedded broker, or on the Kafka at `bootstrap`.

    At the end everything of it must be gone in time, or AssertionError says what is left.
    """
    # Not below pytest's folder: that is closed to the user whom an embedded Postgres runs as when started by root, and
    # its name leaves no room for a socket's.
    folder = Path(tempfile.mkdtemp(prefix="queryd-")).resolve()
    folder.chmod(0o755)
    stack = Stack(folder, {} if bootstrap is None else {"QUERYD_KAFKA_BOOTSTRAP": bootstrap})
    try:
        yield stack.await_ready()
    finally:
        left = stack.end()
        log = stack.log_tail()
        shutil.rmtree(folder)
    assert not left, f"left {END_SECONDS:.0f} s after SIGTERM: {left}\n{log}"
