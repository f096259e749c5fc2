"""Events a second out of a full outbox: the relay against a bare transactional producer plus batched deletes.

Both empty the same table into the same topic, 500 rows to a Kafka transaction, and delete each batch once it is
committed. The peer holds all rows in memory before its clock starts; it reads nothing, writes no ledger, takes no lock,
remembers nothing of what it published, and loses or doubles a batch when it dies. The events are those of whole
queries, three to each. One unmeasured run of each warms up; then they alternate, and each pair begins with the other
one. A run lasts from the first transaction to the last delete; the relay's session is open by then, as the peer's is.

Run it from the checkout: `python -m bench.relay [--events N] [--runs N] [--bootstrap HOST:PORT] [--json]`. It needs
transactions, so an Apache Kafka: the one at `--bootstrap`, or one that it starts as the tests do.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Producer

from consumers.executor.story import QueryFacts, tell
from db.connection import conninfo
from db.data.outbox import CHANNEL, NewEvent, WaitingEvent, read_waiting
from db.migrations.upgrade import upgrade_data
from producers.relay.relay import Relay, RelayRules
from queryd.events import Mode, OrgId, QueryId, Status, Topic
from queryd.headers import continue_trace, to_kafka
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from service.topics import apply_topics
from tests.servers import kafka as brokers

# What the relay reads at once.
_BATCH = 500
_PARTITIONS = 6
_BROKER_SECONDS = 30.0
# Short against a run, and a look at the end of an index costs nothing.
_LOOK_SECONDS = 0.01
# Guards against hanging only.
_RUN_SECONDS = 300.0

_FILL = "COPY outbox (shard, event_id, query_id, type, payload, headers) FROM STDIN"
_LEFT = "SELECT position FROM outbox ORDER BY position DESC LIMIT 1"


def fill(url: str, count: int) -> None:
    """Put `count` events into an empty outbox, as a server that is at rest holds them."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE outbox")
        with connection.cursor() as cursor, cursor.copy(_FILL) as copy:
            for event in _tell_stories(count):
                copy.write_row((event.shard, event.event_id, event.query_id, event.type, event.payload, event.headers))
        connection.execute("VACUUM ANALYZE outbox")
        connection.execute("CHECKPOINT")


def _tell_stories(count: int) -> Iterator[NewEvent]:
    steps = [(None, Status.QUEUED), (Status.QUEUED, Status.RUNNING), (Status.RUNNING, Status.SUCCEEDED)]
    facts = _make_facts()
    for number in range(count):
        place = number % len(steps)
        previous, status = steps[place]
        now = datetime.now(UTC)
        yield tell(facts, sequence=place + 1, previous=previous, status=status, attempt=int(place > 0), now=now)
        if place == len(steps) - 1:
            facts = _make_facts()


def _make_facts() -> QueryFacts:
    query_id, org_id = QueryId(str(uuid.uuid4())), OrgId(str(uuid.uuid4()))
    return QueryFacts(query_id, org_id, Mode.INTERACTIVE, "0" * 64, continue_trace(None))


async def run_relay(url: str, kafka: dict[str, Any], count: int) -> float:
    """One run of the relay, in events a second."""
    ready = asyncio.Event()
    relay = Relay(RelayRules(url, kafka, transactions=True), ready.set)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        running = asyncio.create_task(relay.run())
        try:
            async with asyncio.timeout(_RUN_SECONDS):
                await ready.wait()
                start = time.perf_counter()
                while await (await connection.execute(_LEFT)).fetchone() is not None:
                    await asyncio.sleep(_LOOK_SECONDS)
                    if running.done():
                        running.result()
            seconds = time.perf_counter() - start
        finally:
            relay.stop()
            await connection.execute(f"NOTIFY {CHANNEL}".encode())
            await running
    return count / seconds


