"""The acceptance checker must be able to fail: each broken story is found, and the good one passes."""

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.acceptance.checker import Evidence, Malformed, Row, Rules, Valid, judge
from tests.acceptance.stranger import Place, Record, StatusEvent, StoredObject

ORG = "11111111-1111-4111-8111-111111111111"
QUERY = "22222222-2222-4222-8222-222222222222"
USER = "33333333-3333-4333-8333-333333333333"
OTHER = "44444444-4444-4444-8444-444444444444"
SQL = "SELECT 42 AS answer, 'x' AS label"
PREFIX = f"results/{ORG}/{QUERY}/1-0a1b2c3d/"
BAD_PLACE = Place("query.requests.batch", 2, 7)
ROWS: tuple[Row, ...] = ({"answer": 42, "label": "x"},)


@dataclass
class Story:
    """One good query and one dead letter, each part open to be broken."""

    valid: Valid
    events: list[StatusEvent]
    row: dict[str, Any]
    status: dict[str, Any]
    objects: dict[str, StoredObject]
    letters: list[Record]
    malformed: list[Malformed] = field(
        default_factory=lambda: [Malformed(BAD_PLACE, b"k", b"\x00garbage", (("sent-by", b"me"),))]
    )
    rules: Rules = field(default_factory=Rules)

    def judge(self) -> list[str]:
        """What the checker says."""
        return judge(
            [self.valid],
            self.malformed,
            Evidence(
                bucket="results",
                events={QUERY: self.events} if self.events else {},
                dead_letters=self.letters,
                results={QUERY: self.row} if self.row else {},
                statuses={QUERY: self.status} if self.status else {},
                objects=self.objects,
            ),
            self.rules,
        )

    def change_event(self, index: int, **fields: Any) -> None:
        """Replace fields of one event."""
        self.events[index] = make_event(dict(self.events[index].fields) | fields, index)

    def change_file(self, **fields: Any) -> None:
        """Replace fields of the one announced file."""
        self.change_event(-1, files=[self.events[-1].fields["files"][0] | fields])


def make_parquet() -> bytes:
    file = BytesIO()
    pq.write_table(pa.table({"answer": pa.array([42], pa.int32()), "label": ["x"]}), file)
    return file.getvalue()


def make_event(fields: dict[str, Any], offset: int) -> StatusEvent:
    payload = json.dumps(fields, sort_keys=True).encode()
    headers = (("ce_id", str(fields["event_id"]).encode()),)
    return StatusEvent(Record(Place("query.status", 1, offset), QUERY.encode(), payload, headers), fields)


def make_letter(place: Place, value: bytes, offset: int = 0) -> Record:
    headers = {
        "sent-by": "me",
        "queryd_dead_code": "UNDECODABLE",
        "queryd_dead_reason": "the value is no Avro",
        "queryd_dead_topic": place.topic,
        "queryd_dead_partition": str(place.partition),
        "queryd_dead_offset": str(place.offset),
        "queryd_dead_time": "2026-01-01T00:00:00Z",
        "queryd_dead_redrives": "0",
    }
    encoded = tuple((name, text.encode()) for name, text in headers.items())
    return Record(Place("query.requests.dead", 0, offset), b"k", value, encoded)


def make_story(output_format: str = "parquet", content: bytes | None = None) -> Story:
    content = make_parquet() if content is None else content
    key = f"{PREFIX}result.{output_format}"
    common = {
        "org_id": ORG,
        "user_id": USER,
        "task_id": None,
        "mode": "interactive",
        "output_location": None,
        "row_count": None,
        "bytes": None,
        "error_code": None,
        "error_message": None,
    }
    shared = common | {
        "query_id": QUERY,
        "sql_hash": hashlib.sha256(SQL.encode()).hexdigest(),
        "saved_query_id": None,
        "output_format": output_format,
        "duration_ms": None,
    }
    end = {"output_location": f"s3://results/{PREFIX}", "row_count": 1, "bytes": len(content)}
    file = {"key": key, "bytes": len(content), "rows": 1, "etag": "e", "sha256": hashlib.sha256(content).hexdigest()}
    columns = [{"name": "answer", "type": "INTEGER"}, {"name": "label", "type": "VARCHAR"}]
    steps: list[dict[str, Any]] = [
        {"previous_status": None, "status": "Queued", "attempt": 0, "files": [], "columns": []},
        {"previous_status": "Queued", "status": "Running", "attempt": 1, "files": [], "columns": []},
        {"previous_status": "Running", "status": "Succeeded", "attempt": 1, "files": [file], "columns": columns, **end},
    ]
    events = []
    for number, step in enumerate(steps, 1):
        name = str(uuid.uuid5(uuid.UUID(QUERY), str(number)))
        events.append(make_event(shared | step | {"sequence": number, "event_id": name}, number))
    return Story(
        valid=Valid(
            {"query_id": QUERY, "org_id": ORG, "user_id": USER, "mode": "interactive", "sql": SQL}
            | {"output_format": output_format},
            ("answer", "label"),
            ROWS,
        ),
        events=events,
        row=shared | end | {"status": "Succeeded"},
        status=common | end | {"status": "Succeeded", "sequence": 3, "attempt": 1},
        objects={key: StoredObject(content, "e")},
        letters=[make_letter(BAD_PLACE, b"\x00garbage")],
    )


