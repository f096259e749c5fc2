"""The uploader's process as a sweeper: what lies in a bucket, page by page, and its removal."""

from typing import Any

from botocore.exceptions import ClientError

from processes.frames import Message


class NotRemoved(Exception):
    """The store has kept objects that it was to delete; they can be deleted again."""


class BucketSweeper:
    """Answers messages that have a `sweep`: `objects`, `uploads`, `delete` or `abort`. `s3` is boto3's client."""

    def __init__(self, s3: Any) -> None:
        self._s3 = s3

    def handle(self, message: Message) -> Message:
        """One step; raises botocore's errors, and `NotRemoved`."""
        match message["sweep"]:
            case "objects":
                return self._list_objects(message["bucket"], message["prefix"], message["most"], message["marker"])
            case "uploads":
                return self._list_uploads(message["bucket"], message["prefix"], message["most"], message["marker"])
            case "delete":
                return self._delete(message["bucket"], message["keys"])
            case "abort":
                return self._abort(message["bucket"], message["uploads"])
            case unknown:
                raise ValueError(f"no step of a sweep is called {unknown}")

    def _list_objects(self, bucket: str, prefix: str, most: int, marker: dict[str, str]) -> Message:
        """A page in order of keys. The marker is the last key that was seen, which need not be there any more."""
        answer = self._s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=most, **marker)
        found = [[each["Key"], each["LastModified"].isoformat(), ""] for each in answer.get("Contents", ())]
        more = {"StartAfter": found[-1][0]} if answer["IsTruncated"] and found else None
        return _page(answer, found, more)

    def _list_uploads(self, bucket: str, prefix: str, most: int, marker: dict[str, str]) -> Message:
        """A page in the store's own order: S3 goes on behind a key and an upload, others behind an upload alone."""
        answer = self._s3.list_multipart_uploads(Bucket=bucket, Prefix=prefix, MaxUploads=most, **marker)
        found = [[each["Key"], each["Initiated"].isoformat(), each["UploadId"]] for each in answer.get("Uploads", ())]
        next_marker = {name: answer.get(f"Next{name}") for name in ("KeyMarker", "UploadIdMarker")}
        more = {name: value for name, value in next_marker.items() if value} if answer["IsTruncated"] else None
        return _page(answer, found, None if more == marker else more)

    def _delete(self, bucket: str, keys: list[str]) -> Message:
        """Delete at most a page; what is gone already is deleted too."""
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            left = self._s3.delete_objects(Bucket=bucket, Delete=wanted).get("Errors", ())
        except ClientError as error:
            # With an earlier setting's bucket its objects have gone as well.
            if _code(error) != "NoSuchBucket":
                raise
            left = ()
        if left:
            # A code is one of S3's words; the keys and messages stay here.
            codes = sorted({str(each.get("Code", "unknown")) for each in left})
            raise NotRemoved(f"the store keeps {len(left)} objects: {', '.join(codes)}")
        return {"deleted": len(keys)}

    def _abort(self, bucket: str, uploads: list[list[str]]) -> Message:
        for key, upload_id in uploads:
            try:
                self._s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
            except ClientError as error:
                if _code(error) != "NoSuchUpload":
                    raise
        return {"aborted": len(uploads)}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code"))


def _page(answer: Any, found: list[list[str]], more: dict[str, str] | None) -> Message:
    told_at: str | None = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return {"found": found, "more": more, "told_at": told_at}
