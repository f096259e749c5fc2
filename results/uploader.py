"""The parent's side of storing results: many uploads in flight over one process that alone may write."""

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from processes.child import ChildDied, ChildProcess, minimal_environment
from processes.frames import Message
from queryd.__main__ import room_command
from telemetry.metrics import METRICS

# Importing boto3 takes 0.2 s on an idle machine; on a starved one many times that, and waiting beats giving up.
_START_SECONDS = 60.0


class StoreUnavailable(Exception):
    """The store can't be reached, or did not answer: the object may be there or not. Wait and store again."""


class StoreRefused(Exception):
    """The store will not take the object, however often it is asked; the sentence says why. Stop."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that is there, whole: its key, its size, the store's ETag without quotes, and its SHA-256 in hex."""

    key: str
    bytes: int
    etag: str
    sha256: str


class Uploader:
    """Stores files in one bucket. `aws` is the writing process's whole say: standard `AWS_*` variables."""

    def __init__(self, bucket: str, aws: Mapping[str, str], *, quiet: bool = True) -> None:
        """`quiet` sends what the process prints nowhere. Raises `ValueError` for a variable that is not `AWS_*`."""
        if any(not name.startswith("AWS_") for name in aws):
            raise ValueError("the uploader's process takes AWS_* variables only")
        self._bucket = bucket
        self._aws = dict(aws)
        self._quiet = quiet
        self._process: ChildProcess | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        """Start the process, so that the first store does not wait for it. Raises `StoreUnavailable`."""
        await self._running()

    async def store(self, path: Path, key: str, content_type: str) -> StoredObject:
        """Put a file at a key where nothing is yet. Storing the same file there again is the same as once.

        Raises `StoreUnavailable` and `StoreRefused`; another object at that key is refused and stays as it is.
        """
        answer = await self.ask({"bucket": self._bucket, "path": str(path), "key": key, "content_type": content_type})
        return StoredObject(key, answer["bytes"], answer["etag"], answer["sha256"])

    async def ask(self, message: Message) -> Message:
        """The process's answer to any message that it knows; raises `StoreUnavailable` and `StoreRefused`."""
        process = await self._running()
        try:
            answer = await process.request(message)
        except ChildDied:
            raise StoreUnavailable("the uploading process died") from None
        if "unavailable" in answer:
            raise StoreUnavailable(answer["unavailable"])
        if "refused" in answer:
            raise StoreRefused(answer["refused"])
        return answer

    async def close(self) -> None:
        """End the process; what is still being stored raises `StoreUnavailable`."""
        self._closed = True
        async with self._starting:
            if self._process is not None:
                self._process.kill()
                await self._process.wait()
                self._process = None

    async def _running(self) -> ChildProcess:
        """The process, started again if it has died."""
        async with self._starting:
            if self._closed:
                raise StoreUnavailable("the uploader is closed")
            if self._process is not None and not self._process.alive:
                await self._process.wait()
                self._process = None
                METRICS.restart_child("uploader")
            if self._process is None:
                self._process = await self._start()
            return self._process

    async def _start(self) -> ChildProcess:
        # It never writes a file; its home only keeps it from reading the user's own AWS configuration.
        environment = minimal_environment(Path(tempfile.gettempdir()) / "queryd-has-no-home") | self._aws
        try:
            process = await ChildProcess.start(room_command("results.uploader_process"), environment, quiet=self._quiet)
        except OSError:
            raise StoreUnavailable("the uploading process can't be started") from None
        try:
            async with asyncio.timeout(_START_SECONDS):
                await process.request({"hello": True})
        except BaseException as failure:
            process.kill()
            await asyncio.shield(process.wait())
            if isinstance(failure, ChildDied | TimeoutError):
                raise StoreUnavailable("the uploading process can't be started") from None
            raise
        return process
