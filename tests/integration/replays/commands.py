"""Replays by the real command line, and what lies in the topics before and after."""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg
from confluent_kafka import Message, Producer
from typer.testing import CliRunner, Result

from queryd.codec import encode
from queryd.events import QueryRequested
from queryd.headers import ReplayHeader
from service.cli import app
from tests.integration.fleet import Fleet, await_that
from tests.integration.records import PATIENCE_SECONDS, config_of, headers_of, read_topic
from tests.servers.kafka import Kafka

# So that a plan may say it: a time that is over.
_LOOK_SECONDS = 0.05


@dataclass(slots=True)
class CommandLine:
    """`queryd replay …` as somebody types it, against a fleet."""

    fleet: Fleet

    def replay(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Its JSON line; it must end with that exit code."""
        found: dict[str, Any] = self._read(arguments, code)
        return found

    def list_replays(self) -> list[dict[str, Any]]:
        """`queryd replay list`."""
        found: list[dict[str, Any]] = self._read(["list"], 0)
        return found

    def list_letters(self, *arguments: str) -> list[dict[str, Any]]:
        """`queryd replay dead-letters --list`."""
        found: list[dict[str, Any]] = self._read(["dead-letters", "--list", *arguments], 0)
        return found

    def refuse(self, *arguments: str, **settings: str) -> str:
        """What it says instead of doing it, with other settings than the fleet's: `QUERYD_SQL_HASH_KEY=…`."""
        done = self._run(arguments, settings)
        assert done.exit_code in (1, 2), done.output
        assert done.stdout == ""
        return done.stderr

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """In the background."""
        return subprocess.Popen(
            self._command(arguments),
            env=self.fleet.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def carry_out(self, *arguments: str, reason: str = "a test", options: Sequence[str] = ()) -> dict[str, Any]:
        """Plan and execute."""
        planned = self.replay(*arguments)
        return self.replay(*arguments, "--execute", planned["hash"], "--reason", reason, *options)

    def _read(self, arguments: Sequence[str], code: int) -> Any:
        done = self._run([*arguments, "--json"])
        assert done.exit_code == code, done.stderr
        return json.loads(done.stdout)

    def _run(self, arguments: Sequence[str], changes: dict[str, str] | None = None) -> Result:
        # In this process: an interpreter's start takes longer than most replays of a test.
        return CliRunner().invoke(app, ["replay", *arguments], env=self.fleet.environment | (changes or {}))

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "queryd", "replay", *arguments]


@dataclass(slots=True)
class Stretch:
    """A span of time by the broker's clock, which is this machine's."""

    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    until: datetime | None = None

    @property
    def options(self) -> list[str]:
        """As the command line takes it."""
        assert self.until is not None
        return ["--since", _say(self.since), "--until", _say(self.until)]


@contextmanager
def stretch() -> Iterator[Stretch]:
    """What is published meanwhile lies in it, and nothing else of this test."""
    # Timestamps are in milliseconds.
    time.sleep(_LOOK_SECONDS)
    span = Stretch()
    yield span
    time.sleep(_LOOK_SECONDS)
    span.until = datetime.now(UTC)
    time.sleep(_LOOK_SECONDS)


def _say(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def publish(kafka: Kafka, requests: Iterable[QueryRequested], headers: dict[str, bytes] | None = None) -> None:
    """Requests as a producer of another program's would write them."""
    producer = Producer(config_of(kafka) | {"queue.buffering.max.messages": 1_000_000})
    for request in requests:
        producer.produce(
            request.mode.topic,
            key=request.query_id.encode(),
            value=encode(request),
            headers=list((headers or {}).items()),
        )
    assert producer.flush(PATIENCE_SECONDS) == 0


def await_terminal(fleet: Fleet, org_id: str, count: int) -> None:
    """So many queries of the org have ended, and the outbox is empty."""

    def look() -> bool:
        with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
            row = connection.execute(
                "SELECT count(*) FILTER (WHERE status IN ('Succeeded', 'Failed')), "
                "(SELECT count(*) FROM outbox) FROM query_results WHERE org_id = %s",
                [org_id],
            ).fetchone()
        return row == (count, 0)

    await_that(look, f"{count} queries to end", PATIENCE_SECONDS * 2)


def read_rows(fleet: Fleet, org_id: str) -> list[tuple[Any, ...]]:
    """All that the database says of an org's queries."""
    with psycopg.connect(fleet.environment["QUERYD_DATA_URL"]) as connection:
        return connection.execute(
            "SELECT q.*, r.* FROM query_results q JOIN query_runs r ON r.query_id = q.id "
            "WHERE q.org_id = %s ORDER BY q.id",
            [org_id],
        ).fetchall()


def read_records(kafka: Kafka, topics: Iterable[str]) -> list[Message]:
    """All committed records of the topics."""
    return [message for topic in topics for message in asyncio.run(read_topic(kafka, topic))]


def find_copies(records: Iterable[Message], replay_id: str) -> list[Message]:
    """Those that a replay has written."""
    return [record for record in records if headers_of(record).get(ReplayHeader.ID) == replay_id.encode()]


def count_origins(copies: Iterable[Message]) -> Counter[tuple[str, int, int]]:
    """How often a record of these coordinates was copied."""
    counted: Counter[tuple[str, int, int]] = Counter()
    for copied in copies:
        headers = headers_of(copied)
        topic, partition, offset = (
            headers[name] or b"" for name in (ReplayHeader.TOPIC, ReplayHeader.PARTITION, ReplayHeader.OFFSET)
        )
        counted[topic.decode(), int(partition), int(offset)] += 1
    return counted


def place_of(record: Message) -> tuple[str, int, int]:
    """A record's coordinates."""
    topic, partition, offset = record.topic(), record.partition(), record.offset()
    assert topic is not None and partition is not None and offset is not None
    return topic, partition, offset
