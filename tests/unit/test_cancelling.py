"""A task is ended for certain, also one that a first cancel did not reach."""

import asyncio

import pytest

from consumers.executor import cancelling
from consumers.executor.cancelling import end_tasks


async def test_a_task_that_misses_its_cancel_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancelling, "_AGAIN_SECONDS", 0.01)
    began = asyncio.Event()

    async def miss() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            # As `asyncio.wait_for` does where the answer has come at once with the cancel.
            await asyncio.Event().wait()

    task = asyncio.create_task(miss())
    await began.wait()
    await end_tasks([task])
    assert task.cancelled()


async def test_what_has_ended_stays_as_it_is() -> None:
    async def fail() -> None:
        raise RuntimeError

    task = asyncio.create_task(fail())
    await asyncio.wait({task})
    await end_tasks([task])
    assert isinstance(task.exception(), RuntimeError)
