"""Headers of our records: CloudEvents in binary mode, and W3C `traceparent`.

Source: CloudEvents 1.0.2, "Kafka Protocol Binding"; W3C Trace Context, level 1.
"""

import random
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum

from queryd.contract import contract
from queryd.events import QueryStatusChanged

Headers = dict[str, str]

# Version 00 has exactly these four parts; ids of all zeros are invalid.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class ReplayHeader(StrEnum):
    """What a replay adds to the copy of a record."""

    # The replay's id, and how often the record was replayed by now.
    ID = "queryd_replay_id"
    COUNT = "queryd_replay_count"
    # Where the record was read that this is a copy of, and its timestamp there, in milliseconds since the epoch.
    TOPIC = "queryd_origin_topic"
    PARTITION = "queryd_origin_partition"
    OFFSET = "queryd_origin_offset"
    TIMESTAMP = "queryd_origin_timestamp"
    # The record's own trace: the copy's is another, which links to it.
    TRACEPARENT = "queryd_origin_traceparent"


# On a status event that is published once more because what it carried has gone from it. Its value says what.
REPUBLISHED = "queryd_republished"


def build_headers(
    *, event_type: str, event_id: str, subject: str, time: datetime, source: str, traceparent: str, schema: str
) -> Headers:
    """The headers of one event; `schema` is the file it was written with, such as `QueryRequested.v1.avsc`."""
    return {
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_source": source,
        "ce_type": event_type,
        "ce_subject": subject,
        "ce_time": time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "ce_dataschema": schema,
        "content-type": "application/avro",
        "traceparent": traceparent,
    }


def build_status_headers(event: QueryStatusChanged, traceparent: str) -> Headers:
    """The headers of a step of a query's story."""
    name = QueryStatusChanged.__name__
    return build_headers(
        event_type=f"queryd.{name}",
        event_id=event.event_id,
        subject=event.query_id,
        time=event.occurred_at,
        source="queryd",
        traceparent=traceparent,
        schema=f"{name}.v{contract().newest[name].version}.avsc",
    )


def to_kafka(headers: Mapping[str, str]) -> list[tuple[str, str | bytes | None]]:
    """Headers as confluent-kafka takes them."""
    return [(name, value.encode()) for name, value in headers.items()]


def find_traceparent(headers: Iterable[tuple[str, bytes | None]]) -> str | None:
    """The request's `traceparent` where it has a valid one."""
    for name, value in headers:
        if name.lower() == "traceparent" and value is not None:
            text = value.decode("ascii", "replace")
            return text if _TRACEPARENT.fullmatch(text) else None
    return None


def continue_trace(traceparent: str | None) -> str:
    """A `traceparent` with a span of its own: in the given trace, or in a new one."""
    trace = traceparent[3:35] if traceparent else _draw_id(128)
    flags = traceparent[-2:] if traceparent else "00"
    return f"00-{trace}-{_draw_id(64)}-{flags}"


def _draw_id(bits: int) -> str:
    """An id in hexadecimal, not zero. It is no secret; OpenTelemetry draws its ids in the same way."""
    drawn = 0
    while not drawn:
        drawn = random.getrandbits(bits)
    return f"{drawn:0{bits // 4}x}"
