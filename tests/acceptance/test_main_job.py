"""The main job, as a stranger sees it: the real command line, real servers, real signals, and none of our code.

Deadlines here guard against hanging and say nothing about speed.
"""

import os
import random
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.embedded.servers import Lifeline
from tests.acceptance.checker import (
    Evidence,
    Malformed,
    Rules,
    Valid,
    judge,
    judge_dead_letters,
    judge_query,
    judge_row_and_event,
    judge_state,
    judge_story,
)
from tests.acceptance.printed import read_blocks
from tests.acceptance.stack import Stack, run_stack
from tests.acceptance.stock_tools import lay_out_distribution
from tests.acceptance.stranger import (
    DEAD_LETTER_TOPIC,
    REQUEST_TOPICS,
    TERMINAL,
    Contract,
    Outgoing,
    Publisher,
    Servers,
    StatusTail,
    Tail,
    find_partitions,
    prefix_of,
    read_objects,
    read_results,
    read_statuses,
)
from tests.acceptance.workload import (
    Dataset,
    make_answer,
    make_fields,
    make_garbage,
    make_requests,
    to_malformed,
    to_outgoing,
)
from tests.servers.kafka import Kafka, Kind
from tests.servers.kafka import run as run_broker

# The chaos tests send hundreds of queries through a machine that may be busy with other tests.
pytestmark = pytest.mark.timeout(900)

LOAD_SECONDS = 300.0
QUERY_SECONDS = 90.0
# What should not come has this long a silence to show itself; a relay's round takes a fraction of it.
QUIET_SECONDS = 2.0

GARBAGE = 20


@pytest.fixture
def stack(kafka: Kafka, lifeline: Lifeline) -> Iterator[Stack]:
    """A stack for one test, which may kill parts of it, on a broker of its own: what is there was sent here."""
    if kafka.kind is Kind.EMBEDDED:
        with run_stack() as started:
            yield from lend(started)
        return
    with (
        tempfile.TemporaryDirectory(prefix="kafka-") as folder,
        run_broker(kafka.kind, Path(folder), lifeline) as own,
        run_stack(own.bootstrap) as started,
    ):
        yield from lend(started)


@pytest.fixture(scope="module")
def shared_stack(kafka: Kafka) -> Iterator[Stack]:
    """A stack for the tests that leave it whole, on the broker that all tests share (an embedded one is its own)."""
    with run_stack(None if kafka.kind is Kind.EMBEDDED else kafka.bootstrap) as started:
        yield from lend(started)


@pytest.fixture(scope="module")
def publisher(shared_stack: Stack) -> Iterator[Publisher]:
    """A producer for the shared stack."""
    with Publisher(shared_stack.servers.bootstrap) as opened:
        yield opened


def lend(stack: Stack) -> Iterator[Stack]:
    """Give it away; after a test that failed, pytest shows what the stack had to say."""
    yield stack
    print(stack.log_tail())


@pytest.fixture(scope="module")
def contract() -> Contract:
    """The schemas, as a stranger reads them."""
    return Contract()


def add_dataset(stack: Stack, name: str, owner: str) -> Dataset:
    """Put a Parquet file into the bucket and register it for the org."""
    dataset = Dataset(name)
    servers = stack.servers
    key = f"datasets/{name}/part-0.parquet"
    servers.s3().put_object(Bucket=servers.bucket, Key=key, Body=dataset.parquet())
    location = f"s3://{servers.bucket}/{key}"
    stack.queryd(
        *("datasets", "add", name, "--org", owner, "--kind", "parquet", "--location", location, "--visibility", "org")
    )
    return dataset


def await_state(servers: Servers, told: StatusTail, query_ids: Sequence[str]) -> None:
    """Wait until the state database has come as far as the stories that were read."""

    def has_caught_up() -> bool:
        statuses = read_statuses(servers)
        return all(
            query_id in statuses
            and statuses[query_id]["sequence"] == max(event.fields["sequence"] for event in told.events[query_id])
            for query_id in query_ids
        )

    told.read_until(has_caught_up, LOAD_SECONDS, "query_status to catch up")


def await_letters(letters: Tail, malformed: Sequence[Malformed]) -> None:
    """Wait until every malformed record has a dead letter."""

    def have_all_come() -> bool:
        origins = {
            tuple(letter.header(f"queryd_dead_{name}") for name in ("topic", "partition", "offset"))
            for letter in letters.records
        }
        return all((sent.place[0], str(sent.place[1]), str(sent.place[2])) in origins for sent in malformed)

    letters.read_until(have_all_come, LOAD_SECONDS, f"{len(malformed)} dead letters")


