"""What do other programs import? Event types, the codec, the subscription and the client."""

import importlib
from typing import TYPE_CHECKING, Any

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
    from queryd.client import NotSubmitted, QueryClient, QueryFailed, QueryHandle

__all__ = [
    "Column",
    "Delivery",
    "ErrorCode",
    "Mode",
    "NotSubmitted",
    "OutputFormat",
    "QueryCancelRequested",
    "QueryClient",
    "QueryFailed",
    "QueryHandle",
    "QueryRequested",
    "QueryStatusChanged",
    "ResultFile",
    "Status",
    "Topic",
]

# The client brings boto3 and pyarrow, 0.3 s of imports that every child process of the service would pay for as well.
_FROM_CLIENT = frozenset({"NotSubmitted", "QueryClient", "QueryFailed", "QueryHandle"})


def __getattr__(name: str) -> Any:
    if name in _FROM_CLIENT:
        return getattr(importlib.import_module("queryd.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
