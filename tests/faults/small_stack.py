"""The whole service on one broker, one Postgres and one S3 server, for tests that break one thing on purpose.

Its executors may be sabotaged ones. Everything that was sent and broken is noted, so that the judge can be asked.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from processes.failpoints import Failpoint
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from service.topics import apply_topics
from tests.acceptance.checker import Valid
from tests.acceptance.stranger import Contract, Publisher
from tests.acceptance.workload import FORMATS, make_fields, to_outgoing
from tests.faults.cluster import Service, together
from tests.faults.evidence import Evidence, Fault, Place, SentQuery
from tests.faults.world import to_servers
from tests.servers.kafka import Kafka

# The shortest that a lease may be: a stopped worker outlives it soon.
LEASE_SECONDS = 3.0
# As short as one can be with heartbeats every second: a killed member's partitions move soon.
_SESSION_SECONDS = 3
# Guards against hanging.
_PATIENCE_SECONDS = 60.0
# Once all services are up, something happens within a lease and a session timeout: after this long without any change
# nothing will come.
_QUIET_SECONDS = 8.0
# With every row terminal, only the relay and the projector have work left, and that takes a fraction of a second.
_TOLD_SECONDS = 3.0
_LOOK_SECONDS = 0.05
_DEADLINE_SECONDS = 60


class SmallStack:
    """A running stack; make one with `run_small_stack`."""

    def __init__(
        self, place: Place, folder: Path, environment: dict[str, str], services: Sequence[Service], store: ObjectStore
    ) -> None:
        self.place = place
        self._environment = environment
        self.services = {service.name: service for service in services}
        self.store = store
        self._folder = folder
        self._contract = Contract()
        self._sent: list[SentQuery] = []
        self._faults: list[Fault] = []

    @property
    def executors(self) -> list[Service]:
        """The executors."""
        return [service for service in self.services.values() if service.kind == "executor"]

    def send(self, count: int) -> None:
        """Send queries of some hundredths of a second, over both lanes and all formats, and wait for the broker."""
        orgs = [str(uuid.uuid4()) for _ in range(3)]
        requests, sent_at = [_make_request(number, orgs) for number in range(count)], time.time()
        batch = [request.fields for request in requests if request.fields["task_id"] is not None]
        with psycopg.connect(self.place.state_url) as connection, connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO tasks (id, org_id) VALUES (%s, %s)",
                [(fields["task_id"], fields["org_id"]) for fields in batch],
            )
        with Publisher(self.place.bootstrap) as publisher:
            publisher.publish([to_outgoing(self._contract, request) for request in requests])
        self._sent += [_to_evidence(request, sent_at) for request in requests]

    @contextmanager
    def fault(self, kind: str, row: int) -> Iterator[None]:
        """Note what is broken in the context, until it is whole again."""
        started = time.time()
        yield
        self._faults.append(Fault(kind, row, "executor", started, time.time()))

    def arm(self, place: Failpoint, signal_name: str = "KILL") -> None:
        """Let the next process that passes this place get the signal."""
        draft = self._folder / "draft"
        draft.write_text(signal_name)
        draft.rename(self._failpoints / place)

    def await_passed(self, place: Failpoint) -> None:
        """Wait until the failpoint has had its victim."""
        await_condition(lambda: not (self._failpoints / place).exists(), f"somebody to pass {place}")

    def find_stopped(self) -> Service:
        """The executor that SIGSTOP has got."""

        def stopped() -> list[Service]:
            return [each for each in self.executors if each.pid is not None and _is_stopped(each.pid)]

        await_condition(lambda: bool(stopped()), "an executor to be stopped")
        [found] = stopped()
        return found

    def await_restart(self, service: Service, endings: int) -> None:
        """Wait until a service that had ended so often before has ended again, and works again."""
        await_condition(lambda: len(service.endings) > endings and service.ready, f"{service.name} to be back")

    def await_terminal(self) -> None:
        """Wait until all queries are terminal."""
        await_condition(lambda: self._progress()[0] == len(self._sent), "all queries to be terminal")

    def settle(self) -> None:
        """Wait until nothing changes any more, whether or not all is well then."""
        seen, since, latest = self._progress(), time.monotonic(), time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < latest:
            time.sleep(_LOOK_SECONDS)
            now = self._progress()
            if now != seen:
                seen, since = now, time.monotonic()
            over = seen[0] == len(self._sent)
            if time.monotonic() - since > (_TOLD_SECONDS if over else _QUIET_SECONDS):
                return
        raise TimeoutError(f"the stack did not come to rest within {_PATIENCE_SECONDS:.0f} s")

    def sweep(self) -> None:
        """Remove what dead attempts have left, as an operator would, from a stack that has settled."""
        # The product's own rule: only what has been dead for twice the lease. It has been at rest for a while already.
        time.sleep(2 * LEASE_SECONDS - _TOLD_SECONDS + 1.0)
        subprocess.run(
            [sys.executable, "-m", "queryd", "retention"],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=_PATIENCE_SECONDS,
            check=True,
        )

    def evidence(self) -> Evidence:
        """What was sent and broken so far."""
        return Evidence(
            place=self.place,
            queries=tuple(self._sent),
            malformed=(),
            faults=tuple(self._faults),
            lease_seconds=LEASE_SECONDS,
            logs=tuple(service.log for service in self.services.values()),
            scratch=tuple(self._folder / "scratch" / service.name for service in self.executors),
        )

    def log_of(self, service: Service) -> str:
        """What a service has logged."""
        return service.log.read_text(errors="replace")

    @property
    def _failpoints(self) -> Path:
        return self._folder / "failpoints"

    def _progress(self) -> tuple[int, int, int, int]:
        """How far all has come: terminal rows; sequences, leases and the outbox; the state database's sequences."""
        data = "SELECT count(*) FILTER (WHERE status IN ('Succeeded', 'Failed')) FROM query_results"
        inner = "SELECT coalesce(sum(sequence), 0) + (SELECT count(*) FROM query_leases) FROM query_runs"
        state = "SELECT coalesce(sum(sequence), 0) FROM query_status"
        return (
            _ask(self.place.data_url, data),
            _ask(self.place.data_url, inner),
            _ask(self.place.data_url, "SELECT count(*) FROM outbox"),
            _ask(self.place.state_url, state),
        )


