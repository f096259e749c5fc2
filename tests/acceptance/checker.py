"""Judges what a stranger found: every promise of the main job, each broken one as a sentence.

It knows what was sent and what the servers hold, and nothing of how the service works.
"""

import csv
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from io import BytesIO, StringIO
from typing import Any, assert_never

import pyarrow.parquet as pq

from tests.acceptance.stranger import (
    TERMINAL,
    Headers,
    Place,
    Record,
    StatusEvent,
    StoredObject,
    prefix_of,
)

# What a cell of an expected row may be.
Cell = None | bool | int | str | Decimal
Row = Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Valid:
    """A request that must succeed: its fields as sent, and the rows that its result must hold, in this order."""

    fields: Mapping[str, Any]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def query_id(self) -> str:
        """The request's own id."""
        return str(self.fields["query_id"])


@dataclass(frozen=True, slots=True)
class Malformed:
    """A record that must become a dead letter, and where it lies."""

    place: Place
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the servers hold: status events per query in the order they were read, rows by query id, objects by key."""

    bucket: str
    events: Mapping[str, Sequence[StatusEvent]]
    dead_letters: Sequence[Record]
    results: Mapping[str, Mapping[str, Any]]
    statuses: Mapping[str, Mapping[str, Any]]
    objects: Mapping[str, StoredObject]


@dataclass(frozen=True, slots=True)
class Rules:
    """How strictly to judge.

    `events_may_repeat`: the relay died on a broker without transactions, so an event may come again, byte for byte.
    `letters_may_repeat`: a record may be dead-lettered again where its consumer died between the letter and the offset.
    `alone`: the servers hold nothing but what was sent here, so whatever else is there is a violation.
    """

    events_may_repeat: bool = False
    letters_may_repeat: bool = False
    alone: bool = True


def judge(
    valid: Sequence[Valid], malformed: Sequence[Malformed], evidence: Evidence, rules: Rules | None = None
) -> list[str]:
    """Every broken promise as one sentence; an empty list is a pass."""
    rules = rules or Rules()
    violations: list[str] = []
    for request in valid:
        violations += judge_query(request, evidence, rules)
    violations += judge_dead_letters(malformed, evidence.dead_letters, rules)
    if rules.alone:
        known = {request.query_id for request in valid}
        for what, ids in (
            ("row in query_results", evidence.results),
            ("row in query_status", evidence.statuses),
            ("event", evidence.events),
        ):
            violations += [f"{other} has a {what}, and was never sent" for other in sorted(set(ids) - known)]
    return violations


def judge_query(request: Valid, evidence: Evidence, rules: Rules) -> list[str]:
    """The row, the story, the object and the state of one query that must have succeeded."""
    query_id = request.query_id
    told = evidence.events.get(query_id, ())
    row = evidence.results.get(query_id)
    status = evidence.statuses.get(query_id)
    violations = judge_story(query_id, told, rules)
    if row is None:
        violations.append(f"{query_id} has no row in query_results")
    else:
        violations += _judge_row(request, row)
        if told:
            last = _last(told)
            violations += judge_row_and_event(query_id, row, last)
            if row["status"] == "Succeeded":
                violations += _judge_object(request, row, last, evidence)
    violations += judge_state(query_id, status, row, told)
    return violations


def judge_story(query_id: str, told: Sequence[StatusEvent], rules: Rules) -> list[str]:
    """Events 1..n on one partition, in order, each once, by legal steps, with the ids that follow from them."""
    if not told:
        return [f"{query_id} has no event"]
    violations = []
    if len({event.record.place.partition for event in told}) > 1:
        violations.append(f"{query_id} has events on several partitions")
    if any(event.record.key != query_id.encode() for event in told):
        violations.append(f"{query_id} has an event under another key")
    story = _without_repeats(told) if rules.events_may_repeat else list(told)
    numbers = [event.fields["sequence"] for event in story]
    if numbers != list(range(1, len(story) + 1)):
        violations.append(f"{query_id} has the sequence {numbers} instead of 1, 2, 3 …")
    for event in story:
        number = event.fields["sequence"]
        if event.fields["event_id"] != str(uuid.uuid5(uuid.UUID(query_id), str(number))):
            violations.append(f"{query_id} event {number} has an event_id that doesn't follow from query and sequence")
        if event.record.header("ce_id") != event.fields["event_id"]:
            violations.append(f"{query_id} event {number} has a ce_id other than its event_id")
    violations += _judge_steps(query_id, [event.fields for event in story])
    return violations


def _last(told: Sequence[StatusEvent]) -> Mapping[str, Any]:
    """The newest step, wherever a repeat of an older one was read."""
    return max((event.fields for event in told), key=lambda fields: int(fields["sequence"]))


def _without_repeats(told: Sequence[StatusEvent]) -> list[StatusEvent]:
    """The first of each, where a later one is the very same bytes; anything else stays and is judged."""
    first: dict[int, bytes | None] = {}
    story = []
    for event in told:
        number = event.fields["sequence"]
        if number in first and first[number] == event.record.value:
            continue
        first.setdefault(number, event.record.value)
        story.append(event)
    return story


def _judge_steps(query_id: str, story: Sequence[Mapping[str, Any]]) -> list[str]:
    """– → Queued (0), Queued → Running (1), Running (n) → Running (n+1), Queued | Running → Succeeded | Failed."""
    violations = []
    status: str | None = None
    attempt = 0
    for fields in story:
        if fields["previous_status"] != status:
            violations.append(
                f"{query_id} event {fields['sequence']} says that it follows {fields['previous_status']}, not {status}"
            )
        if not _is_legal(status, attempt, fields["status"], fields["attempt"]):
            violations.append(
                f"{query_id} goes from {status} ({attempt}) to {fields['status']} ({fields['attempt']}), no legal step"
            )
        status, attempt = fields["status"], fields["attempt"]
    if status not in TERMINAL:
        violations.append(f"{query_id} ends as {status}, which is not terminal")
    return violations


def _is_legal(before: str | None, attempt: int, after: str, next_attempt: int) -> bool:
    match after:
        case "Queued":
            return before is None and next_attempt == 0
        case "Running":
            return before in ("Queued", "Running") and next_attempt == attempt + 1
        case "Succeeded" | "Failed":
            return before in ("Queued", "Running") and next_attempt == attempt
    return False


def _judge_row(request: Valid, row: Mapping[str, Any]) -> list[str]:
    sent = request.fields
    expected = {
        "status": "Succeeded",
        "org_id": sent["org_id"],
        "user_id": sent.get("user_id"),
        "task_id": sent.get("task_id"),
        "mode": sent["mode"],
        "output_format": sent.get("output_format", "parquet"),
        "sql_hash": hashlib.sha256(sent["sql"].encode()).hexdigest(),
        "row_count": len(request.rows),
        "error_code": None,
        "error_message": None,
    }
    return _differences(f"{request.query_id} row", row, expected)


_ROW_AND_EVENT = (
    "org_id",
    "user_id",
    "task_id",
    "mode",
    "status",
    "sql_hash",
    "saved_query_id",
    "output_format",
    "output_location",
    "row_count",
    "bytes",
    "duration_ms",
    "error_code",
    "error_message",
)


def judge_row_and_event(query_id: str, row: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """What the last event says is what the row says."""
    return _differences(f"{query_id} row against its last event", row, {name: last[name] for name in _ROW_AND_EVENT})


def _judge_object(request: Valid, row: Mapping[str, Any], last: Mapping[str, Any], evidence: Evidence) -> list[str]:
    """Exactly one object under the location, and it is what row and event say."""
    query_id, location = request.query_id, row["output_location"]
    home = f"s3://{evidence.bucket}/results/{request.fields['org_id']}/{query_id}/"
    if location is None or not location.startswith(home) or not location.endswith("/") or location == home:
        return [f"{query_id} has no prefix of an attempt's own under {home} as its output_location"]
    prefix = prefix_of(location)
    keys = [key for key in evidence.objects if key.startswith(prefix)]
    output_format = request.fields.get("output_format", "parquet")
    if keys != [f"{prefix}result.{output_format}"]:
        return [f"{query_id} has {len(keys)} objects under its output_location instead of one result.{output_format}"]
    stored = evidence.objects[keys[0]]
    if len(last["files"]) != 1:
        return [f"{query_id} announces {len(last['files'])} files instead of one"]
    file = {
        "key": keys[0],
        "bytes": len(stored.content),
        "rows": len(request.rows),
        "etag": stored.etag,
        "sha256": hashlib.sha256(stored.content).hexdigest(),
    }
    violations = _differences(f"{query_id} file", last["files"][0], file)
    violations += _differences(f"{query_id} row", row, {"bytes": len(stored.content)})
    names = [column["name"] for column in last["columns"]]
    if names != list(request.columns):
        violations.append(f"{query_id} announces the columns {names} instead of {list(request.columns)}")
    violations += _judge_content(request, stored.content)
    return violations


def _judge_content(request: Valid, content: bytes) -> list[str]:
    query_id = request.query_id
    output_format = request.fields.get("output_format", "parquet")
    try:
        columns, rows, equal = _parse(output_format, content)
    except (ValueError, csv.Error, KeyError) as error:
        return [f"{query_id} has a result that can't be read as {output_format}: {type(error).__name__}"]
    if columns is not None and columns != list(request.columns):
        return [f"{query_id} has a result with the columns {columns} instead of {list(request.columns)}"]
    if len(rows) != len(request.rows):
        return [f"{query_id} has a result of {len(rows)} rows instead of {len(request.rows)}"]
    for index, (found, expected) in enumerate(zip(rows, request.rows, strict=True)):
        if list(found) != list(request.columns) or not all(equal(found[name], expected[name]) for name in expected):
            return [f"{query_id} has {dict(found)} as row {index} of its result instead of {dict(expected)}"]
    return []


_Parsed = tuple[list[str] | None, list[dict[str, Any]], Callable[[Any, Cell], bool]]


def _parse(output_format: str, content: bytes) -> _Parsed:
    """The columns (None where the format has no place for them), the rows, and how a cell compares."""
    if output_format == "parquet":
        table = pq.read_table(BytesIO(content))
        return table.column_names, table.to_pylist(), _is_same
    if output_format == "csv":
        header, *records = csv.reader(StringIO(content.decode(), newline=""), strict=True)
        return header, [dict(zip(header, record, strict=True)) for record in records], _is_same_text
    if output_format == "json":
        # Only a line feed ends a line: a JSON string may hold other line separators as they are.
        lines = content.decode().removesuffix("\n").split("\n") if content else []
        return None, [json.loads(line, parse_float=Decimal) for line in lines], _is_same_json
    raise ValueError("an unknown format")


def _is_same(found: Any, expected: Cell) -> bool:
    return type(found) is type(expected) and found == expected


def _is_same_text(found: Any, expected: Cell) -> bool:
    """CSV has only text; the csv module reads both NULL and the empty string as empty."""
    match expected:
        case None:
            text = ""
        case bool():
            text = "true" if expected else "false"
        case int() | str() | Decimal():
            text = str(expected)
        case _:
            assert_never(expected)
    return bool(found == text)


def _is_same_json(found: Any, expected: Cell) -> bool:
    """A decimal may be a JSON number or, to keep its digits, a string."""
    if isinstance(expected, Decimal) and isinstance(found, str | int | Decimal) and not isinstance(found, bool):
        return Decimal(found) == expected
    return _is_same(found, expected)


def judge_dead_letters(malformed: Sequence[Malformed], letters: Sequence[Record], rules: Rules) -> list[str]:
    """One dead letter for each malformed record, found by its origin, with its bytes, key, headers, and the reason."""
    by_origin: dict[Place | None, list[Record]] = {}
    for letter in letters:
        by_origin.setdefault(origin_of(letter), []).append(letter)
    violations = []
    for sent in malformed:
        found = by_origin.pop(sent.place, [])
        if not found or (len(found) > 1 and not rules.letters_may_repeat):
            violations.append(f"{sent.place} has {len(found)} dead letters instead of one")
        for letter in found:
            violations += _judge_letter(sent, letter)
    if rules.alone:
        violations += [
            f"{letter.place} is a dead letter of {origin}, which was not malformed"
            for origin, surplus in by_origin.items()
            for letter in surplus
        ]
    return violations


def origin_of(letter: Record) -> Place | None:
    """The record that a dead letter came from, by its headers; None where they don't say."""
    topic = letter.header("queryd_dead_topic")
    partition = letter.header("queryd_dead_partition") or ""
    offset = letter.header("queryd_dead_offset") or ""
    if topic is None or not partition.isdecimal() or not offset.isdecimal():
        return None
    return Place(topic, int(partition), int(offset))


