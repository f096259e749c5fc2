"""The judge of the fault suite must be able to fail: each broken world is found by its invariant, a good one passes.

What `gather` reads from servers is made here by hand.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.acceptance.stranger import Place, Record, StatusEvent
from tests.faults.canaries import Canaries
from tests.faults.checker import Verdict, judge_world
from tests.faults.contents import Unreadable, read_content
from tests.faults.evidence import Evidence, Fault, SentMalformed, SentQuery
from tests.faults.evidence import Place as Addresses
from tests.faults.world import FoundObject, Leak, World, read_object

ORG = "11111111-1111-4111-8111-111111111111"
GOOD = "22222222-2222-4222-8222-222222222222"
BAD = "33333333-3333-4333-8333-333333333333"
ANSWERED = "44444444-4444-4444-8444-444444444444"
STRANGER = "55555555-5555-4555-8555-555555555555"
TASK = "66666666-6666-4666-8666-666666666666"
BAD_TASK = "77777777-7777-4777-8777-777777777777"
PREFIX = f"results/{ORG}/{GOOD}/2-0a1b2c3d/"
KEY = f"{PREFIX}result.csv"
CSV = b"answer,label\r\n42,x\r\n"
GARBAGE = Place("query.requests.batch", 1, 7)
INVALID = Place("query.requests.interactive", 0, 3)
HONEST = Place("query.requests.interactive", 0, 4)
SENT_AT = 1_000_000.0


@dataclass
class Case:
    """A run that went well, each part open to be broken."""

    evidence: Evidence
    told: dict[str, list[StatusEvent]]
    foreign: list[str]
    requests: dict[Place, Record]
    letters: list[Record]
    results: dict[str, dict[str, Any]]
    statuses: dict[str, dict[str, Any]]
    tasks: dict[str, str]
    objects: dict[str, FoundObject]
    uploads: list[str]
    scratch: list[Path]
    leaks: list[Leak]

    def judge(self) -> Verdict:
        """What the checker says."""
        return judge_world(
            self.evidence,
            World(
                told=self.told,
                foreign=self.foreign,
                requests=self.requests,
                dead_letters=self.letters,
                results=self.results,
                statuses=self.statuses,
                tasks=self.tasks,
                objects=self.objects,
                uploads=self.uploads,
                scratch=self.scratch,
                leaks=self.leaks,
            ),
        )

    def change_query(self, query_id: str, **fields: Any) -> None:
        """Replace fields of what was sent."""
        queries = [replace(query, **fields) if query.query_id == query_id else query for query in self.evidence.queries]
        self.evidence = replace(self.evidence, queries=tuple(queries))

    def change_event(self, query_id: str, index: int, **fields: Any) -> None:
        """Replace fields of one event; its id follows."""
        told = self.told[query_id]
        event = told[index]
        told[index] = make_event(dict(event.fields) | fields, event.record.place.offset, event.record.timestamp_ms or 0)

    def change_file(self, **fields: Any) -> None:
        """Replace fields of the announced file."""
        self.change_event(GOOD, -1, files=[self.told[GOOD][-1].fields["files"][0] | fields])

    def fail_both(self, code: str) -> None:
        """Row, event and state of the failed query say another code."""
        self.change_event(BAD, -1, error_code=code)
        self.results[BAD]["error_code"] = self.statuses[BAD]["error_code"] = code


def make_event(fields: dict[str, Any], offset: int, timestamp_ms: int) -> StatusEvent:
    headers = (("ce_id", str(fields["event_id"]).encode()),)
    payload = json.dumps(fields, sort_keys=True, default=repr).encode()
    record = Record(Place("query.status", 0, offset), fields["query_id"].encode(), payload, headers, timestamp_ms)
    return StatusEvent(record, fields)


def make_letter(place: Place, value: bytes, code: str) -> Record:
    said = {
        "code": code,
        "reason": "a sentence",
        "topic": place.topic,
        "partition": str(place.partition),
        "offset": str(place.offset),
        "time": "2026-01-01T00:00:00Z",
        "redrives": "0",
    }
    headers = tuple((f"queryd_dead_{name}", text.encode()) for name, text in said.items())
    return Record(Place("query.requests.dead", 0, place.offset), b"k", value, headers)


def make_query(query_id: str, task_id: str, canary: str, *outcomes: str, **fields: Any) -> SentQuery:
    return SentQuery(
        query_id=query_id,
        org_id=ORG,
        task_id=task_id,
        mode="batch",
        output_format="csv",
        canary=canary,
        sent_at=SENT_AT,
        deadline_seconds=10.0,
        outcomes=frozenset(outcomes),
        **fields,
    )


_NUMBERS = {"output_location": None, "row_count": None, "bytes": None, "error_code": None, "error_message": None}


def make_story(query_id: str, task_id: str | None, steps: list[dict[str, Any]]) -> list[StatusEvent]:
    story, status = [], None
    for number, step in enumerate(steps, 1):
        fields: dict[str, Any] = {
            "query_id": query_id,
            "event_id": str(uuid.uuid5(uuid.UUID(query_id), str(number))),
            "sequence": number,
            "previous_status": status,
            "org_id": ORG,
            "user_id": None,
            "task_id": task_id,
            "mode": "batch",
            "sql_hash": "00",
            "saved_query_id": None,
            "output_format": "csv",
            "duration_ms": None,
            "files": [],
            "columns": [],
            "inline_result": None,
        }
        story.append(make_event(fields | _NUMBERS | step, number, round((SENT_AT + number) * 1000)))
        status = step["status"]
    return story


def make_rows(story: list[StatusEvent]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of `query_results` and `query_status` that the last event of a story tells of."""
    last = dict(story[-1].fields)
    shared = {name: last[name] for name in ("query_id", "org_id", "user_id", "task_id", "mode", "status", *_NUMBERS)}
    canonical = {name: last[name] for name in ("sql_hash", "saved_query_id", "output_format", "duration_ms")}
    return shared | canonical, shared | {"sequence": last["sequence"], "attempt": last["attempt"]}


