"""`queryd replay state-db`."""

import asyncio
import shlex
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

import typer

from db.data.replays import ReplayStatus
from db.health import STATE, require_schema
from db.state.rebuild import RebuildUnderWay, TablesMissing, WritersBusy
from queryd.codec import NoRegistry
from queryd.kafka.bounded_reader import LogChanged
from replay.journal import Journal, ReplayRefused, opened_journal
from replay.kinds import ReplayName
from replay.plan import PlanStale
from replay.rebuild.rebuild import Found, Rebuild, Rebuilt, opened
from replay.rebuild.source import RebuildRefused, SourceName
from service.cli.account import account
from service.cli.failures import FAILURES, describe_failure
from service.cli.output import complain, print_fields, print_json, print_rows
from service.cli.progress import PlanningBar
from service.cli.query import Json
from service.settings import Settings, load_settings
from service.wiring import opened_data_pool
from telemetry.logs import set_up_logs

_Answer = TypeVar("_Answer")
# How soon a cancel is heard; a row written that often is nothing.
_CHECKPOINT_SECONDS = 2.0
_INTERRUPTED = 130
# What is true wherever it ends early: the swap is one transaction.
_LEFT = "the live table is whole. If it had begun, `queryd replay list` has its id: resume or cancel it"


class _Cancelled(Exception):
    """Somebody asked for the replay's end."""


