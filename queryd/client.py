"""A client in a few lines: submit a query, wait for it, read its result. `queryd.async_client` is its twin."""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack
from uuid import UUID

import pyarrow as pa

from queryd.environment import read_kafka
from queryd.events import QueryStatusChanged
from queryd.feed import EventFeed
from queryd.requests import SubmitOptions
from queryd.session import KnownQuery, Session, still_waiting


class QueryHandle(KnownQuery):
    """A query: what it has come to, and its result."""

    def wait(self, timeout: float | None = None) -> QueryStatusChanged:
        """The terminal event, `Succeeded` or `Failed`.

        Raises `TimeoutError` after `timeout` seconds, `QueryDeleted`, and `ClientStopped`.
        """
        self._query.session.check_process()
        try:
            self._query.track.ended.result(timeout)
        except TimeoutError:
            raise still_waiting(timeout) from None
        return self._query.track.answer()

    def latest(self, timeout: float | None = None) -> QueryStatusChanged | None:
        """The newest event, once the log has been read for it if need be; None where the log does not know the query.

        For a query that this client has just submitted under a new id, its first event. Raises as `wait` does.
        """
        self._query.session.check_process()
        try:
            self._query.track.looked_up.result(timeout)
        except TimeoutError:
            raise still_waiting(timeout) from None
        self._query.track.check()
        return self.event

    def result(self, timeout: float | None = None) -> pa.Table:
        """The result as an Arrow table, waiting for it; it is checked against its event's size and SHA-256.

        Raises `QueryFailed`, `ResultExpired`, `ResultDamaged`, `ResultUnreadable`, and as `wait` does.
        """
        self.wait(timeout)
        return self._query.session.reader.read_table(self._query.succeeded())

    def batches(self, timeout: float | None = None) -> Iterator[pa.RecordBatch]:
        """The result batch by batch, never all of it in memory, waiting for it; raises as `result` does."""
        self.wait(timeout)
        return self._query.session.reader.read_batches(self._query.succeeded())

    def links(self, timeout: float | None = None) -> list[str]:
        """Wait for the result, then return presigned URLs of its files.

        Anybody may read the files by these URLs for one hour, or until the result expires.

        Raises `ResultInline` for a result that lies in its event, and as `result` does.
        """
        self.wait(timeout)
        return self._query.session.reader.links(self._query.succeeded())

    def cancel(self, *, user_id: str | UUID | None = None, reason: str | None = None) -> None:
        """Ask for the query to stop; see `QueryClient.cancel`."""
        _, answer = self._query.session.cancel(self.query_id, self._query.org_id, user_id, reason)
        answer.result()


class QueryClient:
    """Publishes requests and follows their status. Use it as a context manager; it is safe for several threads."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        """`kafka` is librdkafka's configuration. Raises `KafkaException` when the broker does not answer in 15 s."""
        self._session = Session(kafka)

    @classmethod
    def from_environment(cls) -> Self:
        """A client of the broker in `QUERYD_KAFKA_BOOTSTRAP`, with the librdkafka properties in `QUERYD_KAFKA_OPTIONS`;
        raises `LookupError` where no broker is set. S3 takes the standard `AWS_*` variables."""
        return cls(read_kafka())

    def submit(self, sql: str | None = None, **options: Unpack[SubmitOptions]) -> QueryHandle:
        """Publish a request; return when the broker has acknowledged it.

        Raises `TypeError` for an unknown option, `Invalid` for a wrong value, `NotSubmitted`, and `ClientStopped` after
        `close` and in a fork of the process that created the client.

        Submitting again under the same `query_id` with the same content is the same request: the handle tells what has
        come of the first. With other content it is refused into `query.requests.dead`, and the first stays.
        """
        query, answer = self._session.submit(sql, options)
        answer.result()
        return QueryHandle(query)

    def handle(self, query_id: str | UUID, *, org_id: str | UUID | None = None) -> QueryHandle:
        """A query that was submitted before, by anybody, finished or not. Publishes nothing.

        What the log knows of it is looked up in the background. `org_id` is for its `cancel`, before an event says it.
        """
        return QueryHandle(self._session.find(query_id, org_id))

    def cancel(
        self,
        query_id: str | UUID,
        *,
        org_id: str | UUID,
        user_id: str | UUID | None = None,
        reason: str | None = None,
    ) -> QueryHandle:
        """Ask for a query of that org to stop, and return once the broker has it; raises as `submit` does.

        Its terminal event confirms it: `Failed` with `QUERY_CANCELLED`, unless the query was finished before. A query
        of another org goes on as if nobody had asked.
        """
        query, answer = self._session.cancel(query_id, org_id, user_id, reason)
        answer.result()
        return QueryHandle(query)

    def events(self, *, group: str, org: str | UUID | None = None) -> EventFeed:
        """All status events, or those of one org, as a durable subscription of the caller's group: see `EventFeed`."""
        self._session.check_process()
        return EventFeed(self._session.kafka, group, org=org)

    def close(self) -> None:
        """Stop following; who still waits gets `ClientStopped`."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