@contextmanager
def run_small_stack(
    folder: Path,
    kafka: Kafka,
    postgres: Postgres,
    store: ObjectStore,
    lifeline: Lifeline,
    *,
    executors: int = 1,
    sabotage: str | None = None,
) -> Iterator[SmallStack]:
    """Executors, a relay and a projector, ready, on databases and a bucket of their own; the broker must be new."""
    for name in ("failpoints", "scratch", "services"):
        (folder / name).mkdir(parents=True)
    place = _prepare(kafka, postgres, store)
    environment = _environment(place, kafka) | {"QUERYD_FAILPOINTS": str(folder / "failpoints")}
    services = []
    for name in (*(f"executor-{number}" for number in range(1, executors + 1)), "relay", "projector"):
        kind = name.partition("-")[0]
        broken = sabotage is not None and kind == "executor"
        scratch = folder / "scratch" / name
        scratch.mkdir()
        module = ("tests.faults.sabotaged", str(sabotage)) if broken else ("queryd", "run")
        own = environment | {"QUERYD_SCRATCH": str(scratch)}
        services.append(Service(name, kind, folder / "services" / name, own, lifeline, module))
    try:
        for service in services:
            service.start()
        for service in services:
            service.await_ready(_PATIENCE_SECONDS)
        yield SmallStack(place, folder, environment, services, store)
    finally:
        for service in services:
            if service.pid is not None and _is_stopped(service.pid):
                os.kill(service.pid, signal.SIGCONT)
        together([service.stop for service in services])


