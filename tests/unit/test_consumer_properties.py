"""What a subscription tells librdkafka, and that none of its callbacks ever raises. No broker is there."""

from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer

from queryd.kafka.consumer import Subscription, SubscriptionLost, _consumer_config

_NOBODY = {"bootstrap.servers": "127.0.0.1:1", "group.id": "group", "log_level": 0}
# What librdkafka refuses beside `group.protocol=consumer`.
_CLASSIC_ONLY = {"session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy"}
_ASKED_FOR = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "queued.max.messages.kbytes": 16_384,
    "fetch.max.bytes": 8_388_608,
}


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_what_the_rules_ask_for_cannot_be_configured_away(protocol: str) -> None:
    others = {
        "enable.auto.commit": True,
        "enable.auto.offset.store": True,
        "auto.offset.reset": "earliest",
        "isolation.level": "read_uncommitted",
        "queued.max.messages.kbytes": 1_000_000,
        "fetch.max.bytes": 1_000_000_000,
    }
    made = _consumer_config(_NOBODY | others | {"group.protocol": protocol})
    assert {name: made[name] for name in _ASKED_FOR} == _ASKED_FOR


def test_each_protocol_gets_its_properties_and_no_other() -> None:
    classic = _consumer_config(_NOBODY | {"session.timeout.ms": 6000})
    assert classic["partition.assignment.strategy"] == "cooperative-sticky"
    consumer = _consumer_config(_NOBODY | {"group.protocol": "consumer"})
    assert not consumer.keys() & _CLASSIC_ONLY
    for config in (classic, consumer):
        # librdkafka itself has the last word.
        Consumer(config).close()


@pytest.mark.parametrize("callback", ["_on_assign", "_on_revoke", "_on_lost"])
async def test_no_callback_raises_and_the_next_poll_tells(callback: str) -> None:
    # What none of them can work on.
    await _assert_latched(lambda subscription: getattr(subscription, callback)(subscription._consumer, None))


@pytest.mark.parametrize("callback", ["_on_commit", "_on_statistics"])
async def test_no_callback_of_the_client_raises_either(callback: str) -> None:
    nothing: dict[str, tuple[None, ...]] = {"_on_commit": (None, None), "_on_statistics": (None,)}
    await _assert_latched(lambda subscription: getattr(subscription, callback)(*nothing[callback]))


async def test_what_is_no_exception_class_is_caught_as_well() -> None:
    class Strange(BaseException):
        """What `except Exception` lets pass."""

    def fail(subscription: Subscription) -> None:
        with subscription._guarded("test"):
            raise Strange

    await _assert_latched(fail)


async def _assert_latched(call: Callable[[Subscription], Any]) -> None:
    subscription = Subscription(_NOBODY, ["topic"])
    call(subscription)
    with pytest.raises(SubscriptionLost, match="callback failed"):
        await subscription.poll()
    await subscription.close()
