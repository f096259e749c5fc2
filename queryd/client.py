"""A client in a few lines: submit a query, wait for it, read its result."""

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from queryd.codec import Undecodable, decode_status, encode
from queryd.contract import contract
from queryd.events import (
    Delivery,
    ErrorCode,
    Invalid,
    Mode,
    OrgId,
    OutputFormat,
    Parameter,
    QueryCancelRequested,
    QueryId,
    QueryRequested,
    QueryStatusChanged,
    Topic,
)
from queryd.headers import build_headers, continue_trace, to_kafka
from queryd.outages import QUIET
from queryd.results import ResultReader

# How long a submit waits for the broker's acknowledgement before it says that it failed.
_DELIVERY_SECONDS = 30.0
# How long the broker may take to say where its topics end.
_BROKER_SECONDS = 15.0
# How long the listener blocks in one poll; only `close` waits for it.
_POLL_SECONDS = 0.2


class NotSubmitted(Exception):
    """The broker did not acknowledge it: it may have arrived or not. Submit or cancel again, under the same id."""


class QueryFailed(Exception):
    """The query ended `Failed`; `code` says why."""

    def __init__(self, event: QueryStatusChanged) -> None:
        super().__init__(f"{event.error_code}: {event.error_message}")
        self.code: ErrorCode | None = event.error_code
        self.event = event


class QueryHandle:
    """A submitted query."""

    def __init__(self, client: "QueryClient", query_id: QueryId) -> None:
        self._client = client
        self.query_id = query_id

    @property
    def event(self) -> QueryStatusChanged | None:
        """The newest event that has been seen of it."""
        return self._client._latest(self.query_id)

    def wait(self, timeout: float | None = None) -> QueryStatusChanged:
        """The terminal event, `Succeeded` or `Failed`; raises `TimeoutError` after `timeout` seconds."""
        return self._client._wait(self.query_id, timeout)

    def result(self, timeout: float | None = None) -> pa.Table:
        """The result as an Arrow table, waiting for it; raises `QueryFailed` and `TimeoutError`."""
        event = self.wait(timeout)
        if event.error_code is not None:
            raise QueryFailed(event)
        return self._client._reader().read_table(event)


