"""The judge of a fault run: the seven invariants, by what the servers hold and not by what the product says of itself.

| | |
| --- | --- |
| I1 | every accepted request has one row in one terminal status, in time after the last fault that touched it |
| I2 | one visible result per Succeeded query, which is what row, event and sender say; none for a Failed one |
| I3 | events 1..n, each once, in order, legal steps only, the last one terminal and equal to the row |
| I4 | `query_status` equals `query_results`, and `tasks` follow |
| I5 | every malformed record is one dead letter by origin; no other record is |
| I6 | no scratch, no incomplete upload, no object that no terminal row points to |
| I7 | a query's canary is nowhere but in its request and its dead letter |
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.acceptance import stranger
from tests.acceptance.checker import (
    Malformed,
    Rules,
    judge_dead_letters,
    judge_row_and_event,
    judge_state,
    judge_story,
    origin_of,
)
from tests.acceptance.stranger import TERMINAL, StatusEvent, prefix_of
from tests.faults.canaries import Canaries
from tests.faults.contents import Content
from tests.faults.evidence import Evidence, Fault, SentQuery
from tests.faults.world import RESULTS, FoundObject, World, canaries_of, gather, read_object

# I1: what a query may take beyond its deadline and a lease, and what it may take at most, after the last fault.
_GRACE_SECONDS = 20.0
_MOST_SECONDS = 60.0

_CANCELLED = "QUERY_CANCELLED"
_INVALID = "INVALID_REQUEST"
# What an event carries of a result at most.
_MOST_INLINE = 65_536
# What a failed query may have in the bucket: the engine's own words, for its author.
_ERROR_FILE = "error.json"
_FAULT_ROWS = range(1, 7)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: which invariant (1 to 7), of which query where it is one's, and a sentence."""

    invariant: int
    query_id: str | None
    sentence: str

    def __str__(self) -> str:
        return f"I{self.invariant}: {self.sentence}"


