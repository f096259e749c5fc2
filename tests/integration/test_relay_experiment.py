"""What the relay stands on, tried on Apache Kafka itself: an offset's metadata is part of the transaction.

Not a line of ours runs here. If a broker or a client ever behaves otherwise, this is where it shows first.
"""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from tests.servers.kafka import Kafka

pytestmark = pytest.mark.needs_kafka

_SECONDS = 30.0
# Long enough for an answer if there were one, on a busy machine.
_UNANSWERED_SECONDS = 1.5


class Bench:
    """A topic, a group that never subscribes, and transactional producers of one id: each newer one fences the last."""

    def __init__(self, kafka: Kafka, topic: str, stack: ExitStack) -> None:
        self.topic = topic
        self._bootstrap = {"bootstrap.servers": kafka.bootstrap}
        self._name = str(uuid.uuid4())
        self.group = Consumer(
            self._bootstrap | {"group.id": self._name, "enable.auto.commit": False, "isolation.level": "read_committed"}
        )
        stack.callback(self.group.close)

    def make_producer(self) -> Producer:
        producer = Producer(self._bootstrap | {"transactional.id": self._name, "log_level": 0})
        producer.init_transactions(_SECONDS)
        return producer

    def begin(self, producer: Producer, key: str, offset: int, metadata: str) -> None:
        """A transaction with a record and an offset, both acknowledged and neither committed."""
        producer.begin_transaction()
        producer.produce(self.topic, key=key)
        assert producer.flush(_SECONDS) == 0
        place = TopicPartition(self.topic, 0, offset, metadata)
        producer.send_offsets_to_transaction([place], self.group.consumer_group_metadata(), _SECONDS)

    def read_offset(self, seconds: float = _SECONDS) -> tuple[int, str | None]:
        """The group's stable offset and its metadata."""
        [found] = self.group.committed([TopicPartition(self.topic, 0)], timeout=seconds)
        return found.offset, found.metadata

    def read_records(self, isolation: str) -> list[str]:
        """The keys that a reader of that isolation level sees."""
        reader = Consumer(
            self._bootstrap
            | {"group.id": str(uuid.uuid4()), "isolation.level": isolation, "enable.partition.eof": True}
        )
        try:
            reader.assign([TopicPartition(self.topic, 0, 0)])
            keys: list[str] = []
            while True:
                message = reader.poll(_SECONDS)
                assert message is not None
                error = message.error()
                if error is not None:
                    assert error.code() == KafkaError._PARTITION_EOF
                    return keys
                keys.append((message.key() or b"").decode())
        finally:
            reader.close()


@pytest.fixture
def bench(kafka: Kafka, unique_topic: Callable[..., str]) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(kafka, unique_topic(), stack)


def test_a_committed_transaction_holds_its_records_and_its_offsets_metadata(bench: Bench) -> None:
    producer = bench.make_producer()
    metadata = "x" * 3_500
    bench.begin(producer, "a", 7, metadata)
    producer.commit_transaction(_SECONDS)
    assert bench.read_offset() == (7, metadata)
    assert bench.read_records("read_committed") == ["a"]


@pytest.mark.slow
def test_while_a_transaction_is_pending_its_offset_is_not_answered_and_then_is_the_new_one(bench: Bench) -> None:
    producer = bench.make_producer()
    bench.begin(producer, "a", 1, "first")
    producer.commit_transaction(_SECONDS)
    bench.begin(producer, "b", 2, "second")
    with pytest.raises(KafkaException) as unstable:
        bench.read_offset(_UNANSWERED_SECONDS)
    assert unstable.value.args[0].code() in (KafkaError.UNSTABLE_OFFSET_COMMIT, KafkaError._TIMED_OUT)
    assert bench.read_records("read_committed") == ["a"]
    assert bench.read_records("read_uncommitted") == ["a", "b"]
    # Who asks while it is pending gets its answer once it is committed.
    committing = threading.Timer(_UNANSWERED_SECONDS, producer.commit_transaction, [_SECONDS])
    committing.start()
    try:
        assert bench.read_offset() == (2, "second")
    finally:
        committing.join()


def test_an_aborted_transaction_leaves_the_offset_and_the_topic_as_they_were(bench: Bench) -> None:
    producer = bench.make_producer()
    bench.begin(producer, "a", 1, "first")
    producer.commit_transaction(_SECONDS)
    bench.begin(producer, "b", 2, "second")
    producer.abort_transaction(_SECONDS)
    assert bench.read_offset() == (1, "first")
    assert bench.read_records("read_committed") == ["a"]


@pytest.mark.slow
def test_a_successor_settles_what_was_pending_before_it_reads_and_fences_the_zombie(bench: Bench) -> None:
    zombie = bench.make_producer()
    bench.begin(zombie, "a", 1, "first")
    zombie.commit_transaction(_SECONDS)
    bench.begin(zombie, "b", 2, "second")
    successor = bench.make_producer()
    # Stable at once: the zombie's transaction was aborted on the way.
    assert bench.read_offset() == (1, "first")
    with pytest.raises(KafkaException) as fenced:
        zombie.commit_transaction(_SECONDS)
    assert fenced.value.args[0].fatal()
    assert fenced.value.args[0].code() == KafkaError._FENCED
    bench.begin(successor, "c", 3, "third")
    successor.commit_transaction(_SECONDS)
    assert bench.read_offset() == (3, "third")
    assert bench.read_records("read_committed") == ["a", "c"]


def test_a_zombie_that_wakes_up_between_transactions_can_not_begin_another(bench: Bench) -> None:
    zombie = bench.make_producer()
    bench.begin(zombie, "a", 1, "first")
    zombie.commit_transaction(_SECONDS)
    bench.make_producer()
    with pytest.raises(KafkaException) as fenced:
        bench.begin(zombie, "b", 2, "second")
    assert fenced.value.args[0].code() in (KafkaError._FENCED, KafkaError._STATE)
    assert bench.read_offset() == (1, "first")
    assert bench.read_records("read_committed") == ["a"]
