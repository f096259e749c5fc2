"""Reading a topic to its end finds everything, however slowly the broker answers, and says so when it can't."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from producers import read_back
from producers.read_back import EndNotReached, read_to_end
from service.embedded.broker import Broker
from service.embedded.servers import Lifeline
from tests.integration.records import config_of, write
from tests.servers.kafka import Kafka

# Longer than a second, in which an idle reader might take silence for the end.
_STALL_SECONDS = 2.5


@pytest.fixture
def own_broker(tmp_path: Path, lifeline: Lifeline) -> Iterator[Broker]:
    """A broker that only this test stops."""
    broker = Broker(tmp_path / "kafka", tmp_path / "kafka.log", lifeline)
    broker.start()
    yield broker
    broker.stop()


@contextmanager
def _stopped_before_the_first_fetch(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The broker stops when the reader is about to fetch, until the event is set."""
    go_on = threading.Event()
    pid = _find_process(broker)

    class Stalling(Consumer):
        def assign(self, *arguments: Any) -> None:
            os.kill(pid, signal.SIGSTOP)
            super().assign(*arguments)

    def wake() -> None:
        go_on.wait()
        os.kill(pid, signal.SIGCONT)

    monkeypatch.setattr(read_back, "Consumer", Stalling)
    waking = threading.Thread(target=wake)
    waking.start()
    try:
        yield go_on
    finally:
        go_on.set()
        waking.join()


def test_all_records_from_the_starts_to_the_ends_are_read(kafka: Kafka, unique_topic: Any) -> None:
    topic = unique_topic(3)
    for number in range(20):
        # The third partition stays empty.
        write(config_of(kafka), topic, str(number), b"value", partition=number % 2)
    assert _read(config_of(kafka), topic, {}) == {str(number) for number in range(20)}
    # Partition 0 holds the even ones, 1 the odd ones; the end itself is a start too.
    assert _read(config_of(kafka), topic, {0: 8, 1: 10}) == {"16", "18"}


def test_a_topic_without_records_is_at_its_end(kafka: Kafka, unique_topic: Any) -> None:
    assert _read(config_of(kafka), unique_topic(3), {}) == set()


def test_a_broker_that_answers_late_is_waited_for(own_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"bootstrap.servers": own_broker.bootstrap}
    _make_topic(config)
    for number in range(10):
        write(config, "t", str(number), b"value")
    with _stopped_before_the_first_fetch(own_broker, monkeypatch) as go_on:
        timer = threading.Timer(_STALL_SECONDS, go_on.set)
        timer.start()
        assert _read(config, "t", {}) == {str(number) for number in range(10)}
        assert go_on.is_set()


def test_a_broker_that_stays_silent_leaves_the_end_unknown(own_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"bootstrap.servers": own_broker.bootstrap}
    _make_topic(config)
    write(config, "t", "0", b"value")
    monkeypatch.setattr(read_back, "SILENCE_SECONDS", 1.0)
    with _stopped_before_the_first_fetch(own_broker, monkeypatch), pytest.raises(EndNotReached, match=r"^t could not"):
        _read(config, "t", {})


def _find_process(broker: Broker) -> int:
    """The broker itself; the guard that started it has the same words on its command line, behind an interpreter."""
    [pid] = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any(broker.bootstrap in part for part in process.cmdline()) and process.cmdline()[1] == "broker"
    ]
    return int(pid)


def _make_topic(config: dict[str, Any]) -> None:
    admin = AdminClient(config)
    for made in admin.create_topics([NewTopic("t", 1, 1)]).values():
        made.result()


def _read(config: dict[str, Any], topic: str, starts: dict[int, int]) -> set[str]:
    """The keys of what is read; each comes once."""
    keys = [(message.key() or b"").decode() for message in read_to_end(config, "test-read-back", topic, starts)]
    assert len(keys) == len(set(keys))
    return set(keys)
