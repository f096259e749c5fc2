"""docs/events.md names what is on the wire: fingerprints, headers, topics and error codes."""

import re
from pathlib import Path

from queryd.codec import MAX_EVENT_BYTES, MAX_SQL_BYTES
from queryd.contract import contract
from queryd.dead_letters import DEAD_PREFIX, DeadCode
from queryd.events import MAX_INLINE_BYTES, ErrorCode, Topic
from queryd.headers import REPUBLISHED, ReplayHeader

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "events.md").read_text(encoding="utf-8")


def test_every_schemas_fingerprint_stands_there() -> None:
    rows = {
        (name, int(version), fingerprint)
        for name, version, fingerprint in re.findall(r"^\| (\w+) \| (\d+) \| `([0-9a-f]{16})` \|$", PAGE, re.MULTILINE)
    }
    assert rows == {
        (schema.name, schema.version, schema.fingerprint.hex()) for schema in contract().by_fingerprint.values()
    }


def test_the_walk_throughs_request_begins_with_its_schemas_fingerprint() -> None:
    frame = b"\xc3\x01" + contract().newest["QueryRequested"].fingerprint
    assert "".join(f"\\x{byte:02x}" for byte in frame) in PAGE


def test_topics_headers_and_codes_stand_there() -> None:
    words = set(re.findall(r"[\w.-]+", PAGE))
    assert {topic.value for topic in Topic} <= words
    assert {code.value for code in ErrorCode} | {code.value for code in DeadCode} <= words
    # Of names that begin alike the table gives the first in full and the others' ends.
    ends = {ReplayHeader.PARTITION, ReplayHeader.OFFSET, ReplayHeader.TIMESTAMP}
    assert {header.value for header in set(ReplayHeader) - ends} <= words
    assert {header.value.removeprefix("queryd_origin") for header in ends} <= words
    assert {f"{DEAD_PREFIX}code", f"{DEAD_PREFIX}reason", REPUBLISHED, "traceparent", "ce_id"} <= words


def test_sizes_stand_there() -> None:
    assert all(f"{size:,} bytes" in PAGE for size in (MAX_EVENT_BYTES, MAX_SQL_BYTES, MAX_INLINE_BYTES))
