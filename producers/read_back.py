"""Reading a topic to its end, to find out what an earlier process had written there before it died."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from queryd.outages import QUIET

_BROKER_SECONDS = 15.0
# A broker that is there answers a fetch within its own half second, with records or with the end. Nothing at all for
# this long, and the end is not known.
_SILENCE_SECONDS = 15.0
# How many records are taken at once, and how long is waited for the first of them.
_AT_ONCE = 500
_LOOK_SECONDS = 0.1


class EndNotReached(Exception):
    """The broker went silent before the topic's end was read: what had been written is not known."""


def read_to_end(config: dict[str, Any], group: str, topic: str, starts: Mapping[int, int]) -> Iterator[Message]:
    """All records of a topic that nobody writes to meanwhile, from `starts` by partition (else from the earliest).

    Blocks. The end of a partition is where the broker's own answer to a fetch says that it is: unlike a watermark that
    is asked for, it is right on the embedded broker too. Raises `EndNotReached` and `KafkaException`.
    """
    reading = {"group.id": group, "enable.auto.commit": False, "enable.partition.eof": True}
    consumer = Consumer(config | QUIET | reading | {"auto.offset.reset": "earliest"})
    try:
        partitions = consumer.list_topics(topic, timeout=_BROKER_SECONDS).topics[topic].partitions
        unread = set(partitions)
        consumer.assign([TopicPartition(topic, partition, starts.get(partition, 0)) for partition in partitions])
        heard = time.monotonic()
        while unread:
            for message in consumer.consume(_AT_ONCE, _LOOK_SECONDS):
                error = message.error()
                if error is None:
                    heard = time.monotonic()
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    heard = time.monotonic()
                    unread.discard(_partition(message))
            if time.monotonic() - heard > _SILENCE_SECONDS:
                raise EndNotReached(f"{topic} could not be read to its end")
    finally:
        consumer.close()


def _partition(message: Message) -> int:
    partition = message.partition()
    assert partition is not None
    return partition
