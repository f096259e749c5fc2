"""What the operating system holds a child to, whatever runs inside it.

Three layers, entered in this order: what may be reached (`confine`: Landlock and seccomp, where the kernel has them),
how much may be taken (`enter_sandbox`: resource limits, everywhere), and CPU by the query (`allow_cpu`).
"""

import contextlib
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.duckdb import landlock, seccomp
from processes.failpoints import FAILPOINTS_VARIABLE

# Name resolution, TLS, the dynamic linker and time zones; memory and CPUs as the kernel tells them.
_SYSTEM = (
    "/etc",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/proc/self",
    "/proc/sys/vm",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/dev/urandom",
)
# systemd-resolved and its like keep there what /etc/resolv.conf points to, and replace it now and then.
_RESOLVERS = ("/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager")
_RESOLV_CONF = Path("/etc/resolv.conf")
_TLS_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

# A child's argument: it reaches the datasets' Postgres by a Unix socket.
LOCAL_SOCKETS = "--local-sockets"

# Answers that don't fit into a datagram are asked for again by TCP.
_DNS_PORT = 53

# The first to go when the machine is out of memory (0 is everybody's, 1000 the most): a query can be run again, and
# the worker beside it runs many.
_OOM_SCORE = 500


@dataclass(frozen=True, slots=True)
class Layers:
    """Which of the kernel's layers hold: Landlock's version (0 is none, from 4 on it bounds TCP too), and seccomp."""

    landlock: int
    seccomp: bool


def confine(home: Path, ports: tuple[int, ...], files: tuple[Path, ...] = (), *, local_sockets: bool = False) -> Layers:
    """Take everything from the process but its home, what it runs on, reading `files`, and TCP to `ports`; for good.

    With `local_sockets` it may also connect to every Unix socket that its user may connect to.

    To be called while there is one thread: Landlock holds for the calling one and those it starts. A layer that the
    kernel lacks is left out, and the answer says so. Raises `OSError` where one that it has can't be entered.
    """
    _offer_to_the_oom_killer()
    system = (*map(Path, _SYSTEM + _RESOLVERS), _RESOLV_CONF.resolve())
    readable = (*system, *_python(), *_certificates(), *files)
    changeable = (home, Path("/dev/null"), *_failpoints())
    abi = landlock.restrict(landlock.Allowed(readable, changeable, (*ports, _DNS_PORT)))
    return Layers(abi, seccomp.restrict(local_sockets=local_sockets))


def _python() -> Iterator[Path]:
    """Where this interpreter, its packages and our own rooms lie: modules may be imported later."""
    yield from {Path(place) for place in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())}
    tops = {name.partition(".")[0] for name in sys.modules}
    for name in tops:
        yield from map(Path, getattr(sys.modules.get(name), "__path__", ()))


def _certificates() -> Iterator[Path]:
    yield from (Path(os.environ[name]) for name in _TLS_VARIABLES if name in os.environ)


def _failpoints() -> Iterator[Path]:
    if FAILPOINTS_VARIABLE in os.environ:
        yield Path(os.environ[FAILPOINTS_VARIABLE])


def _offer_to_the_oom_killer() -> None:
    # A courtesy to the worker, which some containers don't allow.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(max(_OOM_SCORE, int(score.read_text()))))


def enter_sandbox(address_space_bytes: int, file_bytes: int) -> None:
    """Bound the process's memory and files for good: no core dumps (they hold data), files only for our own user.

    DuckDB's `memory_limit` does not bound the process; `RLIMIT_AS` does, as a clean allocation error.
    """
    os.umask(0o077)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, address_space_bytes)
    # A write beyond the limit is then EFBIG, an error of the query, instead of the end of the process.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _limit(resource.RLIMIT_FSIZE, file_bytes)


def allow_cpu(seconds: float) -> None:
    """Grant that many more seconds of CPU, over all threads; beyond them the kernel ends the process by SIGXCPU.

    The limit counts for the process's life, so it is raised before each query.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + seconds) + 1, hard))


def address_space_used() -> int:
    """Bytes of address space that the process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - a hot path, and no file of ours
            pages = int(statm.read().split()[0])
    except FileNotFoundError:
        return 0
    return pages * resource.getpagesize()


def _limit(which: int, value: int) -> None:
    """Lower a limit; one that is lower already stays as it is."""
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))
