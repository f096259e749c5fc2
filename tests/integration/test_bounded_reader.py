"""Reading partitions to their ends finds every record, however slowly the broker answers, and raises when it can't."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Consumer, Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from queryd.kafka import bounded_reader
from queryd.kafka.bounded_reader import BoundedReader, EndNotReached, LogChanged, read_ends
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

    monkeypatch.setattr(bounded_reader, "Consumer", Stalling)
    waking = threading.Thread(target=wake)
    waking.start()
    try:
        yield go_on
    finally:
        go_on.set()
        waking.join()


@pytest.mark.slow
def test_all_records_from_the_starts_to_the_ends_are_read(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    config, topic = config_of(kafka), unique_topic(3)
    # The third partition stays empty.
    _write_alternating(config, topic, range(20))
    assert _read(config, topic, {0: 0, 1: 0, 2: 0}) == {str(number) for number in range(20)}
    # Partition 0 holds the even ones, 1 the odd ones; the end itself is a start too.
    assert _read(config, topic, {0: 8, 1: 10, 2: 0}) == {"16", "18"}


def test_records_at_and_behind_the_given_ends_are_left_for_a_later_read(
    kafka: Kafka, unique_topic: Callable[..., str]
) -> None:
    config, topic = config_of(kafka), unique_topic(2)
    _write_alternating(config, topic, range(20))
    with BoundedReader(config, {(topic, 0): 2, (topic, 1): 0}) as reader:
        assert _keys(reader.read_to({(topic, 0): 5, (topic, 1): 1}, most=3)) == ["1", "4", "6", "8"]
        assert reader.positions == {(topic, 0): 5, (topic, 1): 1}
        assert _keys(reader.read_to({(topic, 0): 5})) == []
        _write_alternating(config, topic, range(20, 22))
        assert _keys(reader.read_to({(topic, 0): 11})) == ["10", "12", "14", "16", "18", "20"]
        assert _keys(reader.read_to()) == [str(number) for number in range(3, 22, 2)]
        assert reader.positions == {(topic, 0): 11, (topic, 1): 11}


# The embedded broker answers such a fetch as one that finds nothing.
@pytest.mark.needs_kafka
def test_an_offset_that_is_not_in_the_log_is_an_error(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    topic = unique_topic(1)
    with BoundedReader(config_of(kafka), {(topic, 0): 7}) as reader, pytest.raises(LogChanged, match=topic):
        list(reader.read_to({(topic, 0): 9}))


def test_a_reader_that_is_closed_in_another_thread_ends(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    topic = unique_topic(1)
    reader = BoundedReader(config_of(kafka), {(topic, 0): 0})
    closing = threading.Timer(0.2, reader.close)
    closing.start()
    # No record comes: nobody writes it.
    assert list(reader.read_to({(topic, 0): 1}, silence_seconds=_PATIENCE_SECONDS)) == []
    closing.join()


def test_a_topic_without_records_is_at_its_end(kafka: Kafka, unique_topic: Callable[..., str]) -> None:
    assert _read(config_of(kafka), unique_topic(3), {0: 0, 1: 0, 2: 0}) == set()


@pytest.mark.slow
def test_a_broker_that_answers_late_is_waited_for(own_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"bootstrap.servers": own_broker.bootstrap}
    _make_topic(config)
    for number in range(10):
        write(config, "t", str(number), b"value")
    with _stopped_before_the_first_fetch(own_broker, monkeypatch) as go_on:
        timer = threading.Timer(_STALL_SECONDS, go_on.set)
        timer.start()
        assert _read(config, "t", {0: 0}) == {str(number) for number in range(10)}
        assert go_on.is_set()


def test_a_broker_that_stays_silent_leaves_the_end_unknown(own_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"bootstrap.servers": own_broker.bootstrap}
    _make_topic(config)
    write(config, "t", "0", b"value")
    with (
        _stopped_before_the_first_fetch(own_broker, monkeypatch),
        BoundedReader(config, {("t", 0): 0}) as reader,
        pytest.raises(EndNotReached, match=r"the end of t/0 is not known"),
    ):
        list(reader.read_to(silence_seconds=1.0))


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
    with BoundedReader(config, {(topic, partition): start for partition, start in starts.items()}) as reader:
        keys = _keys(reader.read_to())
    assert len(keys) == len(set(keys))
    return set(keys)


def _keys(batches: Iterator[list[Message]]) -> list[str]:
    """The keys as numbers in order: partitions are read side by side."""
    return sorted(((message.key() or b"").decode() for batch in batches for message in batch), key=int)


def _write_alternating(config: dict[str, Any], topic: str, numbers: range) -> None:
    for number in numbers:
        write(config, topic, str(number), b"value", partition=number % 2)


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
