"""The broker that the tests run against: Apache Kafka from Maven's jars, Apache Kafka in Docker, or the embedded one.

`QUERYD_TEST_BROKER` chooses: `apache`, `docker`, `embedded`, or `auto` for the first that this machine has the tools
for, in the order docker, apache, embedded.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from service.embedded.broker import Broker
from service.embedded.servers import Lifeline
from tests.servers.apache_kafka import ApacheKafka, resolve_classpath
from tests.servers.kafka_settings import VERSION

VARIABLE = "QUERYD_TEST_BROKER"
WHAT_TO_INSTALL = "Java 17 or newer and Maven, or Docker"

_JAVA = 17
# `java -version` starts a virtual machine, `docker version` asks a daemon: a second on a slow machine.
_TOOL_SECONDS = 30


class Kind(StrEnum):
    """The values of `QUERYD_TEST_BROKER` without `auto`."""

    APACHE = "apache"
    DOCKER = "docker"
    EMBEDDED = "embedded"

    @property
    def label(self) -> str:
        """What the header of a test run says."""
        return {
            Kind.APACHE: f"Apache Kafka {VERSION} (Maven)",
            Kind.DOCKER: f"Apache Kafka {VERSION} (Docker)",
            Kind.EMBEDDED: "embedded (no transactions, no watermarks)",
        }[self]


# Which one the tests of this run were given.
CHOSEN = pytest.StashKey[Kind]()


class ToolMissing(RuntimeError):
    """The broker that was asked for needs something that is not there; the sentence says what to install."""


@dataclass(frozen=True, slots=True)
class Kafka:
    """A running broker. `transactions` is true where they, watermarks and KIP-848 groups work as Apache has them."""

    bootstrap: str
    kind: Kind

    @property
    def transactions(self) -> bool:
        """True on Apache Kafka, however it was started."""
        return self.kind is not Kind.EMBEDDED


def choose(wish: str) -> Kind:
    """The broker for a value of `QUERYD_TEST_BROKER`. Raises `ToolMissing`, `ValueError` for another value."""
    match wish:
        case "auto":
            return next(kind for kind in (Kind.DOCKER, Kind.APACHE, Kind.EMBEDDED) if _missing(kind) is None)
        case Kind.APACHE | Kind.DOCKER | Kind.EMBEDDED:
            kind = Kind(wish)
            missing = _missing(kind)
            if missing is not None:
                raise ToolMissing(f"{VARIABLE}={wish} needs {missing}")
            return kind
        case _:
            raise ValueError(f"{VARIABLE} is apache, docker, embedded or auto")


def prepare(kind: Kind) -> None:
    """Download what the broker needs, if anything, so that no test's time limit has to cover it."""
    if kind is Kind.APACHE:
        resolve_classpath()


@contextmanager
def run(kind: Kind, directory: Path, lifeline: Lifeline) -> Iterator[Kafka]:
    """A broker for as long as the context lasts."""
    match kind:
        case Kind.APACHE:
            apache = ApacheKafka(directory, lifeline)
            try:
                apache.start()
                yield Kafka(apache.bootstrap, kind)
            finally:
                apache.stop()
        case Kind.DOCKER:
            # testcontainers takes a third of a second to import, which only these runs need to spend.
            from tests.servers import docker_kafka  # noqa: PLC0415

            with docker_kafka.run() as bootstrap:
                yield Kafka(bootstrap, kind)
        case Kind.EMBEDDED:
            broker = Broker(directory, directory / "kafka.log", lifeline)
            try:
                broker.start()
                yield Kafka(broker.bootstrap, kind)
            finally:
                broker.stop()


def _missing(kind: Kind) -> str | None:
    """What this machine lacks for a broker of that kind; None when nothing."""
    match kind:
        case Kind.APACHE:
            if _java_version() < _JAVA:
                return f"Java {_JAVA} or newer: install a JDK or JRE and put `java` on the PATH"
            return None if shutil.which("mvn") else "Maven: install it and put `mvn` on the PATH"
        case Kind.DOCKER:
            return None if _docker_answers() else "a running Docker daemon: install and start Docker"
        case Kind.EMBEDDED:
            return None


def _docker_answers() -> bool:
    """True when there is a Docker daemon and we may talk to it."""
    if shutil.which("docker") is None:
        return False
    told = subprocess.run(["docker", "version"], capture_output=True, timeout=_TOOL_SECONDS, check=False)
    return told.returncode == 0


def _java_version() -> int:
    """The major version of the `java` on the PATH; 0 when there is none that runs."""
    if shutil.which("java") is None:
        return 0
    told = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    # `openjdk version "17.0.15" 2025-04-15`, on stderr; before Java 9 it was `1.8.0`.
    found = re.search(r'version "(\d+)', told.stderr)
    return int(found[1]) if found else 0