async def run_bare(url: str, kafka: dict[str, Any], count: int) -> float:
    """One run of the peer, in events a second."""
    async with await psycopg.AsyncConnection.connect(conninfo(url, "bench"), autocommit=True) as connection:
        rows = await read_waiting(connection, range(64), count)
        producer = Producer(kafka | {"transactional.id": "queryd-bench-bare"})
        await asyncio.to_thread(producer.init_transactions, _BROKER_SECONDS)
        start = time.perf_counter()
        for begin in range(0, len(rows), _BATCH):
            batch = rows[begin : begin + _BATCH]
            await asyncio.to_thread(_produce, producer, batch)
            await connection.execute("DELETE FROM outbox WHERE position = ANY(%s)", [[row.position for row in batch]])
        return count / (time.perf_counter() - start)


def _produce(producer: Producer, batch: list[WaitingEvent]) -> None:
    producer.begin_transaction()
    for row in batch:
        producer.produce(Topic.STATUS, key=str(row.query_id), value=row.payload, headers=to_kafka(row.headers))
    producer.commit_transaction(_BROKER_SECONDS)


async def compare(url: str, kafka: dict[str, Any], count: int, runs: int, report: Callable[[str], None]) -> Any:
    """`runs` pairs of runs; rates are events a second, ratios the relay's over the bare producer's."""
    peers = {"relay": run_relay, "bare": run_bare}
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for pair in range(runs + 1):
        for name in sorted(peers, reverse=pair % 2 == 0):
            fill(url, count)
            rate = await peers[name](url, kafka, count)
            if pair > 0:
                rates[name].append(rate)
                report(f"run {pair} of {runs}: {name:5} {rate:8.0f} events/s")
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    return {
        "events": count,
        "rates": {name: [round(rate) for rate in measured] for name, measured in rates.items()},
        "medians": {name: round(rate) for name, rate in medians.items()},
        "ratio_of_medians": round(medians["relay"] / medians["bare"], 2),
        "ratios_of_pairs": [round(relay / bare, 2) for relay, bare in zip(rates["relay"], rates["bare"], strict=True)],
    }


@contextmanager
def run_servers(bootstrap: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """A fresh data database and a Kafka with our topics: the libpq URI, and librdkafka's configuration."""
    # Not below a folder that is closed to the user whom an embedded Postgres runs as when started by root.
    folder = Path(tempfile.mkdtemp(prefix="queryd-"))
    folder.chmod(0o755)
    try:
        with Lifeline() as lifeline:
            postgres = Postgres(folder / "postgres", folder / "postgres.log", lifeline)
            try:
                postgres.start()
                postgres.create_database("data")
                upgrade_data(postgres.url("data"))
                with _run_kafka(bootstrap, folder, lifeline) as address:
                    kafka = {"bootstrap.servers": address}
                    apply_topics(kafka, _PARTITIONS, 1)
                    yield postgres.url("data"), kafka
            finally:
                postgres.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _run_kafka(bootstrap: str | None, folder: Path, lifeline: Lifeline) -> Iterator[str]:
    if bootstrap is not None:
        yield bootstrap
        return
    kind = brokers.choose("auto")
    if kind is brokers.Kind.EMBEDDED:
        sys.exit(f"the relay's transactions need Apache Kafka: install {brokers.WHAT_TO_INSTALL}, or name one")
    brokers.prepare(kind)
    with brokers.run(kind, folder, lifeline) as broker:
        yield broker.bootstrap


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print it; with `--json` as one line on stdout, and nothing after it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=30_000, help="events in a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each")
    parser.add_argument("--bootstrap", help="a Kafka with transactions to use instead of starting one")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args(argv)
    with run_servers(arguments.bootstrap) as (url, kafka):
        found = asyncio.run(
            compare(url, kafka, arguments.events, arguments.runs, lambda line: print(line, file=sys.stderr, flush=True))
        )
    if arguments.json:
        print(json.dumps(found), flush=True)
        return
    print(f"{found['events']} events a run, {arguments.runs} runs of each, alternating")
    for name, median in found["medians"].items():
        print(f"  {name:5} median {median:8} events/s   of {found['rates'][name]}")
    print(f"  ratio of the medians {found['ratio_of_medians']}, of each pair {found['ratios_of_pairs']}")


if __name__ == "__main__":
    main()
