"""`queryd replay`: plan, carry out, resume, list, show and cancel."""

import asyncio
import json
import shlex
import sys
import uuid
from collections.abc import Awaitable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from confluent_kafka import KafkaException

from db.connection import DatabaseUnavailable
from db.data.replays import Replay, ReplayStatus, list_replays
from producers.read_back import EndNotReached
from producers.replay.comparison import Comparison
from producers.replay.copies import HeaderRules
from producers.replay.journal import ReplayRefused, opened_journal
from producers.replay.kinds import NOTES, SKIP_REASONS, Note, ReplayName, Skip
from producers.replay.letters import Patch, PatchRefused
from producers.replay.log import Window, WindowRefused
from producers.replay.plan import NothingMatches, Plan, PlanStale
from producers.replay.run import Outcome
from producers.replay.selection import Selection
from queryd.events import Mode, Status
from queryd.publisher import NotDelivered
from queryd.topics import TopicUnknown
from service.cli.account import account
from service.cli.database import optional_uuid, uuid_argument
from service.cli.output import complain, print_fields, print_json, print_rows
from service.cli.progress import ComparisonBar, PlanningBar, ReplayBar
from service.cli.query import Json
from service.cli.rebuild import resume_state_db, state_db
from service.replaying import Asked, Cause, Pace, begin_replay, compare_replay, plan_replay, resume_replay
from service.settings import Settings, load_settings

app = typer.Typer(help="Write again what was written once: plan first, then carry the plan out.", no_args_is_help=True)
app.command()(state_db)

# What a broker and an executor on two cores take beside live traffic without anybody noticing.
_RATE = 1000.0
# Some seconds of an executor's admission.
_MAX_LAG = 10_000
_INTERRUPTED = 130
# As long as a batch query may run by default: then something ends, or nothing will.
_PATIENCE_SECONDS = 3600.0

Since = Annotated[
    str | None, typer.Option("--since", help="Records of this time or later, in UTC: 2026-11-23T10:00:00Z.")
]
Until = Annotated[str | None, typer.Option("--until", help="Records from before this time, in UTC.")]
Partitions = Annotated[list[int] | None, typer.Option("--partition", help="Only this partition; may be repeated.")]
FromOffset = Annotated[int | None, typer.Option("--from-offset", help="From this offset of the one partition.", min=0)]
ToOffset = Annotated[int | None, typer.Option("--to-offset", help="Up to this offset, without it.", min=0)]
Keys = Annotated[list[str] | None, typer.Option("--key", help="Only this key; may be repeated.")]
Headers = Annotated[list[str] | None, typer.Option("--header", help="Only with this header: name=value.")]
Org = Annotated[str | None, typer.Option("--org", help="Only this org's.")]
User = Annotated[str | None, typer.Option("--user", help="Only this user's; with --org.")]
Lane = Annotated[Mode | None, typer.Option("--mode", help="Only this lane's.")]
Statuses = Annotated[list[Status] | None, typer.Option("--status", help="Only queries that stand so.")]
Codes = Annotated[list[str] | None, typer.Option("--error-code", help="Only with this error code.")]
Allowed = Annotated[list[str] | None, typer.Option("--allow-header", help="Copies keep only the headers so named.")]
Denied = Annotated[list[str] | None, typer.Option("--deny-header", help="Copies lose the headers so named.")]
Execute = Annotated[str | None, typer.Option("--execute", help="Carry out the plan that has this hash.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why, for whoever audits it.")]
Actor = Annotated[str | None, typer.Option("--by", help="Who; the account's name where not given.")]
Id = Annotated[str | None, typer.Option("--id", help="The replay's own id; made up where not given.")]
Rate = Annotated[float, typer.Option("--rate", help="Records a second.", min=1)]
MaxLag = Annotated[
    int, typer.Option("--max-lag", help="Wait while more records than this wait in live traffic; 0: never.", min=0)
]
Patience = Annotated[
    float, typer.Option("--patience", help="Give up when nothing has ended for so many seconds.", min=1)
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="field=value in every letter; the value is JSON, or else text. May be repeated."),
]

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
    window = _read_window(since, until, partition, from_offset, to_offset)
    if (window.since is None or window.until is None) and window.from_offset is None:
        complain("say which requests: --since and --until, or --partition and --from-offset", 2)
    if compare and not as_new:
        complain("--compare compares new queries with the old ones: it goes with --as-new", 2)
    asked = Asked(
        name=ReplayName.REQUESTS,
        window=window,
        selection=_read_selection(key, header, org, user, mode, status, error_code),
        headers=_read_headers(allow_header, deny_header),
        lanes=tuple(Mode) if mode is None else (mode,),
        as_new=as_new,
    )
    _check_one_topic(asked)
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
        list[str] | None, typer.Option("--error-code", help="Only UNDECODABLE, INVALID_REQUEST or CONFLICT.")
    ] = None,
    allow_header: Allowed = None,
    deny_header: Denied = None,
    changes: Changes = None,
    max_redrives: Annotated[
        int, typer.Option("--max-redrives", help="A letter sent again so often stays where it is.", min=1)
    ] = 3,
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
        window=_read_window(since, until, partition, from_offset, to_offset),
        selection=_read_selection(key, header, org, user, mode, status, error_code),
        headers=_read_headers(allow_header, deny_header),
        patch=_read_patch(changes),
        max_redrives=max_redrives,
    )
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
        window=_read_window(since, until, partition, from_offset, to_offset),
        selection=_read_selection(key, header, org, user, mode, status, error_code),
        headers=_read_headers(allow_header, deny_header),
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
            resume_replay(settings, wanted, _read_patch(changes), Pace(rate, max_lag), bar.show), resumable=wanted
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

    rows = [_summarize(replay) for replay in _run(read(load_settings()))]
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
    details = {"plan": replay.plan, "counts": replay.counts, "checkpoint": replay.checkpoint}
    if as_json:
        print_json(_summarize(replay) | details)
    else:
        print_fields(_summarize(replay) | {name: json.dumps(value) for name, value in details.items()})


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


