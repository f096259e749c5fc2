"""Count the cores that this process may use, by its affinity and the CPU quotas of its cgroup and the parents."""

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def count_cores(root: Path = _ROOT) -> float:
    """Return the number of cores, a fraction if a quota is one. `root` contains `proc` and `sys`."""
    return min([float(_count_usable()), *_find_quotas(root)])


def _count_usable() -> int:
    # macOS has no affinity.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _find_quotas(root: Path) -> Iterator[float]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _folders(mount, path):
                quota, period = _read(folder / "cpu.max", 2)
                yield from _divide(quota, period)
        elif "cpu" in controllers.split(","):
            for folder in _folders(mount / "cpu", path):
                yield from _divide(_read(folder / "cpu.cfs_quota_us", 1)[0], _read(folder / "cpu.cfs_period_us", 1)[0])


def _folders(mount: Path, path: str) -> Iterator[Path]:
    """Yield the folders of the cgroup and its parents. In a container only `mount` may exist; `path` is the host's."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _read(file: Path, words: int) -> list[str]:
    """Read this many words of a file; they are empty if the file is missing, as in the root cgroup."""
    try:
        found = file.read_text(encoding="utf-8").split()
    except OSError:
        found = []
    return found if len(found) == words else [""] * words


def _divide(quota: str, period: str) -> Iterator[float]:
    # Without a quota, cgroup version 2 has `max` and version 1 has -1.
    if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
        yield int(quota) / int(period)
