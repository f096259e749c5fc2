"""The FastStream peer: its confluent-kafka broker with 8 concurrent handlers in one process.

Handlers share a pool of Postgres connections, one obstore client and one DuckDB, of which each handler uses a cursor on
a thread. Offsets are committed by FastStream's default, automatically: with several workers, its later policies commit
the consumer's position, which is ahead of the handled messages. It prints `ready` when it has its partitions, and runs
until it is killed.
"""

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import duckdb
import obstore
from faststream import FastStream
from faststream.confluent import KafkaBroker
from faststream.confluent.annotations import KafkaMessage
from psycopg_pool import AsyncConnectionPool

from bench.peers.common import (
    FINISH,
    INSERT,
    START,
    Event,
    Task,
    Work,
    consumer_options,
    open_bucket,
    parse_task,
    run_duckdb,
)

HANDLERS = 8


def _make_handler(task: Task, broker: Any, pool: AsyncConnectionPool, scratch: Path) -> Callable[..., Awaitable[None]]:
    bucket, store = task.servers.bucket, open_bucket(task.servers)
    engine = duckdb.connect(":memory:")

    async def execute(statement: str, parameters: tuple[Any, ...]) -> None:
        # The pool's connections commit automatically, so that a step is one round trip.
        async with pool.connection() as connection:
            await connection.execute(statement.encode(), parameters)

    async def publish(event: Event) -> None:
        headers = {name: value.decode() for name, value in event.headers if isinstance(value, bytes)}
        await broker.publish(event.value, task.status_topic, key=event.key.encode(), headers=headers)

    def run(work: Work) -> None:
        file = scratch / f"{work.query_id}.parquet"
        with engine.cursor() as cursor:
            run_duckdb(cursor, work, file)
        file.unlink()

    async def handle(message: KafkaMessage) -> None:
        work = Work.from_record(message.body)
        await execute(INSERT, work.inserted())
        await publish(work.queued())
        await execute(START, (work.query_id,))
        await publish(work.running())
        await asyncio.to_thread(run, work)
        work.etag = ((await obstore.put_async(store, work.key, work.content))["e_tag"] or "").strip('"')
        await execute(FINISH, work.finished(bucket))
        await publish(work.succeeded(bucket))

    return handle


async def main() -> None:
    """Consume until killed."""
    task = parse_task(__doc__)
    options = consumer_options(task.servers, task.topic)
    # FastStream passes these to librdkafka; the group and the commits are its own parameters.
    config = {name: options[name] for name in ("session.timeout.ms", "fetch.wait.max.ms")}
    broker = KafkaBroker(task.servers.bootstrap, config=config, enable_idempotence=True, log_level=logging.DEBUG)
    with tempfile.TemporaryDirectory(prefix="faststream-") as scratch:
        async with AsyncConnectionPool(
            task.servers.data_url, min_size=HANDLERS, max_size=HANDLERS, kwargs={"autocommit": True}, open=False
        ) as pool:
            subscriber = broker.subscriber(
                task.topic,
                group_id=options["group.id"],
                auto_offset_reset="earliest",
                max_workers=HANDLERS,
                on_assign=lambda *_: print("ready", flush=True),
            )
            subscriber(_make_handler(task, broker, pool, Path(scratch)))

            await FastStream(broker, logger=None).run()


if __name__ == "__main__":
    asyncio.run(main())
