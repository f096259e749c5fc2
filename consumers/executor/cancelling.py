"""Ending tasks for certain."""

import asyncio
from collections.abc import Collection
from typing import Any

# Far longer than a task takes that has heard of it.
_AGAIN_SECONDS = 2.0


async def end_tasks(tasks: "Collection[asyncio.Task[Any]]") -> None:
    """Cancel the tasks until they have ended, whatever with.

    Before Python 3.12 `asyncio.wait_for` drops a cancel that comes at once with the answer, and psycopg's pool waits by
    it: a task that loops for ever then goes on, and who cancelled it once waits for ever.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
    # What they ended with is known to whoever holds them, or to nobody.
    await asyncio.gather(*tasks, return_exceptions=True)
