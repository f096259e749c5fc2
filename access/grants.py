"""What a caller may read."""

from collections.abc import Sequence

from db.connection import DataPool, statement
from db.data.datasets import Caller, Dataset, read_granted


async def authorize(pool: DataPool, org_id: str, user_id: str | None, roles: Sequence[str]) -> tuple[Dataset, ...]:
    """Every dataset that this org, user and roles may read, and no other; raises `DatabaseUnavailable`."""
    caller = Caller(org_id, user_id, tuple(roles))
    async with statement(pool) as connection:
        return (await read_granted(connection, [caller]))[caller]
