"""Producers: what can't be delivered surfaces, as an error of whoever wanted it delivered. No broker is there."""

from typing import Any

import pytest
from confluent_kafka import Producer

from db.data.outbox import WaitingEvent
from producers.relay import channel
from producers.relay.channel import ChannelBroken, PlainChannel, TransactionalChannel
from producers.relay.ledger import Ledger
from queryd.kafka import producer, transactional_producer
from queryd.kafka.producer import IdempotentProducer, NotDelivered
from queryd.kafka.record import NewRecord
from tests.unit.samples import QUERY_ID

# Nobody listens on a port that only root may open; log_level 0 keeps librdkafka from telling stderr so.
_NOBODY = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}
# Far more than a flush of this long needs, and soon over.
_SOON_SECONDS = 0.3
_EVENT = WaitingEvent(7, "an id", QUERY_ID, b"payload", {"ce_id": "an id"})
_LEDGER = Ledger("a generation", (7,), 1, "a digest")


class _Constructed(Exception):
    """Carries the configuration of a producer that a test has caught."""


def _catch(config: dict[str, Any]) -> Producer:
    raise _Constructed(config)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> PlainChannel:
    """An open channel without transactions, whose broker has gone."""
    monkeypatch.setattr(channel, "BROKER_SECONDS", _SOON_SECONDS)
    made = PlainChannel(_NOBODY)
    made.open()
    return made


def test_our_producers_are_idempotent_whatever_the_callers_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "Producer", _catch)
    options = _NOBODY | {"enable.idempotence": False, "acks": "1"}
    with pytest.raises(_Constructed) as caught:
        IdempotentProducer(options, "a test", {})
    [config] = caught.value.args
    assert (config["enable.idempotence"], config["acks"]) == (True, "all")


def test_a_transactional_producer_is_idempotent_by_its_id_and_can_be_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transactional_producer, "BROKER_SECONDS", _SOON_SECONDS)
    with pytest.raises(ChannelBroken, match=r"transactional\.id"):
        TransactionalChannel(_NOBODY | {"enable.idempotence": False}, "relay").open()


def test_a_record_that_is_not_delivered_is_an_error_of_whoever_published_it() -> None:
    made = IdempotentProducer(_NOBODY, "a test", {"delivery.timeout.ms": int(_SOON_SECONDS * 1000), "linger.ms": 0})
    with pytest.raises(NotDelivered, match="timed out"):
        made.publish([NewRecord("topic", b"key", b"value", [])], _SOON_SECONDS + 3)
    made.close(0)


def test_a_batch_that_stays_unacknowledged_breaks_the_channel(refusing: PlainChannel) -> None:
    with pytest.raises(ChannelBroken, match="1 of 1 records not acknowledged"):
        refusing.publish([_EVENT], _LEDGER)
    refusing.close()


def test_a_failed_delivery_is_latched_and_breaks_the_channel() -> None:
    made = PlainChannel(_NOBODY | {"delivery.timeout.ms": int(_SOON_SECONDS * 1000)})
    made.open()
    # By the time that the flush returns nothing is left, and yet nothing was delivered.
    with pytest.raises(ChannelBroken, match=r"0 of 2 records not acknowledged, first error: .*timed out"):
        made.publish([_EVENT, _EVENT], _LEDGER)
    made.close()
