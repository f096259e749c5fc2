"""`queryd replay`: plan, carry out, resume, list, show and cancel."""

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import typer

from db.data.replays import Replay, ReplayStatus, list_replays
from db.health import DATA, require_schema
from queryd.dead_letters import DeadCode
from queryd.events import Mode
from queryd.kafka.bounded_reader import LogChanged
from replay.commands import (
    Asked,
    Cause,
    Pace,
    Servers,
    begin_replay,
    compare_replay,
    list_letters,
    plan_replay,
    resume_replay,
)
from replay.comparison import Comparison
from replay.journal import ReplayRefused, opened_journal
from replay.kinds import ReplayName, Skip
from replay.letters import PatchRefused
from replay.log import WindowRefused
from replay.plan import NothingMatches, PlanStale
from replay.run import Outcome
from service.cli.account import account
from service.cli.database import optional_uuid, uuid_argument
from service.cli.failures import FAILURES, describe_failure
from service.cli.output import complain, print_json, print_rows
from service.cli.progress import ComparisonBar, PlanningBar, ReplayBar
from service.cli.query import Json
from service.cli.rebuild import resume_state_db, state_db
from service.cli.replay_options import (
    Actor,
    Allowed,
    Changes,
    Codes,
    Denied,
    Execute,
    FromOffset,
    Headers,
    Id,
    Keys,
    Lane,
    MaxLag,
    Org,
    Partitions,
    Patience,
    Rate,
    Reason,
    Since,
    Statuses,
    ToOffset,
    Until,
    User,
    check_one_topic,
    read_headers,
    read_patch,
    read_selection,
    read_window,
)
from service.cli.replay_output import print_letters, print_outcome, print_plan, print_replay, summarize
from service.settings import Settings, load_settings
from service.wiring import opened_data_pool

app = typer.Typer(help="Write again what was written once: plan first, then carry the plan out.", no_args_is_help=True)
app.command()(state_db)

# What a broker and an executor on two cores take beside live traffic without anybody noticing.
_RATE = 1000.0
# Some seconds of an executor's admission.
_MAX_LAG = 10_000
_INTERRUPTED = 130
# As long as a batch query may run by default: then something ends, or nothing will.
_PATIENCE_SECONDS = 3600.0

_Answer = TypeVar("_Answer")


@app.command()
def requests(
    *,
    since: Since = None,
    until: Until = None,
    mode: Lane = None,
    partition: Partitions = None,
    from_offset: FromOffset = None,
    to_offset: ToOffset = None,
    key: Keys = None,
    header: Headers = None,
    org: Org = None,
    user: User = None,
    status: Statuses = None,
    error_code: Codes = None,
    allow_header: Allowed = None,
    deny_header: Denied = None,
    as_new: Annotated[bool, typer.Option("--as-new", help="Each as a new query: uuid5(replay id, query id).")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --as-new: wait for the new results and compare the contents.")
    ] = False,
    patience: Patience = _PATIENCE_SECONDS,
    execute: Execute = None,
    reason: Reason = None,
    by: Actor = None,
    replay_id: Id = None,
    rate: Rate = _RATE,
    max_lag: MaxLag = _MAX_LAG,
    as_json: Json = False,
) -> None:
    """Requests of a window again. Those that were accepted before change nothing, unless --as-new is given."""
    window = read_window(since, until, partition, from_offset, to_offset)
    if (window.since is None or window.until is None) and window.from_offset is None:
        complain("say which requests: --since and --until, or --partition and --from-offset", 2)
    if compare and not as_new:
        complain("--compare compares new queries with the old ones: it goes with --as-new", 2)
    asked = Asked(
        name=ReplayName.REQUESTS,
        window=window,
        selection=read_selection(key, header, org, user, mode, status, error_code),
        headers=read_headers(allow_header, deny_header),
        lanes=tuple(Mode) if mode is None else (mode,),
        as_new=as_new,
    )
    check_one_topic(asked)
    _plan_or_run(
        asked, execute, reason, by, replay_id, Pace(rate, max_lag), as_json, patience=patience if compare else None
    )


