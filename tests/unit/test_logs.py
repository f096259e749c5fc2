"""Log lines as a service writes them: its name on every line, and facts in fields."""

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import structlog
from confluent_kafka import TopicPartition

from queryd.events import Topic
from queryd.kafka.consumer import Subscription
from queryd.kafka.record import Record
from queryd.projector import tell_unreadable
from telemetry.logs import set_up_logs


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("queryd")
    handlers, level, our_level = root.handlers, root.level, ours.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    ours.setLevel(our_level)
    structlog.reset_defaults()


def _read(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_every_line_names_its_service_whichever_library_and_thread_writes_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logs("INFO", "relay")
    structlog.get_logger("queryd.relay").info("ours")
    logging.getLogger("somebody.else").warning("theirs")
    thread = threading.Thread(target=logging.getLogger("queryd.kafka").error, args=("of a thread",))
    thread.start()
    thread.join()
    # A line about another service names that one.
    structlog.get_logger("queryd.up").info("service_restarted", service="executor")
    assert [(line["event"], line["service"]) for line in _read(capsys)] == [
        ("ours", "relay"),
        ("theirs", "relay"),
        ("of a thread", "relay"),
        ("service_restarted", "executor"),
    ]


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_below_a_warning_other_libraries_write_nothing(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    # An HTTP client's line for each request contains the URL, and so its password.
    set_up_logs(level, "executor")
    logging.getLogger("httpx2").info("HTTP Request: POST http://user:password@registry/")
    logging.getLogger("somebody.else").debug("password")
    structlog.get_logger("queryd.executor").info("ours")
    assert [line["event"] for line in _read(capsys)] == ["ours"]


def test_partitions_are_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("INFO", "executor")
    subscription = Subscription({"bootstrap.servers": "127.0.0.1:1", "group.id": "a group"}, ["a", "b"])
    subscription._on_lost(cast(Any, None), [TopicPartition("b", 1), TopicPartition("a", 10), TopicPartition("a", 2)])
    [line] = _read(capsys)
    assert line["event"] == "partitions lost"
    assert line["partitions"] == {"a": [2, 10], "b": [1]}


def test_a_record_s_place_is_in_fields(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("INFO", "projector")
    tell_unreadable(Record(Topic.STATUS, 3, 41, b"k", None, (), None, False, 0.0, 1), "it is no event")
    [line] = _read(capsys)
    assert (line["topic"], line["partition"], line["offset"]) == ("query.status", 3, 41)
    assert "41" not in line["event"]


def test_a_field_that_nobody_listed_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("INFO", "executor")
    logging.getLogger("somebody.else").warning("a line", extra={"sql": "SELECT secret"})
    assert "secret" not in capsys.readouterr().err
