"""Traces: a request's trace goes on through every step to its events, and costs nothing where nobody records it."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from consumers.executor.status_event import build_status_event
from db.data.outbox import NewEvent
from queryd.events import Status
from telemetry import recording, traces
from telemetry.events import LogEvent
from telemetry.recording import OtlpRecorder
from telemetry.traces import SpanAttribute, SpanName
from tests.unit.samples import NOW, ORG_ID, QUERY_ID, TRACEPARENT, make_facts

TRACE_ID, PARENT_ID = TRACEPARENT.split("-")[1:3]
UNSAMPLED = TRACEPARENT[:-2] + "00"
CANARY = "canary4711"

# A query takes some ten of these, and milliseconds.
_OFF_SECONDS = 0.00001


@pytest.fixture
def recorded() -> Iterator[InMemorySpanExporter]:
    """Spans recorded in this process, as they end."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces.record_by(OtlpRecorder(provider))
    yield exporter
    traces.close_traces()


def _tell() -> NewEvent:
    return build_status_event(
        make_facts(), sequence=2, previous=Status.QUEUED, status=Status.RUNNING, attempt=1, now=NOW
    )


def _traceparent(event: NewEvent) -> str:
    headers: dict[str, str] = event.headers.obj
    return headers["traceparent"]


def _ids(span: ReadableSpan) -> tuple[str, str | None, str]:
    """Trace, parent and span, in hex."""
    assert span.context is not None
    parent = None if span.parent is None else f"{span.parent.span_id:016x}"
    return f"{span.context.trace_id:032x}", parent, f"{span.context.span_id:016x}"


def _named(recorded: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in recorded.get_finished_spans()}


def test_a_span_continues_the_requests_trace(recorded: InMemorySpanExporter) -> None:
    with traces.span(SpanName.ATTEMPT, TRACEPARENT, query_id=QUERY_ID, org_id=ORG_ID, attempt=1):
        pass
    [span] = recorded.get_finished_spans()
    assert _ids(span)[:2] == (TRACE_ID, PARENT_ID)
    assert span.attributes == {"queryd.query_id": QUERY_ID, "queryd.org_id": ORG_ID, "queryd.attempt": 1}


def test_a_copy_s_trace_is_its_own_and_links_to_the_record_s(recorded: InMemorySpanExporter) -> None:
    with traces.linked_spans(SpanName.REPLAY, [TRACEPARENT, None]) as traceparents:
        pass
    first, second = sorted(recorded.get_finished_spans(), key=lambda span: len(span.links), reverse=True)
    assert [f"{link.context.trace_id:032x}" for link in first.links] == [TRACE_ID]
    assert second.links == ()
    traces_of_copies = {traceparent[3:35] for traceparent in traceparents if traceparent is not None}
    assert traces_of_copies == {_ids(first)[0], _ids(second)[0]}
    assert TRACE_ID not in traces_of_copies
    assert (_ids(first)[1], _ids(second)[1]) == (None, None)


async def test_steps_are_inside_their_attempt_also_in_tasks_of_their_own(recorded: InMemorySpanExporter) -> None:
    @traces.in_span(SpanName.EXECUTE)
    async def execute(answer: int) -> int:
        return answer

    with traces.span(SpanName.ATTEMPT, TRACEPARENT):
        assert await asyncio.ensure_future(execute(7)) == 7
        with traces.span(SpanName.STORE):
            pass
    spans = _named(recorded)
    attempt = _ids(spans["queryd.attempt"])[2]
    assert _ids(spans["queryd.execute"])[:2] == _ids(spans["queryd.store"])[:2] == (TRACE_ID, attempt)


async def test_attempts_side_by_side_keep_their_steps_apart(recorded: InMemorySpanExporter) -> None:
    async def attempt(number: int) -> None:
        with traces.span(SpanName.ATTEMPT, f"00-{number:032x}-{PARENT_ID}-01", attempt=number):
            await asyncio.sleep(0)
            with traces.span(SpanName.FINISH):
                await asyncio.sleep(0)

    await asyncio.gather(*(attempt(number) for number in range(1, 6)))
    finished = [span for span in recorded.get_finished_spans() if span.name == SpanName.FINISH]
    attempts = {_ids(span)[2]: _ids(span)[0] for span in recorded.get_finished_spans() if span.name == SpanName.ATTEMPT}
    assert len(finished) == 5
    assert all(attempts[_ids(span)[1] or ""] == _ids(span)[0] for span in finished)


def test_an_event_names_the_span_that_made_it(recorded: InMemorySpanExporter) -> None:
    with traces.span(SpanName.CLAIM, TRACEPARENT):
        event = _tell()
    trace_id, _, span_id = _ids(_named(recorded)["queryd.claim"])
    assert _traceparent(event) == f"00-{trace_id}-{span_id}-01"


def test_an_event_never_names_a_span_of_another_trace(recorded: InMemorySpanExporter) -> None:
    with traces.span(SpanName.REAP, f"00-{'a' * 32}-{'b' * 16}-01"):
        event = _tell()
    assert _traceparent(event).split("-")[1] == TRACE_ID
    assert _traceparent(event).split("-")[2] not in {_ids(span)[2] for span in recorded.get_finished_spans()}


def test_without_tracing_an_event_still_continues_the_trace() -> None:
    first, second = _traceparent(_tell()), _traceparent(_tell())
    assert first[:36] == second[:36] == TRACEPARENT[:36]
    assert len({first, second, TRACEPARENT}) == 3


