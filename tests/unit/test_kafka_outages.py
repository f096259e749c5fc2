"""One log line when Kafka goes away and one when it is back. No broker is there."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaError, Message

from queryd.kafka import producer
from queryd.kafka.producer import IdempotentProducer, OnDelivery
from queryd.kafka.record import NewRecord


class _FakeProducer:
    """Takes records; `poll` reports them as delivered."""

    complain: Callable[[KafkaError], None]

    def __init__(self) -> None:
        self._reports: list[OnDelivery] = []

    def open(self, config: dict[str, Any]) -> "_FakeProducer":
        self.complain = config["error_cb"]
        return self

    def produce(self, _topic: str, *, on_delivery: OnDelivery, **_record: object) -> None:
        self._reports.append(on_delivery)

    def poll(self, _seconds: float) -> None:
        while self._reports:
            self._reports.pop()(None, Message())


def test_a_client_that_only_polls_logs_every_outage_and_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = _FakeProducer()
    monkeypatch.setattr(producer, "Producer", fake.open)
    client = IdempotentProducer({}, "the client", {})
    with caplog.at_level(logging.INFO, logger="queryd.kafka"):
        for _ in range(2):
            fake.complain(KafkaError(KafkaError._ALL_BROKERS_DOWN, "nobody answers"))
            client.produce(NewRecord("a topic", b"key", b"value", ()), lambda _error, _message: None)
            client.poll(0)
    assert [record.getMessage() for record in caplog.records] == [
        "kafka is away, the client waits: nobody answers",
        "kafka is back, the client goes on",
    ] * 2
