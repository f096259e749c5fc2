"""A real stack as an operator sees it: health, metrics, logs and traces of services that run as processes."""

import gzip
import json
import secrets
import subprocess
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from queryd.codec import encode
from queryd.events import ErrorCode, Mode, OrgId, QueryId, QueryRequested, Status, Topic
from service.embedded.ports import pick_ports
from service.embedded.servers import Lifeline
from service.run import Service
from tests.acceptance.stranger import Contract, StatusEvent, StatusTail
from tests.servers.own_stack import PATIENCE_SECONDS, Servers, await_that, opened_servers

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
CANARY = f"canary{secrets.token_hex(8)}"

_STEPS = ("admit", "claim", "attempt", "execute", "store", "finish")

pytestmark = pytest.mark.timeout(300)


class Collector:
    """An OTLP endpoint that keeps the spans it is sent, and the bytes they came in."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.keep(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def keep(self, body: bytes) -> None:
        """One export request."""
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {each.value.string_value for each in resource.resource.attributes if "name" in each.key}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()

    def of_trace(self, trace_id: str) -> list[Span]:
        """The spans of one trace."""
        return [span for span in self.spans if span.trace_id.hex() == trace_id]


@dataclass(frozen=True, slots=True)
class Stack:
    """Servers, and the three services as processes."""

    servers: Servers
    collector: Collector
    ports: dict[Service, int]
    processes: dict[Service, "subprocess.Popen[bytes]"]

    def get(self, service: Service, path: str) -> tuple[int, str]:
        """Status and body of a page."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[service]}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def ask_ready(self, service: Service) -> tuple[int, dict[str, Any]]:
        """What /readyz says."""
        status, body = self.get(service, "/readyz")
        return status, json.loads(body)

    def await_ready(self) -> None:
        """All services say that they are."""
        for service in self.ports:
            await_that(partial(self.is_ready, service), f"{service} to be ready")

    def is_ready(self, service: Service) -> bool:
        """Whether it answers, and says that it is ready."""
        try:
            return self.ask_ready(service)[0] == 200
        except urllib.error.URLError:
            return False

    def misses(self, service: Service) -> bool:
        """Whether it says that it misses something."""
        return bool(self.ask_ready(service)[1]["missing"])

    def read_metrics(self, service: Service) -> Callable[..., float]:
        """A reader of one scrape: its values by name, summed over those with the given labels."""
        status, page = self.get(service, "/metrics")
        assert status == 200
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

        def read(name: str, **labels: str) -> float:
            return sum(
                sample.value
                for sample in samples
                if sample.name == f"queryd_{name}" and labels.items() <= sample.labels.items()
            )

        return read


