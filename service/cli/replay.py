"""`queryd replay`: plan, carry out, resume, list, show and cancel."""

import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from db.data.replays import ReplayStatus, list_replays
from queryd.dead_letters import DeadCode
from queryd.events import Mode
from replay.commands import Servers, begin_replay, compare_replay, list_letters, plan_replay, resume_replay
from replay.comparison import Comparison
from replay.journal import Journal, opened_journal
from replay.kinds import Skip
from replay.run import Outcome
from replay.spec import ReplayName, ReplaySpec
from service.cli.database import optional_uuid, uuid_argument
from service.cli.output import INTERRUPTED, WRONGLY_ASKED, complain, print_json, show_rows
from service.cli.progress import Bar
from service.cli.query import Json
from service.cli.rebuild import resume_state_db, state_db
from service.cli.replay_options import (
    PATIENCE_SECONDS,
    Changes,
    Codes,
    NewId,
    PaceOptions,
    Patience,
    PlanOptions,
    RecordOptions,
    ReplayId,
    read_patch,
    with_options,
)
from service.cli.replay_output import print_letters, print_outcome, print_plan, print_replay, summarize
from service.cli.replay_running import run_replay
from service.settings import Settings, load_settings
from service.wiring import opened_data_pool

app = typer.Typer(help="Write again what was written once: plan first, then carry the plan out.", no_args_is_help=True)
app.command()(state_db)

_Answer = TypeVar("_Answer")


@app.command()
@with_options
def requests(
    records: RecordOptions,
    plan: PlanOptions,
    pace: PaceOptions,
    replay_id: NewId = None,
    error_code: Codes = None,
    as_new: Annotated[bool, typer.Option("--as-new", help="Each as a new query: uuid5(replay id, query id).")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --as-new: wait for the new results and compare the contents.")
    ] = False,
    patience: Patience = PATIENCE_SECONDS,
) -> None:
    """Requests of a window again. Those that were accepted before change nothing, unless --as-new is given."""
    lanes = tuple(Mode) if records.mode is None else (records.mode,)
    spec = records.make_spec(ReplayName.REQUESTS, error_code, lanes=lanes, as_new=as_new)
    window = spec.window
    if (window.since is None or window.until is None) and window.from_offset is None:
        complain("say which requests: --since and --until, or --partition and --from-offset", WRONGLY_ASKED)
    if window.has_offsets and records.mode is None:
        complain("offsets belong to one topic: give --mode with them", WRONGLY_ASKED)
    if compare and not as_new:
        complain("--compare requires --as-new", WRONGLY_ASKED)
    _plan_or_run(spec, plan, pace, replay_id, patience=patience if compare else None)


@app.command()
@with_options
def dead_letters(
    records: RecordOptions,
    plan: PlanOptions,
    pace: PaceOptions,
    replay_id: NewId = None,
    error_code: Annotated[
        list[DeadCode] | None, typer.Option("--error-code", help="Only letters with this code.")
    ] = None,
    changes: Changes = None,
    max_redrives: Annotated[
        int, typer.Option("--max-redrives", help="Skip dead letters that were already redriven N times.", min=1)
    ] = 3,
    list_only: Annotated[
        bool, typer.Option("--list", help="Only show the letters, with the reason and time of each.")
    ] = False,
) -> None:
    """Dead letters back to their topic, changed by --set or unchanged. One whose id is taken gets a new one."""
    patch = read_patch(changes)
    spec = records.make_spec(ReplayName.DEAD_LETTERS, error_code, patch=patch, max_redrives=max_redrives)
    if list_only:
        settings = load_settings()
        print_letters(run_replay(settings, list_letters(_servers(settings), spec)), plan.as_json)
        return
    _plan_or_run(spec, plan, pace, replay_id)


@app.command()
@with_options
def status(
    records: RecordOptions,
    plan: PlanOptions,
    pace: PaceOptions,
    replay_id: NewId = None,
    error_code: Codes = None,
) -> None:
    """Each finished query's last event again, byte for byte, for subscribers that have lost it."""
    _plan_or_run(records.make_spec(ReplayName.STATUS, error_code), plan, pace, replay_id)


@app.command()
@with_options
def resume(replay_id: ReplayId, pace: PaceOptions, changes: Changes = None, as_json: Json = False) -> None:
    """Go on with a replay that was stopped or has died."""
    settings, wanted = load_settings(), uuid_argument(replay_id, "the id")
    if _in_journal(lambda journal: journal.find(wanted)).kind == ReplayName.STATE_DB:
        resume_state_db(wanted, as_json)
        return
    with Bar("publishing", quiet=as_json) as bar:
        work = resume_replay(_servers(settings), wanted, read_patch(changes), pace, bar.show)
        outcome = run_replay(settings, work, _say_how_to_resume(wanted))
    _finish(outcome, wanted, as_json)


