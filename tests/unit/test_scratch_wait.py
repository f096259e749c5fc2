"""A disk that is full is waited for, until the query's own time is over."""

import asyncio
import time
from pathlib import Path

import pytest

from consumers.executor.attempt import Running, make_scratch
from consumers.executor.leases import Lease
from tests.unit.samples import make_admitted


def _running(folder: Path, seconds: float) -> Running:
    return Running(
        query=make_admitted(),
        lease=Lease("query", "token"),
        attempt=1,
        sequence=2,
        started=time.monotonic(),
        run_seconds=seconds,
        queued_ms=0,
        scratch=folder / "attempts" / "query-1",
    )


async def test_an_attempts_folder_is_made_once_there_is_room(tmp_path: Path) -> None:
    # Where a folder has to be there is a file: the operating system refuses, as it does on a full disk.
    (tmp_path / "attempts").touch()
    making = asyncio.create_task(make_scratch(_running(tmp_path, 60.0)))
    done, _ = await asyncio.wait([making], timeout=0.3)
    assert not done
    (tmp_path / "attempts").unlink()
    async with asyncio.timeout(30):
        await making
    assert (tmp_path / "attempts" / "query-1").is_dir()


async def test_the_querys_time_ends_the_waiting(tmp_path: Path) -> None:
    (tmp_path / "attempts").touch()
    with pytest.raises(OSError, match="Not a directory"):
        await make_scratch(_running(tmp_path, 0.3))