def test_a_good_story_has_no_violations() -> None:
    assert make_story().judge() == []


@pytest.mark.parametrize(
    ("output_format", "content"),
    [("csv", b"answer,label\r\n42,x\r\n"), ("json", b'{"answer":42,"label":"x"}\n')],
)
def test_a_good_story_in_text_has_no_violations(output_format: str, content: bytes) -> None:
    assert make_story(output_format, content).judge() == []


def remove_event(story: Story) -> None:
    del story.events[1]


def double_event(story: Story) -> None:
    story.events.insert(2, story.events[1])


def swap_events(story: Story) -> None:
    story.events[0], story.events[1] = story.events[1], story.events[0]


def remove_last_event(story: Story) -> None:
    del story.events[2]


def remove_all_events(story: Story) -> None:
    story.events.clear()


def move_event_to_other_partition(story: Story) -> None:
    event = story.events[2]
    story.events[2] = StatusEvent(replace(event.record, place=Place("query.status", 0, 9)), event.fields)


def change_event_key(story: Story) -> None:
    event = story.events[2]
    story.events[2] = StatusEvent(replace(event.record, key=OTHER.encode()), event.fields)


def change_cloud_event_id(story: Story) -> None:
    event = story.events[0]
    story.events[0] = StatusEvent(replace(event.record, headers=(("ce_id", OTHER.encode()),)), event.fields)


def skip_an_attempt(story: Story) -> None:
    story.change_event(1, attempt=2)
    story.change_event(2, attempt=2)
    story.status["attempt"] = 2


def go_on_after_the_end(story: Story) -> None:
    more = dict(story.events[2].fields) | {"sequence": 4, "previous_status": "Succeeded"}
    more["event_id"] = str(uuid.uuid5(uuid.UUID(QUERY), "4"))
    story.events.append(make_event(more, 4))
    story.status["sequence"] = 4


def spoil_the_object(story: Story) -> None:
    key, stored = next(iter(story.objects.items()))
    story.objects[key] = StoredObject(stored.content[:-1] + b"\x00", stored.etag)


def add_an_object(story: Story) -> None:
    story.objects[PREFIX + "other.parquet"] = StoredObject(b"", "e")


def remove_the_object(story: Story) -> None:
    story.objects.clear()


def share_the_prefix(story: Story) -> None:
    shared = f"s3://results/results/{ORG}/{QUERY}/"
    story.row["output_location"] = story.status["output_location"] = shared
    story.change_event(2, output_location=shared)


def announce_two_files(story: Story) -> None:
    file = story.events[2].fields["files"][0]
    story.change_event(2, files=[file, file])


def fail_it(story: Story) -> None:
    for seen in (story.row, story.status):
        seen.update(status="Failed", error_code="INTERNAL")
    story.change_event(2, status="Failed", error_code="INTERNAL")


def double_the_letter(story: Story) -> None:
    story.letters.append(replace(story.letters[0], place=Place("query.requests.dead", 0, 1)))


def lose_the_reason(story: Story) -> None:
    headers = tuple(item for item in story.letters[0].headers if item[0] != "queryd_dead_reason")
    story.letters[0] = replace(story.letters[0], headers=headers)


def lose_a_sent_header(story: Story) -> None:
    headers = tuple(item for item in story.letters[0].headers if item[0] != "sent-by")
    story.letters[0] = replace(story.letters[0], headers=headers)


def change_the_letter(story: Story) -> None:
    story.letters[0] = replace(story.letters[0], value=b"garbage")


def change_the_letters_key(story: Story) -> None:
    story.letters[0] = replace(story.letters[0], key=None)


def add_a_letter(story: Story) -> None:
    story.letters.append(make_letter(Place("query.requests.batch", 0, 0), b"?", 1))


def expect_other_rows(story: Story) -> None:
    story.valid = replace(story.valid, rows=({"answer": 43, "label": "x"},))


