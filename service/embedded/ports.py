"""Free loopback ports for servers that have to be told theirs.

A port that is free now may be taken a moment later: whoever starts a server on one is ready to try again on another,
as `service.embedded.servers` does.
"""

import random
import socket
from collections.abc import Iterable
from pathlib import Path

LOOPBACK = "127.0.0.1"

# Below this lie the ports that people remember and other software expects.
_FIRST = 10_000
# Where the kernel starts to hand out ports to outgoing connections, unless it says otherwise. A server's port must lie
# below: a client that reconnects to a dead server there can be given the server's own port and meet itself.
_USUAL_EPHEMERAL = 32_768
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
# A pair 10,000 apart needs this much room below the ephemeral ports; with less, all ports are candidates.
_ROOM = 12_000
# More picks than this without a free port mean that something else is wrong.
_PICKS = 10_000

_random = random.SystemRandom()


class NoFreePort(RuntimeError):
    """No loopback port could be had."""


def pick_ports(count: int) -> tuple[int, ...]:
    """`count` different ports that nobody listens on at 127.0.0.1. Raises `NoFreePort`."""
    return _pick(count, apart=0)


def pick_port_pair(apart: int, taken: Iterable[int] = ()) -> tuple[int, int]:
    """A free port and its partner `apart` above it, none of them in `taken`. Raises `NoFreePort`."""
    unwanted = set(taken)
    for _ in range(_PICKS):
        (port,) = _pick(1, apart)
        if not {port, port + apart} & unwanted and is_free(port + apart):
            return port, port + apart
    raise NoFreePort(f"no two free loopback ports {apart} apart")


def is_free(port: int) -> bool:
    """True when a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # As servers do, or the leavings of closed connections would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def accepts(port: int) -> bool:
    """True when somebody accepts a connection on this port of 127.0.0.1."""
    try:
        # A loopback server either accepts at once or is too busy to be called ready.
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _pick(count: int, apart: int) -> tuple[int, ...]:
    candidates = range(_FIRST, _end() - apart)
    found: set[int] = set()
    for _ in range(_PICKS):
        if len(found) == count:
            break
        port = _random.choice(candidates)
        if port not in found and is_free(port):
            found.add(port)
    if len(found) < count:
        raise NoFreePort(f"fewer than {count} loopback ports are free")
    return tuple(found)


def _end() -> int:
    """The first port that is not ours to pick."""
    try:
        ephemeral = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except OSError:
        ephemeral = _USUAL_EPHEMERAL
    return ephemeral if ephemeral - _FIRST >= _ROOM else 65_536
