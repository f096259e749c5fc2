"""The proxy of the fault tests does to a connection what it says, and nothing else."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.servers.tcp_proxy import TcpProxy

# Within this a loopback has delivered whatever it is going to deliver.
_SILENCE_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0


class Echo:
    """A server that answers every piece it receives with `<` and the piece, and remembers all it received."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.news = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        with end:
            try:
                while data := end.recv(65_536):
                    with self.news:
                        self.received += data
                        self.news.notify_all()
                    end.sendall(b"<" + data)
            except OSError:
                return

    def wait_for(self, data: bytes) -> None:
        with self.news:
            assert self.news.wait_for(lambda: data in self.received, _PATIENCE_SECONDS)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", echo.port) as running:
        yield running


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[socket.socket]:
    with _connect(proxy) as end:
        assert _ask(end, b"hello") == b"<hello"
        yield end


def _connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), _PATIENCE_SECONDS)


def _ask(end: socket.socket, data: bytes) -> bytes:
    end.sendall(data)
    answer = b""
    while len(answer) < len(data) + 1:
        piece = end.recv(65_536)
        assert piece, "the connection ended instead of answering"
        answer += piece
    return answer


def _assert_silent(end: socket.socket) -> None:
    end.settimeout(_SILENCE_SECONDS)
    with pytest.raises(TimeoutError):
        end.recv(1)
    end.settimeout(_PATIENCE_SECONDS)


def _assert_reset(end: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        while end.recv(65_536):
            pass
        raise AssertionError("it ended in order instead")


def test_it_passes_bytes_and_the_end_of_a_connection(proxy: TcpProxy, client: socket.socket) -> None:
    big = bytes(range(256)) * 4_000
    assert _ask(client, b"again") == b"<again"
    sender = threading.Thread(target=client.sendall, args=(big,))
    sender.start()
    got = bytearray()
    while got.count(b"<"[0]) < 1 or len(got.replace(b"<", b"")) < len(big.replace(b"<", b"")):
        got += client.recv(65_536)
    sender.join()
    assert bytes(got).replace(b"<", b"") == big.replace(b"<", b"")
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    assert proxy.accepted_connections == 1


def test_refuse_cuts_what_there_is_and_closes_what_comes(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.refuse()
    _assert_reset(client)
    with pytest.raises(ConnectionError), _connect(proxy) as refused:
        refused.sendall(b"x")
        _assert_reset(refused)
        raise ConnectionResetError
    proxy.pass_through()
    with _connect(proxy) as back:
        assert _ask(back, b"hello") == b"<hello"


def test_cut_resets_all_connections_and_passes_new_ones(proxy: TcpProxy, client: socket.socket) -> None:
    with _connect(proxy) as other:
        _ask(other, b"x")
        assert proxy.open_connections == 2
        proxy.cut()
        assert proxy.open_connections == 0
        _assert_reset(client)
        _assert_reset(other)
    with _connect(proxy) as back:
        assert _ask(back, b"hello") == b"<hello"


def test_hang_keeps_everything_back_until_it_passes_again(proxy: TcpProxy, client: socket.socket, echo: Echo) -> None:
    proxy.hang()
    client.sendall(b"late")
    with _connect(proxy) as other:
        other.sendall(b"later")
        _assert_silent(client)
        _assert_silent(other)
        assert echo.received == b"hello"
        proxy.pass_through()
        assert client.recv(100) == b"<late"
        assert other.recv(100) == b"<later"


def test_slow_gives_each_connection_its_rate(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.slow(20_000)
    # What was being waited for when the link became slow still comes at once.
    _ask(client, b"x")
    started = time.monotonic()
    client.sendall(b"y" * 10_000)
    got = 0
    while got < 10_000:
        got += client.recv(65_536).count(b"y")
    assert 0.3 < time.monotonic() - started < 5


def test_swallowed_answers_are_lost_but_the_server_has_the_request(
    proxy: TcpProxy, client: socket.socket, echo: Echo
) -> None:
    proxy.swallow_answers()
    client.sendall(b"COMMIT")
    echo.wait_for(b"COMMIT")
    _assert_silent(client)
    proxy.cut()
    _assert_reset(client)


def test_cut_after_forwards_exactly_so_many_bytes_once(proxy: TcpProxy, client: socket.socket, echo: Echo) -> None:
    proxy.cut_after(1_000)
    client.sendall(b"z" * 1_500)
    _assert_reset(client)
    echo.wait_for(b"z" * 1_000)
    assert echo.received == b"hello" + b"z" * 1_000
    with _connect(proxy) as back:
        assert _ask(back, b"q" * 2_000).count(b"q") >= 1_999


def test_the_answer_to_a_pattern_is_lost_once(proxy: TcpProxy, client: socket.socket, echo: Echo) -> None:
    lost = proxy.lose_answer(b"COMMIT")
    assert _ask(client, b"BEGIN") == b"<BEGIN"
    assert not lost.fired
    # In two pieces, as a network may deliver it.
    assert _ask(client, b"x COM") == b"<x COM"
    client.sendall(b"MIT y")
    _assert_reset(client)
    assert lost.wait(_PATIENCE_SECONDS)
    assert echo.received == b"helloBEGINx COMMIT y"
    with _connect(proxy) as back:
        assert _ask(back, b"COMMIT") == b"<COMMIT"


def test_an_answer_is_lost_only_when_it_is_the_one_waited_for(
    proxy: TcpProxy, client: socket.socket, echo: Echo
) -> None:
    lost = proxy.lose_answer(b"PUT", answer=b"200 OK")
    client.sendall(b"PUT")
    _assert_silent(client)
    assert not lost.fired
    client.sendall(b"200 OK")
    _assert_reset(client)
    assert lost.wait(_PATIENCE_SECONDS)
    assert echo.received == b"helloPUT200 OK"


def test_a_request_is_cut_before_the_server_gets_it(proxy: TcpProxy, client: socket.socket, echo: Echo) -> None:
    cut = proxy.cut_before(b"COMMIT")
    client.sendall(b"COMMIT")
    _assert_reset(client)
    assert cut.wait(_PATIENCE_SECONDS)
    assert echo.received == b"hello"


def test_a_target_that_is_away_is_a_cut_connection() -> None:
    # Bound and not listened on: refused, and nobody else's meanwhile.
    with socket.socket() as away:
        away.bind(("127.0.0.1", 0))
        # It may come before the client has seen its connection made.
        with TcpProxy("127.0.0.1", away.getsockname()[1]) as proxy, pytest.raises(ConnectionResetError):
            with _connect(proxy) as end:
                assert end.recv(1) == b"", "nobody could have answered"
            raise AssertionError("it ended in order instead")


def test_stop_cuts_and_gives_the_port_back(echo: Echo) -> None:
    proxy = TcpProxy("127.0.0.1", echo.port)
    proxy.start()
    with _connect(proxy) as end:
        _ask(end, b"x")
        proxy.stop()
        _assert_reset(end)
    with TcpProxy("127.0.0.1", echo.port, port=proxy.port) as again, _connect(again) as end:
        assert _ask(end, b"x") == b"<x"