@dataclass(frozen=True, slots=True)
class Counts:
    """How much was judged. `retried` are the queries of more than one attempt, `ends` how many ended how."""

    queries: int
    events: int
    objects: int
    dead_letters: int
    retried: int
    ends: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge found.

    Seconds to the terminal status count as I1 has it: from the request, or from the end of the last fault that touched
    the query. `faults_by_row` has each row of the table of faults, 1 to 6; `faults_by_kind` its row, kind and count.
    """

    violations: tuple[Violation, ...]
    counts: Counts
    longest_seconds: float
    p99_seconds: float
    faults_by_row: Mapping[int, int] = field(default_factory=dict)
    faults_by_kind: Mapping[tuple[int, str], int] = field(default_factory=dict)


def judge(evidence: Evidence) -> Verdict:
    """Gather and judge; raises what the servers' clients raise when something can't be read."""
    return judge_world(evidence, gather(evidence))


def judge_world(evidence: Evidence, world: World) -> Verdict:
    """Judge what was gathered."""
    waits = {query.query_id: _wait(query, world, evidence.faults) for query in evidence.queries}
    seconds = sorted(wait for wait in waits.values() if wait is not None)
    violations = [
        *_judge_ends(evidence, world, waits),
        *_judge_results(evidence, world),
        *_judge_stories(evidence, world),
        *_judge_state(evidence, world),
        *_judge_dead_letters(evidence, world),
        *_judge_leavings(world),
        *_judge_leaks(evidence, world),
    ]
    return Verdict(
        violations=tuple(violations),
        counts=_count(evidence, world),
        longest_seconds=seconds[-1] if seconds else 0.0,
        p99_seconds=seconds[math.ceil(len(seconds) * 0.99) - 1] if seconds else 0.0,
        faults_by_row={row: sum(fault.row == row for fault in evidence.faults) for row in _FAULT_ROWS},
        faults_by_kind=dict(sorted(Counter((fault.row, fault.kind) for fault in evidence.faults).items())),
    )


def _count(evidence: Evidence, world: World) -> Counts:
    return Counts(
        queries=len(evidence.queries),
        events=sum(map(len, world.told.values())),
        objects=len(world.objects),
        dead_letters=len(world.dead_letters),
        retried=sum(any(event.fields["attempt"] > 1 for event in told) for told in world.told.values()),
        ends=dict(Counter(_end_of(row) for row in world.results.values()).most_common()),
    )


def _end_of(row: Mapping[str, Any]) -> str:
    """The status, or the error code of a failure."""
    return str(row["error_code"] or row["status"])


def _answered(evidence: Evidence) -> set[str]:
    return {record.answered_id for record in evidence.malformed if record.answered_id is not None}


def _strangers(found: Iterable[str], evidence: Evidence) -> list[str]:
    """Ids that nobody sent."""
    return sorted(set(found) - {query.query_id for query in evidence.queries} - _answered(evidence))


# I1: one row, one terminal status, in time.


def _wait(query: SentQuery, world: World, faults: Sequence[Fault]) -> float | None:
    """Seconds to the first terminal event since the request, or since the end of the last fault in between; None
    without such an event, or where the broker gave it no time."""
    ends = [event for event in world.told.get(query.query_id, ()) if event.fields["status"] in TERMINAL]
    if not ends or ends[0].record.timestamp_ms is None:
        return None
    ended = ends[0].record.timestamp_ms / 1000
    touched = [fault.ended for fault in faults if fault.started <= ended and fault.ended >= query.sent_at]
    # A fault that outlasts the query leaves no time to count.
    return max(0.0, ended - max([query.sent_at, *touched]))


def _judge_ends(evidence: Evidence, world: World, waits: Mapping[str, float | None]) -> Iterator[Violation]:
    for query_id in [*(query.query_id for query in evidence.queries), *sorted(_answered(evidence))]:
        row = world.results.get(query_id)
        if row is None:
            yield Violation(1, query_id, f"{query_id} has no row in query_results")
        elif row["status"] not in TERMINAL:
            yield Violation(1, query_id, f"{query_id} is still {row['status']}")
    for query in evidence.queries:
        wait = waits[query.query_id]
        most = min(query.deadline_seconds + evidence.lease_seconds + _GRACE_SECONDS, _MOST_SECONDS)
        if wait is not None and wait > most:
            sentence = (
                f"{query.query_id} ended {wait:.1f} s after the last fault that touched it, not within {most:.0f} s"
            )
            yield Violation(1, query.query_id, sentence)
    for query_id in _strangers(world.results, evidence):
        yield Violation(1, query_id, f"{query_id} has a row in query_results, and was never sent")


# I2: one visible result, whole and right.


def _judge_results(evidence: Evidence, world: World) -> Iterator[Violation]:
    objects = _by_query(world.objects)
    for query in evidence.queries:
        row = world.results.get(query.query_id)
        if row is None or row["status"] not in TERMINAL:
            continue
        last = _last(world.told.get(query.query_id, ()))
        home = f"{RESULTS}{query.org_id}/{query.query_id}/"
        mine = {key: found for key, found in objects.get(query.query_id, {}).items() if key.startswith(home)}
        judged = (
            _judge_success(query, row, last, evidence.place.bucket, mine)
            if row["status"] == "Succeeded"
            else _judge_failure(query, row, last, mine)
        )
        yield from (Violation(2, query.query_id, f"{query.query_id} {sentence}") for sentence in judged)


def _by_query(objects: Mapping[str, FoundObject]) -> dict[str, dict[str, FoundObject]]:
    """The objects by the query id in their keys, `results/{org_id}/{query_id}/…`."""
    sorted_out: dict[str, dict[str, FoundObject]] = {}
    for key, found in objects.items():
        parts = key.split("/")
        sorted_out.setdefault(parts[2] if len(parts) > 2 else "", {})[key] = found
    return sorted_out


def _judge_failure(
    query: SentQuery, row: Mapping[str, Any], last: Mapping[str, Any] | None, mine: Mapping[str, FoundObject]
) -> Iterator[str]:
    if row["output_location"] is not None:
        yield "failed and has an output_location"
    if last is not None and (last["files"] or last["inline_result"] is not None):
        yield "failed and announces files, or a result"
    if mine and [key.rpartition("/")[2] for key in mine] != [_ERROR_FILE]:
        yield f"failed and has {len(mine)} objects under its prefix that are not one {_ERROR_FILE}"


def _judge_success(
    query: SentQuery,
    row: Mapping[str, Any],
    last: Mapping[str, Any] | None,
    bucket: str,
    mine: Mapping[str, FoundObject],
) -> Iterator[str]:
    if last is not None and last["inline_result"] is not None:
        yield from _judge_inline(query, row, last)
        return
    if query.inline and row["bytes"] <= _MOST_INLINE:
        yield f"has a result of {row['bytes']} bytes as an object, and was to be told it"
    home = f"s3://{bucket}/{RESULTS}{query.org_id}/{query.query_id}/"
    location = row["output_location"] or ""
    if not location.startswith(home) or not location.endswith("/") or location == home:
        yield f"succeeded and has no prefix of an attempt's own under {home} as its output_location"
        return
    key = f"{prefix_of(location)}result.{query.output_format}"
    visible = [name for name in mine if name.startswith(prefix_of(location))]
    if visible != [key]:
        yield f"has {len(visible)} objects under its output_location instead of one result.{query.output_format}"
        return
    if last is None or last["status"] != "Succeeded":
        # That the story does not end as the row says is I3's.
        return
    if not location.removeprefix(home).startswith(f"{last['attempt']}-"):
        yield f"points to another attempt's result than attempt {last['attempt']}'s, which its last event tells of"
    yield from _judge_file(query, row, last, key, mine[key])


def _judge_inline(query: SentQuery, row: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[str]:
    """The event itself is the one visible result; that no object lies about besides is I6's."""
    if not query.inline:
        yield "is told its result, and did not ask for that"
    if row["output_location"] is not None or last["files"]:
        yield "has its result in its event, and a location or files besides"
    body: bytes = last["inline_result"]
    if len(body) > _MOST_INLINE:
        yield f"is told a result of {len(body)} bytes"
    read = read_object(f"result.{query.output_format}", body, with_rows=query.content is not None)
    if read.content is None:
        yield f"is told a result that can't be read as {query.output_format}"
        return
    yield from _judge_numbers(row, read.bytes, read.content)
    yield from _judge_content(query, last, read.content)


