"""The owner's side of a guarded server: start it on free ports, wait until it answers, stop it, kill it."""

import fcntl
import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from queryd.__main__ import room_command
from service.embedded.ports import is_free
from service.embedded.warden import Ending

# A loopback round trip is far below a millisecond; asking every 20 ms costs nothing and delays nobody.
_ASK_SECONDS = 0.02
# A port is lost to another program in the moment between picking and binding perhaps once in thousands of starts.
_PORT_ATTEMPTS = 5
# What a stack that was just killed may take to let go of its directory: Postgres's orphaned ending, and some.
_LOCK_SECONDS = 10.0
# What a warden needs beyond the server's own time: to notice, to kill, to reap.
_WARDEN_SECONDS = 3.0
# A log longer than this is set aside at the next start; one older log is kept.
_LOG_BYTES = 8 << 20
# The variables that a warden's Python may need to start. A server gets no others from the user's environment: HOME
# would make it read the user's settings, and variables such as PGDATA or CLUSTER_ID would change its behaviour.
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# Only the OS user that runs a server may access its files and sockets.
_UMASK = 0o077


class EmbeddedError(RuntimeError):
    """An embedded server can't be started or stopped; the sentence says which and where its log is."""


class Lifeline:
    """A pipe whose write end only this process holds: when it reaches its end, the owner has died.

    Share one between all servers of an owner. The owner must not fork without exec (multiprocessing's `fork`), or the
    fork would hold the write end too.
    """

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()

    def close(self) -> None:
        """End every server that still hangs on it, the hard way. May be called twice."""
        if self._write_end >= 0:
            os.close(self._write_end)
            os.close(self.read_end)
            self._write_end = self.read_end = -1

    def __enter__(self) -> "Lifeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Account:
    """Another OS user to run a server as; `unhindered` lets it use files that are closed to it (root, Linux)."""

    uid: int
    gid: int
    unhindered: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """What there is to know about a server before it runs.

    `pick` chooses ports, `command` makes the command line for them, `ready` tells whether the server that listens
    there is ours and answers. `directory` is its working directory, `log` takes its output. `sockets` names the files
    outside of `directory` that it leaves behind.
    """

    name: str
    directory: Path
    log: Path
    pick: Callable[[], tuple[int, ...]]
    command: Callable[[tuple[int, ...]], Sequence[str]]
    ready: Callable[[tuple[int, ...]], bool]
    stop: Ending
    orphaned: Ending
    account: Account | None = None
    sockets: Callable[[tuple[int, ...]], Sequence[Path]] = lambda _: ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Server:
    """One guarded server. Its first start chooses the ports and writes them to its directory.

    Later starts, also by other processes, reuse the ports if they are free, so that clients' addresses stay valid.
    """

    def __init__(self, recipe: Recipe, lifeline: Lifeline) -> None:
        self._recipe = recipe
        self._lifeline = lifeline
        self._ports: tuple[int, ...] | None = None
        self._note = recipe.directory / "ports"
        self._warden: subprocess.Popen[bytes] | None = None

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports of the last start. Raises `EmbeddedError` before the first."""
        if self._ports is None:
            raise EmbeddedError(f"{self._recipe.name} was not started yet")
        return self._ports

    @property
    def running(self) -> bool:
        """True while the server lives."""
        return self._warden is not None and self._warden.poll() is None

    def start(self, seconds: float) -> None:
        """Start and wait until the server answers. Raises `EmbeddedError` when it ends or doesn't within `seconds`."""
        if self.running:
            raise EmbeddedError(f"{self._recipe.name} is running already")
        deadline = time.monotonic() + seconds
        for attempt in range(_PORT_ATTEMPTS):
            ports = self._ports or self._choose_ports(noted=attempt == 0)
            self._warden = _spawn(
                self._recipe, self._recipe.command(ports), self._lifeline, self._recipe.sockets(ports)
            )
            if self._await_ready(ports, deadline):
                self._ports = ports
                self._note.write_text(" ".join(map(str, ports)), encoding="ascii")
                return
            self._discard_warden()
            # Free again after a first failure may mean that the other program gave up too.
            if attempt > 0 and all(is_free(port) for port in ports):
                raise EmbeddedError(f"{self._recipe.name} ended instead of starting: see {self._recipe.log}")
        raise EmbeddedError(f"{self._recipe.name} could not have its ports: see {self._recipe.log}")

    def stop(self) -> None:
        """Stop gently, then with SIGKILL when that takes too long. Nothing happens when it doesn't run."""
        self._signal(signal.SIGTERM, self._recipe.stop.seconds + _WARDEN_SECONDS)

    def kill(self) -> None:
        """SIGKILL, as a crash would have it."""
        self._signal(signal.SIGUSR1, _WARDEN_SECONDS)

    def _choose_ports(self, *, noted: bool) -> tuple[int, ...]:
        """Return the ports of an earlier start if they are `noted` and free, else new ones."""
        picked = self._recipe.pick()
        if noted and self._note.exists():
            earlier = tuple(int(port) for port in self._note.read_text(encoding="ascii").split())
            # Another version may have written a different number of ports.
            if len(earlier) == len(picked) and all(map(is_free, earlier)):
                return earlier
        return picked

    def _await_ready(self, ports: tuple[int, ...], deadline: float) -> bool:
        """True when it answers, False when it ended. Raises `EmbeddedError`, having stopped it, when time is up."""
        while self.running:
            if self._recipe.ready(ports):
                return True
            if time.monotonic() >= deadline:
                self.kill()
                raise EmbeddedError(f"{self._recipe.name} does not answer: see {self._recipe.log}")
            time.sleep(_ASK_SECONDS)
        return False

    def _signal(self, number: signal.Signals, seconds: float) -> None:
        if self._warden is None:
            return
        self._warden.send_signal(number)
        try:
            self._warden.wait(seconds)
        except subprocess.TimeoutExpired:
            # The kernel passes the warden's death on to the server.
            self._warden.kill()
            self._warden.wait()
        self._warden = None

    def _discard_warden(self) -> None:
        if self._warden is not None:
            self._warden.wait()
            self._warden = None


