"""Status events a second out of the log: a rebuild of the state database against a bare consumer that only decodes.

Both read the same topic at read_committed, by assignment, from its beginning to its end. The peer decodes each event
with `decode_status` and forgets it; the rebuild has an emptied state database and ends with the swap, indexes, offsets
and counts included. The events are those of whole queries, three to each, with a thousand queries under way at any
time, in Kafka transactions and with headers as the relay writes them. The two alternate, and each pair begins with the
other one.

Run it from the checkout: `python -m bench.rebuild [--events N] [--runs N] [--bootstrap HOST:PORT] [--json]`. It needs
transactions, so an Apache Kafka: the one at `--bootstrap`, or one that it starts as the tests do.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition
from psycopg.conninfo import make_conninfo

from bench.relay import run_servers
from consumers.executor.story import QueryFacts, tell
from consumers.rebuild.rebuild import opened
from consumers.rebuild.source import SourceName
from db.connection import DataPool, make_pool
from db.data.outbox import NewEvent
from db.migrations.upgrade import upgrade_state
from db.state.platform import create_platform_tables
from queryd.codec import decode_status
from queryd.events import Mode, OrgId, QueryId, Status, Topic
from queryd.headers import continue_trace, to_kafka

EVENTS = 1_000_000

# A busy installation's: their events lie between those of others.
_UNDER_WAY = 1_000
# Larger than the relay's, for nobody waits; markers are as many as make no difference.
_TRANSACTION = 10_000
_BROKER_SECONDS = 30.0
_AT_ONCE = 1_000
_STEPS = [(None, Status.QUEUED), (Status.QUEUED, Status.RUNNING), (Status.RUNNING, Status.SUCCEEDED)]


def fill(kafka: dict[str, Any], count: int) -> None:
    """Write `count` status events."""
    producer = Producer(
        kafka
        | {"transactional.id": f"queryd-bench-{uuid.uuid4()}", "linger.ms": 20, "queue.buffering.max.messages": 200_000}
    )
    producer.init_transactions(_BROKER_SECONDS)
    producer.begin_transaction()
    for number, event in enumerate(_tell_stories(count), 1):
        producer.produce(Topic.STATUS, key=event.query_id, value=event.payload, headers=to_kafka(event.headers.obj))
        if number % _TRANSACTION == 0:
            producer.commit_transaction(_BROKER_SECONDS)
            producer.begin_transaction()
    producer.commit_transaction(_BROKER_SECONDS)


def _tell_stories(count: int) -> Iterator[NewEvent]:
    """Each query's events in order, and between two of them one event of each of the others under way."""
    waiting: deque[tuple[QueryFacts, int]] = deque()
    for _ in range(count):
        if len(waiting) < _UNDER_WAY:
            facts = QueryFacts(_new_query(), OrgId(str(uuid.uuid4())), Mode.INTERACTIVE, "0" * 64, continue_trace(None))
            place = 0
        else:
            facts, place = waiting.popleft()
        previous, status = _STEPS[place]
        now = datetime.now(UTC)
        yield tell(facts, sequence=place + 1, previous=previous, status=status, attempt=int(place > 0), now=now)
        if place + 1 < len(_STEPS):
            waiting.append((facts, place + 1))


def _new_query() -> QueryId:
    return QueryId(str(uuid.uuid4()))


def decode_all(kafka: dict[str, Any]) -> tuple[int, float]:
    """The peer: how many events it has decoded, and in how many seconds."""
    start, decoded = time.perf_counter(), 0
    reading = {"group.id": str(uuid.uuid4()), "enable.auto.commit": False, "enable.partition.eof": True}
    consumer = Consumer(kafka | reading)
    try:
        unread = set(consumer.list_topics(Topic.STATUS, timeout=_BROKER_SECONDS).topics[Topic.STATUS].partitions)
        consumer.assign([TopicPartition(Topic.STATUS, partition, OFFSET_BEGINNING) for partition in unread])
        while unread:
            for message in consumer.consume(_AT_ONCE, 0.1):
                error = message.error()
                if error is None:
                    decode_status(message.value())
                    decoded += 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(message.partition())
    finally:
        consumer.close()
    return decoded, time.perf_counter() - start


async def rebuild_all(
    kafka: dict[str, Any], state_url: str, data_url: str, report: Callable[[str], None]
) -> tuple[int, float]:
    """A rebuild of an emptied state database: how many events it has read, and in how many seconds."""
    with psycopg.connect(state_url, autocommit=True) as connection:
        connection.execute("TRUNCATE query_status, consumer_offsets")
        connection.execute("CHECKPOINT")
    pool = DataPool(make_pool(data_url, "bench", 1))
    await pool.open()
    try:
        start = time.perf_counter()
        async with opened(SourceName.LOG, state_url, pool, kafka) as rebuild:
            await rebuild.stage(_ignore)
            plan = await rebuild.plan()
            swap_start = time.perf_counter()
            rebuilt = await rebuild.swap(plan.hash)
            report(f"writers waited for {time.perf_counter() - swap_start:.1f} s, {rebuilt.found.queries} queries")
        return rebuilt.found.reading.events, time.perf_counter() - start
    finally:
        await pool.close()


async def _ignore(_read: int, _total: int) -> None:
    return None


def compare(
    kafka: dict[str, Any], state_url: str, data_url: str, runs: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """`runs` pairs of runs; rates are events a second, ratios the rebuild's over the bare consumer's."""
    peers: dict[str, Callable[[], tuple[int, float]]] = {
        "bare": lambda: decode_all(kafka),
        "rebuild": lambda: asyncio.run(rebuild_all(kafka, state_url, data_url, report)),
    }
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for pair in range(1, runs + 1):
        for name in sorted(peers, reverse=pair % 2 == 0):
            events, seconds = peers[name]()
            rates[name].append(events / seconds)
            report(f"run {pair} of {runs}: {name:7} {events} events, {events / seconds:8.0f} events/s")
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    return {
        "rates": {name: [round(rate) for rate in measured] for name, measured in rates.items()},
        "medians": {name: round(rate) for name, rate in medians.items()},
        "ratio_of_medians": round(medians["rebuild"] / medians["bare"], 2),
        "ratios_of_pairs": [round(ours / bare, 2) for ours, bare in zip(rates["rebuild"], rates["bare"], strict=True)],
    }


def make_state(data_url: str) -> str:
    """A fresh state database on the server of `data_url`; where it is."""
    with psycopg.connect(data_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE state")
    state_url = make_conninfo(data_url, dbname="state")
    upgrade_state(state_url)
    create_platform_tables(state_url)
    return state_url


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print it; with `--json` as one line on stdout, and nothing after it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=EVENTS, help="events in the log")
    parser.add_argument("--runs", type=int, default=1, help="runs of each")
    parser.add_argument("--bootstrap", help="a Kafka with transactions to use instead of starting one")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args(argv)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with run_servers(arguments.bootstrap) as (data_url, kafka):
        state_url = make_state(data_url)
        report(f"writing {arguments.events} events")
        fill(kafka, arguments.events)
        found = {"events": arguments.events} | compare(kafka, state_url, data_url, arguments.runs, report)
    if arguments.json:
        print(json.dumps(found), flush=True)
        return
    print(f"{found['events']} events, {arguments.runs} runs of each, alternating")
    for name, median in found["medians"].items():
        print(f"  {name:7} median {median:8} events/s   of {found['rates'][name]}")
    print(f"  ratio of the medians {found['ratio_of_medians']}, of each pair {found['ratios_of_pairs']}")


if __name__ == "__main__":
    main()