BROKEN: list[tuple[str, Callable[[Story], object], str]] = [
    ("missing event", remove_event, "sequence [1, 3]"),
    ("doubled event", double_event, "sequence [1, 2, 2, 3]"),
    ("swapped events", swap_events, "sequence [2, 1, 3]"),
    ("no terminal event", remove_last_event, "not terminal"),
    ("no event", remove_all_events, "has no event"),
    ("two partitions", move_event_to_other_partition, "several partitions"),
    ("another key", change_event_key, "another key"),
    ("another ce_id", change_cloud_event_id, "ce_id"),
    ("wrong event id", lambda story: story.change_event(1, event_id=OTHER), "event_id"),
    ("wrong previous status", lambda story: story.change_event(2, previous_status="Queued"), "follows Queued"),
    ("skipped attempt", skip_an_attempt, "no legal step"),
    ("queued with an attempt", lambda story: story.change_event(0, attempt=1), "no legal step"),
    ("end of another attempt", lambda story: story.change_event(2, attempt=2), "no legal step"),
    ("step after the end", go_on_after_the_end, "no legal step"),
    ("wrong sha256", lambda story: story.change_file(sha256="0" * 64), "sha256 is"),
    ("wrong file size", lambda story: story.change_file(bytes=1), "file: bytes is"),
    ("wrong file rows", lambda story: story.change_file(rows=2), "file: rows is"),
    ("wrong etag", lambda story: story.change_file(etag="f"), "etag is"),
    ("wrong key", lambda story: story.change_file(key="elsewhere"), "key is"),
    ("two files", announce_two_files, "2 files"),
    ("spoilt object", spoil_the_object, "sha256 is"),
    ("second object", add_an_object, "2 objects"),
    ("no object", remove_the_object, "0 objects"),
    ("shared prefix", share_the_prefix, "prefix of an attempt's own"),
    ("other rows", expect_other_rows, "as row 0 of its result"),
    ("other columns", lambda story: story.change_event(2, columns=[]), "announces the columns"),
    ("missing row", lambda story: story.row.clear(), "no row in query_results"),
    ("failed", fail_it, "status is 'Failed'"),
    ("wrong hash", lambda story: story.row.update(sql_hash="0"), "sql_hash is"),
    ("other user", lambda story: story.row.update(user_id=None), "user_id is None"),
    ("wrong bytes in row", lambda story: story.row.update(bytes=1), "row: bytes is 1"),
    ("row other than event", lambda story: story.row.update(row_count=2), "against its last event: row_count"),
    ("event other than row", lambda story: story.change_event(2, bytes=1), "against its last event: bytes"),
    ("missing dead letter", lambda story: story.letters.clear(), "0 dead letters"),
    ("doubled dead letter", double_the_letter, "2 dead letters"),
    ("other bytes in dead letter", change_the_letter, "other bytes"),
    ("other key of dead letter", change_the_letters_key, "another key than was sent"),
    ("no reason", lose_the_reason, "no queryd_dead_reason"),
    ("lost header", lose_a_sent_header, "lacks a header"),
    ("surplus dead letter", add_a_letter, "not malformed"),
    ("missing state", lambda story: story.status.clear(), "no row in query_status"),
    ("state other than row", lambda story: story.status.update(row_count=2), "against query_results: row_count"),
    ("state's status other", lambda story: story.status.update(status="Running"), "against query_results: status"),
    ("state behind", lambda story: story.status.update(sequence=2), "query_status against its last event: sequence"),
    ("state's attempt other", lambda story: story.status.update(attempt=2), "against its last event: attempt"),
]


@pytest.mark.parametrize(("spoil", "finding"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_story_is_found(spoil: Callable[[Story], object], finding: str) -> None:
    story = make_story()
    spoil(story)
    violations = story.judge()
    assert any(finding in violation for violation in violations), violations


@pytest.mark.parametrize(
    ("output_format", "content"),
    [
        ("csv", b"answer,label\r\n43,x\r\n"),
        ("csv", b"label,answer\r\nx,42\r\n"),
        ("csv", b""),
        ("csv", b"answer,label\r\n42,x\r\n42,x\r\n"),
        ("json", b'{"answer":"42","label":"x"}\n'),
        ("json", b'{"answer":true,"label":"x"}\n'),
        ("json", b'{"answer":42,"label":"x"\n'),
        ("json", b""),
        ("parquet", b"PAR1"),
    ],
)
def test_other_content_is_found(output_format: str, content: bytes) -> None:
    assert any("result" in violation for violation in make_story(output_format, content).judge())


def test_something_never_sent_is_found() -> None:
    story = make_story()
    story.valid = replace(story.valid, fields=dict(story.valid.fields) | {"query_id": OTHER})
    violations = story.judge()
    assert f"{QUERY} has a row in query_results, and was never sent" in violations
    assert f"{OTHER} has no row in query_results" in violations


def test_a_repeat_of_the_same_bytes_passes_only_where_events_may_repeat() -> None:
    story = make_story()
    story.events += story.events[:2]
    assert story.judge() != []
    story.rules = Rules(events_may_repeat=True)
    assert story.judge() == []


def test_a_repeated_dead_letter_passes_only_where_letters_may_repeat() -> None:
    story = make_story()
    story.rules = Rules(letters_may_repeat=True)
    double_the_letter(story)
    assert story.judge() == []
    change_the_letter(story)
    assert any("other bytes" in violation for violation in story.judge())
    story.letters.clear()
    assert any("0 dead letters" in violation for violation in story.judge())


def test_another_event_of_the_same_number_never_passes() -> None:
    story = make_story()
    story.rules = Rules(events_may_repeat=True)
    story.events.append(make_event(dict(story.events[2].fields) | {"duration_ms": 5}, 3))
    assert any("sequence [1, 2, 3, 3]" in violation for violation in story.judge())


def test_a_decimal_in_json_may_be_a_number_or_a_string() -> None:
    for text in (b"1.50", b'"1.50"', b"1.5"):
        story = make_story("json", b'{"answer":' + text + b',"label":"x"}\n')
        story.valid = replace(story.valid, rows=({"answer": Decimal("1.50"), "label": "x"},))
        assert story.judge() == []
