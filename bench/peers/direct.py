"""The limit: the same DuckDB, obstore and Postgres calls in batches, with no service around them.

Requests come in batches from Kafka, rows and events go out in batches, two DuckDB cursors run on two threads, objects
are put concurrently. One batch executes while another one is stored. There is no admission, no lease, no fencing, no
outbox, no sandbox. It prints `ready` when it has its partitions, and runs until it is killed.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import duckdb
import obstore
import psycopg
from confluent_kafka import Consumer, KafkaException, Producer

from bench.peers.common import (
    Event,
    Task,
    Work,
    consumer_options,
    open_bucket,
    parse_task,
    refuse_loss,
    run_duckdb,
)

_BATCH = 50
_THREADS = 2

_INSERT = """
INSERT INTO bench.peer_results (id, org_id, status, sql_hash)
SELECT id, org_id, 'Queued', sql_hash
FROM unnest(%s::uuid[], %s::uuid[], %s::text[]) AS t(id, org_id, sql_hash)
"""
_START = "UPDATE bench.peer_results SET status = 'Running', updated_at = now() WHERE id = ANY(%s::uuid[])"
_FINISH = """
UPDATE bench.peer_results AS row
SET status = 'Succeeded', output_location = t.location, row_count = t.row_count, bytes = t.bytes, updated_at = now()
FROM unnest(%s::text[], %s::bigint[], %s::bigint[], %s::uuid[]) AS t(location, row_count, bytes, id)
WHERE row.id = t.id
"""


class Direct:
    """One connection (autocommit), one producer, one DuckDB with a cursor per thread."""

    def __init__(self, task: Task, rows: psycopg.AsyncConnection[tuple[Any, ...]], scratch: Path) -> None:
        self._task = task
        self._rows = rows
        self._store = open_bucket(task.servers)
        self._producer = Producer({"bootstrap.servers": task.servers.bootstrap, "enable.idempotence": True})
        self._threads = ThreadPoolExecutor(_THREADS)
        # Each thread takes a cursor and a file of its own.
        self._idle: SimpleQueue[tuple[duckdb.DuckDBPyConnection, Path]] = SimpleQueue()
        engine = duckdb.connect(":memory:", config={"threads": 1})
        for number in range(_THREADS):
            self._idle.put((engine.cursor(), scratch / f"{number}.parquet"))

    async def run(self, works: Sequence[Work]) -> None:
        """Take a batch from its rows to its last events."""
        bucket, loop = self._task.servers.bucket, asyncio.get_running_loop()
        await self._rows.execute(_INSERT, _columns([work.inserted() for work in works]))
        await self._rows.execute(_START, [[work.query_id for work in works]])
        await self._publish([event for work in works for event in (work.queued(), work.running())])
        halves = [works[number::_THREADS] for number in range(_THREADS)]
        await asyncio.gather(*(loop.run_in_executor(self._threads, self._execute, half) for half in halves))
        await asyncio.gather(*map(self._store_result, works))
        await self._rows.execute(_FINISH, _columns([work.finished(bucket) for work in works]))
        await self._publish([work.succeeded(bucket) for work in works])

    def _execute(self, works: Sequence[Work]) -> None:
        cursor, file = self._idle.get()
        for work in works:
            run_duckdb(cursor, work, file)
        self._idle.put((cursor, file))

    async def _store_result(self, work: Work) -> None:
        work.etag = ((await obstore.put_async(self._store, work.key, work.content))["e_tag"] or "").strip('"')

    async def _publish(self, events: Sequence[Event]) -> None:
        topic = self._task.status_topic
        for event in events:
            headers = event.headers
            self._producer.produce(topic, event.value, event.key, headers=headers, on_delivery=refuse_loss)
        await asyncio.to_thread(self._producer.flush)


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _consume(consumer: Consumer) -> list[Work]:
    """Wait for one request, then take those that have arrived with it."""
    # `consume` waits out its whole time unless it gets all that it asks for.
    first = consumer.poll(1.0)
    messages = [] if first is None else [first, *consumer.consume(_BATCH - 1, 0)]
    for message in messages:
        if (error := message.error()) is not None:
            raise KafkaException(error)
    return [Work.from_record(message.value()) for message in messages]


async def main() -> None:
    """Consume until killed."""
    task = parse_task(__doc__)
    consumer = Consumer(consumer_options(task.servers, task.topic))
    consumer.subscribe([task.topic], on_assign=lambda *_: print("ready", flush=True))
    with tempfile.TemporaryDirectory(prefix="direct-") as scratch:
        async with await psycopg.AsyncConnection.connect(task.servers.data_url, autocommit=True) as rows:
            direct = Direct(task, rows, Path(scratch))
            before: asyncio.Task[None] | None = None
            while True:
                works = await asyncio.to_thread(_consume, consumer)
                if not works:
                    continue
                batch = asyncio.create_task(direct.run(works))
                if before is not None:
                    await before
                    # The position is ahead of `batch`, which a crash would lose: the limit promises nothing.
                    consumer.commit(asynchronous=True)
                before = batch


if __name__ == "__main__":
    asyncio.run(main())