@app.command()
def dead_letters(
    *,
    since: Since = None,
    until: Until = None,
    partition: Partitions = None,
    from_offset: FromOffset = None,
    to_offset: ToOffset = None,
    key: Keys = None,
    header: Headers = None,
    org: Org = None,
    user: User = None,
    mode: Lane = None,
    status: Statuses = None,
    error_code: Annotated[
        list[DeadCode] | None, typer.Option("--error-code", help="Only those buried for this.")
    ] = None,
    allow_header: Allowed = None,
    deny_header: Denied = None,
    changes: Changes = None,
    max_redrives: Annotated[
        int, typer.Option("--max-redrives", help="A letter sent again so often stays where it is.", min=1)
    ] = 3,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show the letters, with why and when they were buried, and no more.")
    ] = False,
    execute: Execute = None,
    reason: Reason = None,
    by: Actor = None,
    replay_id: Id = None,
    rate: Rate = _RATE,
    max_lag: MaxLag = _MAX_LAG,
    as_json: Json = False,
) -> None:
    """Dead letters back to their topic, mended by --set or as they are. One whose id is taken gets a new one."""
    asked = Asked(
        name=ReplayName.DEAD_LETTERS,
        window=read_window(since, until, partition, from_offset, to_offset),
        selection=read_selection(key, header, org, user, mode, status, error_code),
        headers=read_headers(allow_header, deny_header),
        patch=read_patch(changes),
        max_redrives=max_redrives,
    )
    if list_only:
        print_letters(_run(list_letters(_servers(load_settings()), asked)), as_json)
        return
    _plan_or_run(asked, execute, reason, by, replay_id, Pace(rate, max_lag), as_json)


@app.command()
def status(
    *,
    since: Since = None,
    until: Until = None,
    partition: Partitions = None,
    from_offset: FromOffset = None,
    to_offset: ToOffset = None,
    key: Keys = None,
    header: Headers = None,
    org: Org = None,
    user: User = None,
    mode: Lane = None,
    status: Statuses = None,
    error_code: Codes = None,
    allow_header: Allowed = None,
    deny_header: Denied = None,
    execute: Execute = None,
    reason: Reason = None,
    by: Actor = None,
    replay_id: Id = None,
    rate: Rate = _RATE,
    max_lag: MaxLag = _MAX_LAG,
    as_json: Json = False,
) -> None:
    """Each finished query's last event again, byte for byte, for subscribers that have lost it."""
    asked = Asked(
        name=ReplayName.STATUS,
        window=read_window(since, until, partition, from_offset, to_offset),
        selection=read_selection(key, header, org, user, mode, status, error_code),
        headers=read_headers(allow_header, deny_header),
    )
    _plan_or_run(asked, execute, reason, by, replay_id, Pace(rate, max_lag), as_json)


@app.command()
def resume(
    replay_id: Annotated[str, typer.Argument(metavar="ID", help="The replay's id.")],
    changes: Changes = None,
    rate: Rate = _RATE,
    max_lag: MaxLag = _MAX_LAG,
    as_json: Json = False,
) -> None:
    """Go on with a replay that was stopped or has died."""
    settings, wanted = load_settings(), uuid_argument(replay_id, "the id")
    if _run(_find(settings, wanted)).kind == ReplayName.STATE_DB:
        resume_state_db(wanted, as_json)
        return
    with ReplayBar(quiet=as_json) as bar:
        outcome = _run(
            resume_replay(_servers(settings), wanted, read_patch(changes), Pace(rate, max_lag), bar.show),
            resumable=wanted,
        )
    _finish(outcome, wanted, as_json)


@app.command(name="compare")
def compare_(
    replay_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a replay with --as-new.")],
    patience: Patience = _PATIENCE_SECONDS,
    as_json: Json = False,
) -> None:
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

    async def read(settings: Settings) -> list[Replay]:
        async with opened_journal(settings.data_url.get_secret_value()) as journal:
            return await list_replays(journal.connection, limit)

    rows = [summarize(replay) for replay in _run(read(load_settings()))]
    if as_json:
        print_json(rows)
    else:
        print_rows("replays", rows)


@app.command()
def show(
    replay_id: Annotated[str, typer.Argument(metavar="ID", help="The replay's id.")], as_json: Json = False
) -> None:
    """One replay with its plan, its counts and its checkpoint."""
    wanted = uuid_argument(replay_id, "the id")
    replay = _run(_find(load_settings(), wanted))
    print_replay(replay, as_json)


