"""What a test's own process says to its databases, statement by statement."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest


@contextmanager
def recorded_statements() -> Iterator[list[str]]:
    """The texts of all statements that go to any database while this is open, in their order, without their values."""
    statements: list[str] = []
    execute = psycopg.AsyncCursor.execute

    async def record(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        statements.append(str(query))
        return await execute(self, query, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.AsyncCursor, "execute", record)
        yield statements
