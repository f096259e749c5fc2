"""How much waits in the outbox, measured beside the relay: a relay that is stuck, or stands by, still says so."""

import asyncio
from contextlib import suppress

import psycopg

from db.connection import Connection, DatabaseUnavailable, conninfo, unavailable_told_apart
from db.data.outbox import measure_waiting
from telemetry.metrics import METRICS

# As often as Prometheus looks, or oftener. It reads one index entry of each waiting event, 100,000 at most.
_SECONDS = 5.0


async def measure_for_ever(data_url: str) -> None:
    """Tell the metrics, every 5 s. While the database is away nobody knows, and the metrics say nothing."""
    while True:
        with suppress(DatabaseUnavailable), unavailable_told_apart():
            async with await psycopg.AsyncConnection.connect(
                conninfo(data_url, "outbox depth"), autocommit=True, prepare_threshold=0
            ) as connection:
                await _measure(connection)
        METRICS.tell_outbox(None, None)
        await asyncio.sleep(_SECONDS)


async def _measure(connection: Connection) -> None:
    while True:
        events, age_seconds = await measure_waiting(connection)
        METRICS.tell_outbox(events, age_seconds)
        await asyncio.sleep(_SECONDS)
