"""What a DuckDB engine is told by the service."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class DuckDBSettings:
    """Limits and reading credentials of every child.

    `memory_bytes` is DuckDB's memory_limit; the address space is four times that. `max_scratch_bytes` bounds what a
    query may spill and, apart from that, the largest file that it may write. `postgres_url` is a libpq URI or
    connection string of a role that can only read; for a child it is a connection string without the password, which
    is `postgres_password` then. Without an access key, S3 is read anonymously.
    """

    memory_bytes: int
    threads: int
    scratch_root: Path
    endpoint_url: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    postgres_url: str | None = field(default=None, repr=False)
    postgres_password: str | None = field(default=None, repr=False)
    max_scratch_bytes: int = 20 * 1024**3

    def to_message(self) -> dict[str, Any]:
        """The settings as JSON can carry them."""
        return asdict(self) | {"scratch_root": str(self.scratch_root)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Self:
        """The settings that `to_message` wrote."""
        return cls(**message | {"scratch_root": Path(message["scratch_root"])})
