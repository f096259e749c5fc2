"""Shutting down: each step is guarded on its own, so that the last one is reached whatever the others ran into."""

import asyncio
import inspect
import logging
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from consumers.executor.executor import Executor, ExecutorRules
from queryd.events import Mode
from queryd.kafka.consumer import Subscription

# Nobody listens there, and none of this needs anybody to.
_NOBODY = {"bootstrap.servers": "127.0.0.1:1", "group.id": "group", "log_level": 0}
_TOPICS = [mode.topic.value for mode in Mode]


class _Broken:
    """Anything that an executor holds: whatever it is asked to do, it notes, and raises."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self._name = name
        self._asked = asked

    def __getattr__(self, what: str) -> Any:
        async def fail(*_: object) -> None:
            self._asked.append(f"{self._name}.{what}")
            raise RuntimeError

        def stop_all(*_: object) -> None:
            self._asked.append(f"{self._name}.{what}")
            raise RuntimeError

        return stop_all if what == "stop_all" else fail


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of a consumer that can't store an offset."""
    calls: list[str] = []

    class Failing(Consumer):
        def store_offsets(self, message: Any = None, offsets: list[TopicPartition] | None = None) -> None:
            calls.append("store")
            raise KafkaException(KafkaError(KafkaError._STATE))

        def close(self) -> None:
            calls.append("close")
            super().close()

    monkeypatch.setattr("queryd.kafka.consumer.Consumer", Failing)
    return calls


def _make_executor(asked: list[str]) -> Executor:
    parts: dict[str, Any] = {name: _Broken(name, asked) for name in inspect.signature(Executor).parameters}
    parts["subscription_config"] = _NOBODY
    parts["rules"] = ExecutorRules(dict.fromkeys(Mode, 1), lease_seconds=15.0, drain_seconds=0.0)
    return Executor(**parts)


async def test_every_step_of_an_executors_shutdown_is_reached_although_each_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    executor = _make_executor(asked)
    leave_all = executor.intake.close

    async def leave() -> None:
        asked.append("intake.close")
        await leave_all()
        raise RuntimeError

    monkeypatch.setattr(executor.intake, "close", leave)
    await executor._shut_down([])
    assert asked == ["intake.close", "leases.stop_all", "engine.close"]


async def test_a_group_that_cannot_be_left_keeps_nobody_from_handing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Kafka away a consumer leaves only once its session has ended."""
    monkeypatch.setattr("consumers.executor.executor._LEAVE_SECONDS", 0.0)
    asked: list[str] = []
    executor = _make_executor(asked)
    last_step = asyncio.Event()

    async def leave() -> None:
        await last_step.wait()
        asked.append("left")

    async def close_engine() -> None:
        last_step.set()

    monkeypatch.setattr(executor.intake, "close", leave)
    monkeypatch.setattr(executor._engine, "close", close_engine, raising=False)
    await executor._shut_down([])
    assert asked == ["leases.stop_all", "left"]


async def test_a_subscription_whose_last_commit_fails_still_leaves_its_group(
    closed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "queryd.kafka.consumer")
    subscription = Subscription(_NOBODY, _TOPICS)
    await subscription.open()
    positions = [TopicPartition(_TOPICS[0], 0, 5)]
    monkeypatch.setattr(subscription, "_take_positions", lambda *_, **__: positions)
    await subscription.close()
    assert closed == ["store", "close"]
    assert "the last commit failed" in caplog.text


async def test_a_subscription_is_closed_although_what_it_meets_is_no_error_of_kafka(
    closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subscription = Subscription(_NOBODY, _TOPICS)
    await subscription.open()

    def fail(*_: object, **__: object) -> list[TopicPartition]:
        raise RuntimeError

    monkeypatch.setattr(subscription, "_take_positions", fail)
    with pytest.raises(RuntimeError):
        await subscription.close()
    assert closed == ["close"]
