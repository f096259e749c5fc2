"""Postgres or S3 away, at the start and later: one clear line, nothing skipped, and going on by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from queryd.events import Status
from service.embedded.servers import Lifeline
from service.run import Service
from tests.servers.own_stack import PATIENCE_SECONDS, Servers, await_that, opened_servers

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
_SERVICES: dict[Service, dict[str, str]] = {Service.EXECUTOR: {}, Service.RELAY: {}}


@pytest.fixture
def servers(tmp_path: Path, lifeline: Lifeline) -> Iterator[Servers]:
    with opened_servers(tmp_path, lifeline) as opened:
        yield opened


@pytest.mark.slow
def test_postgres_away_at_the_start_and_later_is_waited_for(servers: Servers) -> None:
    servers.postgres.stop()
    with servers.client as client, servers.running(_SERVICES):
        await_that(lambda: _count(servers.read_log(), "dependency_unavailable", "postgres data") >= 2, "both to say so")
        early = client.submit("SELECT 1 AS one", org_id=ORG)
        servers.postgres.start()
        assert early.wait(PATIENCE_SECONDS).status is Status.SUCCEEDED
        servers.postgres.server.kill()
        late = client.submit("SELECT 2 AS two", org_id=ORG)
        servers.postgres.start()
        assert late.wait(PATIENCE_SECONDS).status is Status.SUCCEEDED
        log = servers.read_log()
    # The executor and the relay each say it once for the start; after the crash each of their loops that was at work.
    assert _count(log, "dependency_unavailable", "postgres data") <= 2 + 6
    assert not [line for line in log if line["level"] in ("error", "critical")]


@pytest.mark.slow
def test_s3_away_is_waited_for_and_the_result_is_whole(servers: Servers) -> None:
    with servers.client as client, servers.running(_SERVICES):
        assert client.submit("SELECT 1 AS one", org_id=ORG).wait(PATIENCE_SECONDS).status is Status.SUCCEEDED
        servers.store.stop()
        query = client.submit("SELECT 2 AS two", org_id=ORG)
        await_that(lambda: _count(servers.read_log(), "dependency_unavailable", "s3") == 1, "the executor to say so")
        servers.store.start()
        event = query.wait(PATIENCE_SECONDS)
        assert (event.status, event.attempt, len(event.files)) == (Status.SUCCEEDED, 1, 1)
        assert _count(servers.read_log(), "dependency_unavailable", "s3") == 1
        assert _count(servers.read_log(), "dependency_available", "s3") == 1


def _count(log: list[dict[str, Any]], event: str, dependency: str) -> int:
    return sum(line["event"] == event and line.get("dependency") == dependency for line in log)
