"""Looking before something is registered: at a dataset's rows and a saved query's text, by the engine itself."""

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from access.visibility import InvalidRegistration
from db.data.datasets import NewDataset
from engines.duckdb.describing import describe
from engines.duckdb.pool import DuckDBEngine
from engines.protocol import Engine, EngineCrashed, EngineUnavailable, Inspected, QueryFailed, Relation, RelationKind
from queryd.events import Column, ErrorCode
from service.settings import Settings
from service.wiring import duckdb_settings

# Listing a hundred thousand objects takes this long; a person waits.
_LOOK_SECONDS = 60.0

_Answer = TypeVar("_Answer")


class CantLook(Exception):
    """Nothing is known against what was to be looked at, but it can't be reached from here; the sentence says why."""


def look(settings: Settings, work: Callable[["Looker"], Awaitable[_Answer]]) -> _Answer:
    """The answer of `work`, which gets an engine of its own. Raises `CantLook` and whatever `work` raises."""

    async def run() -> _Answer:
        async with opened_looker(settings) as looker:
            return await work(looker)

    return asyncio.run(run())


@asynccontextmanager
async def opened_looker(settings: Settings) -> AsyncIterator["Looker"]:
    """A looker with one child process, which reads with the datasets' credentials; raises `CantLook`."""
    with tempfile.TemporaryDirectory(prefix="queryd-look-") as folder:
        engine = DuckDBEngine(duckdb_settings(settings, Path(folder)), 1)
        try:
            await engine.start()
            yield Looker(engine, Path(folder))
        except EngineUnavailable as error:
            raise CantLook(str(error)) from error
        finally:
            await engine.close()


class Looker:
    """An engine and a folder for what it writes."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._numbers = itertools.count(1)

    async def read_columns(self, dataset: NewDataset) -> tuple[Column, ...]:
        """The dataset's columns as the engine names them. All of them can be read if it answers.

        Raises `InvalidRegistration` where they can't, and `CantLook`.
        """
        scratch = self._folder / f"look-{next(self._numbers)}"
        scratch.mkdir()
        relation = Relation(dataset.name, RelationKind(dataset.kind), dataset.location, version="candidate")
        try:
            return await describe(self._engine, relation, scratch, _LOOK_SECONDS)
        except QueryFailed as failed:
            raise _explain(failed, dataset) from None
        except EngineCrashed:
            raise InvalidRegistration("the engine's process dies when it reads the dataset") from None
        except EngineUnavailable as error:
            raise CantLook(str(error)) from error

    async def inspect(self, sql: str) -> Inspected:
        """What a statement names; raises `InvalidRegistration` with the gate's reason where it may not run."""
        try:
            return await self._engine.inspect(sql)
        except QueryFailed as failed:
            raise InvalidRegistration(failed.message) from None
        except EngineCrashed:
            raise InvalidRegistration("the engine's process dies when it parses the SQL") from None


def _explain(failed: QueryFailed, dataset: NewDataset) -> Exception:
    """What to tell the person who registers, who knows neither the engine's sentences nor its view of the store."""
    match failed.code:
        case ErrorCode.QUERY_TIMEOUT:
            return CantLook(f"reading the dataset takes longer than {_LOOK_SECONDS:.0f} s")
        case ErrorCode.ENGINE_UNAVAILABLE:
            return InvalidRegistration(
                "the credentials for datasets may not read it (QUERYD_DATASETS_ACCESS_KEY_ID, QUERYD_DATASETS_PG_URL)"
            )
        case ErrorCode.QUERY_ERROR if dataset.kind == RelationKind.POSTGRES:
            return InvalidRegistration(f"the datasets' Postgres has no table or view {dataset.location}")
        case _:
            return InvalidRegistration(f"the dataset can't be read: {failed.message}")