def make_case() -> Case:
    read = read_object("result.csv", CSV, with_rows=True)
    file = {"key": KEY, "bytes": len(CSV), "rows": 1, "etag": "e", "sha256": read.sha256}
    columns = [{"name": "answer", "type": "INTEGER"}, {"name": "label", "type": "VARCHAR"}]
    result = {"output_location": f"s3://bucket/{PREFIX}", "row_count": 1, "bytes": len(CSV)}
    queued, running = {"status": "Queued", "attempt": 0}, {"status": "Running", "attempt": 1}
    told = {
        GOOD: make_story(
            GOOD,
            TASK,
            [
                queued,
                running,
                {"status": "Running", "attempt": 2},
                {"status": "Succeeded", "attempt": 2, "files": [file], "columns": columns} | result,
            ],
        ),
        BAD: make_story(
            BAD,
            BAD_TASK,
            [queued, running, {"status": "Failed", "attempt": 1, "error_code": "QUERY_ERROR", "error_message": "no"}],
        ),
        ANSWERED: make_story(
            ANSWERED,
            None,
            [queued, {"status": "Failed", "attempt": 0, "error_code": "INVALID_REQUEST", "error_message": "no"}],
        ),
    }
    rows = {query_id: make_rows(story) for query_id, story in told.items()}
    values = {GARBAGE: b"\x00 canary-run-03", INVALID: b"\x01", HONEST: b"\x02 canary-run-01"}
    return Case(
        evidence=Evidence(
            place=Addresses("", "", "", "bucket", "", "", "", ""),
            queries=(
                make_query(
                    GOOD, TASK, "canary-run-01", "Succeeded", columns=("answer", "label"), content=(("42", "x"),)
                ),
                make_query(BAD, BAD_TASK, "canary-run-02", "QUERY_ERROR"),
            ),
            malformed=(
                SentMalformed(*GARBAGE, canary="canary-run-03", code="UNDECODABLE"),
                SentMalformed(*INVALID, answered_id=ANSWERED),
            ),
            faults=(Fault("executor killed", 1, "executor", SENT_AT + 1, SENT_AT + 2),),
            lease_seconds=5.0,
            logs=(),
            scratch=(),
        ),
        told=told,
        foreign=[],
        requests={place: Record(place, b"k", value, ()) for place, value in values.items()},
        letters=[
            make_letter(GARBAGE, values[GARBAGE], "UNDECODABLE"),
            make_letter(INVALID, values[INVALID], "INVALID_REQUEST"),
        ],
        results={query_id: row for query_id, (row, _) in rows.items()},
        statuses={query_id: status for query_id, (_, status) in rows.items()},
        tasks={TASK: "Completed", BAD_TASK: "Failed"},
        objects={KEY: FoundObject(len(CSV), "e", read)},
        uploads=[],
        scratch=[],
        leaks=[],
    )


