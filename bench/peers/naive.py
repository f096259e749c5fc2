"""The naive peer: a consumer that finishes one query before it reads the next.

Each step is a transaction of its own, each event is flushed before the next step, the offset is committed after each
query. DuckDB, the upload and the consumer share one process and one thread. It has no leases, no limits, no gate. It
prints `ready` when it has its partitions, and runs until it is killed.
"""

import tempfile
from pathlib import Path
from typing import Any

import duckdb
import psycopg
from confluent_kafka import Consumer, KafkaException, Producer

from bench.peers.common import (
    FINISH,
    INSERT,
    START,
    Event,
    Task,
    Work,
    consumer_options,
    parse_task,
    refuse_loss,
    run_duckdb,
)


class Naive:
    """One connection (autocommit), one producer, one DuckDB; `run` takes one request from its row to its last event."""

    def __init__(self, task: Task, rows: psycopg.Connection[tuple[Any, ...]], file: Path) -> None:
        self._task = task
        self._file = file
        self._s3 = task.servers.s3()
        self._rows = rows
        self._engine = duckdb.connect(":memory:")
        self._producer = Producer({"bootstrap.servers": task.servers.bootstrap, "enable.idempotence": True})

    def run(self, work: Work) -> None:
        """Row, event, row, event, query, upload, row, event."""
        bucket = self._task.servers.bucket
        self._rows.execute(INSERT, work.inserted())
        self._publish(work.queued())
        self._rows.execute(START, (work.query_id,))
        self._publish(work.running())
        run_duckdb(self._engine, work, self._file)
        work.etag = self._s3.put_object(Bucket=bucket, Key=work.key, Body=work.content)["ETag"].strip('"')
        self._rows.execute(FINISH, work.finished(bucket))
        self._publish(work.succeeded(bucket))

    def _publish(self, event: Event) -> None:
        topic, headers = self._task.status_topic, event.headers
        self._producer.produce(topic, event.value, event.key, headers=headers, on_delivery=refuse_loss)
        self._producer.flush()


def main() -> None:
    """Consume until killed."""
    task = parse_task(__doc__)
    consumer = Consumer(consumer_options(task.servers, task.topic))
    with (
        tempfile.TemporaryDirectory(prefix="naive-") as scratch,
        psycopg.connect(task.servers.data_url, autocommit=True) as rows,
    ):
        naive = Naive(task, rows, Path(scratch) / "result.parquet")
        consumer.subscribe([task.topic], on_assign=lambda *_: print("ready", flush=True))
        while True:
            message = consumer.poll(1.0)
            if message is None:
                continue
            if (error := message.error()) is not None:
                raise KafkaException(error)
            naive.run(Work.from_record(message.value()))
            consumer.commit(message=message, asynchronous=False)


if __name__ == "__main__":
    main()
