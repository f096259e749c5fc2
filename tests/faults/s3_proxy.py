"""An HTTP proxy before the S3 server that lies, stalls and breaks as told. One thread for each connection.

It knows where a request ends and an answer begins, so that it can answer for the server, break off in the middle of a
body, or lose the answer to a write that has succeeded.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import parse_qs, urlsplit

_LOOPBACK = "127.0.0.1"
_CHUNK = 65_536
_MOST_HEAD = 65_536
# RST instead of FIN when such a socket is closed.
_RESET = struct.pack("ii", 1, 0)
# How often a connection that hangs looks whether it may go on.
_LOOK_SECONDS = 0.05
# One chunk of 64 KiB each tenth of a second: 16 MiB then take 26 s, within the client's patience for one answer.
_SLOW_SECONDS = 0.1
# As S3 has it.
_UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: 113\r\n\r\n"
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>   '
)


_NOT_IMPLEMENTED = (
    b"HTTP/1.1 501 Not Implemented\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: 124\r\n\r\n"
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>NotImplemented</Code>'
    b"<Message>If-None-Match is unknown.</Message></Error>"
)

_WRITTEN = b'HTTP/1.1 200 OK\r\nETag: "x"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'


class Mode(StrEnum):
    """What happens to every request."""

    PASS = "pass"
    UNAVAILABLE = "503"
    SLOW = "slow"
    HANG = "hang"
    # Of two kinds of servers: one that refuses conditional writes, and one that does not know what they are.
    UNCONDITIONAL = "501"
    OVERWRITING = "overwriting"


@dataclass(frozen=True, slots=True)
class _Head:
    """The head of a request or an answer, with its bytes as they came."""

    raw: bytes
    first: str
    headers: dict[str, str]

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", "0"))


class _Ended(Exception):
    """One side has gone."""


class _Stream:
    """A socket, read by lines and by lengths."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._ahead = b""

    def head(self) -> _Head:
        """Raises `_Ended` where there is none."""
        while (end := self._ahead.find(b"\r\n\r\n")) < 0:
            if len(self._ahead) > _MOST_HEAD:
                raise _Ended
            self._ahead += self._some()
        raw, self._ahead = self._ahead[: end + 4], self._ahead[end + 4 :]
        first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return _Head(raw, first, headers)

    def body(self, length: int, use: Callable[[bytes], None]) -> None:
        """Hand over exactly so many bytes, in pieces."""
        while length:
            data = self._ahead or self._some()
            data, self._ahead = data[:length], data[length:]
            length -= len(data)
            use(data)

    def rest(self, use: Callable[[bytes], None]) -> None:
        """Hand over everything until the end."""
        try:
            while True:
                use(self._ahead or self._some())
                self._ahead = b""
        except _Ended:
            return

    def line(self) -> bytes:
        """One line with its end."""
        while (end := self._ahead.find(b"\r\n")) < 0:
            self._ahead += self._some()
        line, self._ahead = self._ahead[: end + 2], self._ahead[end + 2 :]
        return line

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise _Ended from error

    def close(self, *, reset: bool = False) -> None:
        with suppress(OSError):
            if reset:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            # Wakes a thread that waits for it, which closing alone would not.
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _some(self) -> bytes:
        try:
            data = self.socket.recv(_CHUNK)
        except OSError as error:
            raise _Ended from error
        if not data:
            raise _Ended
        return data