# What a replay is asked for.


def _read_window(
    since: str | None,
    until: str | None,
    partitions: list[int] | None,
    from_offset: int | None,
    to_offset: int | None,
) -> Window:
    window = Window(
        partitions=frozenset(partitions or ()),
        from_offset=from_offset,
        to_offset=to_offset,
        since=_read_time(since, "--since"),
        until=_read_time(until, "--until"),
    )
    if (from_offset is not None or to_offset is not None) and len(window.partitions) != 1:
        complain("offsets are a partition's own: give one --partition with them", 2)
    if from_offset is not None and to_offset is not None and from_offset >= to_offset:
        complain("--from-offset must lie before --to-offset", 2)
    if window.since is not None and window.until is not None and window.since >= window.until:
        complain("--since must be earlier than --until", 2)
    if window.until is not None and window.until > datetime.now(UTC):
        complain("--until lies in the future: what is still to come can't be planned. Take a time that is over", 2)
    return window


def _read_time(text: str | None, name: str) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        complain(f"{name} must be a time in UTC, such as 2026-11-23T10:00:00Z", 2)
    if moment.tzinfo is None or moment.utcoffset() != UTC.utcoffset(None):
        complain(f"{name} must say that it is UTC, with a Z at its end: 2026-11-23T10:00:00Z", 2)
    return moment


def _read_selection(
    keys: list[str] | None,
    headers: list[str] | None,
    org: str | None,
    user: str | None,
    mode: Mode | None,
    statuses: list[Status] | None,
    codes: list[str] | None,
) -> Selection:
    if user is not None and org is None:
        complain("a user is an org's: give --org with --user", 2)
    return Selection(
        keys=frozenset(keys or ()),
        headers=frozenset(_split(each, "--header") for each in headers or ()),
        org_id=optional_uuid(org, "--org"),
        user_id=optional_uuid(user, "--user"),
        mode=None if mode is None else mode.value,
        statuses=frozenset(each.value for each in statuses or ()),
        error_codes=frozenset(codes or ()),
    )


def _read_headers(allowed: list[str] | None, denied: list[str] | None) -> HeaderRules:
    return HeaderRules(
        frozenset(name.lower() for name in allowed or ()), frozenset(name.lower() for name in denied or ())
    )


def _read_patch(changes: list[str] | None) -> Patch:
    values: dict[str, Any] = {}
    for change in changes or ():
        name, text = _split(change, "--set")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return Patch(values)


