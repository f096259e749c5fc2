"""The Celery peer: tasks through Redis to 4 worker processes, acknowledged late.

Each process has its own DuckDB, Postgres connection, S3 client and Kafka producer. Rows are committed step by step; the
three events are flushed once, before the task is acknowledged. Redis keeps nothing on disk. The parent prints `ready`
when its workers accept tasks, and runs until it is killed.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import obstore
import psycopg
from celery import Celery
from celery.signals import worker_process_init, worker_ready
from confluent_kafka import Producer
from obstore.store import S3Store

from bench.peers.common import FINISH, INSERT, START, Event, Task, Work, open_bucket, refuse_loss, run_duckdb
from tests.acceptance.stranger import Servers

PROCESSES = 4
TASK = "bench.run_query"
# The worker's command line is Celery's own, so that these come by the environment.
REDIS_URL, ENV_FILE, STATUS_TOPIC = "BENCH_REDIS_URL", "BENCH_ENV_FILE", "BENCH_STATUS_TOPIC"


def make_app(redis_url: str) -> Any:
    """Celery as both sides use it. No results are kept: a query's row and events say how it ended."""
    app = Celery("bench", broker=redis_url)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=True,
        worker_concurrency=PROCESSES,
        worker_hijack_root_logger=False,
        # Otherwise `ready` would go to the log.
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
    )
    return app


@dataclass(slots=True)
class Worker:
    """What one worker process keeps open."""

    task: Task
    rows: psycopg.Connection[tuple[Any, ...]]
    engine: duckdb.DuckDBPyConnection
    store: S3Store
    producer: Producer
    file: Path

    def run(self, request: dict[str, Any]) -> None:
        """Take one request from its row to its last event."""
        work, bucket = Work(request), self.task.servers.bucket
        self.rows.execute(INSERT, work.inserted())
        self._publish(work.queued())
        self.rows.execute(START, (work.query_id,))
        self._publish(work.running())
        run_duckdb(self.engine, work, self.file)
        work.etag = (obstore.put(self.store, work.key, work.content)["e_tag"] or "").strip('"')
        self.rows.execute(FINISH, work.finished(bucket))
        self._publish(work.succeeded(bucket))
        self.producer.flush()

    def _publish(self, event: Event) -> None:
        topic, headers = self.task.status_topic, event.headers
        self.producer.produce(topic, event.value, event.key, headers=headers, on_delivery=refuse_loss)


_workers: list[Worker] = []


def _open_worker(**_: object) -> None:
    servers = Servers.from_env_file(Path(os.environ[ENV_FILE]))
    _workers.append(
        Worker(
            Task(servers, TASK, os.environ[STATUS_TOPIC]),
            psycopg.connect(servers.data_url, autocommit=True),
            # Four processes share the cores; a small query gains nothing from a second thread.
            duckdb.connect(":memory:", config={"threads": 1}),
            open_bucket(servers),
            Producer({"bootstrap.servers": servers.bootstrap, "enable.idempotence": True}),
            Path(tempfile.mkdtemp(prefix="celery-")) / "result.parquet",
        )
    )


def _run_query(request: dict[str, Any]) -> None:
    _workers[0].run(request)


def main() -> None:
    """Work until killed."""
    app = make_app(os.environ[REDIS_URL])
    app.task(_run_query, name=TASK)
    worker_process_init.connect(_open_worker)

    def report_ready(**_: object) -> None:
        print("ready", flush=True)

    worker_ready.connect(report_ready)
    app.worker_main(["worker", "--loglevel=WARNING", "--without-gossip", "--without-mingle"])


if __name__ == "__main__":
    main()
