"""A proxy in front of the brokers of a Kafka cluster that delays an EndTxn request, or drops its answer.

It knows Kafka's framing and nothing of the messages but the API key and the correlation id. In answers it replaces the
brokers' addresses by its own, whose length is the same: a host's name is followed by the port as four bytes.
"""

import asyncio
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

_END_TXN = 26
_EFFECT_SECONDS = 10.0
# How long a broker may take to answer what a client that is gone has requested.
_ANSWER_SECONDS = 30.0


class Trap(StrEnum):
    """What happens to the next EndTxn request."""

    # Keep it, and all that follows on its connection, until it is released.
    HOLD = "hold"
    # The same, and end the client's connection at once: the client asks again on another.
    HOLD_AND_CUT = "hold and cut"
    # Forward it, and drop the broker's answer.
    DROP_ANSWER = "drop answer"


class Caught:
    """One EndTxn request. `seen` is set when it was caught, `answered` when the broker has answered it."""

    def __init__(self, trap: Trap, loop: asyncio.AbstractEventLoop) -> None:
        self.trap = trap
        self.seen = threading.Event()
        self.answered = threading.Event()
        self.released = asyncio.Event()
        self._loop = loop

    def release(self) -> None:
        """Forward a held request to the broker."""
        self._loop.call_soon_threadsafe(self.released.set)


@dataclass(slots=True)
class _Link:
    """One connection. `waiting` are the correlation ids that the broker has yet to answer."""

    client: asyncio.StreamWriter
    waiting: set[int] = field(default_factory=set)
    caught: dict[int, Caught] = field(default_factory=dict)
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class KafkaProxy:
    """Listens on a port for each broker. A context manager; every method may be called from any thread."""

    def __init__(self, bootstrap: str) -> None:
        self._targets = [_parse(address) for address in bootstrap.split(",")]
        self._ports: list[int] = []
        self._servers: list[asyncio.Server] = []
        self._replacements: list[tuple[bytes, bytes]] = []
        self._armed: list[Caught] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kafka-proxy", daemon=True)

    @property
    def bootstrap(self) -> str:
        """The proxy's own addresses."""
        return ",".join(f"{host}:{port}" for (host, _), port in zip(self._targets, self._ports, strict=True))

    def start(self) -> None:
        """Accept connections."""
        self._thread.start()
        self._do(self._listen())

    def stop(self) -> None:
        """End all connections; a second call does nothing."""
        if not self._thread.is_alive():
            return
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_EFFECT_SECONDS)
        self._loop.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def catch(self, trap: Trap) -> Caught:
        """Set a trap for the next EndTxn request on any connection."""
        caught = Caught(trap, self._loop)

        async def arm() -> None:
            self._armed.append(caught)

        self._do(arm())
        return caught

    def disarm(self) -> None:
        """Remove the traps that have caught nothing."""

        async def clear() -> None:
            self._armed.clear()

        self._do(clear())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_EFFECT_SECONDS)

    # From here on everything runs in the proxy's own loop.

    async def _listen(self) -> None:
        for target in self._targets:
            server = await asyncio.start_server(self._serve_for(target), "127.0.0.1", 0)
            self._servers.append(server)
            self._ports.append(server.sockets[0].getsockname()[1])
        self._replacements = [
            (host.encode() + struct.pack(">i", port), host.encode() + struct.pack(">i", own))
            for (host, port), own in zip(self._targets, self._ports, strict=True)
        ]

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _serve_for(
        self, target: tuple[str, int]
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # Either side may end or be reset at any time, and a broker may be down.
            with suppress(OSError, asyncio.IncompleteReadError):
                try:
                    await self._connect(target, reader, writer)
                finally:
                    writer.close()

        return serve

    async def _connect(
        self, target: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        from_broker, to_broker = await asyncio.open_connection(*target)
        link = _Link(writer)
        answers = asyncio.create_task(self._pass_answers(link, from_broker))
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._pass_requests(link, reader, to_broker)
            # What the client has requested is done, although it is gone.
            with suppress(TimeoutError):
                await asyncio.wait_for(link.idle.wait(), _ANSWER_SECONDS)
        finally:
            answers.cancel()
            to_broker.close()

    async def _pass_requests(self, link: _Link, reader: asyncio.StreamReader, to_broker: asyncio.StreamWriter) -> None:
        while True:
            link.idle.clear() if link.waiting else link.idle.set()
            frame = await _read_frame(reader)
            key, _, correlation = struct.unpack_from(">hhi", frame)
            link.waiting.add(correlation)
            if key == _END_TXN and self._armed:
                link.caught[correlation] = caught = self._armed.pop(0)
                link.idle.clear()
                caught.seen.set()
                if caught.trap is Trap.HOLD_AND_CUT:
                    link.client.transport.abort()
                if caught.trap is not Trap.DROP_ANSWER:
                    await caught.released.wait()
            _write_frame(to_broker, frame)
            await to_broker.drain()

    async def _pass_answers(self, link: _Link, from_broker: asyncio.StreamReader) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _read_frame(from_broker)
                (correlation,) = struct.unpack_from(">i", frame)
                link.waiting.discard(correlation)
                caught = link.caught.pop(correlation, None)
                if caught is None or caught.trap is Trap.HOLD:
                    for theirs, ours in self._replacements:
                        frame = frame.replace(theirs, ours)
                    with suppress(OSError):
                        _write_frame(link.client, frame)
                        await link.client.drain()
                if caught is not None:
                    caught.answered.set()
                if not link.waiting:
                    link.idle.set()
        # The broker has ended the connection: so does the client's end.
        link.waiting.clear()
        link.idle.set()
        link.client.close()


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    (size,) = struct.unpack(">i", await reader.readexactly(4))
    return await reader.readexactly(size)


def _write_frame(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(struct.pack(">i", len(frame)) + frame)


def _parse(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)
