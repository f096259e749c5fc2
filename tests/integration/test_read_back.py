"""Reading a topic to its end finds everything, however slowly the broker answers, and says so when it can't."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from producers import read_back
from producers.read_back import EndNotReached, read_ends, read_to_end
from service.embedded.broker import Broker
from service.embedded.servers import Lifeline
from tests.integration.records import config_of, write
from tests.servers.kafka import Kafka

# Longer than a second, in which an idle reader might take silence for the end.
_STALL_SECONDS = 2.5
# A guard against hanging only.
_PATIENCE_SECONDS = 60.0


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


# Where a topic ends.


@pytest.mark.parametrize("written", [1, 7, 1_000])
def test_the_end_is_behind_the_last_record_however_it_was_written(own_broker: Broker, written: int) -> None:
    """The embedded broker's answer to ListOffsets is where the last batch begins."""
    _judge_ends({"bootstrap.servers": own_broker.bootstrap}, f"ends.{written}", written)


def test_the_end_is_right_on_the_broker_of_the_test_run(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    _judge_ends(config_of(kafka), unique_topic(3), 1_000, made=True)


def _judge_ends(config: dict[str, Any], topic: str, written: int, *, made: bool = False) -> None:
    if not made:
        admin = AdminClient(config)
        admin.create_topics([NewTopic(topic, 3, replication_factor=1)])[topic].result(_PATIENCE_SECONDS)
    producer = Producer(config)
    for _ in range(written):
        producer.produce(topic, b"a record", partition=0)
        producer.produce(topic, b"a record", partition=2)
    assert producer.flush(_PATIENCE_SECONDS) == 0
    # One more, in a batch of its own.
    producer.produce(topic, b"a record", partition=2)
    assert producer.flush(_PATIENCE_SECONDS) == 0
    assert read_ends(config, topic) == {0: written, 1: 0, 2: written + 1}


def test_the_end_is_found_while_somebody_writes(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    config, topic = config_of(kafka), unique_topic()
    producer, stopping = Producer(config | {"linger.ms": 1}), threading.Event()

    def write_on() -> None:
        while not stopping.is_set():
            producer.produce(topic, b"a record")
            producer.poll(0.001)

    writing = threading.Thread(target=write_on)
    writing.start()
    try:
        ends = [read_ends(config, topic)[0] for _ in range(5)]
    finally:
        stopping.set()
        writing.join()
    assert producer.flush(_PATIENCE_SECONDS) == 0
    assert ends == sorted(ends)
    assert ends[-1] <= read_ends(config, topic)[0]
