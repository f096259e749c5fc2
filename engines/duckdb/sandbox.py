"""What the operating system holds a child to, whatever runs inside it."""

import os
import resource
import signal


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
