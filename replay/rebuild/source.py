"""What a rebuild is made from, seen by the rebuild."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from db.connection import Connection


class SourceName(StrEnum):
    """Where the whole story is: in the log, or in Postgres data, which every event was committed to before."""

    LOG = "log"
    POSTGRES = "postgres"


@dataclass(frozen=True, slots=True)
class PartitionRead:
    """A partition of the status topic: where its log begins, and the offset behind the last record that was read."""

    partition: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read: events, and such as could not be understood. `partitions` is empty where no log was read."""

    events: int
    unreadable: int
    partitions: tuple[PartitionRead, ...] = ()


# How much is read, of how much: offsets of the log, or queries of Postgres data.
Report = Callable[[int, int], Awaitable[None]]


class Source(Protocol):
    """A place to rebuild from. All its methods write into the copy that the connection holds."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a plan relies on, as JSON: with other facts it is stale."""

    @property
    def reading(self) -> Reading:
        """What has been read so far."""

    async def stage(self, connection: Connection, report: Report) -> None:
        """Fill the copy."""

    async def settle(self, connection: Connection) -> None:
        """Take in what the live table may know and the copy does not, in a transaction in which the live table stands
        still."""

    async def write_offsets(self, connection: Connection) -> None:
        """Say how far the log is read by what the copy holds, in the transaction that makes it live."""