def _judge_file(
    query: SentQuery, row: Mapping[str, Any], last: Mapping[str, Any], key: str, found: FoundObject
) -> Iterator[str]:
    if len(last["files"]) != 1:
        yield f"announces {len(last['files'])} files instead of one"
        return
    if found.read is None or found.read.content is None:
        yield f"has a result that can't be read as {query.output_format}"
        return
    content = found.read.content
    file = {"key": key, "bytes": found.read.bytes, "rows": content.row_count, "sha256": found.read.sha256}
    for name, value in (file | {"etag": found.etag}).items():
        if last["files"][0][name] != value:
            yield f"announces {last['files'][0][name]!r} as its file's {name}, which is {value!r}"
    yield from _judge_numbers(row, found.read.bytes, content)
    yield from _judge_content(query, last, content)


def _judge_numbers(row: Mapping[str, Any], size: int, content: Content) -> Iterator[str]:
    for name, value in (("bytes", size), ("row_count", content.row_count)):
        if row[name] != value:
            yield f"has {row[name]} as its row's {name}, and its result {value}"


def _judge_content(query: SentQuery, last: Mapping[str, Any], content: Content) -> Iterator[str]:
    announced = tuple(column["name"] for column in last["columns"])
    if query.columns and announced != query.columns:
        yield f"announces the columns {announced} instead of {query.columns}"
    if query.columns and content.columns is not None and content.columns != query.columns:
        yield f"has a result with the columns {content.columns} instead of {query.columns}"
    if query.content is None:
        return
    if content.row_count != len(query.content):
        yield f"has a result of {content.row_count} rows instead of {len(query.content)}"
    elif content.rows != query.content:
        pairs = enumerate(zip(content.rows, query.content, strict=True))
        index, (found, expected) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
        yield f"has {found} as row {index} of its result instead of {expected}"


# I3: the story.


def _last(told: Sequence[StatusEvent]) -> Mapping[str, Any] | None:
    return told[-1].fields if told else None


def _judge_stories(evidence: Evidence, world: World) -> Iterator[Violation]:
    allowed = {query.query_id: _allowed_ends(query) for query in evidence.queries}
    allowed |= dict.fromkeys(_answered(evidence), frozenset({_INVALID}))
    for query_id, ends in allowed.items():
        told, row = world.told.get(query_id, ()), world.results.get(query_id)
        sentences = judge_story(query_id, told, Rules())
        if row is not None and told:
            sentences += judge_row_and_event(query_id, row, told[-1].fields)
        if row is not None and row["status"] in TERMINAL and _end_of(row) not in ends:
            sentences.append(f"{query_id} ended with {_end_of(row)}, not with {' or '.join(sorted(ends))}")
        yield from (Violation(3, query_id, sentence) for sentence in sentences)
    for query_id in _strangers(world.told, evidence):
        yield Violation(3, query_id, f"{query_id} has events, and was never sent")
    yield from (Violation(3, None, sentence) for sentence in world.foreign)