@app.command()
def cancel(
    replay_id: Annotated[str, typer.Argument(metavar="ID", help="The replay's id.")], as_json: Json = False
) -> None:
    """End a replay before its time: at once where nobody works on it, else after the batch under way."""
    wanted = uuid_argument(replay_id, "the id")

    async def end(settings: Settings) -> ReplayStatus:
        async with opened_journal(settings.data_url.get_secret_value()) as journal:
            return await journal.cancel(wanted)

    ended = _run(end(load_settings()))
    if as_json:
        print_json({"id": wanted, "status": ended.value})
    else:
        print(f"{wanted}: {ended.value}")


# Planning and carrying out.


def _plan_or_run(
    asked: Asked,
    expected: str | None,
    reason: str | None,
    actor: str | None,
    replay_id: str | None,
    pace: Pace,
    as_json: bool,
    *,
    patience: float | None = None,
) -> None:
    """With `patience` the results are compared in the end."""
    settings = load_settings()
    if expected is None:
        with PlanningBar(quiet=as_json) as bar:
            planned = _run(plan_replay(_servers(settings), asked, bar.show))
        print_plan(planned, as_json)
        return
    if reason is None or not reason.strip():
        complain("say why: --reason is kept with the replay for whoever audits it", 2)
    wanted = optional_uuid(replay_id, "--id") or str(uuid.uuid4())
    with PlanningBar(quiet=as_json) as planning, ReplayBar(quiet=as_json) as bar:
        outcome = _run(
            begin_replay(
                _servers(settings),
                asked,
                expected=expected,
                replay_id=wanted,
                cause=Cause(actor or account(), reason),
                pace=pace,
                planning=planning.show,
                told=bar.show,
            ),
            resumable=wanted,
        )
    done = outcome.status is ReplayStatus.DONE
    comparison = _compare(settings, wanted, patience, quiet=as_json) if done and patience is not None else None
    _finish(outcome, wanted, as_json, comparison)


def _compare(settings: Settings, replay_id: str, patience: float, *, quiet: bool) -> Comparison:
    with ComparisonBar(quiet=quiet) as bar:
        return _run(_compare_in_pool(settings, replay_id, patience, bar))


async def _compare_in_pool(settings: Settings, replay_id: str, patience: float, bar: ComparisonBar) -> Comparison:
    async with opened_data_pool(settings) as pool:
        return await compare_replay(_servers(settings), pool, replay_id, patience, bar.show)


def _servers(settings: Settings) -> Servers:
    return Servers(
        data_url=settings.data_url.get_secret_value(),
        kafka=settings.kafka,
        has_transactions=settings.relay_transactions,
        executor_group=str(settings.group("executor")["group.id"]),
        hash_key=None if settings.sql_hash_key is None else settings.sql_hash_key.get_secret_value(),
    )


def _run(work: Coroutine[Any, Any, _Answer], resumable: str | None = None) -> _Answer:
    """The answer; exits with one sentence for whatever is refused or away."""

    async def run() -> _Answer:
        try:
            await require_schema(load_settings().data_url.get_secret_value(), DATA)
            return await work
        finally:
            # Close the coroutine, since Python warns about one that never started.
            work.close()

    try:
        return asyncio.run(run())
    except (WindowRefused, LogChanged, NothingMatches, PatchRefused, PlanStale, ReplayRefused) as error:
        complain(str(error))
    except FAILURES as error:
        again = "" if resumable is None else f". If it had started, continue it: queryd replay resume {resumable}"
        complain(f"{describe_failure(error)}{again}")


async def _find(settings: Settings, replay_id: str) -> Replay:
    async with opened_journal(settings.data_url.get_secret_value()) as journal:
        return await journal.find(replay_id)


def _finish(outcome: Outcome, replay_id: str, as_json: bool, comparison: Comparison | None = None) -> None:
    print_outcome(outcome, replay_id, as_json, comparison)
    if outcome.status is ReplayStatus.ACTIVE:
        raise SystemExit(_INTERRUPTED)
    changed = outcome.counts["skipped"].get(Skip.CHANGED.value, 0)
    if outcome.status is ReplayStatus.CANCELLED or changed or (comparison is not None and not comparison.all_same):
        raise SystemExit(1)