def gather(servers: Servers, told: StatusTail, letters: Tail) -> Evidence:
    """All that there is to see."""
    results = read_results(servers)
    locations = [row["output_location"] for row in results.values() if row["output_location"]]
    return Evidence(
        bucket=servers.bucket,
        events=told.events,
        dead_letters=letters.records,
        results=results,
        statuses=read_statuses(servers),
        objects=read_objects(servers, map(prefix_of, locations)),
    )


def play(stack: Stack, contract: Contract, count: int, wound: Callable[[StatusTail], None], rules: Rules) -> list[str]:
    """Send `count` requests, a tenth of them twice, garbage among them; wound the service; judge what came of it."""
    servers = stack.servers
    owner = str(uuid.uuid4())
    requests = make_requests(count, add_dataset(stack, "flights_x", owner), owner)
    outgoing = [to_outgoing(contract, request) for request in requests]
    garbage = make_garbage(contract, GARBAGE)
    # Half of the duplicates come close to the first, the others after the wound.
    repeated = outgoing[::10]
    early, late = repeated[::2], repeated[1::2]
    messages = [*outgoing, *early, *garbage]
    random.Random(count).shuffle(messages)
    # Each partition handles its records in order: when these are done, so is whatever was sent before them.
    last = [(make_answer(mode), place) for mode in REQUEST_TOPICS for place in _partitions(servers, mode)]
    valid = [*requests, *(request for request, _ in last)]

    with (
        Publisher(servers.bootstrap) as publisher,
        StatusTail(servers.bootstrap, contract) as told,
        Tail(servers.bootstrap, DEAD_LETTER_TOPIC) as letters,
    ):
        places = publisher.publish(messages)
        malformed = [
            to_malformed(message, place)
            for message, place in zip(messages, places, strict=True)
            if any(message is item for item in garbage)
        ]
        wound(told)
        publisher.publish([*late, *(to_outgoing(contract, request, place) for request, place in last)])
        query_ids = [request.query_id for request in valid]
        told.read_terminal(query_ids, LOAD_SECONDS)
        await_letters(letters, malformed)
        told.read_surplus(QUIET_SECONDS)
        letters.read_surplus(QUIET_SECONDS)
        await_state(servers, told, query_ids)
        return judge(valid, malformed, gather(servers, told, letters), rules)


def _partitions(servers: Servers, mode: str) -> list[int]:
    return find_partitions(servers.bootstrap, REQUEST_TOPICS[mode])


def kill_at(stack: Stack, service: str, told: StatusTail, terminal: int) -> None:
    """`kill -9` the service once so many queries have ended, and wait until it is back."""
    before = len(told.terminal)
    told.read_until(lambda: len(told.terminal) >= terminal, LOAD_SECONDS, f"{terminal} terminal events")
    killed = stack.kill(service)
    print(f"killed {service} at {len(told.terminal)} terminal events, {before} before")
    stack.await_restart(service, killed)


