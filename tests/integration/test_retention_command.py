"""`queryd retention` as a process, and what the docs say of the day by which the topics have forgotten."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from queryd.events import Topic
from results.retention.sweep import Swept
from service.embedded.object_store import ObjectStore
from service.topics import TOPICS, days_until_forgotten
from tests.integration.queries import (
    read_row,
)
from tests.integration.retention_place import (
    Place,
    aws_variables,
    opened_place,
)


@pytest.fixture
async def place(data_url: str, object_store: ObjectStore, tmp_path: Path) -> AsyncIterator[Place]:
    async with opened_place(data_url, object_store, tmp_path) as opened:
        yield opened


@pytest.fixture
def environment(place: Place, object_store: ObjectStore) -> dict[str, str]:
    """What the command needs; nobody listens at port 9, and retention asks nothing of Kafka or the state database."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("QUERYD_", "AWS_"))}
    return (
        inherited
        | aws_variables(object_store)
        | {
            "QUERYD_KAFKA_BOOTSTRAP": "127.0.0.1:9",
            "QUERYD_DATA_URL": place.url,
            "QUERYD_STATE_URL": "postgresql://nobody@127.0.0.1:9/state",
            "QUERYD_RESULTS_URL": f"s3://{place.bucket}",
            "QUERYD_SCRATCH": str(place.scratch),
        }
    )


async def _queryd(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "queryd", "retention", *arguments],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
async def test_the_command_sweeps_and_says_how_much(place: Place, environment: dict[str, str], tmp_path: Path) -> None:
    over = await place.announce(timedelta(0))
    swept = await _queryd(environment, tmp_path, "--json")
    assert swept.returncode == 0, swept.stderr
    assert json.loads(swept.stdout) == asdict(Swept(expired=1))
    assert place.objects(over.prefix) == []
    assert "expired: 0" in (await _queryd(environment, tmp_path)).stdout.splitlines()
    fetched = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "queryd", "fetch", over.query_id],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (fetched.returncode, fetched.stderr) == (1, "queryd: the result has expired and was removed\n")


@pytest.mark.slow
async def test_the_command_deletes_only_when_told_twice_and_says_when_the_topics_have_forgotten(
    place: Place, environment: dict[str, str], tmp_path: Path
) -> None:
    attempt = await place.announce()
    org_id, user_id = attempt.facts.org_id, attempt.facts.user_id
    assert user_id is not None
    refused = await _queryd(environment, tmp_path, "delete-org", org_id)
    assert (refused.returncode, refused.stderr) == (2, "queryd: this deletes for good: give --yes\n")
    assert await read_row(place.pool, attempt.query_id) is not None
    deleted = await _queryd(environment, tmp_path, "delete-user", user_id, "--org", org_id, "--yes", "--json")
    assert deleted.returncode == 0, deleted.stderr
    told = json.loads(deleted.stdout)
    assert (told["org_id"], told["user_id"], told["queries"], told["objects"]) == (org_id, user_id, 1, 1)
    assert await read_row(place.pool, attempt.query_id) is None
    days = {
        topic: date.fromisoformat(day) - datetime.now(UTC).date() for topic, day in told["forgotten_by_topic"].items()
    }
    assert days.keys() == set(Topic)
    # The request topics' week, the status topic's last compaction, the dead letters' month.
    assert days[Topic.REQUESTS_BATCH].days in {8, 9}
    assert days[Topic.STATUS].days in {24, 25}
    assert days[Topic.DEAD_LETTERS].days in {31, 32}
    assert told["forgotten_on"] == told["forgotten_by_topic"][Topic.DEAD_LETTERS]
    again = await _queryd(environment, tmp_path, "delete-org", org_id, "--yes")
    assert again.stdout.splitlines()[1:3] == ["queries: 0", "stopped: 0"]


def test_no_topic_remembers_for_longer_than_its_settings_say() -> None:
    assert {spec.name: days_until_forgotten(spec) for spec in TOPICS} == {
        Topic.REQUESTS_INTERACTIVE: 9,
        Topic.REQUESTS_BATCH: 9,
        Topic.CANCELLATIONS: 9,
        Topic.STATUS: 25,
        Topic.DEAD_LETTERS: 32,
    }