def test_a_good_world_has_no_violations() -> None:
    verdict = make_case().judge()
    assert [str(violation) for violation in verdict.violations] == []
    assert (verdict.counts.queries, verdict.counts.events, verdict.counts.dead_letters) == (2, 9, 2)
    assert (verdict.counts.retried, verdict.counts.objects) == (1, 1)
    assert verdict.counts.ends == {"Succeeded": 1, "QUERY_ERROR": 1, "INVALID_REQUEST": 1}
    assert verdict.faults_by_row == {1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0}
    assert verdict.faults_by_kind == {(1, "executor killed"): 1}


def test_the_time_to_terminal_counts_from_the_last_fault_that_touched_the_query() -> None:
    case = make_case()
    # The longer story ends 4 s after the request, and 2 s after the fault.
    assert case.judge().longest_seconds == pytest.approx(2.0)
    case.evidence = replace(case.evidence, faults=())
    assert case.judge().longest_seconds == pytest.approx(4.0)
    after, before = Fault("late", 1, "", SENT_AT + 5, SENT_AT + 6), Fault("early", 1, "", SENT_AT - 2, SENT_AT - 1)
    case.evidence = replace(case.evidence, faults=(after, before))
    assert case.judge().longest_seconds == pytest.approx(4.0)
    case.evidence = replace(case.evidence, faults=(Fault("long", 1, "", SENT_AT - 2, SENT_AT + 60),))
    assert case.judge().longest_seconds == 0.0


def test_one_who_asked_to_cancel_may_come_in_time_or_too_late() -> None:
    case = make_case()
    case.change_query(BAD, cancelled=True)
    assert not case.judge().violations
    case.fail_both("QUERY_CANCELLED")
    case.tasks[BAD_TASK] = "Canceled"
    assert not case.judge().violations


def test_a_result_may_be_in_its_event() -> None:
    case = make_case()
    _deliver_inline(case)
    assert [str(violation) for violation in case.judge().violations] == []
    # Small as it is, it must not be an object where that was asked for.
    case = make_case()
    case.change_query(GOOD, inline=True)
    [violation] = case.judge().violations
    assert (violation.invariant, violation.query_id) == (2, GOOD)


def _deliver_inline(case: Case, body: bytes = CSV) -> None:
    case.change_query(GOOD, inline=True)
    case.change_event(GOOD, -1, files=[], output_location=None, inline_result=body)
    case.results[GOOD]["output_location"] = case.statuses[GOOD]["output_location"] = None
    del case.objects[KEY]


def _deliver_inline_unasked(case: Case) -> None:
    _deliver_inline(case)
    case.change_query(GOOD, inline=False)


def _deliver_inline_and_as_an_object(case: Case) -> None:
    found = case.objects[KEY]
    _deliver_inline(case)
    case.objects[KEY] = found


def _end_late(case: Case) -> None:
    # 10 s of its own, 5 s of lease and 20 s, after the fault's end at 2 s.
    last = case.told[GOOD][-1]
    case.told[GOOD][-1] = make_event(dict(last.fields), last.record.place.offset, round((SENT_AT + 37.5) * 1000))


