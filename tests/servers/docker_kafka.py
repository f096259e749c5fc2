"""Apache Kafka in a container, where there is Docker.

testcontainers' own KafkaContainer knows the layout of Confluent's image only; Apache's is told all by its environment.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from testcontainers.core.container import DockerContainer

from service.embedded.broker import cluster_id
from service.embedded.ports import pick_ports
from tests.servers.kafka_settings import VERSION, broker_settings

_IMAGE = f"apache/kafka:{VERSION}"
# After the image is there: the JVM's start, with the slower file system of a container.
_START_SECONDS = 120.0
_CLIENTS, _CONTROLLER = 9092, 9093


@contextmanager
def run() -> Iterator[str]:
    """A broker in a container; its bootstrap address. The container ends with this process."""
    # The address that clients are sent to is part of the broker's settings, so the port is chosen before the start.
    (port,) = pick_ports(1)
    container = DockerContainer(_IMAGE).with_bind_ports(_CLIENTS, port)
    bootstrap = f"{container.get_container_host_ip()}:{port}"
    for name, value in (_settings(bootstrap) | broker_settings(nodes=1)).items():
        container.with_env(f"KAFKA_{name.replace('.', '_').upper()}", value)
    with container:
        _await_answer(bootstrap)
        yield bootstrap


def _await_answer(bootstrap: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    # Each question itself waits for an answer, so this asks every two seconds at most.
    while cluster_id(bootstrap) is None:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{_IMAGE} does not answer after {_START_SECONDS:.0f} s")


def _settings(bootstrap: str) -> dict[str, str]:
    return {
        "node.id": "1",
        "process.roles": "broker,controller",
        "listeners": f"PLAINTEXT://:{_CLIENTS},CONTROLLER://:{_CONTROLLER}",
        "advertised.listeners": f"PLAINTEXT://{bootstrap}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.quorum.voters": f"1@localhost:{_CONTROLLER}",
    }