@app.command(name="compare")
def compare_(replay_id: ReplayId, patience: Patience = PATIENCE_SECONDS, as_json: Json = False) -> None:
    """Compare the results of a replay's new queries with the old ones'. Exit code 1 unless all are the same."""
    comparison = _compare(load_settings(), uuid_argument(replay_id, "the id"), patience, quiet=as_json)
    if as_json:
        print_json(comparison.to_json())
    else:
        print(comparison.to_text())
    if not comparison.all_same:
        raise SystemExit(1)


@app.command(name="list")
def list_(limit: Annotated[int, typer.Option(help="How many.", min=1, max=10_000)] = 20, as_json: Json = False) -> None:
    """The newest replays: who, why, and how far."""
    rows = [summarize(replay) for replay in _in_journal(lambda journal: list_replays(journal.connection, limit))]
    show_rows("replays", rows, as_json)


@app.command()
def show(replay_id: ReplayId, as_json: Json = False) -> None:
    """One replay with its plan, its counts and its checkpoint."""
    wanted = uuid_argument(replay_id, "the id")
    print_replay(_in_journal(lambda journal: journal.find(wanted)), as_json)


@app.command()
def cancel(replay_id: ReplayId, as_json: Json = False) -> None:
    """End a replay before its time: at once if no process works on it, else after the batch under way."""
    wanted = uuid_argument(replay_id, "the id")
    ended = _in_journal(lambda journal: journal.cancel(wanted))
    if as_json:
        print_json({"id": wanted, "status": ended.value})
    else:
        print(f"{wanted}: {ended.value}")


def _plan_or_run(
    spec: ReplaySpec, plan: PlanOptions, pace: PaceOptions, replay_id: str | None, *, patience: float | None = None
) -> None:
    """Plan, or carry a plan out; with `patience` compare the results in the end."""
    settings, quiet = load_settings(), plan.as_json
    servers = _servers(settings)
    if plan.execute is None:
        with Bar("reading", quiet=quiet) as bar:
            planned = run_replay(settings, plan_replay(servers, spec, bar.show))
        print_plan(planned, plan.as_json)
        return
    reason = plan.require_reason()
    wanted = optional_uuid(replay_id, "--id") or str(uuid.uuid4())
    with Bar("reading", quiet=quiet) as planning, Bar("publishing", quiet=quiet) as bar:
        work = begin_replay(
            servers,
            spec,
            plan_hash=plan.execute,
            replay_id=wanted,
            actor=plan.actor,
            reason=reason,
            pace=pace,
            on_planning=planning.show,
            on_progress=bar.show,
        )
        outcome = run_replay(settings, work, _say_how_to_resume(wanted))
    is_done = outcome.status is ReplayStatus.DONE
    comparison = _compare(settings, wanted, patience, quiet=quiet) if is_done and patience is not None else None
    _finish(outcome, wanted, plan.as_json, comparison)


def _compare(settings: Settings, replay_id: str, patience: float, *, quiet: bool) -> Comparison:
    with Bar("comparing", quiet=quiet) as bar:

        async def work() -> Comparison:
            async with opened_data_pool(settings) as pool:
                return await compare_replay(_servers(settings), pool, replay_id, patience, bar.show)

        return run_replay(settings, work())


def _in_journal(work: Callable[[Journal], Awaitable[_Answer]]) -> _Answer:
    settings = load_settings()

    async def run() -> _Answer:
        async with opened_journal(settings.data_url.get_secret_value()) as journal:
            return await work(journal)

    return run_replay(settings, run())


def _servers(settings: Settings) -> Servers:
    return Servers(
        data_url=settings.data_url.get_secret_value(),
        kafka=settings.kafka,
        has_transactions=settings.relay_transactions,
        executor_group=str(settings.group("executor")["group.id"]),
        hash_key=settings.hash_key,
    )


def _say_how_to_resume(replay_id: str) -> str:
    return f". If it had started, continue it: queryd replay resume {replay_id}"


def _finish(outcome: Outcome, replay_id: str, as_json: bool, comparison: Comparison | None = None) -> None:
    print_outcome(outcome, replay_id, as_json, comparison)
    if outcome.status is ReplayStatus.ACTIVE:
        raise SystemExit(INTERRUPTED)
    changed = outcome.counts["skipped"].get(Skip.CHANGED.value, 0)
    if outcome.status is ReplayStatus.CANCELLED or changed or (comparison is not None and not comparison.all_same):
        raise SystemExit(1)