def test_what_is_admitted_together_keeps_its_own_traces(recorded: InMemorySpanExporter) -> None:
    parents = [f"00-{number:032x}-{PARENT_ID}-01" for number in (1, 2, 3)]
    events = []
    with traces.spans(SpanName.ADMIT, [(parent, {SpanAttribute.QUERY_ID: QUERY_ID}) for parent in parents]) as started:
        for place, parent in enumerate(parents):
            with traces.within(started, place):
                events.append(
                    build_status_event(
                        make_facts(traceparent=parent),
                        sequence=1,
                        previous=None,
                        status=Status.QUEUED,
                        attempt=0,
                        now=NOW,
                    )
                )
        assert not recorded.get_finished_spans()
    spans = [_ids(span) for span in recorded.get_finished_spans()]
    assert sorted(_traceparent(event) for event in events) == sorted(
        f"00-{trace_id}-{span_id}-01" for trace_id, _, span_id in spans
    )
    assert {trace_id for trace_id, _, _ in spans} == {parent.split("-")[1] for parent in parents}


def test_a_request_without_a_trace_begins_one(recorded: InMemorySpanExporter) -> None:
    begun = traces.begin_trace()
    assert begun is not None
    [root] = recorded.get_finished_spans()
    trace_id, parent, span_id = _ids(root)
    assert (begun, parent) == (f"00-{trace_id}-{span_id}-01", None)


def test_who_did_not_want_a_trace_recorded_has_none(recorded: InMemorySpanExporter) -> None:
    with traces.span(SpanName.CLAIM, UNSAMPLED):
        event = _tell()
    assert recorded.get_finished_spans() == ()
    # The trace goes on all the same, and still says so.
    assert _traceparent(event)[:36] == UNSAMPLED[:36]
    assert _traceparent(event).endswith("-00")


def test_of_an_error_the_class_is_told_and_never_its_text(recorded: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match=CANARY), traces.span(SpanName.EXECUTE, TRACEPARENT):
        raise ValueError(CANARY)
    with (
        pytest.raises(ValueError, match=CANARY),
        traces.spans(SpanName.ADMIT, [(TRACEPARENT, {})]) as started,
        traces.within(started, 0),
    ):
        raise ValueError(CANARY)
    for span in recorded.get_finished_spans():
        assert not span.status.is_ok
        assert span.attributes == {"error.type": "ValueError"}
        assert CANARY not in span.to_json()


def test_a_span_says_nothing_but_what_is_on_the_list() -> None:
    assert set(SpanAttribute) == {"queryd.query_id", "queryd.org_id", "queryd.attempt", "error.type"}
    with pytest.raises(KeyError):
        traces._to_attributes({"sql": CANARY})


def test_every_name_is_ours_and_is_used() -> None:
    assert all(name.value == f"queryd.{name.name.lower()}" for name in SpanName)


def test_off_nothing_is_recorded_looked_at_or_found() -> None:
    steps: Iterator[traces.Step] = iter([(TRACEPARENT, {})])
    with traces.spans(SpanName.PUBLISH, steps) as started, traces.within(started, 3):
        assert started == []
    assert next(steps) == (TRACEPARENT, {})
    assert traces.begin_trace() is None
    assert traces.find_current(TRACEPARENT) is None


def test_off_a_span_costs_nothing() -> None:
    def measure() -> float:
        start = time.perf_counter()
        for _ in range(1_000):
            with traces.span(SpanName.ATTEMPT, TRACEPARENT, query_id=QUERY_ID, org_id=ORG_ID, attempt=1):
                pass
        return (time.perf_counter() - start) / 1_000

    assert min(measure() for _ in range(10)) < _OFF_SECONDS


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_an_endpoint_in_the_environment_turns_it_on(environment: dict[str, str], wanted: bool) -> None:
    assert traces._wanted(environment) is wanted


def test_without_the_extra_a_service_says_so_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    # What an import finds where a package is missing.
    monkeypatch.setitem(sys.modules, "telemetry.recording", None)
    with structlog.testing.capture_logs() as logs:
        traces.set_up_traces("executor")
    assert [line["event"] for line in logs] == [LogEvent.TRACES_UNAVAILABLE]
    assert "'.[traces]'" in logs[0]["reason"]
    assert traces.begin_trace() is None


def test_without_an_endpoint_no_package_of_it_is_imported() -> None:
    program = (
        "import sys; from telemetry.traces import set_up_traces; set_up_traces('executor'); "
        "import consumers.executor.executor, producers.relay.relay, consumers.projector, service.run; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "queryd-relay"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "deployment=test,service.name=ours"}, "ours"),
    ],
)
def test_a_service_is_called_as_it_is_or_as_it_was_told(
    environment: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    recorder = OtlpRecorder.to_endpoint("relay")
    assert recorder._provider.resource.attributes["service.name"] == name
    recorder.close()


@pytest.mark.slow
def test_an_endpoint_that_is_away_keeps_no_service_from_ending(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    traces.set_up_traces("executor")
    with traces.span(SpanName.ATTEMPT, TRACEPARENT, query_id=QUERY_ID, org_id=ORG_ID, attempt=1):
        pass
    start = time.monotonic()
    traces.close_traces()
    assert time.monotonic() - start < recording._CLOSE_SECONDS + 1.0
    assert _lines(capfd) == []


def _lines(capfd: pytest.CaptureFixture[str]) -> Sequence[str]:
    """What was written to stderr, but by Kafka clients that other tests of this process have left."""
    return [line for line in capfd.readouterr().err.splitlines() if "|rdkafka#" not in line]
