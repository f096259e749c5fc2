"""Spans recorded by OpenTelemetry and sent by OTLP over HTTP.

At runtime only `telemetry.traces` imports this module, because it needs the extra `traces`.
"""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from telemetry.traces import Attributes, SpanAttribute, SpanName

# A service ends promptly although the endpoint is away: what it can't take by then is lost.
_CLOSE_SECONDS = 2.0

_KINDS = {
    SpanName.RECEIVE: SpanKind.CONSUMER,
    SpanName.PUBLISH: SpanKind.PRODUCER,
    SpanName.PROJECT: SpanKind.CONSUMER,
    SpanName.REPLAY: SpanKind.PRODUCER,
}


class OtlpRecorder:
    """Records by a provider of its own, so that no other library's spans come along."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("queryd")

    @classmethod
    def to_endpoint(cls, service: str) -> Self:
        """To the endpoint of the `OTEL_*` variables, which also say how to sample and what the service is called."""
        # A line for each batch that an endpoint away did not take says too much: metrics tell of what matters.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {SERVICE_NAME: f"queryd-{service}"})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def start(
        self, name: SpanName, traceparent: str | None, attributes: Attributes, links: Sequence[str] = ()
    ) -> "OtlpSpan":
        """Start a child of the current span, else of `traceparent`, else the root span of a new trace. `links` are the
        `traceparent`s of related spans."""
        parent = None
        if traceparent is not None and not trace.get_current_span().get_span_context().is_valid:
            parent = trace.set_span_in_context(NonRecordingSpan(_read(traceparent)))
        said = {key.value: value for key, value in attributes.items()}
        kind = _KINDS.get(name, SpanKind.INTERNAL)
        linked = [Link(_read(link)) for link in links]
        return OtlpSpan(self._tracer.start_span(name.value, parent, kind=kind, attributes=said, links=linked))

    def find_current(self) -> str | None:
        """The present span's `traceparent`."""
        context = trace.get_current_span().get_span_context()
        return _write(context) if context.is_valid else None

    def close(self) -> None:
        """Send what was kept; returns within 2 s."""
        # The exporter repeats what the endpoint refuses for longer than anybody waits for a service to end.
        closing = threading.Thread(target=self._provider.shutdown, name="queryd-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


class OtlpSpan:
    """A span that has begun."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """By which others continue it."""
        return _write(self._span.get_span_context())

    @contextmanager
    def current(self) -> Iterator[None]:
        """What begins within the context continues this span."""
        # An exception's text may quote SQL or data: `end` notes its class alone.
        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def end(self, error: BaseException | None = None) -> None:
        """It has ended, by `error` if there was one."""
        if error is not None:
            self._span.set_attribute(SpanAttribute.ERROR, type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _read(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


def _write(context: SpanContext) -> str:
    # Level 1 of the specification knows only whether a trace is recorded.
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & TraceFlags.SAMPLED:02x}"
