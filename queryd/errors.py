"""What a client may run into, each with what to do about it. `TimeoutError` besides: nothing is decided, wait again."""

from queryd.events import ErrorCode, QueryId, QueryStatusChanged


class ClientError(Exception):
    """Any of the errors of this module."""


class NotSubmitted(ClientError):
    """The broker did not acknowledge it: it may have arrived or not. Submit or cancel again, under the same id."""


class QueryFailed(ClientError):
    """The query ended `Failed`; `code` says why, and docs/events.md what that means."""

    def __init__(self, event: QueryStatusChanged) -> None:
        super().__init__(f"{event.error_code}: {event.error_message}")
        self.code: ErrorCode | None = event.error_code
        self.event = event


class QueryDeleted(ClientError):
    """The query and its result were deleted for good. Submit it under another id if it is still wanted."""

    def __init__(self, query_id: QueryId) -> None:
        super().__init__(f"query {query_id} was deleted for good: submit it under another id if it is still wanted")
        self.query_id = query_id


class ResultExpired(ClientError):
    """The result was kept for as long as its event said. Submit the query again, under another id."""


class ResultInline(ClientError):
    """The result is in the event, so that there is no object to link to. Read it with `result()`, or take the bytes of
    the file from `event.inline_result`."""


class ResultDamaged(ClientError):
    """The object is not what its event says: it was changed or removed behind queryd's back. Submit the query again."""


class ResultUnreadable(ClientError):
    """The file is whole, but can't be read as one table of one type a column. Ask for Parquet, or read the file itself
    by its link."""


class ClientStopped(ClientError):
    """The client follows its queries no more: it was closed, or Kafka refuses it. Make another; `handle(query_id)` of
    that one finds the queries again."""


class CommitOverdue(ClientError):
    """So many events were handed out without a `commit` that no more are read. Commit what is processed."""
