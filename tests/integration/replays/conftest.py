"""One executor with its relay on each broker, which all tests of replays share: each has an org of its own.

The command line runs on the broker of the test run and on the embedded one, which has other ends, other settings and
no transactions; a test that is marked `needs_kafka` runs on the first only. On the embedded broker QUERYD_SQL_HASH_KEY
is set, for the services and for the command line; on the other one it is not.
"""

from collections.abc import Iterator

import pytest

from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.integration.fleet import Fleet, own_broker, running_fleet
from tests.integration.replays.commands import CommandLine
from tests.servers.kafka import CHOSEN, Kafka, Kind


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kafka" in metafunc.fixturenames:
        real = metafunc.definition.get_closest_marker("needs_kafka") is not None
        chosen = metafunc.config.stash[CHOSEN]
        kinds = [chosen] if real or chosen is Kind.EMBEDDED else [chosen, Kind.EMBEDDED]
        metafunc.parametrize("kafka", kinds, indirect=True, scope="package", ids=str)


@pytest.fixture(scope="package")
def kafka(
    request: pytest.FixtureRequest, kafka: Kafka, lifeline: Lifeline, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kafka]:
    """The broker of the test run, or an embedded one that is the fleet's own."""
    if request.param is not Kind.EMBEDDED:
        yield kafka
    else:
        with own_broker(tmp_path_factory.mktemp("embedded"), lifeline) as own:
            yield own


@pytest.fixture(scope="package")
def fleet(
    kafka: Kafka,
    postgres_server: Postgres,
    object_store_server: ObjectStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("replays")
    settings = {} if kafka.transactions else {"QUERYD_SQL_HASH_KEY": "a key of the replays' tests"}
    with running_fleet(kafka, postgres_server, object_store_server, folder, settings) as fleet:
        fleet.man(1)
        yield fleet


@pytest.fixture
def queryd(fleet: Fleet) -> CommandLine:
    return CommandLine(fleet)