def _split(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        complain(f"{option} wants name=value", 2)
    return name, value


def _check_one_topic(asked: Asked) -> None:
    if len(asked.lanes) > 1 and (asked.window.from_offset is not None or asked.window.to_offset is not None):
        complain("offsets are one topic's own: give --mode with them", 2)


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
            planned = _run(plan_replay(settings, asked, bar.show))
        _print_plan(planned, as_json)
        return
    if reason is None or not reason.strip():
        complain("say why: --reason is kept with the replay for whoever audits it", 2)
    wanted = optional_uuid(replay_id, "--id") or str(uuid.uuid4())
    with PlanningBar(quiet=as_json) as planning, ReplayBar(quiet=as_json) as bar:
        outcome = _run(
            begin_replay(
                settings,
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
        return _run(compare_replay(settings, replay_id, patience, bar.show))


def _run(work: Awaitable[_Answer], resumable: str | None = None) -> _Answer:
    """The answer; exits with one sentence for whatever is refused or away."""

    async def run() -> _Answer:
        return await work

    try:
        return asyncio.run(run())
    except (WindowRefused, NothingMatches, PatchRefused, PlanStale, ReplayRefused) as error:
        complain(str(error))
    except DatabaseUnavailable as error:
        _complain_of_stop(f"Postgres data (QUERYD_DATA_URL) does not answer: {error}", resumable)
    except (TopicUnknown, EndNotReached, NotDelivered) as error:
        _complain_of_stop(f"Kafka (QUERYD_KAFKA_BOOTSTRAP) does not do its part: {error}", resumable)
    except KafkaException as error:
        _complain_of_stop(f"Kafka (QUERYD_KAFKA_BOOTSTRAP) does not do its part: {error.args[0].str()}", resumable)


async def _find(settings: Settings, replay_id: str) -> Replay:
    async with opened_journal(settings.data_url.get_secret_value()) as journal:
        return await journal.find(replay_id)


def _complain_of_stop(sentence: str, resumable: str | None) -> NoReturn:
    complain(sentence if resumable is None else f"{sentence}. If it had begun: queryd replay resume {resumable}")


def _finish(outcome: Outcome, replay_id: str, as_json: bool, comparison: Comparison | None = None) -> None:
    counts = outcome.counts
    if as_json:
        compared = {} if comparison is None else {"comparison": comparison.to_json()}
        print_json({"id": replay_id, "status": outcome.status.value} | dict(counts) | compared)
    else:
        print(f"replay {replay_id}: {outcome.status.value}, {counts['published']} records published")
        for line in _describe_counts(counts["notes"], counts["skipped"]):
            print(f"  {line}")
        if comparison is not None:
            print(comparison.to_text())
        if outcome.status is ReplayStatus.ACTIVE:
            print(f"stopped; go on with: queryd replay resume {replay_id}")
    if outcome.status is ReplayStatus.ACTIVE:
        raise SystemExit(_INTERRUPTED)
    if outcome.status is ReplayStatus.CANCELLED or (comparison is not None and not comparison.all_same):
        raise SystemExit(1)


def _print_plan(planned: Plan, as_json: bool) -> None:
    ranges = [
        {
            "topic": each.range.topic,
            "partition": each.range.partition,
            "start": each.range.start,
            "end": each.range.end,
            "matched": each.matched,
            "skipped": each.skipped,
        }
        for each in planned.ranges
    ]
    notes = {note.value: count for note, count in planned.notes.items()}
    skipped = {skip.value: count for skip, count in planned.skipped.items()}
    if as_json:
        print_json(
            {
                "kind": planned.kind,
                "hash": planned.hash,
                "ranges": ranges,
                "scanned": planned.scanned,
                "matched": planned.matched,
                "notes": notes,
                "skipped": skipped,
                "first_ids": planned.first_ids,
            }
        )
        return
    print_rows("ranges", ranges)
    print(f"of {planned.scanned} records read, {planned.matched} would be published:")
    for line in _describe_counts(notes, skipped):
        print(f"  {line}")
    print(f"the first: {', '.join(planned.first_ids)}")
    print(f"plan: {planned.hash}")
    again = shlex.join(["queryd", *sys.argv[1:]])
    print(f"nothing was published. To carry it out: {again} --execute {planned.hash} --reason 'why'")


def _describe_counts(notes: dict[str, int], skipped: dict[str, int]) -> Iterator[str]:
    for name, count in notes.items():
        yield f"{count} {NOTES[Note(name)]}"
    for name, count in skipped.items():
        yield f"{count} skipped: {SKIP_REASONS[Skip(name)]}"


def _summarize(replay: Replay) -> dict[str, Any]:
    return {
        "id": replay.id,
        "kind": replay.kind,
        "status": replay.status,
        "by": replay.actor,
        "reason": replay.reason,
        "planned": replay.plan.get("matched"),
        "published": replay.counts.get("published", 0),
        "created_at": replay.created_at,
        "updated_at": replay.updated_at,
    }
