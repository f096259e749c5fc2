"""What commands share that work on Postgres data: a connection, ids as arguments, one sentence for what goes wrong."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from access.datasets import NoSuchDataset
from access.saved_queries import NoSuchSavedQuery
from access.visibility import InvalidRegistration
from db.connection import DataPool
from queryd.events import Invalid, parse_uuid
from service.cli.output import complain
from service.settings import load_settings
from service.wiring import opened_data_pool

_Answer = TypeVar("_Answer")


def with_data(work: Callable[[DataPool], Awaitable[_Answer]]) -> _Answer:
    """Run `work` and return its result; exits with 2 for a usage error."""
    settings = load_settings()

    async def run() -> _Answer:
        async with opened_data_pool(settings) as pool:
            return await work(pool)

    try:
        return asyncio.run(run())
    except InvalidRegistration as error:
        complain(str(error), 2)
    except (NoSuchDataset, NoSuchSavedQuery) as error:
        complain(str(error))


def uuid_argument(text: str, name: str) -> str:
    """A UUID given on the command line; exits with 2 for anything else."""
    try:
        return parse_uuid(text, name)
    except Invalid as error:
        complain(f"{error}; it looks like {uuid.uuid4()}", 2)


def optional_uuid(text: str | None, name: str) -> str | None:
    """The same for an option that may be left out."""
    return None if text is None else uuid_argument(text, name)