class QueryClient:
    """Publishes requests and follows their status. Use it as a context manager; it is safe for several threads."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        """`kafka` is librdkafka's configuration. Raises `KafkaException` when the broker does not answer in 15 s."""
        self._kafka = dict(kafka)
        self._producer = Producer(self._kafka | QUIET | {"enable.idempotence": True, "acks": "all"})
        self._events: dict[str, QueryStatusChanged] = {}
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._failure: KafkaException | None = None
        self._consumer = self._listen()
        self._listener = threading.Thread(target=self._follow, name="queryd-client", daemon=True)
        self._listener.start()

    @classmethod
    def from_environment(cls) -> Self:
        """A client of the broker in `QUERYD_KAFKA_BOOTSTRAP`; raises `LookupError` where it is not set."""
        bootstrap = os.environ.get("QUERYD_KAFKA_BOOTSTRAP")
        if not bootstrap:
            raise LookupError(
                "QUERYD_KAFKA_BOOTSTRAP is not set: beside `queryd up`, run `set -a; . .queryd/env` first"
            )
        return cls({"bootstrap.servers": bootstrap})

    def submit(
        self,
        sql: str | None = None,
        *,
        org_id: str,
        user_id: str | None = None,
        roles: Sequence[str] = (),
        query_id: str | None = None,
        saved_query_id: str | None = None,
        parameters: Mapping[str, Parameter] | None = None,
        mode: Mode | str = Mode.INTERACTIVE,
        task_id: str | None = None,
        output_format: OutputFormat | str = OutputFormat.PARQUET,
        delivery: Delivery | str = Delivery.OBJECT,
        timeout_seconds: int | None = None,
        max_rows: int | None = None,
    ) -> QueryHandle:
        """Publish a request and return once the broker has it; raises `NotSubmitted`.

        Submitting again under the same `query_id` with the same content is the same request.
        """
        request = QueryRequested(
            query_id=QueryId(query_id or str(uuid.uuid4())),
            org_id=OrgId(org_id),
            mode=Mode(mode),
            user_id=user_id,
            roles=tuple(roles),
            sql=sql,
            saved_query_id=saved_query_id,
            parameters=dict(parameters or {}),
            task_id=task_id,
            output_format=OutputFormat(output_format),
            delivery=Delivery(delivery),
            timeout_seconds=timeout_seconds,
            max_rows=max_rows,
            requested_at=datetime.now(UTC),
        )
        self._publish(request.mode.topic, request)
        return QueryHandle(self, request.query_id)

    def cancel(
        self, query_id: str, *, org_id: str, user_id: str | None = None, reason: str | None = None
    ) -> QueryHandle:
        """Ask for a query of that org to stop, and return once the broker has it; raises `NotSubmitted`.

        Its terminal event confirms it: `Failed` with `QUERY_CANCELLED`, unless the query was finished before. A query
        of another org goes on as if nobody had asked.
        """
        cancel = QueryCancelRequested(
            QueryId(query_id), OrgId(org_id), user_id=user_id, reason=reason, requested_at=datetime.now(UTC)
        )
        self._publish(Topic.CANCELLATIONS, cancel)
        return QueryHandle(self, cancel.query_id)

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        self._listener.join()
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _publish(self, topic: Topic, request: QueryRequested | QueryCancelRequested) -> None:
        refused: list[KafkaError] = []

        def report(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                refused.append(error)

        self._producer.produce(
            topic,
            key=request.query_id.encode(),
            value=encode(request),
            headers=to_kafka(request_headers(request)),
            on_delivery=report,
        )
        if self._producer.flush(_DELIVERY_SECONDS) or refused:
            raise NotSubmitted(refused[0].str() if refused else f"no acknowledgement in {_DELIVERY_SECONDS:.0f} s")

    def _listen(self) -> Consumer:
        consumer = Consumer(
            self._kafka
            | QUIET
            # Nothing is committed: the group is only a name that the protocol wants.
            | {"group.id": f"queryd-client-{uuid.uuid4()}", "enable.auto.commit": False}
            | {"isolation.level": "read_committed"}
        )
        partitions = consumer.list_topics(Topic.STATUS, timeout=_BROKER_SECONDS).topics[Topic.STATUS].partitions
        ends = []
        for number in partitions:
            partition = TopicPartition(Topic.STATUS, number)
            # Where the topic ends now: everything about a later submit lies behind.
            _, partition.offset = consumer.get_watermark_offsets(partition, timeout=_BROKER_SECONDS)
            ends.append(partition)
        consumer.assign(ends)
        return consumer

    def _follow(self) -> None:
        while not self._closing.is_set():
            try:
                messages = self._consumer.consume(500, _POLL_SECONDS / 10)
            except KafkaException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            self._learn(messages)

    def _learn(self, messages: Sequence[Message]) -> None:
        with self._changed:
            for message in messages:
                if message.error() is not None or message.value() is None:
                    continue
                value: Any = message.value()
                try:
                    event = decode_status(value)
                except (Undecodable, Invalid):
                    # Not one of queryd's events, so not one that anybody waits for.
                    continue
                known = self._events.get(event.query_id)
                if known is None or known.sequence < event.sequence:
                    self._events[event.query_id] = event
            self._changed.notify_all()

    def _latest(self, query_id: QueryId) -> QueryStatusChanged | None:
        with self._changed:
            return self._events.get(query_id)

    def _wait(self, query_id: QueryId, timeout: float | None) -> QueryStatusChanged:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                event = self._events.get(query_id)
                if event is not None and event.status.terminal:
                    return event
                if self._failure is not None:
                    raise self._failure
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"the query is not finished after {timeout} s")
                self._changed.wait(left)

    def _reader(self) -> ResultReader:
        return ResultReader()


def request_headers(request: QueryRequested | QueryCancelRequested) -> dict[str, str]:
    """CloudEvents headers of a request, and a trace of its own."""
    name = type(request).__name__
    return build_headers(
        event_type=f"queryd.{name}",
        # A request's own id makes it the same request when it comes again; of cancels each is one of its own.
        event_id=request.query_id if isinstance(request, QueryRequested) else str(uuid.uuid4()),
        subject=request.query_id,
        time=request.requested_at or datetime.now(UTC),
        source="queryd-client",
        traceparent=continue_trace(None),
        schema=f"{name}.v{contract().newest[name].version}.avsc",
    )
