"""A real stack as an operator sees it: health, metrics, logs and traces of services that run as processes."""

import gzip
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Producer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from queryd.client import QueryClient
from queryd.codec import encode
from queryd.events import ErrorCode, Mode, OrgId, QueryId, QueryRequested, Status, Topic
from service.embedded.broker import Broker
from service.embedded.object_store import ObjectStore
from service.embedded.ports import pick_ports
from service.embedded.postgres import Postgres
from service.embedded.servers import Lifeline
from service.run import Service
from service.topics import apply_topics
from tests.acceptance.stranger import Contract, StatusEvent, StatusTail

ORG = "6a1f7f4e-3f0e-4f5c-9d55-0d6f1f2f9a10"
CANARY = f"canary{secrets.token_hex(8)}"
# Guards against hanging.
PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.1

_STEPS = ("admit", "attempt", "claim", "authorize", "execute", "store", "finish")

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

    postgres: Postgres
    bootstrap: str
    collector: Collector
    log: Path
    ports: dict[Service, int]
    data_url: str
    processes: dict[Service, "subprocess.Popen[bytes]"] = field(default_factory=dict)

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
            _await(partial(self.is_ready, service), f"{service} to be ready")

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
    folder = tmp_path_factory.mktemp("observed")
    postgres = Postgres(folder / "postgres", folder / "postgres.log", lifeline)
    store = ObjectStore(folder / "s3", folder / "s3.log", lifeline)
    broker = Broker(folder / "kafka", folder / "kafka.log", lifeline)
    with ExitStack() as exits:
        for server in (postgres, store, broker):
            exits.callback(server.stop)
            server.start()
        for name in ("data", "state"):
            postgres.create_database(name)
        upgrade_data(postgres.url("data"))
        upgrade_state(postgres.url("state"))
        create_platform_tables(postgres.url("state"))
        apply_topics({"bootstrap.servers": broker.bootstrap}, 2, 1)
        collector = Collector()
        exits.callback(collector.close)
        ports = dict(zip(Service, pick_ports(len(Service)), strict=True))
        made = Stack(
            postgres, broker.bootstrap, collector, folder / "services.log", ports, postgres.url("data"), processes={}
        )
        environment = {
            "QUERYD_KAFKA_BOOTSTRAP": broker.bootstrap,
            "QUERYD_KAFKA_SESSION_TIMEOUT": "6",
            "QUERYD_RELAY_TRANSACTIONS": "false",
            "QUERYD_DATA_URL": postgres.url("data"),
            "QUERYD_STATE_URL": postgres.url("state"),
            "QUERYD_RESULTS_URL": f"s3://{store.bucket}",
            "QUERYD_SCRATCH": str(folder / "scratch"),
            "AWS_ENDPOINT_URL": store.endpoint_url,
            "AWS_REGION": store.region,
            "AWS_ACCESS_KEY_ID": store.writer.access_key,
            "AWS_SECRET_ACCESS_KEY": store.writer.secret_key,
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        exits.enter_context(_running(made, environment, folder))
        made.await_ready()
        yield made


@contextmanager
def _running(stack: Stack, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """The services; at their end each must have drained, and promptly."""
    outside = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with stack.log.open("wb") as output:
        for service, port in stack.ports.items():
            stack.processes[service] = subprocess.Popen(
                [sys.executable, "-m", "queryd", "run", service.value],
                cwd=folder,
                env=outside | environment | {"QUERYD_HTTP_PORT": str(port)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
    try:
        yield
        for process in stack.processes.values():
            process.send_signal(signal.SIGTERM)
        assert [process.wait(PATIENCE_SECONDS) for process in stack.processes.values()] == [0, 0, 0]
    finally:
        for process in stack.processes.values():
            process.kill()
            process.wait()


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:.0f} s for {what}"
        time.sleep(_LOOK_SECONDS)


def _read_log(stack: Stack) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stack.log.read_text().splitlines() if line.startswith("{")]


def test_after_some_queries_the_metrics_have_the_right_values(stack: Stack) -> None:
    before = stack.read_metrics(Service.EXECUTOR)
    published_before = stack.read_metrics(Service.RELAY)("events_published_total")
    projected_before = stack.read_metrics(Service.PROJECTOR)("events_projected_total")
    with QueryClient({"bootstrap.servers": stack.bootstrap}) as client:
        queries = [client.submit("SELECT i FROM range(10) AS t(i)", org_id=ORG) for _ in range(5)]
        queries += [client.submit("SELECT 1 AS one", org_id=ORG, mode=Mode.BATCH) for _ in range(3)]
        queries.append(client.submit("SELECT no_such_function(1)", org_id=ORG))
        events = [query.wait(PATIENCE_SECONDS) for query in queries]
        saved = client.submit(saved_query_id=str(uuid.uuid4()), org_id=ORG).wait(PATIENCE_SECONDS)
    producer = Producer({"bootstrap.servers": stack.bootstrap})
    producer.produce(Topic.REQUESTS_BATCH, b"no event of ours", b"key")
    assert producer.flush(PATIENCE_SECONDS) == 0
    assert [event.status for event in events] == [Status.SUCCEEDED] * 8 + [Status.FAILED]
    assert saved.error_code is ErrorCode.SAVED_QUERY_NOT_FOUND
    code = events[-1].error_code
    assert code is not None
    _await(lambda: stack.read_metrics(Service.EXECUTOR)("dead_letters_total", code="UNDECODABLE") == 1, "a dead letter")
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
    _await(
        lambda: stack.read_metrics(Service.PROJECTOR)("events_projected_total") - projected_before == 9 * 3 + 2,
        "all events to be projected",
    )
    relay = stack.read_metrics(Service.RELAY)
    assert relay("events_published_total") - published_before == 9 * 3 + 2
    assert relay("relay_lag_seconds_count") == relay("events_published_total")
    assert 1 <= relay("publish_batches_total") <= relay("events_published_total")
    _await(lambda: stack.read_metrics(Service.RELAY)("outbox_events") == 0, "the outbox to be measured empty")
    _await(lambda: _knows_no_lag(stack), "consumers to have caught up")


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
    _await(lambda: len(stack.collector.of_trace(trace_id)) == len(_STEPS) + 2 * len(events), "all spans to be sent")
    spans = stack.collector.of_trace(trace_id)
    by_name = {span.name: span for span in spans}
    assert {f"queryd.{step}" for step in _STEPS} == by_name.keys() - {"queryd.publish", "queryd.project"}
    assert {by_name[f"queryd.{step}"].parent_span_id.hex() for step in ("admit", "attempt")} == {parent_id}
    attempt = by_name["queryd.attempt"].span_id
    for step in _STEPS[2:]:
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
    _await(
        lambda: "queryd.finish" in {span.name for span in stack.collector.of_trace(trace_id)}, "the spans to be sent"
    )
    assert "queryd.store" not in {span.name for span in stack.collector.of_trace(trace_id)}


def test_the_text_of_a_query_is_in_no_metric_trace_or_log(stack: Stack) -> None:
    trace_id = secrets.token_hex(16)
    _ask(stack, str(uuid.uuid4()), f"SELECT '{CANARY}' AS text", f"00-{trace_id}-{secrets.token_hex(8)}-01")
    _await(lambda: len(stack.collector.of_trace(trace_id)) == len(_STEPS) + 6, "all spans to be sent")
    assert not [body for body in stack.collector.bodies if CANARY.encode() in body]
    assert CANARY not in stack.log.read_text()
    assert not [service for service in Service if CANARY in stack.get(service, "/metrics")[1]]


def test_what_is_logged_of_a_query_names_it_its_org_and_its_attempt(stack: Stack) -> None:
    query_id = str(uuid.uuid4())
    _ask(stack, query_id, "SELECT 1 AS one", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00")
    _await(lambda: any(line.get("query_id") == query_id for line in _read_log(stack)), "the query to be logged")
    [line] = [line for line in _read_log(stack) if line.get("query_id") == query_id]
    assert (line["event"], line["org_id"], line["attempt"]) == ("query_finished", ORG, 1)


def test_a_query_whose_caller_did_not_want_it_recorded_is_not(stack: Stack) -> None:
    trace_id = secrets.token_hex(16)
    _ask(stack, str(uuid.uuid4()), "SELECT 1 AS one", f"00-{trace_id}-{secrets.token_hex(8)}-00")
    other = secrets.token_hex(16)
    # What comes later and is recorded shows that the first had its time.
    _ask(stack, str(uuid.uuid4()), "SELECT 1 AS one", f"00-{other}-{secrets.token_hex(8)}-01")
    _await(lambda: len(stack.collector.of_trace(other)) == len(_STEPS) + 6, "all spans to be sent")
    assert stack.collector.of_trace(trace_id) == []


def test_with_postgres_stopped_services_live_and_say_what_they_miss(stack: Stack) -> None:
    needed = {Service.EXECUTOR: "postgres data", Service.RELAY: "postgres data", Service.PROJECTOR: "postgres state"}
    stack.postgres.stop()
    try:
        for service, name in needed.items():
            _await(partial(stack.misses, service), f"{service} to notice")
            said = stack.ask_ready(service)[1]
            assert (said["missing"], said["ready"], said["state"]) == ([name], False, "ready")
            assert stack.get(service, "/livez")[0] == 200
        # Nobody knows what waits in an outbox that can't be asked.
        _await(lambda: "queryd_outbox_events 0.0" not in stack.get(Service.RELAY, "/metrics")[1], "the gauge to go")
        password = psycopg.conninfo.conninfo_to_dict(stack.data_url).get("password")
        assert not [
            page
            for service in needed
            for page in ("/readyz", "/livez", "/metrics")
            if password and str(password) in stack.get(service, page)[1]
        ]
    finally:
        stack.postgres.start()
    stack.await_ready()


def _ask(stack: Stack, query_id: str, sql: str, traceparent: str) -> list[StatusEvent]:
    """One query with a trace of the caller's; all its events."""
    request = QueryRequested(QueryId(query_id), OrgId(ORG), Mode.INTERACTIVE, sql=sql)
    with StatusTail(stack.bootstrap, Contract()) as told:
        producer = Producer({"bootstrap.servers": stack.bootstrap})
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
