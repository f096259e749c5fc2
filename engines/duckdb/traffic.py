"""How many bytes have come in over this process's TCP connections: the only figure that moves while a query runs.

DuckDB tells what it has read when a statement has ended. Until then the kernel knows: `tcpi_bytes_received` of each
socket (<linux/tcp.h>). That includes headers and TLS, and misses what a connection received after the last look at it.
"""

import ctypes
import os
import socket
import struct

_TCP_INFO = 11
# Eight bytes of flags, 24 numbers of 32 bits, three of 64 bits, then this.
_RECEIVED = struct.Struct("=Q")
_OFFSET = 128
_DESCRIPTORS = "/proc/self/fd"


class Traffic:
    """Bytes received since it was made. On a system without /proc it always tells 0."""

    def __init__(self) -> None:
        self._before = _look()
        self._last = dict(self._before)

    def received(self) -> int:
        """Bytes received by all connections until now; one that has ended counts as when it was last seen."""
        self._last |= _look()
        return sum(count - self._before.get(connection, 0) for connection, count in self._last.items())


def _look() -> dict[str, int]:
    """Bytes received by each TCP connection, by the socket's number."""
    try:
        descriptors = os.listdir(_DESCRIPTORS)  # noqa: PTH208 - looked at often, and only their names matter
    except FileNotFoundError:
        return {}
    seen = {}
    for descriptor in descriptors:
        try:
            name = os.readlink(f"{_DESCRIPTORS}/{descriptor}")  # noqa: PTH115 - what it says is no path
        except FileNotFoundError:
            # It was closed in the meantime, as was the one by which we read the folder.
            continue
        if name.startswith("socket:") and (count := _received(int(descriptor))) is not None:
            seen[name] = count
    return seen


def _received(descriptor: int) -> int | None:
    """None for what is no TCP connection, or no longer open, or too old a kernel's."""
    # Not Python's `socket`, which would take the descriptor for its own and close it.
    answer = ctypes.create_string_buffer(_OFFSET + _RECEIVED.size)
    length = ctypes.c_uint32(len(answer))
    failed = _LIBRARY.getsockopt(descriptor, socket.IPPROTO_TCP, _TCP_INFO, answer, ctypes.byref(length))
    if failed or length.value < len(answer):
        return None
    count: int = _RECEIVED.unpack_from(answer, _OFFSET)[0]
    return count


_LIBRARY = ctypes.CDLL(None)
