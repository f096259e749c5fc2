"""`QueryClient` for programs on asyncio: the same, awaited."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, Unpack
from uuid import UUID

import pyarrow as pa

from queryd.environment import read_kafka
from queryd.events import QueryStatusChanged
from queryd.feed import AsyncEventFeed
from queryd.registry import registry_in_use
from queryd.requests import SubmitOptions
from queryd.session import KnownQuery, Query, Session, still_waiting


class AsyncQueryHandle(KnownQuery):
    """A query: what it has come to, and its result. Use it in one event loop. Errors are those of `QueryHandle`."""

    def __init__(self, query: Query) -> None:
        super().__init__(query)
        self._ended: asyncio.Future[None] = asyncio.wrap_future(query.track.ended)
        self._looked_up: asyncio.Future[None] = asyncio.wrap_future(query.track.looked_up)

    async def wait(self, timeout: float | None = None) -> QueryStatusChanged:  # noqa: ASYNC109 — as its twin has it
        """The terminal event; see `QueryHandle.wait`."""
        self._query.session.check_process()
        await _wait_for(self._ended, timeout)
        return self._query.track.answer()

    async def latest(self, timeout: float | None = None) -> QueryStatusChanged | None:  # noqa: ASYNC109
        """The newest event, once the log has been read for it if need be; see `QueryHandle.latest`."""
        self._query.session.check_process()
        await _wait_for(self._looked_up, timeout)
        self._query.track.check()
        return self.event

    async def result(self, timeout: float | None = None) -> pa.Table:  # noqa: ASYNC109
        """The result as an Arrow table; see `QueryHandle.result`."""
        await self.wait(timeout)
        return await asyncio.to_thread(self._query.session.reader.read_table, self._query.succeeded())

    async def batches(self, timeout: float | None = None) -> AsyncIterator[pa.RecordBatch]:  # noqa: ASYNC109
        """The result batch by batch; see `QueryHandle.batches`."""
        await self.wait(timeout)
        event = self._query.succeeded()
        batches = await asyncio.to_thread(lambda: self._query.session.reader.read_batches(event))
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield batch

    async def links(self, timeout: float | None = None) -> list[str]:  # noqa: ASYNC109
        """Presigned URLs, valid for at most one hour; see `QueryHandle.links`."""
        await self.wait(timeout)
        return await asyncio.to_thread(self._query.session.reader.links, self._query.succeeded())

    async def cancel(self, *, user_id: str | UUID | None = None, reason: str | None = None) -> None:
        """Ask for the query to stop; see `QueryClient.cancel`."""
        org_id = self._query.org_id
        await _send(lambda: self._query.session.cancel(self.query_id, org_id, user_id, reason))


class AsyncQueryClient:
    """`QueryClient`, awaited: `async with AsyncQueryClient.from_environment() as client`."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        """`kafka` is librdkafka's configuration. Nothing is connected before `open`."""
        self._kafka = kafka
        self._opened: Session | None = None

    @classmethod
    def from_environment(cls) -> Self:
        """As `QueryClient.from_environment`."""
        return cls(read_kafka())

    async def open(self) -> None:
        """Begin to follow. Raises `KafkaException` when the broker does not answer in 15 s."""
        self._opened = await asyncio.to_thread(Session, self._kafka)

    async def submit(self, sql: str | None = None, **options: Unpack[SubmitOptions]) -> AsyncQueryHandle:
        """Publish a request and return once the broker has it; see `QueryClient.submit`."""
        session = self._session
        return AsyncQueryHandle(await _send(lambda: session.submit(sql, options)))

    def handle(self, query_id: str | UUID, *, org_id: str | UUID | None = None) -> AsyncQueryHandle:
        """A query that was submitted before; see `QueryClient.handle`."""
        return AsyncQueryHandle(self._session.find(query_id, org_id))

    async def cancel(
        self,
        query_id: str | UUID,
        *,
        org_id: str | UUID,
        user_id: str | UUID | None = None,
        reason: str | None = None,
    ) -> AsyncQueryHandle:
        """Ask for a query of that org to stop; see `QueryClient.cancel`."""
        session = self._session
        return AsyncQueryHandle(await _send(lambda: session.cancel(query_id, org_id, user_id, reason)))

    def events(self, *, group: str, org: str | UUID | None = None) -> AsyncEventFeed:
        """All status events, or those of one org, as a durable subscription of the caller's group."""
        return AsyncEventFeed(self._kafka, group, org=org)

    async def close(self) -> None:
        """Stop following; who still waits gets `ClientStopped`."""
        if self._opened is not None:
            await asyncio.to_thread(self._opened.close)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _session(self) -> Session:
        if self._opened is None:
            raise RuntimeError("the client is not open: `async with` it, or await its open()")
        return self._opened


async def _send(send: "Callable[[], tuple[Query, Future[None]]]") -> Query:
    """The query, once the broker has what `send` publishes."""
    # A schema registry may be asked first, and one that is away takes seconds: not in the event loop.
    query, answer = send() if registry_in_use() is None else await asyncio.to_thread(send)
    await asyncio.wrap_future(answer)
    return query


async def _wait_for(future: "asyncio.Future[None]", seconds: float | None) -> None:
    # Unlike `wait_for`, it leaves the future alone: others may wait for it, and the caller again.
    done, _ = await asyncio.wait([future], timeout=seconds)
    if not done:
        raise still_waiting(seconds)