@pytest.mark.slow
def test_a_killed_executor_loses_and_doubles_nothing(stack: Stack, contract: Contract) -> None:
    count = 1_000

    def wound(told: StatusTail) -> None:
        kill_at(stack, "executor", told, count // 3)
        ended = [row for row in read_results(stack.servers).values() if row["status"] in TERMINAL]
        assert len(ended) < count, "the executor had finished before it was killed"

    assert play(stack, contract, count, wound, Rules()) == []


@pytest.mark.slow
def test_a_killed_relay_loses_and_doubles_nothing(stack: Stack, kafka: Kafka, contract: Contract) -> None:
    count = 300

    def wound(told: StatusTail) -> None:
        for part in (1, 2, 3):
            kill_at(stack, "relay", told, part * count // 5)

    # A broker without transactions can't forget what a dead relay had just sent: it comes again.
    assert play(stack, contract, count, wound, Rules(events_may_repeat=not kafka.transactions)) == []


@pytest.mark.slow
def test_a_killed_projector_loses_and_doubles_nothing(stack: Stack, contract: Contract) -> None:
    count = 300

    def wound(told: StatusTail) -> None:
        for part in (1, 2, 3):
            kill_at(stack, "projector", told, part * count // 5)

    assert play(stack, contract, count, wound, Rules()) == []


@dataclass(frozen=True)
class Bad:
    """A record that is no valid request. `answered`: its ids can be read, so it gets a Failed row and events too."""

    value: bytes | None
    query_id: str
    mode: str = "interactive"
    answered: bool = False


def bad_value(change: Callable[[bytes], bytes | None]) -> Callable[[Contract], Bad]:
    """Spoil the bytes of a good request."""

    def make(contract: Contract) -> Bad:
        fields = make_fields(sql="SELECT 1 AS one")
        return Bad(change(contract.encode("QueryRequested", fields)), fields["query_id"])

    return make


def bad_fields(*, lane: str = "interactive", answered: bool = True, **changed: Any) -> Callable[[Contract], Bad]:
    """A request that decodes, with these fields of it changed."""

    def make(contract: Contract) -> Bad:
        fields = make_fields(lane) | {"sql": "SELECT 1 AS one"} | changed
        return Bad(contract.encode("QueryRequested", fields), fields["query_id"], lane, answered)

    return make


SOME_ID = "55555555-5555-4555-8555-555555555555"

# The last one is within the limit if characters are counted; the limit counts bytes.
BAD_INPUT: dict[str, Callable[[Contract], Bad]] = {
    "no Avro": bad_value(lambda value: b"not Avro at all"),
    "empty value": bad_value(lambda value: b""),
    "null value": bad_value(lambda value: None),
    "marker only": bad_value(lambda value: value[:2]),
    "unknown schema": bad_value(lambda value: value[:2] + bytes(8) + value[10:]),
    "truncated body": bad_value(lambda value: value[: len(value) // 2]),
    "missing last field": bad_value(lambda value: value[:-1]),
    "ill-typed field": bad_value(lambda value: value[:10] + b"\xff" * (len(value) - 10)),
    "query_id no uuid": bad_fields(query_id="query-1", answered=False),
    "org_id no uuid": bad_fields(org_id="", answered=False),
    "user_id no uuid": bad_fields(user_id="somebody"),
    "task_id no uuid": bad_fields(task_id="a task", lane="batch"),
    "saved_query_id no uuid": bad_fields(sql=None, saved_query_id="a query"),
    "both sql and saved_query_id": bad_fields(saved_query_id=SOME_ID),
    "neither sql nor saved_query_id": bad_fields(sql=None),
    "timeout of zero": bad_fields(timeout_seconds=0),
    "timeout below zero": bad_fields(timeout_seconds=-1, lane="batch"),
    "max_rows of zero": bad_fields(max_rows=0),
    "max_rows below zero": bad_fields(max_rows=-1),
    "max_bytes_scanned of zero": bad_fields(max_bytes_scanned=0),
    "unknown format": bad_fields(output_format="xml"),
    "unknown delivery": bad_fields(delivery="pigeon"),
    "unknown mode": bad_fields(mode="weekly"),
    "mode of the other lane": bad_fields(mode="batch"),
    "mode of the other lane, in batch": bad_fields(mode="interactive", lane="batch"),
    "sql too long": bad_fields(sql=f"SELECT '{'a' * (262_145 - 9)}'"),
    "sql too long in bytes": bad_fields(sql=f"SELECT '{'ä' * 131_068}'"),
}


@pytest.mark.parametrize("make", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_answered_and_the_partition_goes_on(
    shared_stack: Stack, publisher: Publisher, contract: Contract, make: Callable[[Contract], Bad]
) -> None:
    servers = shared_stack.servers
    bad = make(contract)
    spoilt = Outgoing(REQUEST_TOPICS[bad.mode], bad.query_id.encode(), bad.value, (("sent-by", b"stranger"),))
    with StatusTail(servers.bootstrap, contract) as told, Tail(servers.bootstrap, DEAD_LETTER_TOPIC) as letters:
        [place] = publisher.publish([spoilt])
        good = make_answer(bad.mode)
        publisher.publish([to_outgoing(contract, good, place.partition)])
        awaited = [good.query_id, *([bad.query_id] if bad.answered else [])]
        told.read_terminal(awaited, QUERY_SECONDS)
        malformed = [to_malformed(spoilt, place)]
        await_letters(letters, malformed)
        await_state(servers, told, awaited)
        evidence = gather(servers, told, letters)

    rules = Rules(alone=False)
    assert judge_query(good, evidence, rules) == []
    assert judge_dead_letters(malformed, letters.records, rules) == []
    if bad.answered:
        judge_failure(bad.query_id, evidence, ["INVALID_REQUEST"])
    else:
        assert bad.query_id not in evidence.results
        assert bad.query_id not in evidence.events


def judge_failure(query_id: str, evidence: Evidence, codes: Sequence[str]) -> None:
    """A whole story that ends as Failed with one of the codes, and row and state that say the same."""
    told = evidence.events[query_id]
    row = evidence.results[query_id]
    assert judge_story(query_id, told, Rules()) == []
    assert judge_row_and_event(query_id, row, told[-1].fields) == []
    assert judge_state(query_id, evidence.statuses.get(query_id), row, told) == []
    assert row["status"] == "Failed"
    assert row["error_code"] in codes
    assert row["error_message"]
    assert row["output_location"] is None
    if "INVALID_REQUEST" in codes:
        assert [event.fields["status"] for event in told] == ["Queued", "Failed"]


def test_the_same_id_with_other_content_is_a_dead_letter_and_the_first_stays(
    shared_stack: Stack, publisher: Publisher, contract: Contract
) -> None:
    servers = shared_stack.servers
    first = make_answer()
    other = Valid(dict(first.fields) | {"sql": "SELECT 43 AS answer"}, ("answer",), ({"answer": 43},))
    with StatusTail(servers.bootstrap, contract) as told, Tail(servers.bootstrap, DEAD_LETTER_TOPIC) as letters:
        publisher.publish([to_outgoing(contract, first)])
        told.read_terminal([first.query_id], QUERY_SECONDS)
        conflict = to_outgoing(contract, other)
        [place] = publisher.publish([conflict])
        malformed = [to_malformed(conflict, place)]
        await_letters(letters, malformed)
        await_state(servers, told, [first.query_id])
        evidence = gather(servers, told, letters)
    assert judge_dead_letters(malformed, letters.records, Rules(alone=False)) == []
    assert judge_query(first, evidence, Rules(alone=False)) == []


def test_every_event_is_a_cloud_event_in_the_trace_of_its_request(
    shared_stack: Stack, publisher: Publisher, contract: Contract
) -> None:
    servers = shared_stack.servers
    request = make_answer()
    sent = to_outgoing(contract, request)
    with StatusTail(servers.bootstrap, contract) as told:
        publisher.publish([sent])
        told.read_terminal([request.query_id], QUERY_SECONDS)
    traces = {dict(sent.headers)["traceparent"]} | {
        (event.record.header("traceparent") or "").encode() for event in told.events[request.query_id]
    }
    assert all(trace and re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", trace) for trace in traces)
    assert len({trace[3:35] for trace in traces if trace}) == 1
    for event in told.events[request.query_id]:
        header = event.record.header
        assert header("ce_specversion") == "1.0"
        assert header("ce_id") == event.fields["event_id"]
        for name in ("ce_source", "ce_type", "ce_time", "ce_subject", "ce_dataschema", "content-type"):
            assert header(name), f"no {name}"


def _needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: not installed here")


@pytest.mark.slow
@pytest.mark.needs_kafka
@pytest.mark.parametrize(
    "way",
    [pytest.param("console", marks=_needs("javac", "mvn")), pytest.param("kcat", marks=_needs("kcat"))],
)
def test_the_walk_through_with_stock_tools_runs_as_printed(way: str, shared_stack: Stack, tmp_path: Path) -> None:
    distribution = tmp_path / "kafka"
    distribution.mkdir()
    lay_out_distribution(distribution)
    request, kcat, console, answer = read_blocks("docs/events.md", "bash", "With stock tools")
    done = subprocess.run(
        ["bash", "-c", request + {"kcat": kcat, "console": console}[way] + answer],
        cwd=tmp_path,
        env=os.environ | {"KAFKA": str(distribution), "QUERYD_KAFKA_BOOTSTRAP": shared_stack.servers.bootstrap},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=QUERY_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last, queued, running, succeeded = done.stdout.splitlines()
    assert last == succeeded
    query_id = last[:36]
    for line, status in ((queued, "Queued"), (running, "Running"), (succeeded, "Succeeded")):
        assert line.startswith(query_id) and status in line
    # The file of the result, as it stands in the event.
    assert "answer..42.." in succeeded
    # It was a request as any other.
    assert shared_stack.queryd("status", query_id).splitlines()[3] == "status: Succeeded"
