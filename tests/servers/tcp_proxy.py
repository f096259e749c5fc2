"""A TCP proxy in a thread of its own, whose links can be made to refuse, cut, hang, crawl or lose answers.

What goes from client to server is called the request, what comes back the answer. Every method may be called from any
thread, and has taken effect when it returns.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

_LOOPBACK = "127.0.0.1"
_CHUNK = 65_536
# Closing a socket that lingers for no time sends RST instead of FIN.
_RESET = struct.pack("ii", 1, 0)
# A method's effect takes microseconds in the proxy's loop; a busy machine may take its time.
_EFFECT_SECONDS = 10.0
# Small enough pieces that a slow link trickles instead of stuttering.
_PIECES_PER_SECOND = 20
# An answer that comes in several pieces has come whole when nothing followed for this long, on a loopback.
_ANSWERED_SECONDS = 0.05


class Mode(StrEnum):
    """What happens to the bytes of every connection."""

    PASS = "pass"
    REFUSE = "refuse"
    HANG = "hang"
    SWALLOW = "swallow"


class Trigger:
    """Something that will happen once to the first connection whose request holds a pattern."""

    def __init__(self) -> None:
        self._fired = threading.Event()

    @property
    def fired(self) -> bool:
        """True once its connection has been cut."""
        return self._fired.is_set()

    def wait(self, seconds: float) -> bool:
        """Block until it fired, or for so long; whether it has fired."""
        return self._fired.wait(seconds)

    def fire(self) -> None:
        """Called by the proxy."""
        self._fired.set()


@dataclass(slots=True, eq=False)
class _Snare:
    """A pattern to look for; `forward` says whether the server still gets it."""

    request: bytes
    answer: bytes
    forward: bool
    trigger: Trigger
    taken: bool = False


@dataclass(slots=True, eq=False)
class _Link:
    """One connection. `tail` is the end of the request so far: a pattern may come in two pieces."""

    client: socket.socket
    server: socket.socket | None = None
    task: asyncio.Task[None] | None = None
    requested: int = 0
    tail: bytes = b""
    # Once caught, answers are dropped and gathered here.
    snare: _Snare | None = None
    dropped: bytes = b""
    ending: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _State:
    mode: Mode = Mode.PASS
    bytes_per_second: float | None = None
    cut_after: int | None = None
    accepted: int = 0
    links: set[_Link] = field(default_factory=set)
    snares: list[_Snare] = field(default_factory=list)


class TcpProxy:
    """Listens on a loopback port and connects each client to the target. A context manager, or `start` and `stop`."""

    def __init__(self, target_host: str, target_port: int, port: int = 0) -> None:
        """`port` 0 is any free one; `port` holds it from the start."""
        self._target = (target_host, target_port)
        self._listener = socket.create_server((_LOOPBACK, port), backlog=512)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._state = _State()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._run, name=f"tcp-proxy-{self.port}", daemon=True)

    def start(self) -> None:
        """Accept connections from here on."""
        self._thread.start()

    def stop(self) -> None:
        """Cut everything and let go of the port; once more does nothing."""
        if not self._thread.is_alive():
            return
        self._do(self._cut_all)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_EFFECT_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def open_connections(self) -> int:
        """How many connections there are now."""
        return len(self._state.links)

    @property
    def accepted_connections(self) -> int:
        """How many there have been."""
        return self._state.accepted

    def pass_through(self) -> None:
        """Be a faithful link again: what `hang` has kept back flows on, and what was armed is disarmed."""
        self._do(lambda: self._enter(Mode.PASS))

    def refuse(self) -> None:
        """Close new connections at once, and cut all there are."""
        self._do(lambda: self._enter(Mode.REFUSE), self._cut_all)

    def cut(self) -> None:
        """Cut all connections now, with RST both ways, then be a faithful link for new ones."""
        self._do(self._cut_all, lambda: self._enter(Mode.PASS))

    def hang(self) -> None:
        """Accept, and forward nothing in either direction, of the connections that there are neither."""
        self._do(lambda: self._enter(Mode.HANG))

    def slow(self, bytes_per_second: float) -> None:
        """Let each connection have so many bytes a second in each direction."""

        def crawl() -> None:
            self._enter(Mode.PASS)
            self._state.bytes_per_second = bytes_per_second

        self._do(crawl)

    def swallow_answers(self) -> None:
        """Forward requests and drop every answer from here on. `cut` then ends them: the answers are lost."""
        self._do(lambda: self._enter(Mode.SWALLOW))

    def cut_after(self, request_bytes: int) -> None:
        """Cut the first connection that asks for more than so many bytes from here on; it forwards exactly these."""

        def arm() -> None:
            for link in self._state.links:
                link.requested = 0
            self._state.cut_after = request_bytes

        self._do(arm)

    def lose_answer(self, request: bytes, answer: bytes = b"") -> Trigger:
        """Forward the next request that holds `request`, drop what is answered, then cut that connection. Once.

        It is cut when the dropped bytes hold `answer` and nothing has come for 50 ms: the server has done it by then.
        Statements that a connection has prepared go by name: look for one of their values instead.
        """
        return self._arm(_Snare(request, answer, forward=True, trigger=Trigger()))

    def cut_before(self, request: bytes) -> Trigger:
        """Cut the next connection whose request holds `request`, before the server gets it. Once."""
        return self._arm(_Snare(request, b"", forward=False, trigger=Trigger()))

    def _arm(self, snare: _Snare) -> Trigger:
        self._do(lambda: self._state.snares.append(snare))
        return snare.trigger

    # From here on everything runs in the proxy's own loop.

    def _do(self, *actions: Callable[[], None]) -> None:
        async def run() -> None:
            for action in actions:
                action()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(_EFFECT_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        accepting = self._loop.create_task(self._accept())
        try:
            self._loop.run_forever()
        finally:
            self._listener.close()
            accepting.cancel()
            left = [link.task for link in self._state.links if link.task is not None]
            self._loop.run_until_complete(asyncio.gather(accepting, *left, return_exceptions=True))
            self._loop.close()

    def _enter(self, mode: Mode) -> None:
        self._state.mode = mode
        self._state.bytes_per_second = None
        self._state.cut_after = None
        self._state.snares.clear()
        if mode is Mode.HANG:
            self._flowing.clear()
        else:
            self._flowing.set()

    def _cut_all(self) -> None:
        for link in tuple(self._state.links):
            self._cut(link)

    def _cut(self, link: _Link) -> None:
        """Reset both ends; the task that served them finds them closed."""
        if link not in self._state.links:
            return
        self._state.links.discard(link)
        if link.ending is not None:
            link.ending.cancel()
        if link.task is not None and link.task is not asyncio.current_task(self._loop):
            link.task.cancel()
        for end in (link.client, link.server):
            if end is not None:
                self._close(end, reset=True)

    def _close(self, end: socket.socket, *, reset: bool) -> None:
        if end.fileno() < 0:
            return
        # The loop must forget a descriptor before it can be another socket's.
        self._loop.remove_reader(end)
        self._loop.remove_writer(end)
        with suppress(OSError):
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            else:
                end.shutdown(socket.SHUT_WR)
        end.close()

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            self._state.accepted += 1
            if self._state.mode is Mode.REFUSE:
                self._close(client, reset=True)
                continue
            client.setblocking(False)
            link = _Link(client)
            self._state.links.add(link)
            link.task = self._loop.create_task(self._serve(link))

    async def _serve(self, link: _Link) -> None:
        try:
            await self._flowing.wait()
            link.server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            link.server.setblocking(False)
            await self._loop.sock_connect(link.server, self._target)
            for end in (link.client, link.server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(link.client, link.server, lambda data: self._request(link, data)))
                both.create_task(self._pump(link.server, link.client, lambda data: self._answer(link, data)))
        except* OSError:
            # The target is away, or one end was reset: so is the other then.
            self._cut(link)
        except* _Cut:
            self._cut(link)
        finally:
            self._state.links.discard(link)
            link.client.close()
            if link.server is not None:
                link.server.close()

    async def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        forward: Callable[[bytes], Coroutine[Any, Any, bytes]],
    ) -> None:
        """One direction, until its source ends; then the sink is told so and the other direction goes on."""
        while True:
            size = self._piece()
            data = await self._loop.sock_recv(source, size)
            # What arrived while the link hangs, its end too, waits here.
            await self._flowing.wait()
            if not data:
                with suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)
                return
            passed = await forward(data)
            if passed:
                await self._loop.sock_sendall(sink, passed)
            if self._state.bytes_per_second is not None:
                await asyncio.sleep(len(data) / self._state.bytes_per_second)

    def _piece(self) -> int:
        rate = self._state.bytes_per_second
        return _CHUNK if rate is None else max(1, min(_CHUNK, int(rate / _PIECES_PER_SECOND)))

    async def _request(self, link: _Link, data: bytes) -> bytes:
        limit = self._state.cut_after
        if limit is not None and link.requested + len(data) > limit:
            assert link.server is not None
            await self._loop.sock_sendall(link.server, data[: limit - link.requested])
            self._state.cut_after = None
            # In order, so that the server reads them before it meets the end: an RST would throw them away.
            self._close(link.server, reset=False)
            raise _Cut
        link.requested += len(data)
        self._look(link, data)
        return data

    def _look(self, link: _Link, data: bytes) -> None:
        seen = link.tail + data
        for snare in self._state.snares:
            if not snare.taken and snare.request in seen:
                snare.taken = True
                self._state.snares.remove(snare)
                if not snare.forward:
                    self._end(link, snare)
                    raise _Cut
                link.snare = snare
                break
        longest = max((len(snare.request) for snare in self._state.snares), default=1)
        link.tail = seen[-(longest - 1) :] if longest > 1 else b""

    async def _answer(self, link: _Link, data: bytes) -> bytes:
        if link.snare is not None:
            self._drop(link, link.snare, data)
            return b""
        return b"" if self._state.mode is Mode.SWALLOW else data

    def _drop(self, link: _Link, snare: _Snare, data: bytes) -> None:
        link.dropped += data
        if snare.answer in link.dropped:
            if link.ending is not None:
                link.ending.cancel()
            link.ending = self._loop.call_later(_ANSWERED_SECONDS, self._end, link, snare)

    def _end(self, link: _Link, snare: _Snare) -> None:
        self._cut(link)
        snare.trigger.fire()


class _Cut(Exception):
    """This connection ends here."""
