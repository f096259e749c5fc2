"""The names of spans, defined once, and how a step becomes one.

Recording needs the extra `traces` and an endpoint in the standard `OTEL_*` variables. Without either, every function
here does nothing, in well under a microsecond. A span never carries SQL, values, or the text of an exception.
"""

import functools
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import structlog

from telemetry.events import LogEvent

if TYPE_CHECKING:
    # Only for annotations: at runtime this import needs the extra `traces`.
    from telemetry.recording import OtlpRecorder, OtlpSpan

_log = structlog.get_logger("queryd.traces")

_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")
_Work = Callable[_Given, Coroutine[Any, Any, _Answer]]


class SpanName(StrEnum):
    """What a span is about, in the order of a query's way."""

    # A request came without a trace of its own: ours begins.
    RECEIVE = "queryd.receive"
    # The request becomes a row; it shares its transaction with others.
    ADMIT = "queryd.admit"
    # One attempt, with what it does inside it.
    ATTEMPT = "queryd.attempt"
    CLAIM = "queryd.claim"
    EXECUTE = "queryd.execute"
    STORE = "queryd.store"
    FINISH = "queryd.finish"
    # A query that nobody holds is ended.
    REAP = "queryd.reap"
    # An event goes from the outbox to Kafka, and from there to Postgres state.
    PUBLISH = "queryd.publish"
    PROJECT = "queryd.project"
    # Records are written again: linked to what they were, and the parent of what becomes of them now.
    REPLAY = "queryd.replay"


class SpanAttribute(StrEnum):
    """Everything that a span may say beside its name and its times."""

    QUERY_ID = "queryd.query_id"
    ORG_ID = "queryd.org_id"
    ATTEMPT = "queryd.attempt"
    # An exception's class, never its text.
    ERROR = "error.type"


Attributes = Mapping[SpanAttribute, str | int]
# The `traceparent` that a span continues, and what it says.
Step = tuple[str | None, Attributes]


_recorder: "OtlpRecorder | None" = None
_NOTHING = nullcontext()


def set_up_traces(service: str) -> None:
    """Record from now on, if the environment names an endpoint and the packages are there."""
    if not _wanted(os.environ):
        return
    try:
        from telemetry.recording import OtlpRecorder  # noqa: PLC0415 — an extra that most installations lack
    except ImportError:
        _log.warning(
            LogEvent.TRACES_UNAVAILABLE, reason="install the extra `traces`: in a clone, pip install '.[traces]'"
        )
        return
    record_by(OtlpRecorder.to_endpoint(service))


def record_by(recorder: "OtlpRecorder | None") -> None:
    """Record by `recorder`, or not at all."""
    global _recorder  # noqa: PLW0603 — one a process, as the endpoint in its environment
    _recorder = recorder


def close_traces() -> None:
    """Send what was kept and record no more; returns within 2 s, whatever the endpoint does."""
    if _recorder is not None:
        _recorder.close()
    record_by(None)


def span(name: SpanName, traceparent: str | None = None, **said: str | int) -> AbstractContextManager[None]:
    """A span for as long as the context lasts, inside the present one, else continuing `traceparent`.

    `said` are attributes by the last part of their names: `query_id`, `org_id`, `attempt`.
    """
    if _recorder is None:
        return _NOTHING
    return _spanning(_recorder.start(name, traceparent, _to_attributes(said)))


def in_span(name: SpanName) -> Callable[[_Work[_Given, _Answer]], _Work[_Given, _Answer]]:
    """Decorate a coroutine function: each call is a span inside the present one."""

    def decorate(work: _Work[_Given, _Answer]) -> _Work[_Given, _Answer]:
        @functools.wraps(work)
        async def work_in_span(*given: _Given.args, **named: _Given.kwargs) -> _Answer:
            if _recorder is None:
                return await work(*given, **named)
            with span(name):
                return await work(*given, **named)

        return work_in_span

    return decorate


@contextmanager
def spans(name: SpanName, steps: Iterable[Step]) -> Iterator[list["OtlpSpan"]]:
    """A span for each of the steps that are taken together; they all end with the context.

    An empty list where nothing is recorded; `steps` is then not even looked at.
    """
    if _recorder is None:
        yield []
        return
    with ExitStack() as stack:
        started = [_recorder.start(name, traceparent, attributes) for traceparent, attributes in steps]
        for each in started:
            stack.push(_Ending(each))
        yield started


def within(started: Sequence["OtlpSpan"], place: int) -> AbstractContextManager[None]:
    """What begins within the context continues the span at that place, if `spans` began any."""
    return started[place].current() if started else _NOTHING


@contextmanager
def linked_spans(name: SpanName, links: Sequence[str | None]) -> Iterator[Sequence[str | None]]:
    """A span for each of the `traceparent`s, at the root of a trace of its own and linked to it; they all end with the
    context. Their own `traceparent`s, None where nothing is recorded."""
    if _recorder is None:
        yield [None] * len(links)
        return
    with ExitStack() as stack:
        started = [_recorder.start(name, None, {}, () if link is None else (link,)) for link in links]
        for each in started:
            stack.push(_Ending(each))
        yield [each.traceparent for each in started]


def begin_trace() -> str | None:
    """The `traceparent` of a new trace, for a query that came without one; None where nothing is recorded."""
    if _recorder is None:
        return None
    root = _recorder.start(SpanName.RECEIVE, None, {})
    root.end()
    return root.traceparent


def find_current(traceparent: str) -> str | None:
    """The present span's own `traceparent`, if it is of the same trace as the given one."""
    if _recorder is None:
        return None
    current = _recorder.find_current()
    return current if current is not None and current[3:35] == traceparent[3:35] else None


class _Ending:
    """Ends a span with the context, and says by what."""

    def __init__(self, running: "OtlpSpan") -> None:
        self._running = running

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._running.end(error)


@contextmanager
def _spanning(running: "OtlpSpan") -> Iterator[None]:
    with _Ending(running), running.current():
        yield


def _wanted(environment: Mapping[str, str]) -> bool:
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or environment.get("OTEL_TRACES_EXPORTER", "").lower() == "none"
    )
    named = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return bool(named) and not off


def _to_attributes(said: Mapping[str, str | int]) -> Attributes:
    return {SpanAttribute[name.upper()]: value for name, value in said.items()}