def await_condition(condition: Callable[[], bool], what: str) -> None:
    """Look until it holds; raises TimeoutError, naming `what` was awaited."""
    latest = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > latest:
            raise TimeoutError(f"waited {_PATIENCE_SECONDS:.0f} s for {what}")
        time.sleep(_LOOK_SECONDS)


def _prepare(kafka: Kafka, postgres: Postgres, store: ObjectStore) -> Place:
    name = uuid.uuid4().hex
    data, state = f"data_{name}", f"state_{name}"
    for database in (data, state):
        postgres.create_database(database)
    place = Place(
        bootstrap=kafka.bootstrap,
        data_url=postgres.url(data),
        state_url=postgres.url(state),
        bucket=f"results-{name}",
        endpoint_url=store.endpoint_url,
        region=store.region,
        access_key=store.writer.access_key,
        secret_key=store.writer.secret_key,
    )
    to_servers(place).s3().create_bucket(Bucket=place.bucket)
    upgrade_data(place.data_url)
    upgrade_state(place.state_url)
    create_platform_tables(place.state_url)
    apply_topics({"bootstrap.servers": kafka.bootstrap}, 3, 1)
    return place


def _environment(place: Place, kafka: Kafka) -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    return passed_on | {
        "QUERYD_KAFKA_BOOTSTRAP": place.bootstrap,
        "QUERYD_KAFKA_SESSION_TIMEOUT": str(_SESSION_SECONDS),
        "QUERYD_RELAY_TRANSACTIONS": str(kafka.transactions).lower(),
        "QUERYD_DATA_URL": place.data_url,
        "QUERYD_STATE_URL": place.state_url,
        "QUERYD_RESULTS_URL": f"s3://{place.bucket}",
        "QUERYD_LEASE_SECONDS": str(LEASE_SECONDS),
        "QUERYD_DRAIN_SECONDS": "1",
        "QUERYD_SLOTS_INTERACTIVE": "1",
        "QUERYD_SLOTS_BATCH": "1",
        "QUERYD_CHILD_MEMORY": str(256 << 20),
        "QUERYD_CHILD_THREADS": "1",
        "AWS_ENDPOINT_URL": place.endpoint_url,
        "AWS_REGION": place.region,
        "AWS_ACCESS_KEY_ID": place.access_key,
        "AWS_SECRET_ACCESS_KEY": place.secret_key,
    }


def _make_request(number: int, orgs: Sequence[str]) -> Valid:
    """A join that takes a core some 20 ms, and a row that anybody can work out."""
    fields = make_fields(
        mode=("interactive", "batch")[number % 2],
        org_id=orgs[number % len(orgs)],
        sql=(
            f"SELECT {number} AS number, count(*) AS pairs FROM range(0, 300) AS a(i), range(0, 10000) AS b(j) "
            f"WHERE (i * j) % 7 < 7 /* {_CANARY}{uuid.uuid4().hex} */"
        ),
        output_format=FORMATS[number % len(FORMATS)],
        timeout_seconds=_DEADLINE_SECONDS,
        # Every other one of the interactive lane.
        delivery="inline_if_small" if number % 4 == 0 else "object",
    )
    return Valid(fields, ("number", "pairs"), ({"number": number, "pairs": 3_000_000},))


_CANARY = "canary-of-a-small-stack-"


def _to_evidence(request: Valid, sent_at: float) -> SentQuery:
    fields: dict[str, Any] = dict(request.fields)
    return SentQuery(
        query_id=request.query_id,
        org_id=fields["org_id"],
        task_id=fields["task_id"],
        mode=fields["mode"],
        output_format=fields["output_format"],
        canary=fields["sql"].rpartition("/* ")[2].removesuffix(" */"),
        sent_at=sent_at,
        deadline_seconds=float(_DEADLINE_SECONDS),
        outcomes=frozenset({"Succeeded"}),
        columns=request.columns,
        content=tuple(tuple(str(cell) for cell in row.values()) for row in request.rows),
        inline=fields["delivery"] == "inline_if_small",
    )


def _ask(url: str, statement: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return int(row[0])


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False