def _end_after_a_minute(case: Case) -> None:
    case.change_query(GOOD, deadline_seconds=3600.0)
    last = case.told[GOOD][-1]
    case.told[GOOD][-1] = make_event(dict(last.fields), last.record.place.offset, round((SENT_AT + 62.5) * 1000))


def _stay_running(case: Case) -> None:
    case.results[BAD]["status"] = "Running"


def _lose_an_answered_row(case: Case) -> None:
    del case.results[ANSWERED]


def _truncate(case: Case) -> None:
    read = read_object("result.csv", CSV[:-3], with_rows=True)
    case.objects[KEY] = FoundObject(len(CSV) - 3, "e", read)


def _change_content(case: Case) -> None:
    data = CSV.replace(b"42", b"43")
    read = read_object("result.csv", data, with_rows=True)
    case.objects[KEY] = FoundObject(len(data), "e", read)
    case.change_file(sha256=read.sha256)


def _change_columns(case: Case) -> None:
    case.change_query(GOOD, columns=("answer", "name"))


def _lose_rows(case: Case) -> None:
    data = b"answer,label\r\n"
    read = read_object("result.csv", data, with_rows=True)
    case.objects[KEY] = FoundObject(len(data), "e", read)
    case.change_file(sha256=read.sha256, bytes=len(data), rows=0)
    case.change_event(GOOD, -1, row_count=0, bytes=len(data))
    for row in (case.results[GOOD], case.statuses[GOOD]):
        row |= {"row_count": 0, "bytes": len(data)}


def _double_the_result(case: Case) -> None:
    case.objects[f"{PREFIX}result-2.csv"] = case.objects[KEY]


def _point_elsewhere(case: Case) -> None:
    """All agree on the result of an attempt that was fenced."""
    prefix = PREFIX.replace("/2-", "/1-")
    case.objects[f"{prefix}result.csv"] = case.objects.pop(KEY)
    location = f"s3://bucket/{prefix}"
    case.change_file(key=f"{prefix}result.csv")
    case.change_event(GOOD, -1, output_location=location)
    case.results[GOOD]["output_location"] = case.statuses[GOOD]["output_location"] = location


def _show_a_failed_result(case: Case) -> None:
    location = f"s3://bucket/results/{ORG}/{BAD}/1-0a1b2c3d/"
    case.change_event(BAD, -1, output_location=location)
    case.results[BAD]["output_location"] = case.statuses[BAD]["output_location"] = location


def _keep_a_failed_result(case: Case) -> None:
    case.objects[f"results/{ORG}/{BAD}/1-0a1b2c3d/result.csv"] = FoundObject(1, "e")


def _publish_twice(case: Case) -> None:
    case.told[GOOD].insert(2, case.told[GOOD][1])


def _publish_never(case: Case) -> None:
    case.told[GOOD].pop(1)


def _publish_out_of_order(case: Case) -> None:
    case.told[GOOD][1:3] = reversed(case.told[GOOD][1:3])


def _publish_after_the_end(case: Case) -> None:
    story = case.told[GOOD]
    name = str(uuid.uuid5(uuid.UUID(GOOD), "5"))
    more = {"sequence": 5, "event_id": name, "previous_status": "Succeeded", "status": "Failed"}
    story.append(make_event(dict(story[-1].fields) | more, 9, 0))


def _end_as_a_stranger(case: Case) -> None:
    case.told[STRANGER] = make_story(STRANGER, None, [{"status": "Queued", "attempt": 0}])


def _cancel_unasked(case: Case) -> None:
    case.change_query(BAD, outcomes=frozenset({"QUERY_ERROR", "QUERY_CANCELLED"}))
    case.fail_both("QUERY_CANCELLED")
    case.tasks[BAD_TASK] = "Canceled"


def _fail_with_another_code(case: Case) -> None:
    case.fail_both("INTERNAL")


def _succeed_where_failure_was_due(case: Case) -> None:
    case.change_query(GOOD, outcomes=frozenset({"QUERY_TIMEOUT"}))


def _let_the_state_lag(case: Case) -> None:
    case.statuses[GOOD] |= {"status": "Running", "sequence": 3}


