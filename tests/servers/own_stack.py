"""Servers of one test's own, to be stopped and started, and queryd's services as processes beside them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from queryd.client import QueryClient
from service.embedded.broker import Broker
from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from service.run import Service
from service.topics import apply_topics

# Guards against hanging; what is awaited comes within seconds.
PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Servers:
    """They keep ports and data over a restart; the broker never goes away. `environment` is the services' own."""

    postgres: Postgres
    store: ObjectStore
    folder: Path
    environment: dict[str, str]

    @property
    def client(self) -> QueryClient:
        """A client of the broker."""
        return QueryClient({"bootstrap.servers": self.environment["QUERYD_KAFKA_BOOTSTRAP"]})

    def read_log(self) -> list[dict[str, Any]]:
        """What the services have logged so far."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @contextmanager
    def running(self, services: Mapping[Service, dict[str, str]]) -> Iterator[dict[Service, "subprocess.Popen[bytes]"]]:
        """The services, each with further variables; at their end each must have drained, and promptly."""
        outside = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = outside | self.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with self.log.open("wb") as output:
            processes = {
                service: subprocess.Popen(
                    [sys.executable, "-m", "queryd", "run", service.value],
                    cwd=self.folder,
                    env=environment | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
                for service, variables in services.items()
            }
        try:
            yield processes
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
            assert [process.wait(PATIENCE_SECONDS) for process in processes.values()] == [0] * len(processes)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()

    @property
    def log(self) -> Path:
        """The services' log."""
        return self.folder / "services.log"


@contextmanager
def opened_servers(folder: Path, lifeline: Lifeline) -> Iterator[Servers]:
    """Postgres with both databases, S3 and the embedded broker, with topics and tables."""
    postgres = Postgres(folder / "postgres", folder / "postgres.log", lifeline)
    store = ObjectStore(folder / "s3", folder / "s3.log", lifeline)
    broker = Broker(folder / "kafka", folder / "kafka.log", lifeline)
    with ExitStack() as exits:
        for server in (postgres, store, broker):
            exits.callback(server.stop)
            server.start()
        for name in ("data", "state"):
            postgres.create_database(name)
        upgrade_data(postgres.url("data"))
        upgrade_state(postgres.url("state"))
        create_platform_tables(postgres.url("state"))
        apply_topics({"bootstrap.servers": broker.bootstrap}, 2, 1)
        environment = {
            "QUERYD_KAFKA_BOOTSTRAP": broker.bootstrap,
            "QUERYD_KAFKA_SESSION_TIMEOUT": "6",
            "QUERYD_RELAY_TRANSACTIONS": "false",
            "QUERYD_DATA_URL": postgres.url("data"),
            "QUERYD_STATE_URL": postgres.url("state"),
            "QUERYD_RESULTS_URL": f"s3://{store.bucket}",
            "QUERYD_SCRATCH": str(folder / "scratch"),
            "AWS_ENDPOINT_URL": store.endpoint_url,
            "AWS_REGION": store.region,
            "AWS_ACCESS_KEY_ID": store.writer.access_key,
            "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
        }
        yield Servers(postgres, store, folder, environment)


def await_that(condition: Callable[[], bool], what: str) -> None:
    """Wait until it holds; fails after a minute, saying what was waited for."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:.0f} s for {what}"
        time.sleep(_LOOK_SECONDS)
