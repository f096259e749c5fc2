"""The child's side: serve the parent's requests, and end at once when the parent is gone."""

import ctypes
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable

from processes import frames
from processes.frames import Message

# Sends a message about a request before its answer.
Tell = Callable[[Message], None]
Handler = Callable[[Message, Tell], Message]
Notice = Callable[[Message], None]

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1

# EX_SOFTWARE of sysexits.h: a handler raised what it had not expected.
FAULTY_HANDLER = 70


class _Pipe:
    """The protocol's two file descriptors, out of the way of whatever the child prints or reads."""

    def __init__(self) -> None:
        self._incoming = os.dup(0)
        self._outgoing = os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)
        os.dup2(2, 1)
        self._writing = threading.Lock()

    def receive(self) -> Message | None:
        """The parent's next message, or None when the parent has gone."""
        header = self._receive_exactly(frames.HEADER.size)
        if header is None:
            return None
        body = self._receive_exactly(frames.body_length(header))
        return None if body is None else frames.decode(body)

    def send(self, message: Message) -> None:
        """Write one whole frame; ends the process when the parent has gone."""
        unsent = memoryview(frames.encode(message))
        with self._writing:
            while unsent:
                try:
                    unsent = unsent[os.write(self._outgoing, unsent) :]
                except BrokenPipeError:
                    os._exit(0)

    def _receive_exactly(self, length: int) -> bytes | None:
        received = bytearray()
        while len(received) < length:
            some = os.read(self._incoming, min(length - len(received), 1 << 20))
            if not some:
                return None
            received += some
        return bytes(received)


def serve(handle: Handler, notice: Notice | None = None, *, workers: int = 1) -> None:
    """Answer requests until the parent goes; never returns.

    `handle` runs one request at a time on the calling thread (a main thread has the large stack), or on that many
    threads if `workers` is above one; what it tells reaches the parent before the answer. `notice` gets one-way
    messages on the reading thread, while a request runs.
    A handler answers its own errors: one that raises ends the process, for nothing in it can be trusted any more.
    """
    _outlive_signals()
    _die_with_parent()
    pipe = _Pipe()
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, requests, notice), name="pipe", daemon=True).start()
    for number in range(1, workers):
        threading.Thread(target=_work, args=(pipe, requests, handle), name=f"worker-{number}", daemon=True).start()
    _work(pipe, requests, handle)


def _outlive_signals() -> None:
    """Leave the end to the parent: a signal to the whole group must not cut off queries that a drain waits for."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _die_with_parent() -> None:
    """Second belt on Linux: the kernel kills us even while a native call keeps the reading thread from running.

    It fires when the parent's *thread* that started us ends; that is the one of its event loop, so we are of no more
    use then either.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _read(pipe: _Pipe, requests: queue.SimpleQueue[Message], notice: Notice | None) -> None:
    try:
        while (message := pipe.receive()) is not None:
            if "id" in message:
                requests.put(message)
            elif notice is not None:
                notice(message["body"])
    finally:
        # The parent has gone, or speaks nonsense: no query of it may go on.
        os._exit(0)


def _work(pipe: _Pipe, requests: queue.SimpleQueue[Message], handle: Handler) -> None:
    try:
        while True:
            message = requests.get()
            number = message["id"]

            def tell(told: Message, number: int = number) -> None:
                pipe.send({"id": number, "told": told})

            pipe.send({"id": number, "body": handle(message["body"], tell)})
    finally:
        # Only an exception leads here, on whichever thread.
        sys.excepthook(*sys.exc_info())
        os._exit(FAULTY_HANDLER)
