"""Looking before something is registered: at a dataset's rows and a saved query's text, by the engine itself."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from access.visibility import InvalidRegistration
from db.data.datasets import NewDataset
from engines.duckdb.errors import NO_TABLE
from engines.duckdb.pool import DuckDBEngine
from engines.protocol import EngineCrashed, EngineUnavailable, Inspected, Looked, QueryFailed, Relation, RelationKind
from queryd.events import ErrorCode
from service.settings import Settings
from service.wiring import duckdb_settings

# Listing a hundred thousand objects takes this long; a person waits.
_LOOK_SECONDS = 60.0

# An error message is one line, so list only a few keys.
_MAX_NAMED = 5

_Answer = TypeVar("_Answer")


class CantLook(Exception):
    """Nothing is known against what was to be looked at, but it can't be reached from here; the sentence says why."""


def look(settings: Settings, work: Callable[["Looker"], Awaitable[_Answer]]) -> _Answer:
    """Call `work` with a `Looker` and return its answer.

    The looker has an engine of its own with one child, which has the datasets' credentials. Raises `CantLook` and
    whatever `work` raises.
    """

    async def run(folder: Path) -> _Answer:
        engine = DuckDBEngine(duckdb_settings(settings, folder), 1)
        try:
            await engine.start()
            return await work(Looker(engine))
        except EngineUnavailable as error:
            raise CantLook(str(error)) from error
        finally:
            await engine.close()

    with tempfile.TemporaryDirectory(prefix="queryd-look-") as folder:
        return asyncio.run(run(Path(folder)))


class Looker:
    """Reads datasets with an engine for registration."""

    def __init__(self, engine: DuckDBEngine) -> None:
        self._engine = engine

    async def look(self, dataset: NewDataset) -> Looked:
        """Return what the dataset holds and how its columns are read; see `check_looked`.

        Raises `InvalidRegistration` if the dataset is not readable as one table, and `CantLook`.
        """
        relation = Relation(
            dataset.name,
            RelationKind(dataset.kind),
            dataset.location,
            version="candidate",
            registered=dataset.registered,
        )
        try:
            return await self._engine.look(relation, _LOOK_SECONDS)
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


def check_looked(looked: Looked, location: str) -> None:
    """Raises `InvalidRegistration` if a column or file is unreadable, with its name and the reason."""
    if looked.unreadable:
        bucket = "/".join(location.split("/")[:3])
        keys = [f"{bucket}/{key}" for key in looked.unreadable[:_MAX_NAMED]]
        more = len(looked.unreadable) - len(keys)
        raise InvalidRegistration(
            f"a file of the dataset can't be read: {', '.join(keys)}" + (f" and {more} more" if more else "")
        )
    if troubles := [f"column {column.name} {column.trouble}" for column in looked.columns if column.trouble]:
        raise InvalidRegistration("; ".join(troubles))


def _explain(failed: QueryFailed, dataset: NewDataset) -> Exception:
    """What to tell the person who registers, who knows neither the engine's sentences nor its view of the store."""
    match failed.code:
        case ErrorCode.QUERY_TIMEOUT:
            return CantLook(f"reading the dataset takes longer than {_LOOK_SECONDS:.0f} s")
        case ErrorCode.ENGINE_UNAVAILABLE:
            return InvalidRegistration(
                "the credentials for datasets may not read it (QUERYD_DATASETS_ACCESS_KEY_ID, QUERYD_DATASETS_PG_URL)"
            )
        case ErrorCode.QUERY_ERROR if failed.message == NO_TABLE:
            return InvalidRegistration(f"the datasets' Postgres has no table or view {dataset.location}")
        case _:
            told = failed.message if failed.detail is None else f"{failed.message} {failed.detail}"
            return InvalidRegistration(f"the dataset can't be read: {told}")