def _letter_with_other_bytes(case: Case) -> None:
    case.letters[0] = replace(case.letters[0], value=b"\x00")


def _letter_of_an_honest_record(case: Case) -> None:
    case.letters.append(make_letter(HONEST, case.requests[HONEST].value or b"", "CONFLICT"))


def _letter_with_another_code(case: Case) -> None:
    case.letters[0] = make_letter(GARBAGE, case.requests[GARBAGE].value or b"", "CONFLICT")


def _leak_into_an_event(case: Case) -> None:
    case.change_event(BAD, -1, error_message="near canary-run-02")
    case.results[BAD]["error_message"] = case.statuses[BAD]["error_message"] = "near canary-run-02"


def _leak_into_a_letter(case: Case) -> None:
    letter = case.letters[1]
    case.letters[1] = replace(letter, headers=(*letter.headers, ("more", b"canary-run-01")))


BREAKS: list[tuple[int, Callable[[Case], object]]] = [
    (1, lambda case: case.results.pop(GOOD)),
    (1, _lose_an_answered_row),
    (1, _stay_running),
    (1, _end_late),
    (1, _end_after_a_minute),
    (1, lambda case: case.results.update({STRANGER: case.results[BAD]})),
    (2, _truncate),
    (2, _change_content),
    (2, _change_columns),
    (2, _lose_rows),
    (2, _double_the_result),
    (2, _point_elsewhere),
    (2, _show_a_failed_result),
    (2, _keep_a_failed_result),
    (2, lambda case: case.objects.pop(KEY)),
    (2, lambda case: case.change_file(bytes=1)),
    (2, lambda case: case.change_file(sha256="00")),
    (2, lambda case: case.change_file(rows=2)),
    (2, lambda case: case.change_file(etag="f")),
    (2, lambda case: case.results[GOOD].update(bytes=1)),
    (2, lambda case: case.results[GOOD].update(output_location=None)),
    (2, lambda case: case.change_event(GOOD, -1, files=[])),
    (2, _deliver_inline_unasked),
    (2, lambda case: case.change_event(GOOD, -1, inline_result=CSV)),
    (2, lambda case: _deliver_inline(case, CSV[:-3])),
    (2, lambda case: _deliver_inline(case, CSV.replace(b"42", b"43"))),
    (2, lambda case: _deliver_inline(case, CSV + b"1," + b"x" * 65_536 + b"\r\n")),
    (2, lambda case: case.change_event(BAD, -1, inline_result=CSV)),
    (3, _publish_twice),
    (3, _publish_never),
    (3, _publish_out_of_order),
    (3, _publish_after_the_end),
    (3, _end_as_a_stranger),
    (3, _cancel_unasked),
    (3, _fail_with_another_code),
    (3, _succeed_where_failure_was_due),
    (3, lambda case: case.told.pop(BAD)),
    (3, lambda case: case.told[BAD].pop()),
    (3, lambda case: case.foreign.append("a tombstone")),
    (3, lambda case: case.change_event(GOOD, 2, event_id=str(uuid.uuid4()))),
    (3, lambda case: case.change_event(GOOD, 2, attempt=3)),
    (3, lambda case: case.change_event(GOOD, 2, previous_status="Queued")),
    (3, lambda case: case.change_event(GOOD, -1, row_count=2)),
    (3, lambda case: case.change_event(BAD, -1, error_code="INTERNAL")),
    (4, _let_the_state_lag),
    (4, lambda case: case.statuses.pop(BAD)),
    (4, lambda case: case.statuses.update({STRANGER: case.statuses[BAD]})),
    (4, lambda case: case.statuses[GOOD].update(bytes=1)),
    (4, lambda case: case.statuses[ANSWERED].update(attempt=1)),
    (4, lambda case: case.tasks.update({TASK: "Running"})),
    (4, lambda case: case.tasks.pop(BAD_TASK)),
    (5, _letter_with_other_bytes),
    (5, _letter_of_an_honest_record),
    (5, _letter_with_another_code),
    (5, lambda case: case.letters.pop(0)),
    (5, lambda case: case.letters.append(case.letters[1])),
    (5, lambda case: case.requests.pop(GARBAGE)),
    (6, lambda case: case.objects.update({PREFIX.replace("/2-", "/1-") + "result.csv": FoundObject(1, "e")})),
    (6, lambda case: case.objects.update({f"results/{ORG}/{STRANGER}/1-00000000/result.csv": FoundObject(1, "e")})),
    (6, _deliver_inline_and_as_an_object),
    (6, lambda case: case.uploads.append(KEY)),
    (6, lambda case: case.scratch.append(Path("scratch/result.csv"))),
    (7, _leak_into_an_event),
    (7, _leak_into_a_letter),
    (7, lambda case: case.leaks.append(Leak("executor.log", "canary-run-01"))),
    (7, lambda case: case.leaks.append(Leak("table query_runs", "canary-run-"))),
]


