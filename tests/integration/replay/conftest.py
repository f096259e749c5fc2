"""One executor with its relay, which all tests of replays share: each has an org of its own."""

from collections.abc import Iterator

import pytest

from service.embedded.object_store import ObjectStore
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from tests.integration.fleet import Fleet, running_fleet
from tests.integration.replay.commands import CommandLine
from tests.servers.kafka import Kafka


@pytest.fixture(scope="package")
def fleet(
    kafka: Kafka,
    postgres_server: Postgres,
    object_store_server: ObjectStore,
    lifeline: Lifeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("replays")
    with running_fleet(kafka, postgres_server, object_store_server, lifeline, folder) as fleet:
        fleet.man(1)
        yield fleet


@pytest.fixture
def queryd(fleet: Fleet) -> CommandLine:
    return CommandLine(fleet)
