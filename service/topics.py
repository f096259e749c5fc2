"""The topics as the contract wants them."""

import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from queryd.events import Topic
from queryd.kafka.outages import QUIET

_DAY = 24 * 3600 * 1000
_BROKER_SECONDS = 15.0
# A healthy broker answers in milliseconds, and a person waits for the command.
_ANSWER_SECONDS = 5.0
# The timeout of one metadata request, after which we check the errors that librdkafka reported.
_LOOK_SECONDS = 0.5
# librdkafka tries a host name's next address after a few tenths of a second.
_OTHER_ADDRESS_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic and its settings."""

    name: Topic
    config: dict[str, str] = field(default_factory=dict)


# The largest batch that a topic takes, as the broker counts it (compressed). A request of the largest SQL has 257 KiB;
# the dead letters' topic takes whatever a request topic took, with our headers added.
_REQUEST_BYTES = 1_048_576
_DEAD_LETTER_BYTES = 16 * _REQUEST_BYTES

# A segment goes as a whole, once its newest record is old enough: rolled daily, no record outstays its time by more
# than a day.
_DAILY = {"segment.ms": str(_DAY)}

_REQUESTS = _DAILY | {
    "cleanup.policy": "delete",
    "retention.ms": str(7 * _DAY),
    "message.timestamp.type": "LogAppendTime",
    "max.message.bytes": str(_REQUEST_BYTES),
}

TOPICS = (
    TopicSpec(Topic.REQUESTS_INTERACTIVE, _REQUESTS),
    TopicSpec(Topic.REQUESTS_BATCH, _REQUESTS),
    TopicSpec(Topic.CANCELLATIONS, _DAILY | {"cleanup.policy": "delete", "retention.ms": str(7 * _DAY)}),
    TopicSpec(
        Topic.STATUS,
        {
            "cleanup.policy": "compact",
            # The full story for a week. Compaction passes over the active segment and over what is not dirty enough, so
            # segments are rolled daily, and a record is compacted at the latest a day after its week.
            "min.compaction.lag.ms": str(7 * _DAY),
            "max.compaction.lag.ms": str(8 * _DAY),
            "segment.ms": str(_DAY),
            # A reader that was away for a week still sees a deletion.
            "delete.retention.ms": str(7 * _DAY),
        },
    ),
    TopicSpec(
        Topic.DEAD_LETTERS,
        _DAILY
        | {
            "cleanup.policy": "delete",
            "retention.ms": str(30 * _DAY),
            "max.message.bytes": str(_DEAD_LETTER_BYTES),
        },
    ),
)


# What a busy broker may take to look for what is over: it looks every few minutes.
_LOOKING_DAYS = 1


def days_until_forgotten(spec: TopicSpec) -> int:
    """After how many days nothing is left of a record that is written now, or deleted now by a tombstone.

    Of a compacted topic the values go first, when the tombstone is compacted with them; the tombstone itself, which is
    only an id, stays for its own time and the next compaction after it.
    """
    config = {name: int(value) for name, value in spec.config.items() if name.endswith(".ms")}
    if spec.config["cleanup.policy"] == "compact":
        millis = 2 * config["max.compaction.lag.ms"] + config["delete.retention.ms"]
    else:
        millis = config["retention.ms"]
    return (millis + config["segment.ms"]) // _DAY + _LOOKING_DAYS


class NoBroker(Exception):
    """No broker answered; `codes` are the error codes that librdkafka reported."""

    def __init__(self, codes: AbstractSet[int]) -> None:
        super().__init__("no broker answers")
        self.codes = codes


def find_topics(kafka: dict[str, Any]) -> set[str]:
    """Return the cluster's topics. Raises `NoBroker` as soon as the failure is certain, at the latest after 5 s."""
    # librdkafka reports the cause in the error callback; the call's own error is only a timeout.
    told: list[KafkaError] = []
    last: list[KafkaError] = []
    deadline, noticed = time.monotonic() + _ANSWER_SECONDS, False
    try:
        admin = AdminClient(kafka | QUIET | {"error_cb": told.append})
        while time.monotonic() < deadline:
            try:
                return set(admin.list_topics(timeout=_LOOK_SECONDS).topics)
            except KafkaException as error:
                last = [error.args[0]]
            finally:
                admin.poll(0)
            if told and not noticed:
                # Another address of the name may answer; after that, waiting does not help.
                deadline, noticed = min(deadline, time.monotonic() + _OTHER_ADDRESS_SECONDS), True
    except KafkaException as error:
        last = [error.args[0]]
    raise NoBroker({each.code() for each in [*last, *told]})


def require_topics(kafka: dict[str, Any]) -> None:
    """Raises `NoBroker`, or `TopicsRefused` if a topic is missing; a client would take 15 s to report either."""
    if missing := find_missing(find_topics(kafka)):
        raise TopicsRefused(missing)


def find_missing(topics: AbstractSet[str]) -> str | None:
    """Return which required topics are missing and what to do; None if all exist."""
    missing = sorted({topic.value for topic in Topic} - topics)
    return f"topics are missing: {', '.join(missing)}; run `queryd topics apply`" if missing else None


class TopicsRefused(Exception):
    """The broker can't be reached, or will not make or alter a topic; the sentence says which and why."""


def apply_topics(kafka: dict[str, Any], partitions: int, replication: int) -> dict[str, str]:
    """Make missing topics and put the settings of the others right; what was done, by topic.

    Partitions are never added: a key's records would move. Safe to repeat. Raises `TopicsRefused`.
    """
    admin = AdminClient(kafka | QUIET)
    new = [
        NewTopic(spec.name, num_partitions=partitions, replication_factor=replication, config=spec.config)
        for spec in TOPICS
    ]
    done: dict[str, str] = {}
    for name, answer in admin.create_topics(new, request_timeout=_BROKER_SECONDS).items():
        try:
            answer.result()
            done[name] = "created"
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise TopicsRefused(f"{name}: {error.args[0].str()}") from error
            done[name] = "kept"
    _put_right(admin, [spec for spec in TOPICS if done[spec.name] == "kept"], done)
    return done


def _put_right(admin: AdminClient, kept: list[TopicSpec], done: dict[str, str]) -> None:
    resources = [
        ConfigResource(
            ResourceType.TOPIC,
            spec.name.value,
            incremental_configs=[
                ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
                for name, value in spec.config.items()
            ],
        )
        for spec in kept
    ]
    if not resources:
        return
    for resource, answer in admin.incremental_alter_configs(resources, request_timeout=_BROKER_SECONDS).items():
        try:
            answer.result()
            done[resource.name] = "settings applied"
        except KafkaException as error:
            raise TopicsRefused(f"{resource.name}: {error.args[0].str()}") from error
