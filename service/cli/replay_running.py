"""Run a replay command's work, and turn what is refused or away into one sentence."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from db.health import DATA, require_schema
from db.state.rebuild import RebuildUnderWay, TablesMissing, WritersBusy
from queryd.kafka.bounded_reader import LogChanged
from replay.refused import ReplayRefused
from service.cli.failures import FAILURES, describe_failure
from service.cli.output import complain
from service.settings import Settings

_Answer = TypeVar("_Answer")
_REFUSED = (ReplayRefused, LogChanged, RebuildUnderWay, TablesMissing)


def run_replay(settings: Settings, work: Coroutine[Any, Any, _Answer], hint: str = "") -> _Answer:
    """The answer of `work`; exits with one sentence if it is refused or a server is away. `hint` says how to go on."""

    async def run() -> _Answer:
        try:
            await require_schema(settings.data_url.get_secret_value(), DATA)
            return await work
        finally:
            # Close the coroutine, since Python warns about one that never started.
            work.close()

    try:
        return asyncio.run(run())
    except _REFUSED as error:
        complain(str(error))
    except WritersBusy as error:
        complain(f"Postgres state (QUERYD_STATE_URL): {error}{hint}")
    except FAILURES as error:
        complain(f"{describe_failure(error)}{hint}")
