"""What do other programs import? Event types, the codec, the subscription and the client."""

import importlib
from typing import TYPE_CHECKING, Any

from queryd.errors import (
    ClientError,
    ClientStopped,
    CommitOverdue,
    NotSubmitted,
    QueryDeleted,
    QueryFailed,
    ResultDamaged,
    ResultExpired,
    ResultInline,
    ResultUnreadable,
)
from queryd.events import (
    Column,
    Delivery,
    ErrorCode,
    Mode,
    OutputFormat,
    QueryCancelRequested,
    QueryRequested,
    QueryStatusChanged,
    ResultFile,
    Status,
    Topic,
)

if TYPE_CHECKING:
    from queryd.async_client import AsyncQueryClient, AsyncQueryHandle
    from queryd.client import QueryClient, QueryHandle
    from queryd.environment import read_kafka
    from queryd.feed import AsyncEventFeed, AsyncStatusFeed, EventFeed, StatusFeed
    from queryd.projector import BlockingStore, Projector, Store, in_thread
    from queryd.status_records import StatusRecord
    from queryd.topics import TopicIdentity

__all__ = [
    "AsyncEventFeed",
    "AsyncQueryClient",
    "AsyncQueryHandle",
    "AsyncStatusFeed",
    "BlockingStore",
    "ClientError",
    "ClientStopped",
    "Column",
    "CommitOverdue",
    "Delivery",
    "ErrorCode",
    "EventFeed",
    "Mode",
    "NotSubmitted",
    "OutputFormat",
    "Projector",
    "QueryCancelRequested",
    "QueryClient",
    "QueryDeleted",
    "QueryFailed",
    "QueryHandle",
    "QueryRequested",
    "QueryStatusChanged",
    "ResultDamaged",
    "ResultExpired",
    "ResultFile",
    "ResultInline",
    "ResultUnreadable",
    "Status",
    "StatusFeed",
    "StatusRecord",
    "Store",
    "Topic",
    "TopicIdentity",
    "in_thread",
    "read_kafka",
]

# The client brings boto3 and pyarrow, 0.3 s of imports that every child process of the service would pay for as well.
_LATE = {
    "queryd.async_client": {"AsyncQueryClient", "AsyncQueryHandle"},
    "queryd.client": {"QueryClient", "QueryHandle"},
    "queryd.environment": {"read_kafka"},
    "queryd.feed": {"AsyncEventFeed", "AsyncStatusFeed", "EventFeed", "StatusFeed"},
    "queryd.projector": {"BlockingStore", "Projector", "Store", "in_thread"},
    "queryd.status_records": {"StatusRecord"},
    "queryd.topics": {"TopicIdentity"},
}
_MODULES = {name: module for module, names in _LATE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