def _judge_letter(sent: Malformed, letter: Record) -> list[str]:
    violations = []
    if letter.value != sent.value:
        violations.append(f"the dead letter of {sent.place} has other bytes than were sent")
    if letter.key != sent.key:
        violations.append(f"the dead letter of {sent.place} has another key than was sent")
    if any(header not in letter.headers for header in sent.headers):
        violations.append(f"the dead letter of {sent.place} lacks a header that was sent")
    violations += [
        f"the dead letter of {sent.place} has no queryd_dead_{name}"
        for name in ("code", "reason", "time", "redrives")
        if not letter.header(f"queryd_dead_{name}")
    ]
    return violations


_STATE_AND_ROW = (
    "org_id",
    "user_id",
    "task_id",
    "mode",
    "status",
    "row_count",
    "bytes",
    "error_code",
    "error_message",
    "output_location",
)


def judge_state(
    query_id: str, status: Mapping[str, Any] | None, row: Mapping[str, Any] | None, told: Sequence[StatusEvent]
) -> list[str]:
    """`query_status` says what `query_results` says, and how far the story has come."""
    if status is None:
        return [f"{query_id} has no row in query_status"]
    violations = []
    if row is not None:
        wanted = {name: row[name] for name in _STATE_AND_ROW}
        violations += _differences(f"{query_id} query_status against query_results", status, wanted)
    if told:
        last = {name: _last(told)[name] for name in ("sequence", "attempt")}
        violations += _differences(f"{query_id} query_status against its last event", status, last)
    return violations


def _differences(what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A sentence for each name whose value is another one."""
    return [
        f"{what}: {name} is {found[name]!r}, not {wanted!r}"
        for name, wanted in expected.items()
        if found[name] != wanted
    ]
