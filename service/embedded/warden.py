"""The process that stands between queryd and one embedded server, so that the server never outlives queryd.

    python -P queryd/__main__.py --room service.embedded.warden OPTIONS -- COMMAND…

The warden starts COMMAND in a session of its own and ends it
- when the lifeline reaches its end: the only holder of the write end, queryd, has died (even by `kill -9`);
- on SIGTERM, gently, and with SIGKILL if that takes too long; on SIGUSR1 with SIGKILL at once;
- when the warden itself is killed: the kernel then signals the server (Linux).
It exits when the server has, with the server's exit code (128 + signal when a signal ended it), and only after every
process that the server left behind has gone too. Signals to queryd's process group reach neither of them, so that
queryd's services can finish their work while the servers still run.

This module starts in a fresh interpreter for each server: it imports little and nothing of ours.
"""

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_CANNOT_START = 127
_LINUX = sys.platform.startswith("linux")

# From linux/prctl.h, linux/securebits.h and linux/capability.h.
_PR_SET_PDEATHSIG = 1
_PR_SET_SECUREBITS = 28
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1


@dataclass(frozen=True, slots=True)
class Ending:
    """A signal, and the seconds until SIGKILL follows it."""

    signal: signal.Signals
    seconds: float

    @classmethod
    def parse(cls, text: str) -> "Ending":
        """The inverse of `str`: `SIGINT:5.0`."""
        name, seconds = text.split(":")
        return cls(signal.Signals[name], float(seconds))

    def __str__(self) -> str:
        return f"{self.signal.name}:{self.seconds}"


@dataclass(frozen=True, slots=True)
class Orders:
    """What a warden is told. `account` is the (uid, gid) that the server runs as; `unhindered` lets it use files and
    folders that are closed to that account, as root could. `sockets` are files that it leaves behind."""

    command: tuple[str, ...]
    lifeline: int
    stop: Ending
    orphaned: Ending
    account: tuple[int, int] | None
    unhindered: bool
    sockets: tuple[Path, ...]