def _allowed_ends(query: SentQuery) -> frozenset[str]:
    """Whoever asked to cancel may come in time or too late."""
    if query.cancelled:
        return query.outcomes | {_CANCELLED}
    return query.outcomes - {_CANCELLED}


# I4: the state database.


def _judge_state(evidence: Evidence, world: World) -> Iterator[Violation]:
    tasks = {query.query_id: query.task_id for query in evidence.queries}
    for query_id in [*tasks, *sorted(_answered(evidence))]:
        row, status = world.results.get(query_id), world.statuses.get(query_id)
        sentences = judge_state(query_id, status, row, world.told.get(query_id, ()))
        task_id = tasks.get(query_id)
        if task_id is not None and row is not None and row["status"] in TERMINAL:
            sentences += _judge_task(query_id, world.tasks.get(task_id), row)
        yield from (Violation(4, query_id, sentence) for sentence in sentences)
    for query_id in _strangers(world.statuses, evidence):
        yield Violation(4, query_id, f"{query_id} has a row in query_status, and was never sent")


def _judge_task(query_id: str, found: str | None, row: Mapping[str, Any]) -> list[str]:
    expected = {"Succeeded": "Completed", _CANCELLED: "Canceled"}.get(_end_of(row), "Failed")
    return [] if found == expected else [f"{query_id} has a task that is {found}, not {expected}"]


# I5: dead letters.


def _judge_dead_letters(evidence: Evidence, world: World) -> Iterator[Violation]:
    malformed, codes = [], {}
    for sent in evidence.malformed:
        place = stranger.Place(sent.topic, sent.partition, sent.offset)
        codes[place] = sent.code
        record = world.requests.get(place)
        if record is None:
            yield Violation(5, None, f"{place} holds no record, so what was sent there can't be compared")
        else:
            malformed.append(Malformed(place, record.key, record.value, record.headers))
    yield from (Violation(5, None, each) for each in judge_dead_letters(malformed, world.dead_letters, Rules()))
    for letter in world.dead_letters:
        origin, code = origin_of(letter), letter.header("queryd_dead_code")
        wanted = None if origin is None else codes.get(origin)
        if wanted is not None and code != wanted:
            yield Violation(5, None, f"the dead letter of {origin} says {code} instead of {wanted}")


# I6: what is left lying about.


def _judge_leavings(world: World) -> Iterator[Violation]:
    homes = {
        prefix_of(row["output_location"])
        for row in world.results.values()
        if row["status"] in TERMINAL and row["output_location"] is not None
    }
    failed = {str(query_id) for query_id, row in world.results.items() if row["status"] == "Failed"}
    for key in world.objects:
        if key.endswith(f"/{_ERROR_FILE}") and key.split("/")[2] in failed:
            # I2 sees that there is one at most.
            continue
        if f"{key.rpartition('/')[0]}/" not in homes:
            yield Violation(6, None, f"no terminal row points to the object {key}")
    yield from (Violation(6, None, f"the upload of {key} was never completed") for key in world.uploads)
    yield from (Violation(6, None, f"{path} is left in scratch") for path in world.scratch)


# I7: canaries.


def _judge_leaks(evidence: Evidence, world: World) -> Iterator[Violation]:
    canaries = canaries_of(evidence)
    owners = {query.canary: query.query_id for query in evidence.queries}
    for leak in world.leaks:
        yield Violation(7, owners.get(leak.canary), f"the canary {leak.canary} is in {leak.where}")
    for told in world.told.values():
        for event in told:
            for canary in sorted(_find_in_record(canaries, event.record)):
                yield Violation(7, owners.get(canary), f"the canary {canary} is in the event at {event.record.place}")
    for letter in world.dead_letters:
        origin = world.requests.get(origin_of(letter) or letter.place)
        own = set() if origin is None else _find_in_record(canaries, origin)
        for canary in sorted(_find_in_record(canaries, letter) - own):
            yield Violation(7, owners.get(canary), f"the canary {canary} is in the dead letter at {letter.place}")


def _find_in_record(canaries: Canaries, record: stranger.Record) -> set[str]:
    pieces = [record.key, record.value, *(value for _, value in record.headers)]
    return canaries.find(b"\0".join(piece for piece in pieces if piece is not None))