@pytest.mark.parametrize(("invariant", "break_it"), BREAKS)
def test_a_broken_world_is_found(invariant: int, break_it: Callable[[Case], object]) -> None:
    case = make_case()
    break_it(case)
    found = case.judge().violations
    assert invariant in {violation.invariant for violation in found}, [str(violation) for violation in found]


def test_a_violation_names_its_query() -> None:
    case = make_case()
    _leak_into_an_event(case)
    [violation] = case.judge().violations
    assert (violation.invariant, violation.query_id) == (7, BAD)


def test_canaries_are_found_whole_and_cut() -> None:
    canaries = Canaries(["canary-run-1", "canary-run-12", "canary-run-2"])
    assert canaries.find(b"...canary-run-12, canary-run-2") == {"canary-run-12", "canary-run-2"}
    assert canaries.find(b"canary-run-") == {"canary-run-"}
    assert canaries.find(b"canary-ru") == set()
    assert Canaries([]).find(b"anything") == set()


def test_canaries_are_found_in_files(tmp_path: Path) -> None:
    canaries = Canaries(["canary-run-1", "canary-run-2"])
    (tmp_path / "empty").touch()
    (tmp_path / "log").write_bytes(b"x" * 100_000 + b"canary-run-2")
    assert canaries.find_in_file(tmp_path / "empty") == set()
    assert canaries.find_in_file(tmp_path / "log") == {"canary-run-2"}


def test_canaries_that_begin_differently_are_refused() -> None:
    with pytest.raises(ValueError, match="begin"):
        Canaries(["canary-1", "another-1"])


def test_the_formats_say_the_same() -> None:
    csv = read_content("csv", b'n,label,even,price\r\n1,"a, b",true,0.50\r\n,,false,2.25\r\n', with_rows=True)
    lines = b'{"n":1,"label":"a, b","even":true,"price":0.50}\n{"n":null,"label":"","even":false,"price":2.25}\n'
    assert csv == read_content("json", lines, with_rows=True)
    assert csv.rows == (("1", "a, b", "true", "0.50"), ("", "", "false", "2.25"))
    file = BytesIO()
    prices = pa.array([Decimal("0.50"), Decimal("2.25")], pa.decimal128(18, 2))
    pq.write_table(pa.table({"n": [1, None], "label": ["a, b", None], "even": [True, False], "price": prices}), file)
    assert csv == read_content("parquet", file.getvalue(), with_rows=True)
    assert read_content("csv", b"n\r\n1\r\n", with_rows=False).rows == ()
    assert read_content("csv", b"n\r\n\r\n1\r\n", with_rows=True).rows == (("",), ("1",))


@pytest.mark.parametrize(
    ("output_format", "data"),
    [("csv", b"a,b\r\n1,2"), ("csv", b""), ("json", b'{"a":1}'), ("json", b"x\n"), ("parquet", b"PAR1"), ("xml", b"")],
)
def test_what_is_no_whole_file_is_unreadable(output_format: str, data: bytes) -> None:
    with pytest.raises(Unreadable):
        read_content(output_format, data, with_rows=True)
