"""`queryd replay state-db`."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from db.data.replays import ReplayStatus
from db.health import STATE, require_schema
from replay.journal import opened_journal
from replay.plan import OnProgress
from replay.rebuild.rebuild import Found, Rebuild, Rebuilt, carry_out, opened
from replay.rebuild.source import SourceName
from replay.spec import ReplayName
from service.cli.output import INTERRUPTED, complain, print_fields, print_json, print_rows
from service.cli.progress import Bar
from service.cli.replay_options import PlanOptions, with_options
from service.cli.replay_output import say_how_to_execute
from service.cli.replay_running import run_replay
from service.settings import Settings, load_settings
from service.wiring import opened_data_pool
from telemetry.logs import set_up_logs

# True at any early end: the swap is one transaction.
_LEFT = "; the live table is whole. If it had begun, `queryd replay list` has its id: resume or cancel it"


@with_options
def state_db(
    plan: PlanOptions,
    source: Annotated[
        SourceName, typer.Option(help="What to rebuild from; Postgres data where the log no longer reaches.")
    ] = SourceName.LOG,
) -> None:
    """The state database made anew beside the live one, and then swapped. Readers and projectors go on."""
    if plan.execute is not None:
        plan.require_reason()
    settings = _prepare()
    if plan.execute is None:
        with Bar("reading", quiet=plan.as_json) as bar:
            found = run_replay(settings, _plan(settings, source, bar.show), _LEFT)
        _print_plan(found, plan.as_json)
        return
    _carry_out(settings, str(uuid.uuid4()), plan.as_json, (plan, source))


def resume_state_db(replay_id: str, as_json: bool) -> None:
    """Do a rebuild that was left once more, from its start: what it had made went with its process."""
    _carry_out(_prepare(), replay_id, as_json, None)


def _prepare() -> Settings:
    # An event that can't be read is reported on stderr; stdout is for the answer.
    set_up_logs("ERROR")
    return load_settings()


# What a new rebuild begins with; None to resume one.
_Order = tuple[PlanOptions, SourceName] | None


def _carry_out(settings: Settings, replay_id: str, as_json: bool, order: _Order) -> None:
    with Bar("reading", quiet=as_json) as bar:
        try:
            rebuilt = run_replay(settings, _begin_or_resume(settings, replay_id, order, bar.show), _LEFT)
        except KeyboardInterrupt:
            complain(f"stopped{_LEFT}", INTERRUPTED)
    _print_done(replay_id, rebuilt, as_json)


async def _plan(settings: Settings, source: SourceName, on_progress: OnProgress) -> Found:
    async def report(read: int, total: int) -> None:
        on_progress(read, total)

    async with _opened_rebuild(settings, source) as rebuild:
        await rebuild.stage(report)
        return await rebuild.plan()


async def _begin_or_resume(settings: Settings, replay_id: str, order: _Order, on_progress: OnProgress) -> Rebuilt:
    async with opened_journal(settings.data_url.get_secret_value()) as journal:
        if order is None:
            row = (await journal.resume(replay_id)).plan
        else:
            row = {"source": order[1].value, "hash": order[0].execute}
        async with _opened_rebuild(settings, SourceName(row["source"])) as rebuild:
            if order is not None:
                rebuild.check(row["hash"])
                await journal.begin(
                    replay_id=replay_id,
                    kind=ReplayName.STATE_DB,
                    actor=order[0].actor,
                    reason=order[0].require_reason(),
                    plan=row,
                )
            return await carry_out(rebuild, journal, replay_id, row["hash"], on_progress)


@asynccontextmanager
async def _opened_rebuild(settings: Settings, source: SourceName) -> AsyncIterator[Rebuild]:
    state_url = settings.state_url.get_secret_value()
    await require_schema(state_url, STATE)
    async with opened_data_pool(settings) as pool, opened(source, state_url, pool, settings.kafka) as rebuild:
        yield rebuild


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
    say_how_to_execute(found.hash, "nothing was changed")


def _print_done(replay_id: str, rebuilt: Rebuilt, as_json: bool) -> None:
    if as_json:
        print_json({"id": replay_id, "status": ReplayStatus.DONE, **rebuilt.describe()})
        return
    difference = rebuilt.found.difference
    print(f"replay {replay_id}: {ReplayStatus.DONE}, {rebuilt.found.queries} queries stand in the state database")
    fields: dict[str, Any] = {
        "rows added": difference.missing,
        "rows put right": difference.stale,
        "rows removed": difference.surplus,
        "tasks moved": rebuilt.tasks,
    }
    print_fields(fields)
