"""A rebuild as a process, to be killed: `python -m tests.integration.rebuild_process STATE_URL DATA_URL WHERE`.

It rebuilds from Postgres data, prints WHERE when it is there, and stays: `staged` before the swap, `swapping` inside
it, with every row written and nothing committed.
"""

import asyncio
import sys
from unittest.mock import patch

from db.connection import Connection
from db.state.rebuild import put_right
from replay.rebuild import rebuild
from replay.rebuild.source import SourceName
from tests.integration.queries import opened_pool

# More than any test's table differs in.
_PLAN_SURPLUS = 1_000_000


async def _stay(where: str) -> None:
    print(where, flush=True)
    await asyncio.Event().wait()


async def _put_right_and_stay(connection: Connection) -> None:
    await put_right(connection)
    await _stay("swapping")


async def _report(_read: int, _total: int) -> None:
    return None


async def _run(state_url: str, data_url: str, where: str) -> None:
    async with opened_pool(data_url) as pool, rebuild.opened(SourceName.POSTGRES, state_url, pool, {}) as begun:
        await begun.stage(_report)
        if where == "staged":
            await _stay(where)
        digest = (await begun.plan()).hash.partition("-")[0]
        with patch.object(rebuild, "put_right", _put_right_and_stay):
            await begun.swap(f"{digest}-{_PLAN_SURPLUS}")


if __name__ == "__main__":
    asyncio.run(_run(*sys.argv[1:]))