class S3Proxy:
    """Listens on a loopback port of its own and passes HTTP/1.1 requests on to the server's port."""

    def __init__(self, target_port: int) -> None:
        self._target = (_LOOPBACK, target_port)
        self._listener = socket.create_server((_LOOPBACK, 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._state = threading.Lock()
        self._mode = Mode.PASS
        # (bytes of body after which to cut, how many more uploads to cut), and how many more answers to lose.
        self._cut_after = 0
        self._cuts = 0
        self._losses = 0
        self._open: set[_Stream] = set()
        self._stopped = False

    def start(self) -> None:
        """Accept connections from here on."""
        threading.Thread(target=self._accept, name="s3-proxy", daemon=True).start()

    def stop(self) -> None:
        """Cut everything and let go of the port."""
        self._stopped = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def enter(self, mode: Mode) -> None:
        """Treat every request so from here on; `PASS` also disarms what was armed. A slow or hung one goes on."""
        with self._state:
            self._mode = mode
            if mode is Mode.PASS:
                self._cuts = self._losses = 0

    def cut(self) -> None:
        """Cut all connections now."""
        with self._state:
            streams = tuple(self._open)
        for stream in streams:
            stream.close(reset=True)

    def cut_uploads(self, count: int, after: int) -> None:
        """Cut the next `count` writes, each when so many bytes of its body have passed, or all where it has fewer."""
        with self._state:
            self._cuts, self._cut_after = count, after

    def lose_answers(self, count: int) -> None:
        """Let the next `count` PUTs and completions of uploads succeed, and cut before the client hears of it."""
        with self._state:
            self._losses = count

    @property
    def armed(self) -> int:
        """How many uploads are still to be cut, or answers to be lost."""
        with self._state:
            return self._cuts + self._losses

    def _accept(self) -> None:
        while not self._stopped:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(_Stream(client),), name="s3-link", daemon=True).start()

    def _serve(self, client: _Stream) -> None:
        server: _Stream | None = None
        reset = True
        self._open.add(client)
        try:
            while True:
                request = client.head()
                self._wait_while_hung()
                if self._mode is Mode.UNAVAILABLE:
                    # An RST could overtake the answer.
                    reset = False
                    client.send(_UNAVAILABLE)
                    return
                conditional = "if-none-match" in request.headers
                if conditional and self._mode in (Mode.UNCONDITIONAL, Mode.OVERWRITING):
                    reset = False
                    client.body(request.length, lambda _: None)
                    client.send(_NOT_IMPLEMENTED if self._mode is Mode.UNCONDITIONAL else _WRITTEN)
                    return
                if server is None:
                    server = self._connect()
                if not self._pass(request, client, server):
                    return
        except (_Ended, OSError, ValueError):
            # One side has gone or speaks no HTTP: so does the other now.
            pass
        finally:
            self._open.discard(client)
            client.close(reset=reset)
            if server is not None:
                self._open.discard(server)
                server.close()

    def _connect(self) -> _Stream:
        end = socket.create_connection(self._target)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = _Stream(end)
        self._open.add(stream)
        return stream

    def _pass(self, request: _Head, client: _Stream, server: _Stream) -> bool:
        """One request and its answer; whether the connection may go on."""
        method = request.first.split(" ", 1)[0]
        cut_after = self._take_cut(request)
        server.send(request.raw)
        if request.headers.get("expect", "").lower() == "100-continue":
            interim = server.head()
            client.send(interim.raw)
            if interim.first.split(" ")[1] != "100":
                self._pass_body(interim, method, server, client.send)
                return False
        if not self._pass_request_body(request, client, server, cut_after):
            return False
        answer = server.head()
        if self._take_loss(request, answer):
            self._pass_body(answer, method, server, lambda _: None)
            return False
        self._wait_while_hung()
        client.send(answer.raw)
        return self._pass_body(answer, method, server, self._throttled(client.send))

    def _pass_request_body(self, request: _Head, client: _Stream, server: _Stream, cut_after: int | None) -> bool:
        if cut_after is not None:
            client.body(min(cut_after, request.length), server.send)
            return False
        if "chunked" in request.headers.get("transfer-encoding", "").lower():
            _pass_chunks(client, server.send)
        else:
            client.body(request.length, self._throttled(server.send))
        return True

    def _pass_body(self, answer: _Head, method: str, server: _Stream, use: Callable[[bytes], None]) -> bool:
        """The answer's body; whether the connection may go on after it."""
        status = answer.first.split(" ")[1]
        if method == "HEAD" or status in ("204", "304"):
            return True
        if "chunked" in answer.headers.get("transfer-encoding", "").lower():
            _pass_chunks(server, use)
        elif "content-length" in answer.headers:
            server.body(answer.length, use)
        else:
            server.rest(use)
            return False
        return answer.headers.get("connection", "").lower() != "close"

    def _throttled(self, send: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def throttled(data: bytes) -> None:
            self._wait_while_hung()
            if self._mode is Mode.SLOW:
                time.sleep(_SLOW_SECONDS)
            send(data)

        return throttled

    def _wait_while_hung(self) -> None:
        while self._mode is Mode.HANG and not self._stopped:
            time.sleep(_LOOK_SECONDS)

    def _take_cut(self, request: _Head) -> int | None:
        """After how many bytes to cut this request; None for not at all."""
        with self._state:
            if not self._cuts or not _writes(request):
                return None
            self._cuts -= 1
            return self._cut_after

    def _take_loss(self, request: _Head, answer: _Head) -> bool:
        with self._state:
            if not self._losses or not _makes_visible(request) or answer.first.split(" ")[1] != "200":
                return False
            self._losses -= 1
            return True


def _writes(request: _Head) -> bool:
    return request.first.startswith("PUT ")


def _makes_visible(request: _Head) -> bool:
    """A whole object's PUT, or the completion of a multipart upload; not one of its parts."""
    method, target, _ = request.first.split(" ", 2)
    query = parse_qs(urlsplit(target).query)
    return (method == "PUT" and "partNumber" not in query) or (method == "POST" and "uploadId" in query)


def _pass_chunks(source: _Stream, use: Callable[[bytes], None]) -> None:
    while True:
        line = source.line()
        use(line)
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        source.body(size + 2, use)
    while (line := source.line()) != b"\r\n":
        use(line)
    use(line)