def state_db(
    source: Annotated[
        SourceName, typer.Option(help="What to rebuild from; Postgres data where the log no longer reaches.")
    ] = SourceName.LOG,
    execute: Annotated[str | None, typer.Option("--execute", help="Carry out the plan that has this hash.")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why, for whoever audits it.")] = None,
    by: Annotated[str | None, typer.Option("--by", help="Who; the account's name where not given.")] = None,
    as_json: Json = False,
) -> None:
    """The state database made anew beside the live one, and then swapped. Readers and projectors go on."""
    if execute is None:
        found = _run(as_json, lambda settings, told: _plan(settings, source, told))
        _print_plan(found, as_json)
        return
    if reason is None or not reason.strip():
        complain("say why: --reason is kept with the replay for whoever audits it", 2)
    order = _Order(source, execute, by or account(), reason)
    replay_id, rebuilt = _run(as_json, lambda settings, told: _begin(settings, order, told))
    _print_done(replay_id, rebuilt, as_json)


def resume_state_db(replay_id: str, as_json: bool) -> None:
    """Do a rebuild that was left once more, from its start: what it had made went with its process."""
    _, rebuilt = _run(as_json, lambda settings, told: _resume(settings, replay_id, told))
    _print_done(replay_id, rebuilt, as_json)


@dataclass(frozen=True, slots=True)
class _Order:
    source: SourceName
    plan_hash: str
    actor: str
    reason: str


_Told = Callable[[int, int], None]


async def _plan(settings: Settings, source: SourceName, told: _Told) -> Found:
    async def report(read: int, total: int) -> None:
        told(read, total)

    async with _opened_rebuild(settings, source) as rebuild:
        await rebuild.stage(report)
        return await rebuild.plan()


async def _begin(settings: Settings, order: _Order, told: _Told) -> tuple[str, Rebuilt]:
    replay_id = str(uuid.uuid4())
    async with _opened_rebuild(settings, order.source) as rebuild, opened_journal(_data_url(settings)) as journal:
        rebuild.check(order.plan_hash)
        await journal.begin(
            replay_id=replay_id,
            kind=ReplayName.STATE_DB,
            actor=order.actor,
            reason=order.reason,
            plan={"source": order.source, "hash": order.plan_hash},
        )
        return replay_id, await _carry_out(rebuild, journal, replay_id, order.plan_hash, told)


async def _resume(settings: Settings, replay_id: str, told: _Told) -> tuple[str, Rebuilt]:
    async with opened_journal(_data_url(settings)) as journal:
        plan = (await journal.resume(replay_id)).plan
        async with _opened_rebuild(settings, SourceName(plan["source"])) as rebuild:
            return replay_id, await _carry_out(rebuild, journal, replay_id, plan["hash"], told)


async def _carry_out(rebuild: Rebuild, journal: Journal, replay_id: str, plan_hash: str, told: _Told) -> Rebuilt:
    """From the start to the end. What the network or a server is to blame for leaves the replay to be resumed."""
    checkpoint = time.monotonic()

    async def report(read: int, total: int) -> None:
        nonlocal checkpoint
        told(read, total)
        if time.monotonic() - checkpoint > _CHECKPOINT_SECONDS:
            checkpoint = time.monotonic()
            status = await journal.save(replay_id, {}, {"read": read, "total": total})
            if status is not ReplayStatus.ACTIVE:
                raise _Cancelled

    try:
        rebuild.check(plan_hash)
        await rebuild.stage(report)
        rebuilt = await rebuild.swap(plan_hash)
    except _Cancelled:
        await journal.end(replay_id, ReplayStatus.CANCELLED, {})
        raise
    except PlanStale:
        await journal.end(replay_id, ReplayStatus.FAILED, {})
        raise
    await journal.end(replay_id, ReplayStatus.DONE, _describe(rebuilt))
    return rebuilt


@asynccontextmanager
async def _opened_rebuild(settings: Settings, source: SourceName) -> AsyncIterator[Rebuild]:
    state_url = settings.state_url.get_secret_value()
    await require_schema(state_url, STATE)
    async with opened_data_pool(settings) as pool, opened(source, state_url, pool, settings.kafka) as rebuild:
        yield rebuild


def _data_url(settings: Settings) -> str:
    return settings.data_url.get_secret_value()


def _run(as_json: bool, work: Callable[[Settings, _Told], Coroutine[Any, Any, _Answer]]) -> _Answer:
    """The answer of `work`, with a bar on stderr; exits with one sentence for whatever is refused or away."""
    settings = load_settings()
    # An event that can't be understood is told of on stderr: stdout is for the answer.
    set_up_logs("ERROR")
    try:
        with PlanningBar(quiet=as_json) as bar:
            return asyncio.run(work(settings, bar.show))
    except (PlanStale, RebuildRefused, ReplayRefused, RebuildUnderWay, TablesMissing, NoRegistry) as error:
        complain(str(error))
    except _Cancelled:
        complain("the rebuild was cancelled; nothing was changed")
    except KeyboardInterrupt:
        complain(f"stopped; {_LEFT}", _INTERRUPTED)
    except WritersBusy as error:
        complain(f"Postgres state (QUERYD_STATE_URL): {error}; {_LEFT}")
    except LogChanged as error:
        complain(f"Kafka request failed: {error}; {_LEFT}")
    except FAILURES as error:
        complain(f"{describe_failure(error)}; {_LEFT}")


def _describe(rebuilt: Rebuilt) -> dict[str, Any]:
    return rebuilt.found.describe() | {"tasks": rebuilt.tasks}


def _print_plan(found: Found, as_json: bool) -> None:
    if as_json:
        print_json({"kind": ReplayName.STATE_DB, "hash": found.hash, **found.describe()})
        return
    if found.reading.partitions:
        print_rows("partitions", [asdict(each) for each in found.reading.partitions])
    difference = found.difference
    print(f"of {found.reading.events} events read, {found.reading.unreadable} could not be understood")
    print(f"{found.queries} queries stand in the rebuilt table; Postgres data knows {found.queries_in_data}")
    print(f"the live table lacks {difference.missing} rows, has {difference.stale} wrong and {difference.surplus} more")
    print(f"plan: {found.hash}")
    again = shlex.join(["queryd", *sys.argv[1:]])
    print(f"nothing was changed. To carry it out: {again} --execute {found.hash} --reason 'why'")


def _print_done(replay_id: str, rebuilt: Rebuilt, as_json: bool) -> None:
    if as_json:
        print_json({"id": replay_id, "status": ReplayStatus.DONE, **_describe(rebuilt)})
        return
    difference = rebuilt.found.difference
    print(f"replay {replay_id}: {ReplayStatus.DONE}, {rebuilt.found.queries} queries stand in the state database")
    print_fields(
        {
            "rows added": difference.missing,
            "rows put right": difference.stale,
            "rows removed": difference.surplus,
            "tasks moved": rebuilt.tasks,
        }
    )
