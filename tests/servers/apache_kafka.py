"""Apache Kafka itself, KRaft, from the jars that Maven resolves through `tests/kafka/pom.xml`.

One node or several, each broker and controller at once. The nodes end with the tests, however those end.
"""

import base64
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.embedded.broker import cluster_id
from service.embedded.ports import LOOPBACK, accepts, is_free, pick_ports
from service.embedded.servers import EmbeddedError, Lifeline, Recipe, Server, run_guarded
from service.embedded.warden import Ending
from tests.servers.kafka_settings import broker_settings

_ROOT = Path(__file__).resolve().parents[2]
_POM = _ROOT / "tests" / "kafka" / "pom.xml"
_TOOLS_POM = _ROOT / "tests" / "kafka" / "tools" / "pom.xml"
_CACHE = _ROOT / "target" / "kafka"

# 60 MB of jars over a slow line; with all of them there Maven takes 4 s.
_MAVEN_SECONDS = 900
# Formatting is 1–2 s, nearly all of it the virtual machine's start.
_FORMAT_SECONDS = 60.0
# A node is up in 3–4 s on two idle cores; other tests may keep them busy.
_START_SECONDS = 90.0
# Another program may take a port between picking and binding: then all nodes get others.
_ATTEMPTS = 3
# Nobody reads its data after the tests, so it need not close its logs in order.
_THROWN_AWAY = Ending(signal.SIGKILL, 1.0)

# Light on a small machine: with the quick compiler alone a node is up half a second sooner and leaves the cores alone.
_JVM = ("-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")

_LOGGING = """\
appenders=out
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %m (%c)%n
rootLogger.level=WARN
rootLogger.appenderRef.out.ref=out
logger.server.name=kafka.server.KafkaRaftServer
logger.server.level=INFO
"""


class ApacheKafka:
    """A cluster of `nodes` nodes, numbered from 1; `servers[0]` is node 1. Its data lies in `directory`."""

    def __init__(self, directory: Path, lifeline: Lifeline, nodes: int = 1) -> None:
        self.servers: list[Server] = []
        self.bootstrap = ""
        self._directory = directory.resolve()
        self._lifeline = lifeline
        self._nodes = nodes
        self._cluster_id = draw_cluster_id()

    def start(self) -> None:
        """Format and start all nodes. Raises `EmbeddedError`, and `RuntimeError` when Maven can't get the jars."""
        classpath = resolve_classpath()
        for attempt in range(1, _ATTEMPTS + 1):
            ports = pick_ports(2 * self._nodes)
            try:
                self._start_on(ports, classpath)
            except EmbeddedError:
                self.stop()
                if attempt == _ATTEMPTS or all(is_free(port) for port in ports):
                    raise
            else:
                return

    def stop(self) -> None:
        """End all nodes at once, without ceremony."""
        for server in self.servers:
            server.kill()

    def _start_on(self, ports: tuple[int, ...], classpath: str) -> None:
        clients, controllers = ports[: self._nodes], ports[self._nodes :]
        self.bootstrap = ",".join(f"{LOOPBACK}:{port}" for port in clients)
        voters = ",".join(f"{node}@{LOOPBACK}:{port}" for node, port in enumerate(controllers, 1))
        recipes = [
            self._lay_out(node, ports_of_node, voters, classpath)
            for node, ports_of_node in enumerate(zip(clients, controllers, strict=True), 1)
        ]
        self.servers = [Server(recipe, self._lifeline) for recipe in recipes]
        with ThreadPoolExecutor(self._nodes) as pool:
            # All at once: a node answers only when most of them are there.
            for started in [pool.submit(server.start, _START_SECONDS) for server in self.servers]:
                started.result()

    def _lay_out(self, node: int, ports: tuple[int, int], voters: str, classpath: str) -> Recipe:
        """Write the node's settings and format its storage."""
        directory = self._directory / f"node-{node}"
        directory.mkdir(parents=True, exist_ok=True)
        settings = directory / "server.properties"
        _write_properties(settings, _node_settings(node, ports, voters) | broker_settings(self._nodes))
        logging = directory / "log4j2.properties"
        logging.write_text(_LOGGING)
        java = [_java(), *_JVM, f"-Dlog4j2.configurationFile={logging}", "-cp", classpath]
        recipe = Recipe(
            name=f"Apache Kafka, node {node}",
            directory=directory,
            log=directory / "kafka.log",
            pick=lambda: ports,
            command=lambda _: [*java, "kafka.Kafka", str(settings)],
            ready=lambda _: accepts(ports[0]) and cluster_id(f"{LOOPBACK}:{ports[0]}") == self._cluster_id,
            stop=_THROWN_AWAY,
            orphaned=_THROWN_AWAY,
        )
        storage = [
            "kafka.tools.StorageTool",
            "format",
            "--ignore-formatted",
            "-t",
            self._cluster_id,
            "-c",
            str(settings),
        ]
        run_guarded(recipe, [*java, *storage], self._lifeline, _FORMAT_SECONDS)
        return recipe


def draw_cluster_id() -> str:
    """As Kafka draws them: 16 random bytes in URL-safe base64; a leading dash would read as an option."""
    while (drawn := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        continue
    return drawn


def resolve_classpath() -> str:
    """The class path of Kafka and all it needs; the first call on a machine downloads it.

    Raises `RuntimeError` when Maven fails; its own words are then on stdout.
    """
    return _resolve(_POM)


def resolve_tools_classpath() -> str:
    """The same with Kafka's own command-line tools."""
    return os.pathsep.join((_resolve(_TOOLS_POM), _resolve(_POM)))


def _resolve(pom: Path) -> str:
    # Another pom is another class path.
    cached = _CACHE / f"{hashlib.sha256(pom.read_bytes()).hexdigest()[:16]}.classpath"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        # Maven's repository is not safe against two downloads of the same file.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _whole(cached):
            _ask_maven(pom, cached)
    return cached.read_text().strip()


def _whole(cached: Path) -> bool:
    """True when the class path is known and all its jars are still there."""
    return cached.exists() and all(Path(jar).exists() for jar in cached.read_text().strip().split(os.pathsep))


def _ask_maven(pom: Path, cached: Path) -> None:
    draft = cached.with_suffix(".new")
    options = ["-q", "-B", "-Dstyle.color=never", "-f", str(pom), f"-Dmdep.outputFile={draft}"]
    command = ["mvn", *options, "dependency:build-classpath"]
    maven = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_MAVEN_SECONDS, check=False)
    if maven.returncode != 0:
        raise RuntimeError("Maven could not get Apache Kafka's jars: see above")
    draft.replace(cached)


def _node_settings(node: int, ports: tuple[int, int], voters: str) -> dict[str, str]:
    client, controller = (f"{LOOPBACK}:{port}" for port in ports)
    return {
        "node.id": str(node),
        "process.roles": "broker,controller",
        "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{client}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.quorum.voters": voters,
        # Relative to the node's directory, where it runs.
        "log.dirs": "data",
    }


def _write_properties(path: Path, settings: dict[str, str]) -> None:
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise RuntimeError("there is no `java` on the PATH")
    return java
