"""Dead letters: the original bytes, key and headers, with headers that say why, when and from where."""

from datetime import UTC, datetime
from enum import StrEnum

import structlog

from queryd.events import Topic
from queryd.publisher import Publisher
from queryd.subscription import Record
from telemetry.events import LogEvent

_log = structlog.get_logger("queryd.dead_letters")

_PREFIX = "queryd_dead_"


class DeadCode(StrEnum):
    """Why a record is a dead letter."""

    UNDECODABLE = "UNDECODABLE"
    INVALID_REQUEST = "INVALID_REQUEST"
    CONFLICT = "CONFLICT"


class DeadLetters:
    """Writes dead letters. A record may be finished only after `send` has returned."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def send(self, record: Record, code: DeadCode, reason: str) -> None:
        """Publish a record as a dead letter and wait for the broker; raises `NotDelivered`: then the consumer stops."""
        await self._publisher.publish(
            Topic.DEAD_LETTERS, record.key, record.value, [*record.headers, *_explain(record, code, reason)]
        )
        _log.warning(
            LogEvent.REQUEST_DEAD_LETTERED,
            code=code.value,
            reason=reason,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
        )


def _explain(record: Record, code: DeadCode, reason: str) -> list[tuple[str, bytes]]:
    redrives = next((value for name, value in record.headers if name == f"{_PREFIX}redrives"), None)
    explained = {
        "code": code.value,
        "reason": reason,
        "topic": record.topic,
        "partition": str(record.partition),
        "offset": str(record.offset),
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if redrives is None:
        explained["redrives"] = "0"
    return [(_PREFIX + name, value.encode()) for name, value in explained.items()]
