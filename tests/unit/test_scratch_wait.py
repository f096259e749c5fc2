"""A disk that is full is waited for, until the query's own time is over."""

import asyncio
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consumers.executor.attempt import Running, make_scratch
from consumers.executor.leases import Lease
from engines.protocol import EngineUnavailable
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


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[asyncio.Event]:
    """No folder below `tmp_path` can be made until the event is set."""
    room, mkdir = asyncio.Event(), Path.mkdir

    def make(folder: Path, *arguments: Any, **options: Any) -> None:
        if not room.is_set() and folder.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        mkdir(folder, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", make)
        yield room


async def test_an_attempts_folder_is_made_once_there_is_room(tmp_path: Path, full_disk: asyncio.Event) -> None:
    making = asyncio.create_task(make_scratch(_running(tmp_path, 60.0)))
    done, _ = await asyncio.wait([making], timeout=0.3)
    assert not done
    full_disk.set()
    async with asyncio.timeout(30):
        await making
    assert (tmp_path / "attempts" / "query-1").is_dir()


@pytest.mark.usefixtures("full_disk")
async def test_the_querys_time_ends_the_waiting(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="The engine's scratch disk is full"):
        await make_scratch(_running(tmp_path, 0.3))


async def test_a_scratch_folder_that_cannot_be_used_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "attempts").touch()
    with pytest.raises(OSError, match="Not a directory"):
        await make_scratch(_running(tmp_path, 60.0))
