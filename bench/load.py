"""The load generator: makes small queries, sends them to queryd or to a peer, and reads their terminal events."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Any

import psycopg
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from bench.peers.common import FETCH_WAIT_MS, TABLE
from bench.peers.redis import run_redis
from tests.acceptance.checker import Valid
from tests.acceptance.stack import Stack
from tests.acceptance.stranger import STATUS_TOPIC, Contract, Outgoing, Publisher, StatusTail
from tests.acceptance.workload import MODES, make_fields, to_outgoing

# The same in every run, so that an org's instances are warm.
_ORGS = tuple(str(uuid.uuid5(uuid.NAMESPACE_URL, f"queryd:bench:org:{number}")) for number in range(4))
# As many as a priority class of a small installation; a peer reads them all by itself.
_PARTITIONS = 4
# Guards against hanging only.
_RUN_SECONDS = 900.0
_TOPIC_SECONDS = 30.0
# Without it a row of queries one after another could fall in step with a timer of the service.
_PAUSE_SECONDS = 0.05


class Peer(StrEnum):
    """What queryd is compared with; modules of `bench.peers`."""

    NAIVE = "naive"
    CELERY = "celery"
    FASTSTREAM = "faststream"
    DIRECT = "direct"


def make_small(count: int, *, inline: bool = False) -> list[Valid]:
    """Make `count` queries of 100 rows, no two alike, of four orgs, in both classes; inline, in the interactive one."""
    return [_make_small(number, inline) for number in range(count)]


def _make_small(number: int, inline: bool) -> Valid:
    salt = random.randrange(1_000_000)
    sql = f"SELECT i AS id, i * {salt} AS product, 'row ' || i AS label FROM range(100) AS t(i)"
    mode = MODES[0 if inline else number // 2 % 2]
    delivery = "inline_if_small" if inline else "object"
    return ask(_ORGS[number // 4 % len(_ORGS)], sql, mode=mode, delivery=delivery)


def ask(org_id: str, sql: str, **fields: Any) -> Valid:
    """Make a request; only its id and fields matter here, not the rows of its result."""
    return Valid(make_fields(**{"mode": "interactive", "org_id": org_id, "sql": sql, **fields}), (), ())


@dataclass(frozen=True, slots=True)
class Target:
    """What takes queries. `prepare` makes the messages, and returns the function that sends them."""

    prepare: Callable[[Sequence[Valid]], Callable[[], object]]
    told: StatusTail

    def measure_rate(self, queries: Sequence[Valid]) -> float:
        """Queries/s from the first publish to the last terminal event read; raises RuntimeError if one failed."""
        send = self.prepare(queries)
        start = time.perf_counter()
        send()
        self.told.read_terminal([query.query_id for query in queries], _RUN_SECONDS)
        seconds = time.perf_counter() - start
        self.check(queries)
        return len(queries) / seconds

    def time_each(self, queries: Sequence[Valid]) -> list[float]:
        """Milliseconds from publish to terminal event read, one query after another."""
        return [self._time_one(query) for query in queries]

    def _time_one(self, query: Valid) -> float:
        time.sleep(random.uniform(0, _PAUSE_SECONDS))
        send = self.prepare([query])
        start = time.perf_counter()
        send()
        self.told.read_terminal([query.query_id], _RUN_SECONDS)
        taken = (time.perf_counter() - start) * 1000
        self.check([query])
        return taken

    def check(self, queries: Sequence[Valid]) -> None:
        """Raise RuntimeError unless each query ended as `Succeeded`."""
        last = [self.told.events[query.query_id][-1].fields for query in queries]
        failed = [fields for fields in last if fields["status"] != "Succeeded"]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(queries)} failed, one with {failed[0].get('error_code')}")


class Site:
    """A running stack with a load generator beside it."""

    def __init__(self, stack: Stack, publisher: Publisher, told: StatusTail, contract: Contract) -> None:
        self.stack = stack
        self.publisher = publisher
        self.contract = contract
        self.queryd = Target(self._prepare, told)

    def _prepare(self, queries: Sequence[Valid]) -> Callable[[], object]:
        messages = [to_outgoing(self.contract, query) for query in queries]
        return lambda: self.publisher.publish(messages)

    @contextmanager
    def run_peer(self, peer: Peer) -> Iterator[Target]:
        """A peer with topics of its own, for as long as the context lasts. Raises `RedisMissing`."""
        servers, run = self.stack.servers, uuid.uuid4().hex[:8]
        requests, statuses = f"bench.{run}.requests", f"bench.{run}.status"
        _make_topics(servers.bootstrap, requests, statuses)
        env_file = str(self.stack.folder / ".queryd" / "env")
        command, environment = [sys.executable, "-m", f"bench.peers.{peer}"], dict(os.environ)
        # A killed peer leaves its scratch files; they go with the stack.
        environment["TMPDIR"] = str(self.stack.folder)
        prepare = self._prepare_for(requests)
        with ExitStack() as opened:
            if peer is Peer.CELERY:
                # Only this peer needs Celery in the load generator's process.
                from bench.peers import celery  # noqa: PLC0415

                url = opened.enter_context(run_redis())
                environment |= {celery.REDIS_URL: url, celery.ENV_FILE: env_file, celery.STATUS_TOPIC: statuses}
                app = opened.enter_context(celery.make_app(url))
                prepare = _prepare_for_celery(app, celery.TASK)
            else:
                command += ["--env", env_file, "--topic", requests, "--status-topic", statuses]
            told = opened.enter_context(open_tail(servers.bootstrap, self.contract, statuses))
            opened.enter_context(_run_until_left(command, environment))
            yield Target(prepare, told)

    def _prepare_for(self, topic: str) -> Callable[[Sequence[Valid]], Callable[[], object]]:
        def prepare(queries: Sequence[Valid]) -> Callable[[], object]:
            sent = [to_outgoing(self.contract, query) for query in queries]
            messages = [Outgoing(topic, each.key, each.value, each.headers) for each in sent]
            return lambda: self.publisher.publish(messages)

        return prepare


def _prepare_for_celery(app: Any, task: str) -> Callable[[Sequence[Valid]], Callable[[], object]]:
    def prepare(queries: Sequence[Valid]) -> Callable[[], object]:
        return lambda: [app.send_task(task, (dict(query.fields),)) for query in queries]

    return prepare


def open_tail(bootstrap: str, contract: Contract, topic: str = STATUS_TOPIC) -> StatusTail:
    """Return a reader of a status topic that an empty fetch does not delay."""
    return StatusTail(bootstrap, contract, topic, options={"fetch.wait.max.ms": FETCH_WAIT_MS})


def _make_topics(bootstrap: str, *names: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    topics = [NewTopic(name, num_partitions=_PARTITIONS, replication_factor=1) for name in names]
    for made in admin.create_topics(topics).values():
        made.result(_TOPIC_SECONDS)


@contextmanager
def _run_until_left(command: Sequence[str], environment: dict[str, str]) -> Iterator[None]:
    """A process that has printed `ready`, killed with its children at the end."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            _await_ready(process.stdout, command)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _await_ready(stream: IO[str] | None, command: Sequence[str]) -> None:
    assert stream is not None
    # Celery prints a banner before it.
    if not any(line == "ready\n" for line in stream):
        raise RuntimeError(f"{command[2]} ended before it was ready")


@contextmanager
def open_site(stack: Stack) -> Iterator[Site]:
    """A load generator for a running stack, and the peers' table in its data database."""
    contract, bootstrap = Contract(), stack.servers.bootstrap
    with psycopg.connect(stack.servers.data_url) as connection:
        connection.execute(TABLE)
    with Publisher(bootstrap) as publisher, open_tail(bootstrap, contract) as told:
        yield Site(stack, publisher, told, contract)
