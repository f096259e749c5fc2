"""The servers that tests ask for. Each starts when the first test asks, and never for a unit test.

They end with this process, however it ends: by itself, by Ctrl-C or by `kill -9`.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.servers import kafka as brokers
from tests.servers.kafka import Kafka, Kind

_FOLDERS = {
    "unit": "starts no server",
    "contract": "holds what others rely on",
    "integration": "against real servers",
    "faults": "servers and processes die on the way",
    "acceptance": "the real command line, from outside",
}
_SERVERS = {"kafka", "postgres_server", "object_store_server"}
_WITHOUT_KAFKA = f"needs Apache Kafka: install {brokers.WHAT_TO_INSTALL}, and run make test-all"
# The first leader of a partition is elected in milliseconds; the machine may be busy.
_TOPIC_SECONDS = 30.0


def pytest_configure(config: pytest.Config) -> None:
    for folder, meaning in _FOLDERS.items():
        config.addinivalue_line("markers", f"{folder}: {meaning} (set by the folder)")
    try:
        config.stash[brokers.CHOSEN] = brokers.choose(os.environ.get(brokers.VARIABLE, "auto"))
    except (brokers.ToolMissing, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> str:
    return f"broker: {config.stash[brokers.CHOSEN].label}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folders = {config.rootpath / "tests" / name: name for name in _FOLDERS}
    for item in items:
        for folder in folders.keys() & set(item.path.parents):
            item.add_marker(folders[folder])
        _forbid_servers_to_unit_tests(item)
    _skip_without_kafka(config.stash[brokers.CHOSEN], items)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if not config.option.collectonly and any("kafka" in _fixtures(item) for item in session.items):
        # Now, so that no test's time limit has to cover a download.
        brokers.prepare(config.stash[brokers.CHOSEN])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # By the reports: tests may have run in other processes than this one.
    skipped = sum(_WITHOUT_KAFKA in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if skipped:
        terminalreporter.section("without Apache Kafka")
        terminalreporter.line(
            f"{skipped} tests need transactions or watermarks and were skipped. "
            f"To run them, install {brokers.WHAT_TO_INSTALL}, unset {brokers.VARIABLE}, and run `make test-all`."
        )


def _forbid_servers_to_unit_tests(item: pytest.Item) -> None:
    wanted = _fixtures(item) & _SERVERS
    if wanted and item.get_closest_marker("unit"):
        raise pytest.UsageError(f"{item.nodeid} is a unit test and asks for {', '.join(sorted(wanted))}")


def _skip_without_kafka(broker: Kind, items: list[pytest.Item]) -> None:
    """Mark what the embedded broker can't do."""
    if broker is Kind.EMBEDDED:
        for item in items:
            if item.get_closest_marker("needs_kafka"):
                item.add_marker(pytest.mark.skip(reason=_WITHOUT_KAFKA))


def _fixtures(item: pytest.Item) -> set[str]:
    return set(item.fixturenames) if isinstance(item, pytest.Function) else set()


@pytest.fixture(scope="session")
def lifeline() -> Iterator[Lifeline]:
    """What every server of this test run hangs on."""
    with Lifeline() as line:
        yield line


@pytest.fixture(scope="session")
def kafka(pytestconfig: pytest.Config, lifeline: Lifeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """The broker of the header: `bootstrap`, `kind`, `transactions`. All tests share it; see `unique_topic`."""
    kind = pytestconfig.stash[brokers.CHOSEN]
    with _server_directory(tmp_path_factory, "kafka") as directory, brokers.run(kind, directory, lifeline) as broker:
        yield broker


@pytest.fixture
def unique_topic(kafka: Kafka) -> Callable[..., str]:
    """Makes a topic that no other test knows: `unique_topic(partitions=1, **config)`, its name.

    A config's name is written with underscores: `unique_topic(6, cleanup_policy="compact")`.
    """
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})

    def create(partitions: int = 1, **config: str) -> str:
        name = f"test.{uuid.uuid4()}"
        settings = {key.replace("_", "."): value for key, value in config.items()}
        topic = NewTopic(name, partitions, replication_factor=1, config=settings)
        for made in admin.create_topics([topic], operation_timeout=_TOPIC_SECONDS).values():
            made.result(_TOPIC_SECONDS)
        return name

    return create


@pytest.fixture(scope="session")
def postgres_server(lifeline: Lifeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The Postgres that all tests share; a test takes a database of its own."""
    with _server_directory(tmp_path_factory, "postgres") as directory:
        server = Postgres(directory, directory / "postgres.log", lifeline)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """The libpq URI of an empty database of this test's own."""
    with _fresh_database(postgres_server, "test") as url:
        yield url


@pytest.fixture
def data_url(postgres_server: Postgres) -> Iterator[str]:
    """A Postgres data of this test's own."""
    with _fresh_database(postgres_server, "data") as url:
        yield url


@pytest.fixture
def state_url(postgres_server: Postgres) -> Iterator[str]:
    """A Postgres state of this test's own."""
    with _fresh_database(postgres_server, "state") as url:
        yield url


@pytest.fixture(scope="session")
def object_store_server(lifeline: Lifeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The S3 server that all tests share."""
    with _server_directory(tmp_path_factory, "s3") as directory:
        server = ObjectStore(directory, directory / "s3.log", lifeline)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture
def object_store(object_store_server: ObjectStore) -> ObjectStore:
    """The shared S3 server and its one bucket: every key of ours holds a query's id, and those are unique."""
    return object_store_server


@contextmanager
def _server_directory(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A directory for a server's data, which goes with the server: pytest would keep three runs' worth.

    It stays when the server doesn't start, for its log says why.
    """
    directory = factory.mktemp(name)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _fresh_database(server: Postgres, purpose: str) -> Iterator[str]:
    name = f"{purpose}_{uuid.uuid4().hex}"
    server.create_database(name)
    try:
        yield server.url(name)
    finally:
        server.drop_database(name)
