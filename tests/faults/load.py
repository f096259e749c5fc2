"""A steady load of mixed queries, as strangers would send it: from `schemas/` alone, acknowledged by all replicas.

Everything is drawn from the seed. What the brokers acknowledged was accepted, and only that: a record whose delivery
failed is sent again under its id until it is.
"""

import heapq
import itertools
import json
import queue
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import boto3
import psycopg
from confluent_kafka import KafkaError, Message, Producer

from tests.acceptance.stranger import REQUEST_TOPICS, Contract, Headers, cloud_event_headers
from tests.acceptance.workload import Dataset
from tests.faults.cluster import Cluster
from tests.faults.evidence import SentMalformed, SentQuery

# Requests a second: 3,000 in ten minutes need five, and outages hold the load back for a third of the time.
RATE = 9.0
PARTITIONS = 6
CANCELLATIONS = "query.cancellations"

_FORMATS = ("parquet", "csv", "json")
_ORGS = 8
# Enough of them to be hit by every fault, and objects stay the most.
_INLINE_SHARE = 0.3
_SUCCEEDED = frozenset({"Succeeded"})
# Enough for a query of seconds to live through an outage of 20 s and several attempts.
_PATIENT_SECONDS = 90
_LEAST_DEADLINE_SECONDS = 60.0
# A task for each query of a run, twice as many as are expected: bursts come on top of the rate.
_TASKS_TO_QUERIES = 2.0
# How many of the latest requests are remembered, to be sent again or contradicted.
_RECENT = 400
# While the brokers are away no more than this many wait for them, so that they don't come all at once.
_MOST_UNACKNOWLEDGED = 40
# Behind by so many requests, it sends faster by this factor.
_LATE, _CATCHING_UP = 5, 2.0
# Deliveries are reported within a poll; the loop polls at least this often.
_POLL_SECONDS = 0.02
# A failed delivery is tried again after this, by a new producer where the old one can't go on.
_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A query to be asked: what it says, and what must come of it."""

    outcomes: frozenset[str]
    columns: tuple[str, ...] = ()
    content: tuple[tuple[str, ...], ...] | None = None
    sql: str | None = None
    saved_query_id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: int = 60
    output_format: str | None = None
    org: str | None = None


@dataclass(slots=True)
class _Query:
    """A request on its way. `accepted_at` is when the first record of it was acknowledged."""

    fields: dict[str, Any]
    canary: str
    draft: _Draft
    value: bytes
    headers: Headers
    cancelled: bool = False
    accepted_at: float | None = None
    partition: int = 0

    @property
    def query_id(self) -> str:
        return str(self.fields["query_id"])

    @property
    def topic(self) -> str:
        return REQUEST_TOPICS[self.fields["mode"]]

    def to_evidence(self) -> SentQuery:
        assert self.accepted_at is not None
        return SentQuery(
            query_id=self.query_id,
            org_id=self.fields["org_id"],
            task_id=self.fields["task_id"],
            mode=self.fields["mode"],
            output_format=self.fields["output_format"],
            canary=self.canary,
            sent_at=self.accepted_at,
            # Its time limit counts from the start of an attempt; in the queue it may wait for minutes.
            deadline_seconds=max(float(self.draft.seconds), _LEAST_DEADLINE_SECONDS),
            outcomes=self.draft.outcomes | ({"QUERY_CANCELLED"} if self.cancelled else frozenset()),
            columns=self.draft.columns,
            content=self.draft.content,
            cancelled=self.cancelled,
            inline=self.fields["delivery"] == "inline_if_small" and self.fields["mode"] == "interactive",
        )


@dataclass(frozen=True, slots=True)
class _Bad:
    """A record that is no valid request."""

    topic: str
    key: bytes
    value: bytes
    canary: str | None
    answered_id: str | None
    partition: int
    code: str


class Load:
    """Sends from `start` to `stop`. `provoke` may be called by any thread, for faults that want company."""

    def __init__(self, cluster: Cluster, seed: str, rate: float = RATE) -> None:
        self._cluster = cluster
        self._random = random.Random(f"{seed}/load")
        self._rate = rate
        self._contract = Contract()
        self._orgs = [self._new_id() for _ in range(_ORGS)]
        self._tasks: dict[str, deque[str]] = {org: deque() for org in self._orgs}
        self._saved = ""
        self._datasets: list[Dataset] = []
        self._queries: dict[str, _Query] = {}
        self._malformed: list[SentMalformed] = []
        self._recent: deque[_Query] = deque(maxlen=_RECENT)
        self._wishes: queue.Queue[tuple[str, int]] = queue.Queue()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._unacknowledged = 0
        self._failures: list[str] = []
        self._producer: Producer
        self._stopping = threading.Event()
        # Set while the service is behind by more than it could work off in time after the last fault.
        self.held = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._kinds: dict[str, tuple[float, Callable[[str], _Draft]]] = {
            "tiny": (44, self._tiny),
            "literal": (8, self._literal),
            "sum": (12, self._sum),
            "rows": (10, self._rows),
            "parquet": (6, lambda canary: self._late(0, canary)),
            "postgres": (4, lambda canary: self._late(1, canary)),
            "saved": (4, self._saved_query),
            "large": (0.8, self._large),
            "slow": (1.5, self._slow),
            "timeout": (0.7, self._endless),
            "cast": (2, self._bad_cast),
            "statement": (1, self._statement),
            "file": (1, self._file),
            "unknown": (1, self._unknown),
        }

    @property
    def accepted(self) -> int:
        """How many queries were accepted so far."""
        return sum(query.accepted_at is not None for query in list(self._queries.values()))

    @property
    def sent(self) -> tuple[SentQuery, ...]:
        """All accepted queries, once stopped."""
        return tuple(query.to_evidence() for query in self._queries.values() if query.accepted_at is not None)

    @property
    def malformed(self) -> tuple[SentMalformed, ...]:
        """All malformed records that were acknowledged, once stopped."""
        return tuple(self._malformed)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What `provoke` understands as kinds of queries."""
        return tuple(self._kinds)

    def prepare(self, seconds: float) -> None:
        """Make the datasets, the saved query and the tasks of a run of so many seconds."""
        place = self._cluster.place
        owner = self._orgs[0]
        self._datasets = [Dataset("flights_s3"), Dataset("flights_pg")]
        in_s3, in_postgres = self._datasets
        client = boto3.client(
            "s3",
            endpoint_url=place.endpoint_url,
            region_name=place.region,
            aws_access_key_id=place.access_key,
            aws_secret_access_key=place.secret_key,
        )
        key = f"datasets/{in_s3.name}/part-0.parquet"
        client.put_object(Bucket=place.bucket, Key=key, Body=in_s3.parquet())
        client.close()
        _load_postgres(self._cluster.data.url("datasets"), in_postgres)
        for name, kind, location in (
            (in_s3.name, "parquet", f"s3://{place.bucket}/{key}"),
            (in_postgres.name, "postgres", f"public.{in_postgres.name}"),
        ):
            self._cluster.queryd(
                *("datasets", "add", name, "--org", owner, "--kind", kind, "--location", location),
                *("--visibility", "public"),
            )
        saved = self._cluster.queryd(
            *("saved", "add", "numbers", "--org", owner, "--user", self._new_id(), "--visibility", "public"),
            *("--sql", "SELECT $number + 1 AS next, length($label) AS size", "--json"),
        )
        self._saved = _find_id(saved)
        self._make_tasks(int(seconds * self._rate * _TASKS_TO_QUERIES) + 200)

    def start(self) -> None:
        """Begin to send."""
        self._producer = self._make_producer()
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Send no more, and wait until all that was sent is acknowledged. Raises TimeoutError."""
        self._stopping.set()
        self._thread.join(seconds)
        if self._thread.is_alive() or self._unacknowledged:
            raise TimeoutError(f"{self._unacknowledged} records of the load were not acknowledged: {self._failures}")

    def provoke(self, wish: str, count: int = 1) -> None:
        """Send soon so many of a kind of query, or of `malformed`, `duplicate`, `reordered`, `cancel`, `conflict`."""
        self._wishes.put((wish, count))

    # The loop.

    def _run(self) -> None:
        started = upcoming = time.monotonic()
        done = 0
        while not self._stopping.is_set():
            now = time.monotonic()
            self._send_wishes()
            while self._later and self._later[0][0] <= now:
                heapq.heappop(self._later)[2]()
            if now >= upcoming and not self.held.is_set() and self._unacknowledged < _MOST_UNACKNOWLEDGED:
                self._act()
                done += 1
                # As strangers come: independent of each other; and more of them while an outage is made up for.
                late = done < self._rate * (now - started) - _LATE
                rate = self._rate * (_CATCHING_UP if late else 1.0)
                upcoming = max(upcoming, now - _LATE / rate) + self._random.expovariate(rate)
            self._producer.poll(_POLL_SECONDS)
        # What waits for its time is due now: a cancel that was promised is sent.
        while self._later or self._unacknowledged:
            while self._later:
                heapq.heappop(self._later)[2]()
            self._producer.poll(_POLL_SECONDS)

    def _act(self) -> None:
        [what] = self._random.choices(("query", "duplicate", "malformed", "cancel", "conflict"), (88, 5, 3, 3, 1))
        self._do(what)

    def _send_wishes(self) -> None:
        while True:
            try:
                what, count = self._wishes.get_nowait()
            except queue.Empty:
                return
            if what == "reordered":
                self._send_reordered(count)
                continue
            for _ in range(count):
                self._do(what)

    def _do(self, what: str) -> None:
        match what:
            case "query":
                [kind] = self._random.choices(list(self._kinds), [weight for weight, _ in self._kinds.values()])
                self._send(self._make(kind))
            case "duplicate":
                self._send_duplicate()
            case "malformed":
                self._send_malformed()
            case "cancel":
                self._send_and_cancel()
            case "conflict":
                self._send_conflict()
            case kind:
                self._send(self._make(kind))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), action))

    # Kinds of queries. Each holds its canary where an engine would see it.

    def _tiny(self, canary: str) -> _Draft:
        number = self._random.randrange(1_000_000)
        return _Draft(_SUCCEEDED, ("answer",), ((str(number),),), f"SELECT {number} AS answer /* {canary} */")

    def _literal(self, canary: str) -> _Draft:
        return _Draft(
            _SUCCEEDED,
            ("size", "same"),
            ((str(len(canary)), "1"),),
            f"SELECT length('{canary}') AS size, ('{canary}' = $word)::INTEGER AS same",
            parameters={"word": canary},
        )

    def _sum(self, canary: str) -> _Draft:
        last = self._random.randrange(1_000, 300_000)
        return _Draft(
            _SUCCEEDED,
            ("numbers", "total"),
            ((str(last), str(last * (last - 1) // 2)),),
            f"SELECT count(*) AS numbers, sum(i)::BIGINT AS total FROM range(0, {last}) AS t(i) WHERE '{canary}' <> ''",
        )

    def _rows(self, canary: str) -> _Draft:
        count, factor = self._random.randrange(1, 300), self._random.randrange(1_000)
        return _Draft(
            _SUCCEEDED,
            ("i", "product"),
            tuple((str(i), str(i * factor)) for i in range(count - 1, -1, -1)),
            f"SELECT i, i * {factor} AS product FROM range(0, {count}) AS t(i) ORDER BY i DESC -- {canary}",
        )

    def _late(self, which: int, canary: str) -> _Draft:
        sql, columns, rows = self._datasets[which].late(self._random.randrange(90))
        content = tuple(tuple(str(row[name]) for name in columns) for row in rows)
        return _Draft(_SUCCEEDED, columns, content, f"{sql} /* {canary} */", seconds=_PATIENT_SECONDS)

    def _saved_query(self, canary: str) -> _Draft:
        number = self._random.randrange(1_000_000)
        return _Draft(
            _SUCCEEDED,
            ("next", "size"),
            ((str(number + 1), str(len(canary))),),
            saved_query_id=self._saved,
            parameters={"number": number, "label": canary},
        )

    def _large(self, canary: str) -> _Draft:
        # 20 MB as CSV, beyond the 16 MiB of a single PUT.
        count = self._random.randrange(480_000, 600_000)
        return _Draft(
            _SUCCEEDED,
            ("i", "digest"),
            None,
            f"SELECT i, md5(i::VARCHAR) AS digest FROM range(0, {count}) AS t(i) /* {canary} */",
            seconds=_PATIENT_SECONDS,
            output_format="csv",
        )

    def _slow(self, canary: str) -> _Draft:
        return self._join(canary, self._random.randrange(8_000, 25_000))

    def _join(self, canary: str, rows: int) -> _Draft:
        # Some 150 million pairs a second on one thread of an idle core.
        return _Draft(
            _SUCCEEDED,
            ("pairs",),
            None,
            f"SELECT count(*) AS pairs FROM range(0, {rows}) AS a(i), range(0, 10000) AS b(j) "
            f"WHERE (i * j) % 7 = 3 /* {canary} */",
            seconds=_PATIENT_SECONDS,
        )

    def _endless(self, canary: str) -> _Draft:
        sql = self._join(canary, 9_000_000).sql
        return _Draft(frozenset({"QUERY_TIMEOUT"}), sql=sql, seconds=1)

    def _bad_cast(self, canary: str) -> _Draft:
        return _Draft(frozenset({"QUERY_ERROR"}), sql=f"SELECT CAST('{canary}' AS INTEGER) AS number")

    def _statement(self, canary: str) -> _Draft:
        return _Draft(frozenset({"SQL_REJECTED"}), sql=f"CREATE TABLE {canary} (i INTEGER)")

    def _file(self, canary: str) -> _Draft:
        return _Draft(frozenset({"SQL_REJECTED"}), sql=f"SELECT * FROM read_csv('/{canary}.csv')")

    def _unknown(self, canary: str) -> _Draft:
        return _Draft(frozenset({"SQL_REJECTED"}), sql=f"SELECT * FROM {canary}")

    # Making and sending.

    def _make(self, kind: str) -> _Query:
        canary = self._new_canary()
        return self._make_of(self._kinds[kind][1](canary), canary)

    def _make_of(self, draft: _Draft, canary: str) -> _Query:
        org = draft.org or self._random.choice(self._orgs)
        mode = "batch" if self._random.random() < 0.4 and self._tasks[org] else "interactive"
        fields = {
            "query_id": self._new_id(),
            "org_id": org,
            "user_id": self._new_id() if mode == "interactive" else None,
            "task_id": self._tasks[org].popleft() if mode == "batch" else None,
            "mode": mode,
            "sql": draft.sql,
            "saved_query_id": draft.saved_query_id,
            "parameters": draft.parameters,
            "output_format": draft.output_format or self._random.choice(_FORMATS),
            "timeout_seconds": draft.seconds,
            # A batch that asks for it gets an object all the same.
            "delivery": "inline_if_small" if self._random.random() < _INLINE_SHARE else "object",
        }
        query_id = str(fields["query_id"])
        value = self._contract.encode("QueryRequested", fields)
        return _Query(fields, canary, draft, value, cloud_event_headers("QueryRequested", query_id))

    def _send(self, query: _Query, partition: int | None = None) -> None:
        self._queries[query.query_id] = query
        self._recent.append(query)

        def accepted(message: Message) -> None:
            if query.accepted_at is None:
                query.accepted_at = time.time()
                query.partition = message.partition() or 0

        place = self._random.randrange(PARTITIONS) if partition is None else partition
        self._produce(query.topic, query.query_id.encode(), query.value, query.headers, place, accepted)

    def _send_duplicate(self) -> None:
        if self._recent:
            self._send(self._random.choice(self._recent))

    def _send_reordered(self, count: int) -> None:
        """New queries, each twice and the copies in any order, on any partition."""
        queries = [self._make(self._random.choice(("tiny", "rows", "sum", "literal"))) for _ in range(count)]
        copies = queries * 2
        self._random.shuffle(copies)
        for query in copies:
            self._send(query)

    def _send_and_cancel(self) -> None:
        canary = self._new_canary()
        slow = self._random.random() < 0.4
        draft = self._join(canary, self._random.randrange(30_000, 60_000)) if slow else self._tiny(canary)
        query = self._make_of(draft, canary)
        when = self._random.choice(("before", "at once", "soon", "later", "after", "foreign"))
        query.cancelled = when != "foreign"
        match when:
            case "before":
                self._cancel(query)
                self._after(self._random.uniform(0.1, 1.0), lambda: self._send(query))
            case "at once" | "foreign":
                self._send(query)
                self._cancel(query)
            case _:
                self._send(query)
                lowest, highest = {"soon": (0.1, 1.0), "later": (1.0, 5.0), "after": (10.0, 20.0)}[when]
                self._after(self._random.uniform(lowest, highest), lambda: self._cancel(query))

    def _cancel(self, query: _Query) -> None:
        org = query.fields["org_id"] if query.cancelled else self._new_id()
        fields = {"query_id": query.query_id, "org_id": org, "user_id": None, "reason": "a test", "requested_at": None}
        value = self._contract.encode("QueryCancelRequested", fields)
        headers = cloud_event_headers("QueryCancelRequested", query.query_id)
        place = self._random.randrange(PARTITIONS)
        self._produce(CANCELLATIONS, query.query_id.encode(), value, headers, place, lambda _: None)

    def _send_conflict(self) -> None:
        """Another request under an id that was accepted, behind it on its partition: so it is judged after it."""
        known = [query for query in self._recent if query.accepted_at is not None]
        if not known:
            return
        query = self._random.choice(known)
        canary = self._new_canary()
        other = query.fields | {"sql": f"SELECT 'another' /* {canary} */", "saved_query_id": None, "parameters": {}}
        value = self._contract.encode("QueryRequested", other)
        self._send_bad(_Bad(query.topic, query.query_id.encode(), value, canary, None, query.partition, "CONFLICT"))

    def _send_malformed(self) -> None:
        canary = self._new_canary()
        query = self._make_of(self._tiny(canary), canary)
        if query.fields["task_id"] is not None:
            self._tasks[query.fields["org_id"]].append(query.fields["task_id"])
        # A task that follows nobody's query: an invalid request's row would move it.
        fields = query.fields | {"task_id": None, "mode": "interactive"}
        whole = self._contract.encode("QueryRequested", fields)
        make: dict[str, Callable[[], tuple[bytes, bool]]] = {
            "noise": lambda: (self._random.randbytes(self._random.randrange(1, 200)), False),
            "truncated": lambda: (whole[: self._random.randrange(2, len(whole))], False),
            "unknown schema": lambda: (whole[:2] + self._random.randbytes(8) + whole[10:], False),
            "text": lambda: (f'{{"sql": "SELECT {canary}"}}'.encode(), False),
            "no id": lambda: (self._contract.encode("QueryRequested", fields | {"query_id": canary}), False),
            "timeout": lambda: (self._contract.encode("QueryRequested", fields | {"timeout_seconds": 0}), True),
            "both": lambda: (self._contract.encode("QueryRequested", fields | {"saved_query_id": self._saved}), True),
            "format": lambda: (self._contract.encode("QueryRequested", fields | {"output_format": canary}), True),
            "lane": lambda: (self._contract.encode("QueryRequested", fields | {"mode": "batch"}), True),
        }
        value, answered = make[self._random.choice(list(make))]()
        times = 2 if self._random.random() < 0.1 else 1
        for _ in range(times):
            self._send_bad(
                _Bad(
                    REQUEST_TOPICS["interactive"],
                    query.query_id.encode(),
                    value,
                    canary,
                    query.query_id if answered else None,
                    self._random.randrange(PARTITIONS),
                    "INVALID_REQUEST" if answered else "UNDECODABLE",
                )
            )

    def _send_bad(self, bad: _Bad) -> None:
        def accepted(message: Message) -> None:
            offset = message.offset()
            assert offset is not None
            self._malformed.append(
                SentMalformed(bad.topic, bad.partition, offset, bad.canary, bad.answered_id, bad.code)
            )

        self._produce(bad.topic, bad.key, bad.value, (), bad.partition, accepted)

    def _produce(
        self,
        topic: str,
        key: bytes,
        value: bytes,
        headers: Headers,
        partition: int,
        accepted: Callable[[Message], None],
    ) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            self._unacknowledged -= 1
            if error is None:
                accepted(message)
            else:
                # It may lie in the topic all the same; under its id the next one is a duplicate.
                self._failures.append(error.str())
                self._after(_AGAIN_SECONDS, lambda: self._produce(topic, key, value, headers, partition, accepted))
                if error.fatal():
                    self._producer = self._make_producer()

        self._unacknowledged += 1
        self._producer.produce(
            topic, key=key, value=value, headers=list(headers), partition=partition, on_delivery=delivered
        )

    def _make_producer(self) -> Producer:
        return Producer(
            {
                "bootstrap.servers": self._cluster.kafka.bootstrap,
                "acks": "all",
                "enable.idempotence": True,
                # No limit: the brokers come back within the run, and what they have not acknowledged is not accepted.
                "message.timeout.ms": 0,
                "linger.ms": 5,
                "log_level": 0,
            }
        )

    def _make_tasks(self, count: int) -> None:
        rows: list[tuple[str, str]] = []
        for number in range(count):
            org, task = self._orgs[number % len(self._orgs)], self._new_id()
            self._tasks[org].append(task)
            rows.append((task, org))
        with (
            psycopg.connect(self._cluster.state.url("state")) as connection,
            connection.cursor() as cursor,
            cursor.copy("COPY tasks (id, org_id) FROM STDIN") as copy,
        ):
            for row in rows:
                copy.write_row(row)

    def _new_id(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def _new_canary(self) -> str:
        return f"canary{self._random.getrandbits(96):024x}"


def _load_postgres(url: str, dataset: Dataset) -> None:
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {dataset.name} (number BIGINT, carrier TEXT, delay BIGINT)".encode())
        with cursor.copy(f"COPY {dataset.name} FROM STDIN".encode()) as copy:
            for row in dataset.rows:
                copy.write_row(row)


def _find_id(answer: str) -> str:
    """The id in a command's JSON answer."""
    return str(json.loads(answer)["id"])