@pytest.fixture(scope="module")
def stack(lifeline: Lifeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: its Postgres is stopped and started."""
    collector = Collector()
    with opened_servers(tmp_path_factory.mktemp("observed"), lifeline) as servers:
        ports = dict(zip(Service, pick_ports(len(Service)), strict=True))
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        services = {service: traced | {"QUERYD_HTTP_PORT": str(port)} for service, port in ports.items()}
        with servers.running(services) as processes:
            made = Stack(servers, collector, ports, processes)
            made.await_ready()
            yield made
    collector.close()


@pytest.mark.slow
def test_after_some_queries_the_metrics_have_the_right_values(stack: Stack) -> None:
    before = stack.read_metrics(Service.EXECUTOR)
    published_before = stack.read_metrics(Service.RELAY)("events_published_total")
    projected_before = stack.read_metrics(Service.PROJECTOR)("events_projected_total")
    with stack.servers.client as client:
        queries = [client.submit("SELECT i FROM range(10) AS t(i)", org_id=ORG) for _ in range(5)]
        queries += [client.submit("SELECT 1 AS one", org_id=ORG, mode=Mode.BATCH) for _ in range(3)]
        queries.append(client.submit("SELECT no_such_function(1)", org_id=ORG))
        events = [query.wait(PATIENCE_SECONDS) for query in queries]
        saved = client.submit(saved_query_id=str(uuid.uuid4()), org_id=ORG).wait(PATIENCE_SECONDS)
    producer = Producer({"bootstrap.servers": stack.servers.environment["QUERYD_KAFKA_BOOTSTRAP"]})
    producer.produce(Topic.REQUESTS_BATCH, b"no event of ours", b"key")
    assert producer.flush(PATIENCE_SECONDS) == 0
    assert [event.status for event in events] == [Status.SUCCEEDED] * 8 + [Status.FAILED]
    assert saved.error_code is ErrorCode.SAVED_QUERY_NOT_FOUND
    code = events[-1].error_code
    assert code is not None
    await_that(
        lambda: stack.read_metrics(Service.EXECUTOR)("dead_letters_total", code="UNDECODABLE") == 1, "a dead letter"
    )
    now = stack.read_metrics(Service.EXECUTOR)

    def rise(name: str, **labels: str) -> float:
        return now(name, **labels) - before(name, **labels)

    assert rise("queries_total", lane="interactive", outcome="Succeeded") == 5
    assert rise("queries_total", lane="batch", outcome="Succeeded") == 3
    assert rise("queries_total", lane="interactive", outcome=code.value) == 1
    assert rise("queries_total", lane="interactive", outcome="SAVED_QUERY_NOT_FOUND") == 1
    assert rise("queries_total") == 10
    assert rise("attempts_total") == 9
    assert rise("query_queue_seconds_count") == rise("query_run_seconds_count") == 9
    assert rise("query_seconds_count") == 10
    assert rise("result_rows_sum") == 53
    assert rise("result_bytes_sum") == sum(event.bytes or 0 for event in events)
    assert 0 < rise("query_run_seconds_sum") < rise("query_seconds_sum") < 10 * PATIENCE_SECONDS
    assert now("queries_running") == now("queries_queued") == 0
    assert now("lease_losses_total") == 0
    # Of nine queries that ran three events each, of the one that did not two.
    await_that(
        lambda: stack.read_metrics(Service.PROJECTOR)("events_projected_total") - projected_before == 9 * 3 + 2,
        "all events to be projected",
    )
    relay = stack.read_metrics(Service.RELAY)
    assert relay("events_published_total") - published_before == 9 * 3 + 2
    assert relay("relay_lag_seconds_count") == relay("events_published_total")
    assert 1 <= relay("publish_batches_total") <= relay("events_published_total")
    await_that(lambda: stack.read_metrics(Service.RELAY)("outbox_events") == 0, "the outbox to be measured empty")
    await_that(lambda: _knows_no_lag(stack), "consumers to have caught up")


def _knows_no_lag(stack: Stack) -> bool:
    requests = (Topic.REQUESTS_INTERACTIVE, Topic.REQUESTS_BATCH)
    pages = {service: stack.get(service, "/metrics")[1] for service in (Service.EXECUTOR, Service.PROJECTOR)}
    return all(
        f'queryd_consumer_lag{{partition="{number}",topic="{topic}"}} 0.0' in pages[service]
        for service, topics in ((Service.EXECUTOR, requests), (Service.PROJECTOR, (Topic.STATUS,)))
        for topic in topics
        for number in "01"
    )


def test_a_request_is_traced_through_every_step_to_its_events(stack: Stack) -> None:
    trace_id, parent_id, query_id = secrets.token_hex(16), secrets.token_hex(8), str(uuid.uuid4())
    events = _ask(stack, query_id, f"SELECT '{CANARY}' AS text", f"00-{trace_id}-{parent_id}-01")
    # Three events, each made, published and projected.
    await_that(lambda: len(stack.collector.of_trace(trace_id)) == len(_STEPS) + 2 * len(events), "all spans to be sent")
    spans = stack.collector.of_trace(trace_id)
    by_name = {span.name: span for span in spans}
    assert {f"queryd.{step}" for step in _STEPS} == by_name.keys() - {"queryd.publish", "queryd.project"}
    assert {by_name[f"queryd.{step}"].parent_span_id.hex() for step in ("admit", "claim", "attempt")} == {parent_id}
    attempt = by_name["queryd.attempt"].span_id
    for step in _STEPS[3:]:
        assert by_name[f"queryd.{step}"].parent_span_id == attempt, step
    # Each event names the span that made it, and is published and projected below it.
    makers = [by_name[f"queryd.{step}"].span_id.hex() for step in ("admit", "claim", "finish")]
    assert [_traceparent(event) for event in events] == [f"00-{trace_id}-{maker}-01" for maker in makers]
    for name in ("queryd.publish", "queryd.project"):
        assert sorted(span.parent_span_id.hex() for span in spans if span.name == name) == sorted(makers)
    assert stack.collector.services >= {"queryd-executor", "queryd-relay", "queryd-projector"}
    said = {each.key: each.value for each in by_name["queryd.attempt"].attributes}
    assert said["queryd.query_id"].string_value == query_id
    assert (said["queryd.org_id"].string_value, said["queryd.attempt"].int_value) == (ORG, 1)


def test_a_failed_query_is_traced_without_its_text(stack: Stack) -> None:
    trace_id, query_id = secrets.token_hex(16), str(uuid.uuid4())
    _ask(stack, query_id, f"SELECT CAST('{CANARY}' AS INTEGER)", f"00-{trace_id}-{secrets.token_hex(8)}-01")
    await_that(
        lambda: "queryd.finish" in {span.name for span in stack.collector.of_trace(trace_id)}, "the spans to be sent"
    )
    assert "queryd.store" not in {span.name for span in stack.collector.of_trace(trace_id)}


def test_the_text_of_a_query_is_in_no_metric_trace_or_log(stack: Stack) -> None:
    trace_id = secrets.token_hex(16)
    _ask(stack, str(uuid.uuid4()), f"SELECT '{CANARY}' AS text", f"00-{trace_id}-{secrets.token_hex(8)}-01")
    await_that(lambda: len(stack.collector.of_trace(trace_id)) == len(_STEPS) + 6, "all spans to be sent")
    assert not [body for body in stack.collector.bodies if CANARY.encode() in body]
    assert CANARY not in stack.servers.log.read_text()
    assert not [service for service in Service if CANARY in stack.get(service, "/metrics")[1]]


def test_what_is_logged_of_a_query_names_it_its_org_and_its_attempt(stack: Stack) -> None:
    query_id = str(uuid.uuid4())
    _ask(stack, query_id, "SELECT 1 AS one", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00")
    await_that(
        lambda: any(line.get("query_id") == query_id for line in stack.servers.read_log()), "the query to be logged"
    )
    [line] = [line for line in stack.servers.read_log() if line.get("query_id") == query_id]
    assert (line["event"], line["org_id"], line["attempt"]) == ("query_finished", ORG, 1)


def test_a_query_whose_caller_did_not_want_it_recorded_is_not(stack: Stack) -> None:
    trace_id = secrets.token_hex(16)
    _ask(stack, str(uuid.uuid4()), "SELECT 1 AS one", f"00-{trace_id}-{secrets.token_hex(8)}-00")
    other = secrets.token_hex(16)
    # What comes later and is recorded shows that the first had its time.
    _ask(stack, str(uuid.uuid4()), "SELECT 1 AS one", f"00-{other}-{secrets.token_hex(8)}-01")
    await_that(lambda: len(stack.collector.of_trace(other)) == len(_STEPS) + 6, "all spans to be sent")
    assert stack.collector.of_trace(trace_id) == []


@pytest.mark.slow
def test_with_postgres_stopped_services_live_and_say_what_they_miss(stack: Stack) -> None:
    needed = {Service.EXECUTOR: "postgres data", Service.RELAY: "postgres data", Service.PROJECTOR: "postgres state"}
    stack.servers.postgres.stop()
    try:
        for service, name in needed.items():
            await_that(partial(stack.misses, service), f"{service} to notice")
            said = stack.ask_ready(service)[1]
            assert (said["missing"], said["ready"], said["state"]) == ([name], False, "ready")
            assert stack.get(service, "/livez")[0] == 200
        # Nobody knows what waits in an outbox that can't be asked.
        await_that(lambda: "queryd_outbox_events 0.0" not in stack.get(Service.RELAY, "/metrics")[1], "the gauge to go")
        password = psycopg.conninfo.conninfo_to_dict(stack.servers.environment["QUERYD_DATA_URL"]).get("password")
        assert not [
            page
            for service in needed
            for page in ("/readyz", "/livez", "/metrics")
            if password and str(password) in stack.get(service, page)[1]
        ]
    finally:
        stack.servers.postgres.start()
    stack.await_ready()


def _ask(stack: Stack, query_id: str, sql: str, traceparent: str) -> list[StatusEvent]:
    """One query with a trace of the caller's; all its events."""
    request = QueryRequested(QueryId(query_id), OrgId(ORG), Mode.INTERACTIVE, sql=sql)
    with StatusTail(stack.servers.environment["QUERYD_KAFKA_BOOTSTRAP"], Contract()) as told:
        producer = Producer({"bootstrap.servers": stack.servers.environment["QUERYD_KAFKA_BOOTSTRAP"]})
        producer.produce(
            Mode.INTERACTIVE.topic.value,
            key=query_id.encode(),
            value=encode(request),
            headers=[("traceparent", traceparent.encode())],
        )
        assert producer.flush(PATIENCE_SECONDS) == 0
        told.read_terminal([query_id], PATIENCE_SECONDS)
        return list(told.events[query_id])


def _traceparent(event: StatusEvent) -> str:
    value = dict(event.record.headers)["traceparent"]
    assert value is not None
    return value.decode()
