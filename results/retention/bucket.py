"""The parent's side of sweeping a bucket: it asks the uploader's process, which alone may list and remove."""

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Literal, TypeVar

from processes.frames import Message
from results.uploader import Uploader

_Item = TypeVar("_Item")

# What S3 lists or deletes in one call at most.
_PAGE = 1000
# An upload is aborted in a call of its own; so many keep one of the uploader's threads for a second.
_ABORTS = 100


@dataclass(frozen=True, slots=True)
class Listed:
    """An object, or with an `upload_id` an unfinished upload to its key. `modified` is on the store's clock."""

    key: str
    modified: datetime
    upload_id: str


@dataclass(frozen=True, slots=True)
class Page:
    """At most 1,000 finds. `told_at` is the store's time of the answer, where it said it."""

    listed: list[Listed]
    told_at: datetime | None


class Bucket:
    """One bucket. Every method raises `StoreUnavailable` and `StoreRefused`."""

    def __init__(self, uploader: Uploader, name: str) -> None:
        self._uploader = uploader
        self.name = name

    async def list_objects(self, prefix: str, after: str = "") -> AsyncIterator[Page]:
        """Everything under a prefix in order of keys, behind the key `after`."""
        async for page in self._list("objects", prefix, {"StartAfter": after} if after else {}):
            yield page

    async def list_uploads(self, prefix: str) -> AsyncIterator[Page]:
        """Every unfinished upload to a key under a prefix."""
        async for page in self._list("uploads", prefix, {}):
            yield page

    async def delete(self, keys: Iterable[str]) -> int:
        """Delete objects; what is not there is no error. How many keys there were."""
        return sum([await self._remove("delete", {"keys": some}, len(some)) for some in _split(keys, _PAGE)])

    async def abort(self, uploads: Iterable[Listed]) -> int:
        """Abort uploads; what is not there is no error. How many there were."""
        pairs = ([upload.key, upload.upload_id] for upload in uploads)
        return sum([await self._remove("abort", {"uploads": some}, len(some)) for some in _split(pairs, _ABORTS)])

    async def _list(self, what: Literal["objects", "uploads"], prefix: str, start: Message) -> AsyncIterator[Page]:
        marker: Message | None = start
        while marker is not None:
            answer = await self._uploader.ask(
                {"sweep": what, "bucket": self.name, "prefix": prefix, "most": _PAGE, "marker": marker}
            )
            listed = [Listed(key, datetime.fromisoformat(time), upload) for key, time, upload in answer["found"]]
            told_at = answer["told_at"]
            yield Page(listed, None if told_at is None else parsedate_to_datetime(told_at))
            marker = answer["more"]

    async def _remove(self, how: Literal["delete", "abort"], what: Message, count: int) -> int:
        await self._uploader.ask({"sweep": how, "bucket": self.name} | what)
        return count


def split_location(location: str) -> tuple[str, str]:
    """Bucket and prefix of an `s3://bucket/prefix/`."""
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    return bucket, prefix


def _split(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
