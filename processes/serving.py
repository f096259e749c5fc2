"""The child's side: serve the parent's requests, and end at once when the parent is gone."""

import ctypes
import os
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

# Names the file descriptor on which the parent sends notices.
NOTICES_VARIABLE = "QUERYD_NOTICES_FD"

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1

# EX_SOFTWARE of sysexits.h: a handler raised what it had not expected.
FAULTY_HANDLER = 70


def serve(handle: Handler, notice: Notice) -> None:
    """Answer requests until the parent goes; never returns.

    `handle` runs on the calling thread, which should be the main thread, because only that one has the large stack.
    This thread also reads the requests. A second thread calls `notice` for one-way messages, even while a request runs.
    A handler answers its own errors: one that raises ends the process, for nothing in it can be trusted any more.
    """
    _outlive_signals()
    _die_with_parent()
    incoming, outgoing = _take_standard_pipes()
    notices = int(os.environ.pop(NOTICES_VARIABLE))
    threading.Thread(target=_receive_notices, args=(notices, notice), name="notices", daemon=True).start()

    def send(message: Message) -> None:
        _send(outgoing, message)

    try:
        while (message := _receive(incoming)) is not None:
            number = message["id"]

            def tell(told: Message, number: int = number) -> None:
                send({"id": number, "told": told})

            send({"id": number, "body": handle(message["body"], tell)})
    except BaseException:  # noqa: BLE001 - after any error the process can't be trusted
        sys.excepthook(*sys.exc_info())
        os._exit(FAULTY_HANDLER)
    os._exit(0)


def _take_standard_pipes() -> tuple[int, int]:
    """Move the protocol to other file descriptors, so that the child's own prints and reads can't disturb it."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    return incoming, outgoing


def _receive_notices(notices: int, notice: Notice) -> None:
    try:
        while (message := _receive(notices)) is not None:
            notice(message)
    finally:
        # The parent is gone or sent an invalid frame: its query must not continue.
        os._exit(0)


def _receive(pipe: int) -> Message | None:
    """The parent's next message, or None when the parent has gone."""
    header = _receive_exactly(pipe, frames.HEADER.size)
    if header is None:
        return None
    body = _receive_exactly(pipe, frames.body_length(header))
    return None if body is None else frames.decode(body)


def _receive_exactly(pipe: int, length: int) -> bytes | None:
    received = bytearray()
    while len(received) < length:
        some = os.read(pipe, min(length - len(received), 1 << 20))
        if not some:
            return None
        received += some
    return bytes(received)


def _send(pipe: int, message: Message) -> None:
    """Write one whole frame; end the process when the parent has gone."""
    unsent = memoryview(frames.encode(message))
    while unsent:
        try:
            unsent = unsent[os.write(pipe, unsent) :]
        except BrokenPipeError:
            os._exit(0)


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
