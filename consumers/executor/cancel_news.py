"""News of cancellations: a query that runs here is stopped at once, one that nobody holds is ended.

News may be missed while the database is away. Then the next lease renewal tells of a query that runs, and the reaper's
next look finds one that waits.
"""

import asyncio
from contextlib import aclosing

from consumers.executor.leases import Leases, Stop
from consumers.executor.reaper import Reaper
from db.connection import DatabaseUnavailable, DataPool, statement
from db.data.cancellations import hear_cancelled

# How long until the next try to listen: meanwhile renewals and the reaper do the work, every few seconds.
_AGAIN_SECONDS = 1.0


async def follow_cancellations(pool: DataPool, leases: Leases, reaper: Reaper) -> None:
    """Stop or end each cancelled query as soon as its cancellation is committed. Runs in every executor."""
    while True:
        try:
            async with statement(pool) as connection, aclosing(hear_cancelled(connection)) as news:
                async for query_id in news:
                    if not leases.stop(query_id, Stop.CANCELLED):
                        await reaper.end([query_id])
        except DatabaseUnavailable:
            await asyncio.sleep(_AGAIN_SECONDS)