class Warden:
    """One server's process and the three ways to end it."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._awake, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        self._watched = [orders.lifeline, self._awake]
        self._kill_at: float | None = None
        self._exit_code: int | None = None
        self._asked: list[Callable[[], None]] = []
        signal.signal(signal.SIGTERM, lambda *_: self._asked.append(self._stop))
        signal.signal(signal.SIGUSR1, lambda *_: self._asked.append(self._kill))
        # Only so that the wake-up pipe tells of it.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        self._pid = _start(orders)

    def run(self) -> int:
        """Wait for the server's end and return its exit code."""
        while True:
            self._reap()
            if self._exit_code is not None:
                self._sweep()
                for path in self._orders.sockets:
                    remove_dead_socket(path)
                return self._exit_code
            self._wait()
            while self._asked:
                self._asked.pop(0)()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._kill()

    def _wait(self) -> None:
        timeout = None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())
        readable, _, _ = select.select(self._watched, [], [], timeout)
        if self._awake in readable:
            os.read(self._awake, 4096)
        if self._orders.lifeline in readable:
            # Nobody ever writes to it: readable means that its end was reached.
            self._watched.remove(self._orders.lifeline)
            self._end(self._orders.orphaned)

    def _stop(self) -> None:
        if self._kill_at is None:
            self._end(self._orders.stop)

    def _end(self, ending: Ending) -> None:
        self._kill_at = time.monotonic() + ending.seconds
        # To the server alone: it knows best how to end its own children.
        _send(self._pid, ending.signal)

    def _kill(self) -> None:
        # Once a second is often enough to repeat a signal that can't be refused.
        self._kill_at = time.monotonic() + 1
        _send(-self._pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Collect every child that has ended; orphans of the server are our children too."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._pid:
                    code = os.waitstatus_to_exitcode(status)
                    self._exit_code = code if code >= 0 else 128 - code

    def _sweep(self) -> None:
        """Kill what the server left behind: its group, and processes that left the group but came to us as orphans."""
        _send(-self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                for orphan in _children():
                    _send(orphan, signal.SIGKILL)
                os.waitpid(-1, 0)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def remove_dead_socket(path: Path) -> None:
    """Remove a socket's file unless somebody listens there: another server may have had the name before ours."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def _children() -> Iterator[int]:
    """The processes whose parent we are, where there is a `/proc` to ask."""
    own = str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # `pid (name) state parent …`, and a name may hold spaces and brackets.
            if stat.read_text().rpartition(")")[2].split()[1] == own:
                yield int(stat.parent.name)


def _start(orders: Orders) -> int:
    """Fork and exec the server; its pid, which is also its session and process group."""
    warden = os.getpid()
    # A fork by hand, for what happens between fork and exec; this process has one thread.
    pid = os.fork()
    if pid == 0:
        _become(orders, warden)
    return pid


def _become(orders: Orders, warden: int) -> NoReturn:
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        # Ignored signals stay ignored across exec, and Python ignores SIGPIPE.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        if orders.account is not None:
            _change_account(*orders.account, unhindered=orders.unhindered)
        if _LINUX:
            # After the change of account, which clears it.
            _prctl(_PR_SET_PDEATHSIG, orders.orphaned.signal)
            if os.getppid() != warden:
                # The warden died before the kernel knew that we wanted to be told.
                os._exit(_CANNOT_START)
        os.execv(orders.command[0], orders.command)  # noqa: S606 - no shell wanted
    except OSError as error:
        os.write(2, f"warden: cannot start {orders.command[0]}: {os.strerror(error.errno or 0)}\n".encode())
    finally:
        os._exit(_CANNOT_START)


def _change_account(uid: int, gid: int, *, unhindered: bool) -> None:
    if unhindered:
        # Keep capabilities when the user changes. Without this flag access(2) ignores them for users other than root,
        # and Postgres calls access(2) on its own programs.
        _prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if unhindered:
        _keep_override()


def _keep_override() -> None:
    """Give up every capability but the one to pass file permissions, and keep that across exec."""
    bit = 1 << _CAP_DAC_OVERRIDE
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # Effective, permitted and inheritable, for the lower and then the upper 32 capabilities.
    sets = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)
    _check(_libc().capset(header, sets))
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE)


def _prctl(option: int, *values: int) -> None:
    padded = (*values, 0, 0, 0, 0)[:4]
    _check(_libc().prctl(option, *(ctypes.c_ulong(value) for value in padded)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _account(text: str) -> tuple[int, int]:
    uid, gid = text.split(":")
    return int(uid), int(gid)


def _parse(arguments: list[str]) -> Orders:
    parser = argparse.ArgumentParser(prog="warden", description="Runs a server that must not outlive its owner.")
    parser.add_argument("--lifeline", type=int, required=True, help="inherited read end of the lifeline")
    parser.add_argument("--lock", type=int, required=True, help="inherited lock, held until the server has ended")
    parser.add_argument("--stop", type=Ending.parse, required=True, help="SIGNAL:SECONDS on SIGTERM")
    parser.add_argument("--orphaned", type=Ending.parse, required=True, help="SIGNAL:SECONDS when the lifeline ends")
    parser.add_argument("--account", type=_account, help="UID:GID to run the server as")
    parser.add_argument("--unhindered", action="store_true", help="let that account use what is closed to it")
    parser.add_argument("--socket", type=Path, action="append", default=[], help="to remove after the server's end")
    parser.add_argument("command", nargs="+")
    read = parser.parse_args(arguments)
    for inherited in (read.lifeline, read.lock):
        os.set_inheritable(inherited, False)
    return Orders(
        tuple(read.command),
        read.lifeline,
        read.stop,
        read.orphaned,
        read.account,
        read.unhindered and _LINUX,
        tuple(read.socket),
    )


def main() -> None:
    """Run the warden that the command line describes."""
    orders = _parse(sys.argv[1:])
    if _LINUX:
        # What the server leaves behind becomes ours, so that it can be ended too.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    sys.exit(Warden(orders).run())


if __name__ == "__main__":
    main()
