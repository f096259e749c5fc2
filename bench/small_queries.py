"""Small queries a second: queryd against the naive consumer of `bench.naive`, on the same servers.

Half of the queries are `SELECT 42 AS answer`, half an aggregation over a thousand numbers; results are Parquet. They
are the same in every run but for their ids, four orgs ask, and half come by each lane; the naive peer has one topic for
all. A run lasts from the first publish to the last terminal event as a reader of the status topic sees it. One
unmeasured run of each warms up; then they alternate, and each pair begins with the other one. While the naive peer
runs, queryd is up and idle.

Run it from the checkout: `python -m bench.small_queries [--queries N] [--runs N] [--bootstrap HOST:PORT] [--json]`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import IO, Any

import psycopg
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from bench.naive import TABLE
from tests.acceptance.checker import Valid
from tests.acceptance.stack import Stack, run_stack
from tests.acceptance.stranger import Contract, Outgoing, Publisher, StatusTail
from tests.acceptance.workload import MODES, make_fields, to_outgoing

STATEMENTS = (
    "SELECT 42 AS answer",
    "SELECT count(*) AS numbers, sum(i)::BIGINT AS total FROM generate_series(1, 1000) AS t(i)",
)

# The same in every run, so that what is kept warm for an org is warm.
ORGS = tuple(str(uuid.uuid5(uuid.NAMESPACE_URL, f"queryd:bench:org:{number}")) for number in range(4))

# Enough to start every process, fill the pools and load what is loaded late.
_WARM_UP = 50
# As many as a lane of a small installation; the naive peer reads them all by itself.
_PARTITIONS = 4
# Guards against hanging only.
_RUN_SECONDS = 600.0
_TOPIC_SECONDS = 30.0


def make_queries(count: int) -> list[Valid]:
    """`count` small requests, alternating by statement, in twos by lane, in fours by org."""
    return [_make_query(number) for number in range(count)]


def _make_query(number: int) -> Valid:
    mode, sql, org = MODES[number // 2 % 2], STATEMENTS[number % 2], ORGS[number // 4 % len(ORGS)]
    return Valid(make_fields(mode, sql=sql, org_id=org), (), ())


def measure(publisher: Publisher, told: StatusTail, messages: Sequence[Outgoing], query_ids: Sequence[str]) -> float:
    """Queries a second from the first publish to the last terminal event; raises RuntimeError if one didn't succeed."""
    start = time.perf_counter()
    publisher.publish(messages)
    told.read_terminal(query_ids, _RUN_SECONDS)
    seconds = time.perf_counter() - start
    failed = [query_id for query_id in query_ids if told.events[query_id][-1].fields["status"] != "Succeeded"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(query_ids)} queries failed")
    return len(query_ids) / seconds


def run_queryd(publisher: Publisher, contract: Contract, told: StatusTail, count: int) -> float:
    """One run of queryd, in queries a second."""
    queries = make_queries(count)
    messages = [to_outgoing(contract, query) for query in queries]
    return measure(publisher, told, messages, [query.query_id for query in queries])


def run_naive(stack: Stack, publisher: Publisher, contract: Contract, count: int) -> float:
    """One run of the naive peer over topics of its own, in queries a second."""
    servers = stack.servers
    run = uuid.uuid4().hex[:8]
    requests, statuses = f"bench.{run}.requests", f"bench.{run}.status"
    admin = AdminClient({"bootstrap.servers": servers.bootstrap})
    topics = [NewTopic(name, num_partitions=_PARTITIONS, replication_factor=1) for name in (requests, statuses)]
    for made in admin.create_topics(topics).values():
        made.result(_TOPIC_SECONDS)
    queries = make_queries(count)
    messages = [
        Outgoing(requests, sent.key, sent.value, sent.headers)
        for sent in (to_outgoing(contract, query) for query in queries)
    ]
    command = [sys.executable, "-m", "bench.naive", "--env", str(stack.folder / ".queryd" / "env")]
    command += ["--topic", requests, "--status-topic", statuses, "--count", str(count)]
    with (
        StatusTail(servers.bootstrap, contract, statuses) as told,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer,
    ):
        try:
            _await_ready(peer.stdout)
            rate = measure(publisher, told, messages, [query.query_id for query in queries])
            peer.wait(_RUN_SECONDS)
        finally:
            peer.kill()
    return rate


def _await_ready(stream: IO[str] | None) -> None:
    assert stream is not None
    if stream.readline() != "ready\n":
        raise RuntimeError("the naive peer ended before it was ready")


def compare(stack: Stack, count: int, runs: int, report: Callable[[str], None]) -> dict[str, Any]:
    """`runs` pairs of runs over a stack; rates are queries a second, ratios queryd over naive."""
    servers, contract = stack.servers, Contract()
    with psycopg.connect(servers.data_url) as connection:
        connection.execute(TABLE)
    # Both are sent to by the same producer, which is warm by the first measured run.
    with Publisher(servers.bootstrap) as publisher, StatusTail(servers.bootstrap, contract) as told:
        peers: dict[str, Callable[[int], float]] = {
            "queryd": lambda queries: run_queryd(publisher, contract, told, queries),
            "naive": lambda queries: run_naive(stack, publisher, contract, queries),
        }
        for run in peers.values():
            run(_WARM_UP)
        rates: dict[str, list[float]] = {name: [] for name in peers}
        for pair in range(runs):
            for name in sorted(peers, reverse=pair % 2 == 0):
                rates[name].append(peers[name](count))
                report(f"run {pair + 1} of {runs}: {name:6} {rates[name][-1]:8.1f} queries/s")
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    pairs = zip(rates["queryd"], rates["naive"], strict=True)
    return {
        "queries": count,
        "rates": {name: [round(rate, 1) for rate in measured] for name, measured in rates.items()},
        "medians": {name: round(rate, 1) for name, rate in medians.items()},
        "ratio_of_medians": round(medians["queryd"] / medians["naive"], 2),
        "ratios_of_pairs": [round(queryd / naive, 2) for queryd, naive in pairs],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print it; with `--json` as one line on stdout, and nothing after it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=500, help="queries in a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each")
    parser.add_argument("--bootstrap", help="a Kafka to use instead of the embedded broker")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args(argv)
    with run_stack(arguments.bootstrap) as stack:
        found = compare(stack, arguments.queries, arguments.runs, lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        print(json.dumps(found), flush=True)
        return
    print(f"{found['queries']} small queries a run, {arguments.runs} runs of each, alternating")
    for name, median in found["medians"].items():
        print(f"  {name:6} median {median:8.1f} queries/s   of {found['rates'][name]}")
    print(f"  ratio of the medians {found['ratio_of_medians']}, of each pair {found['ratios_of_pairs']}")


if __name__ == "__main__":
    main()
