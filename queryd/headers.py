"""Headers of our records: CloudEvents in binary mode, and W3C `traceparent`.

Source: CloudEvents 1.0.2, "Kafka Protocol Binding"; W3C Trace Context, level 1.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

Headers = dict[str, str]

# Version 00 has exactly these four parts; ids of all zeros are invalid.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


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
    trace = traceparent[3:35] if traceparent else secrets.token_hex(16)
    flags = traceparent[-2:] if traceparent else "00"
    return f"00-{trace}-{secrets.token_hex(8)}-{flags}"
