"""The naive peer: what one writes first, a consumer that finishes one query before it looks at the next.

Each step is a transaction of its own, each event is flushed before the next step, the offset is committed after each
query. DuckDB, the upload and the consumer share one process and one thread. It has no leases, no limits, no gate.
Run by `bench.small_queries`; reads `COUNT` requests, says `ready` when it has its partitions, and ends.
"""

import argparse
import hashlib
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import psycopg
from confluent_kafka import Consumer, KafkaException, Message, Producer

from tests.acceptance.stranger import Contract, Servers, cloud_event_headers

# The rows that it keeps: as wide as what a status needs, in a schema of its own.
TABLE = """
CREATE SCHEMA IF NOT EXISTS bench;
CREATE TABLE IF NOT EXISTS bench.naive_results (
    id uuid PRIMARY KEY, org_id uuid NOT NULL, status text NOT NULL, sql_hash text NOT NULL,
    output_location text, row_count bigint, bytes bigint, updated_at timestamptz NOT NULL DEFAULT now()
)
"""

_INSERT = "INSERT INTO bench.naive_results (id, org_id, status, sql_hash) VALUES (%s, %s, 'Queued', %s)"
_START = "UPDATE bench.naive_results SET status = 'Running', updated_at = now() WHERE id = %s"
_FINISH = """
UPDATE bench.naive_results
SET status = 'Succeeded', output_location = %s, row_count = %s, bytes = %s, updated_at = now() WHERE id = %s
"""

# The embedded broker lets a group join in half of this, and takes no less; a bench should not wait longer.
_SESSION_MS = 6_000


class Naive:
    """One connection (autocommit), one producer, one DuckDB; `run` takes one request from its row to its last event."""

    def __init__(
        self, servers: Servers, rows: psycopg.Connection[tuple[Any, ...]], status_topic: str, scratch: Path
    ) -> None:
        self._contract = Contract()
        self._status_topic = status_topic
        self._scratch = scratch
        self._bucket = servers.bucket
        self._s3 = servers.s3()
        self._rows = rows
        self._engine = duckdb.connect(":memory:")
        self._producer = Producer({"bootstrap.servers": servers.bootstrap, "enable.idempotence": True})

    def run(self, payload: bytes) -> None:
        """Row, event, row, event, query, upload, row, event."""
        _, request = self._contract.decode(payload)
        query_id, org_id = request["query_id"], request["org_id"]
        sql_hash = hashlib.sha256(request["sql"].encode()).hexdigest()
        story = {"query_id": query_id, "org_id": org_id, "mode": request["mode"], "sql_hash": sql_hash}

        self._rows.execute(_INSERT, (query_id, org_id, sql_hash))
        self._tell(story | {"sequence": 1, "status": "Queued", "attempt": 0})
        self._rows.execute(_START, (query_id,))
        self._tell(story | {"sequence": 2, "previous_status": "Queued", "status": "Running", "attempt": 1})

        file = self._scratch / "result.parquet"
        copied = self._engine.execute(f"COPY ({request['sql']}) TO '{file}' (FORMAT parquet, COMPRESSION zstd)")
        [(row_count,)] = copied.fetchall()
        content = file.read_bytes()
        key = f"bench/{org_id}/{query_id}/result.parquet"
        etag = self._s3.put_object(Bucket=self._bucket, Key=key, Body=content)["ETag"].strip('"')

        location = f"s3://{self._bucket}/bench/{org_id}/{query_id}/"
        self._rows.execute(_FINISH, (location, row_count, len(content), query_id))
        done = {"output_location": location, "row_count": row_count, "bytes": len(content)}
        sha256 = hashlib.sha256(content).hexdigest()
        stored = {"key": key, "bytes": len(content), "rows": row_count, "etag": etag, "sha256": sha256}
        end = {"sequence": 3, "previous_status": "Running", "status": "Succeeded", "attempt": 1, "files": [stored]}
        self._tell(story | done | end)

    def _tell(self, fields: Mapping[str, Any]) -> None:
        query_id = fields["query_id"]
        event_id = str(uuid.uuid5(uuid.UUID(query_id), str(fields["sequence"])))
        event = {"event_id": event_id, "occurred_at": time.time_ns() // 1_000_000, **fields}
        self._producer.produce(
            self._status_topic,
            key=query_id,
            value=self._contract.encode("QueryStatusChanged", event),
            headers=list(cloud_event_headers("QueryStatusChanged", query_id)),
            on_delivery=_refuse_loss,
        )
        self._producer.flush()


def _refuse_loss(error: Any, message: Message) -> None:
    if error is not None:
        raise KafkaException(error)


def main() -> None:
    """Consume `--count` requests of `--topic`, then end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", type=Path, required=True, help="the stack's .queryd/env")
    parser.add_argument("--topic", required=True)
    parser.add_argument("--status-topic", required=True)
    parser.add_argument("--count", type=int, required=True)
    arguments = parser.parse_args()
    servers = Servers.from_env_file(arguments.env)
    consumer = Consumer(
        {
            "bootstrap.servers": servers.bootstrap,
            "group.id": f"naive-{arguments.topic}",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": _SESSION_MS,
        }
    )
    with (
        tempfile.TemporaryDirectory(prefix="naive-") as scratch,
        psycopg.connect(servers.data_url, autocommit=True) as rows,
    ):
        naive = Naive(servers, rows, arguments.status_topic, Path(scratch))
        consumer.subscribe([arguments.topic], on_assign=lambda *_: print("ready", flush=True))
        done = 0
        while done < arguments.count:
            message = consumer.poll(1.0)
            if message is None:
                continue
            if (error := message.error()) is not None:
                raise KafkaException(error)
            payload = message.value()
            assert payload is not None
            naive.run(payload)
            consumer.commit(message=message, asynchronous=False)
            done += 1
    consumer.close()


if __name__ == "__main__":
    main()
