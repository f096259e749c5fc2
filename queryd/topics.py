"""What an offset belongs to: a cluster and a topic, by their ids."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from queryd.kafka.outages import QUIET

_log = logging.getLogger("queryd.kafka")

# How often to ask for a broker or a topic that is not there yet.
_AGAIN_SECONDS = 1.0
# Long enough for a broker that is starting; then the caller waits and asks again.
_BROKER_SECONDS = 10.0


class TopicUnknown(Exception):
    """The broker does not answer, or does not have the topic: wait and ask again, or create it."""


@dataclass(frozen=True, slots=True)
class TopicIdentity:
    """A topic that was deleted and made again has another id, and so have the topics of another cluster."""

    cluster_id: str
    topic_id: str


async def wait_for_topic(config: dict[str, Any], topic: str) -> TopicIdentity:
    """The topic's identity, waiting for the broker and the topic for as long as it takes, and saying so once."""
    told = False
    while True:
        try:
            return await asyncio.to_thread(read_topic_identity, config, topic)
        except TopicUnknown as error:
            if not told:
                _log.warning("kafka does not know %s yet, waiting: %s", topic, error)
                told = True
            await asyncio.sleep(_AGAIN_SECONDS)


def read_topic_identity(config: dict[str, Any], topic: str) -> TopicIdentity:
    """Ask the broker; blocks for up to 20 s. Raises `TopicUnknown`."""
    admin = AdminClient(config | QUIET)
    try:
        cluster = admin.describe_cluster(request_timeout=_BROKER_SECONDS).result()
        described = admin.describe_topics(TopicCollection([topic]), request_timeout=_BROKER_SECONDS)[topic].result()
    except KafkaException as error:
        raise TopicUnknown(error.args[0].str()) from error
    return TopicIdentity(str(cluster.cluster_id), str(described.topic_id))
