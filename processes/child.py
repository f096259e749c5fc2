"""The parent's side: a child process behind a framed pipe, awaited from asyncio."""

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from processes import frames
from processes.failpoints import FAILPOINTS_VARIABLE
from processes.frames import Message
from processes.serving import NOTICES_VARIABLE

# What Python and TLS may need from outside to start at all; nothing else of our environment reaches a child.
_PASSED_ON = ("LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", FAILPOINTS_VARIABLE)


class ChildDied(Exception):
    """The child's pipe ended: what was asked of it may or may not have happened. Start another one."""


def minimal_environment(home: Path) -> dict[str, str]:
    """An explicit environment for a child: UTC, UTF-8, its own home, no packages of the user's, nothing inherited."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        "HOME": str(home),
        "TMPDIR": str(home),
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONNOUSERSITE": "1",
        **passed_on,
    }


class ChildProcess:
    """One child, which answers one request after another. Bound to its event loop."""

    def __init__(self, process: asyncio.subprocess.Process, notices: int) -> None:
        """`notices` is the write end of the pipe for messages without answers."""
        if process.stdin is None or process.stdout is None:
            raise ValueError("a child needs both pipes")
        self._process = process
        self._notices = notices
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._listeners: dict[int, Callable[[Message], None]] = {}
        self._ended = False
        self._reader = asyncio.create_task(self._read(), name=f"child-{process.pid}")

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str], *, quiet: bool = True) -> Self:
        """Start `command` with exactly the environment `env`, in a session of its own.

        What it prints goes nowhere while `quiet` (it may quote SQL), else to our stderr. Raises `OSError` if the
        command can't be started.
        """
        read_end, write_end = os.pipe()
        # A child that reads no notices must not hold up the event loop.
        os.set_blocking(write_end, False)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env={**env, NOTICES_VARIABLE: str(read_end)},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL if quiet else None,
                start_new_session=True,
                pass_fds=(read_end,),
            )
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        return cls(process, write_end)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """False once the pipe has ended: no request will be answered any more."""
        return not self._ended

    async def request(self, message: Message, on_told: Callable[[Message], None] | None = None) -> Message:
        """Send a message and wait for its answer. Raises `ChildDied` when there will be none.

        `on_told` gets the messages that the child sends before its answer. Cancelling the request only stops the wait:
        the child continues, and its answer is dropped.
        """
        if self._ended:
            raise ChildDied("the child has ended")
        number = next(self._ids)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        if on_told is not None:
            self._listeners[number] = on_told
        try:
            await self._write({"id": number, "body": message})
            return await answer
        finally:
            del self._waiting[number]
            self._listeners.pop(number, None)
            if answer.done() and not answer.cancelled():
                # Mark a failure as seen, for it may have come while the write was what failed.
                answer.exception()

    def send_notice(self, message: Message) -> None:
        """Send a short one-way message. The child handles it even while a request runs. Raises `ChildDied`."""
        if self._ended:
            raise ChildDied("the child has ended")
        try:
            # The kernel writes up to PIPE_BUF bytes at once, so a notice is never cut.
            os.write(self._notices, frames.encode(message))
        except (BrokenPipeError, BlockingIOError):
            raise ChildDied("the child does not read any more") from None

    def kill(self) -> None:
        """End the child at once with SIGKILL; a child that has ended already is left in peace.

        Not by asyncio's own `kill`: it polls, and what it reaps there asyncio's watcher then misses.
        """
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Wait until the child has ended and its pipes are closed; returns its exit code, minus the signal's number."""
        code = await self._process.wait()
        await self._reader
        self._close_notices()
        self._stdin.close()
        with contextlib.suppress(ConnectionError):
            await self._stdin.wait_closed()
        return code

    def _close_notices(self) -> None:
        if self._notices >= 0:
            os.close(self._notices)
            self._notices = -1

    async def _write(self, message: Message) -> None:
        try:
            self._stdin.write(frames.encode(message))
            await self._stdin.drain()
        except ConnectionError:
            raise ChildDied("the child does not read any more") from None

    async def _read(self) -> None:
        try:
            while True:
                header = await self._stdout.readexactly(frames.HEADER.size)
                message = frames.decode(await self._stdout.readexactly(frames.body_length(header)))
                number = int(message["id"])
                waiting = self._waiting.get(number)
                if "told" in message:
                    if (listener := self._listeners.get(number)) is not None:
                        listener(message["told"])
                elif waiting is not None and not waiting.done():
                    waiting.set_result(message["body"])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (frames.BrokenFrame, KeyError, TypeError, ValueError):
            self.kill()
        finally:
            self._ended = True
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ChildDied("the child ended before its answer"))
