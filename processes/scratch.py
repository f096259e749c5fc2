"""Scratch folders that die with their process: each is locked, and the next to start sweeps what nobody holds."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ScratchFolder:
    """A folder of this process's own, readable by nobody else."""

    path: Path
    lock: int

    @classmethod
    def make(cls, root: Path, prefix: str) -> "ScratchFolder":
        """Make and lock one in `root`, which is made as well where it is missing."""
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def sweep(root: Path, prefix: str) -> int:
    """Remove the folders of processes that died without tidying: nobody holds their locks any more. How many."""
    if not root.exists():
        return 0
    removed = 0
    with _alone(root):
        for path in root.glob(f"{prefix}*"):
            try:
                lock = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                # Its owner has just removed it.
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
            finally:
                os.close(lock)
    return removed


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Between making a folder and locking it, no other process may sweep."""
    lock = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
