"""List and delete a bucket's objects and uploads for retention, page by page, with boto3 in threads."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from results.store import StoreAccess, StoreUnavailable, classified

_Item = TypeVar("_Item")
_Marker = dict[str, str]

# What S3 lists or deletes in one call at most.
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Listed:
    """An object, or with an `upload_id` an unfinished upload to its key. `modified` is on the store's clock."""

    key: str
    modified: datetime
    upload_id: str


@dataclass(frozen=True, slots=True)
class Page:
    """At most 1,000 entries. `told_at` is the store's time in the answer, if it has one."""

    listed: list[Listed]
    told_at: datetime | None


class Bucket:
    """One bucket. Every method raises `StoreUnavailable` and `StoreRefused`."""

    def __init__(self, access: StoreAccess, name: str) -> None:
        self._client = access.client
        self.name = name

    async def list_objects(self, prefix: str, after: str = "") -> AsyncIterator[Page]:
        """Everything under a prefix in order of keys, behind the key `after`."""
        async for page in _follow(partial(self._list_objects, prefix), {"StartAfter": after} if after else {}):
            yield page

    async def list_uploads(self, prefix: str) -> AsyncIterator[Page]:
        """Every unfinished upload to a key under a prefix."""
        async for page in _follow(partial(self._list_uploads, prefix), {}):
            yield page

    async def delete(self, keys: Iterable[str]) -> int:
        """Delete objects; a missing object is no error. Returns how many keys there were."""
        count = 0
        for some in _split(keys, _PAGE):
            await _call(self._delete, some)
            count += len(some)
        return count

    async def abort(self, uploads: Iterable[Listed]) -> int:
        """Abort uploads; a missing upload is no error. Returns how many there were."""
        count = 0
        for upload in uploads:
            await _call(self._abort, upload)
            count += 1
        return count

    def _list_objects(self, prefix: str, marker: _Marker) -> tuple[Page, _Marker | None]:
        """List a page in order of keys. The marker is the last listed key; its object may be deleted by now."""
        answer = self._client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=_PAGE, **marker)
        listed = [Listed(each["Key"], each["LastModified"], "") for each in answer.get("Contents", ())]
        more = {"StartAfter": listed[-1].key} if answer["IsTruncated"] and listed else None
        return _to_page(answer, listed), more

    def _list_uploads(self, prefix: str, marker: _Marker) -> tuple[Page, _Marker | None]:
        """List a page in the store's order. S3 continues after a key and upload id, others after an upload id."""
        answer = self._client.list_multipart_uploads(Bucket=self.name, Prefix=prefix, MaxUploads=_PAGE, **marker)
        listed = [Listed(each["Key"], each["Initiated"], each["UploadId"]) for each in answer.get("Uploads", ())]
        next_marker = {name: answer.get(f"Next{name}") for name in ("KeyMarker", "UploadIdMarker")}
        more = {name: value for name, value in next_marker.items() if value} if answer["IsTruncated"] else None
        return _to_page(answer, listed), None if more == marker else more

    def _delete(self, keys: list[str]) -> None:
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            left = self._client.delete_objects(Bucket=self.name, Delete=wanted).get("Errors", ())
        except ClientError as error:
            # The bucket of an earlier setting may be deleted, with its objects.
            if _code(error) != "NoSuchBucket":
                raise
            return
        if left:
            # Report only S3's error codes, since keys and messages must not reach the log.
            codes = sorted({str(each.get("Code", "unknown")) for each in left})
            raise StoreUnavailable(f"the store did not delete {len(left)} objects: {', '.join(codes)}")

    def _abort(self, upload: Listed) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self.name, Key=upload.key, UploadId=upload.upload_id)
        except ClientError as error:
            if _code(error) != "NoSuchUpload":
                raise


def split_location(location: str) -> tuple[str, str]:
    """Bucket and prefix of an `s3://bucket/prefix/`."""
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    return bucket, prefix


async def _follow(list_page: Callable[[_Marker], tuple[Page, _Marker | None]], start: _Marker) -> AsyncIterator[Page]:
    marker: _Marker | None = start
    while marker is not None:
        page, marker = await _call(list_page, marker)
        yield page


async def _call(call: Callable[..., _Item], *arguments: Any) -> _Item:
    with classified():
        return await asyncio.to_thread(call, *arguments)


def _to_page(answer: Any, listed: list[Listed]) -> Page:
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return Page(listed, None if date is None else parsedate_to_datetime(date))


def _split(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code"))