def run_guarded(recipe: Recipe, command: Sequence[str], lifeline: Lifeline, seconds: float) -> None:
    """Run a tool of the server's, such as `initdb`, to its end. Raises `EmbeddedError` unless it exits 0 in time."""
    warden = _spawn(recipe, command, lifeline)
    tool = Path(command[0]).name
    try:
        exit_code = warden.wait(seconds)
    except subprocess.TimeoutExpired:
        warden.send_signal(signal.SIGUSR1)
        warden.wait()
        raise EmbeddedError(f"{tool} took longer than {seconds:.0f} s: see {recipe.log}") from None
    if exit_code != 0:
        raise EmbeddedError(f"{tool} failed with exit code {exit_code}: see {recipe.log}")


def package_folder(package: str, what: str) -> Path:
    """Where an installed package lies, without importing it: imports warn, and cost. Raises `EmbeddedError`."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(f"{what} is not installed: pip install 'queryd[embedded]'")
    return Path(spec.submodule_search_locations[0])


def _spawn(
    recipe: Recipe, command: Sequence[str], lifeline: Lifeline, sockets: Sequence[Path] = ()
) -> "subprocess.Popen[bytes]":
    """A warden for `command`. It inherits the directory's lock, so that nobody else can start there while it lives."""
    lock = _lock(recipe)
    try:
        with _open_log(recipe.log) as log:
            return subprocess.Popen(
                _warden_command(recipe, command, lifeline.read_end, lock, sockets),
                cwd=recipe.directory,
                env=_environment(recipe),
                umask=_UMASK,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lifeline.read_end, lock),
                # Signals to our process group are not for the servers.
                start_new_session=True,
            )
    finally:
        os.close(lock)


def _environment(recipe: Recipe) -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # Set no locale: Python then uses UTF-8, which it needs to read an editable install's path.
    return passed_on | {"HOME": str(recipe.directory), **recipe.environment}


def _warden_command(
    recipe: Recipe, command: Sequence[str], lifeline: int, lock: int, sockets: Sequence[Path]
) -> list[str]:
    options = [f"--lifeline={lifeline}", f"--lock={lock}", f"--stop={recipe.stop}", f"--orphaned={recipe.orphaned}"]
    options += [f"--socket={path}" for path in sockets]
    if recipe.account is not None:
        options.append(f"--account={recipe.account.uid}:{recipe.account.gid}")
        if recipe.account.unhindered:
            options.append("--unhindered")
    return room_command("service.embedded.warden", *options, "--", *command)


def _lock(recipe: Recipe) -> int:
    """The server's directory, locked: a descriptor. Waits for a predecessor that is just ending."""
    lock = os.open(recipe.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(lock)
                raise EmbeddedError(f"another {recipe.name} runs in {recipe.directory}: stop it first") from None
            time.sleep(_ASK_SECONDS)
        else:
            return lock


def _open_log(path: Path) -> IO[bytes]:
    """The log, opened for more; one that has grown too long becomes the previous one."""
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    return path.open("ab")
