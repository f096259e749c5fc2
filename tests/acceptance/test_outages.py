"""Postgres or S3 away, at the start and later: one clear line, nothing skipped, and going on by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from queryd.client import QueryClient
from queryd.events import Status
from service.embedded.broker import Broker
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from service.topics import apply_topics

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
# Guards against hanging; what is awaited comes within seconds of a server's return.
PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Servers:
    """Servers that a test stops and starts again, on the same ports and data, and the services' environment."""

    postgres: Postgres
    store: ObjectStore
    environment: dict[str, str]

    @property
    def client(self) -> QueryClient:
        """A client of the broker, which never goes away."""
        return QueryClient({"bootstrap.servers": self.environment["QUERYD_KAFKA_BOOTSTRAP"]})


@pytest.fixture
def servers(tmp_path: Path, lifeline: Lifeline) -> Iterator[Servers]:
    postgres = Postgres(tmp_path / "postgres", tmp_path / "postgres.log", lifeline)
    store = ObjectStore(tmp_path / "s3", tmp_path / "s3.log", lifeline)
    broker = Broker(tmp_path / "kafka", tmp_path / "kafka.log", lifeline)
    with ExitStack() as stack:
        for server in (postgres, store, broker):
            stack.callback(server.stop)
            server.start()
        for name in ("data", "state"):
            postgres.create_database(name)
        upgrade_data(postgres.url("data"))
        upgrade_state(postgres.url("state"))
        create_platform_tables(postgres.url("state"))
        apply_topics({"bootstrap.servers": broker.bootstrap}, 2, 1)
        yield Servers(
            postgres,
            store,
            {
                "QUERYD_KAFKA_BOOTSTRAP": broker.bootstrap,
                "QUERYD_KAFKA_SESSION_TIMEOUT": "6",
                "QUERYD_RELAY_TRANSACTIONS": "false",
                "QUERYD_DATA_URL": postgres.url("data"),
                "QUERYD_STATE_URL": postgres.url("state"),
                "QUERYD_RESULTS_URL": f"s3://{store.bucket}",
                "QUERYD_SCRATCH": str(tmp_path / "scratch"),
                "AWS_ENDPOINT_URL": store.endpoint_url,
                "AWS_REGION": store.region,
                "AWS_ACCESS_KEY_ID": store.writer.access_key,
                "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
            },
        )


def test_postgres_away_at_the_start_and_later_is_waited_for(servers: Servers, tmp_path: Path) -> None:
    servers.postgres.stop()
    with servers.client as client, _running(servers, tmp_path) as read_log:
        _await(lambda: _count(read_log(), "dependency_unavailable", "postgres data") >= 2, "both to say so")
        early = client.submit("SELECT 1 AS one", org_id=ORG)
        servers.postgres.start()
        assert early.wait(PATIENCE_SECONDS).status is Status.SUCCEEDED
        servers.postgres.server.kill()
        late = client.submit("SELECT 2 AS two", org_id=ORG)
        servers.postgres.start()
        assert late.wait(PATIENCE_SECONDS).status is Status.SUCCEEDED
        log = read_log()
    # The executor and the relay each say it once for the start; after the crash each of their loops that was at work.
    assert _count(log, "dependency_unavailable", "postgres data") <= 2 + 6
    assert not [line for line in log if line["level"] in ("error", "critical")]


def test_s3_away_is_waited_for_and_the_result_is_whole(servers: Servers, tmp_path: Path) -> None:
    with servers.client as client, _running(servers, tmp_path) as read_log:
        assert client.submit("SELECT 1 AS one", org_id=ORG).wait(PATIENCE_SECONDS).status is Status.SUCCEEDED
        servers.store.stop()
        query = client.submit("SELECT 2 AS two", org_id=ORG)
        _await(lambda: _count(read_log(), "dependency_unavailable", "s3") == 1, "the executor to say so")
        servers.store.start()
        event = query.wait(PATIENCE_SECONDS)
        assert (event.status, event.attempt, len(event.files)) == (Status.SUCCEEDED, 1, 1)
        assert _count(read_log(), "dependency_unavailable", "s3") == 1
        assert _count(read_log(), "dependency_available", "s3") == 1


@contextmanager
def _running(servers: Servers, folder: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """An executor and a relay; yields a reader of what they have logged so far."""
    log = folder / "services.log"
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= servers.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("wb") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "queryd", "run", service],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            for service in ("executor", "relay")
        ]
    try:
        yield lambda: _read(log)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(PATIENCE_SECONDS) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def _count(log: list[dict[str, Any]], event: str, dependency: str) -> int:
    return sum(line["event"] == event and line.get("dependency") == dependency for line in log)


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:.0f} s for {what}"
        time.sleep(_LOOK_SECONDS)
