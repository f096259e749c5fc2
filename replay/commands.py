"""What each replay command does: from its options to a plan, and from a plan to its end."""

import asyncio
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, assert_never

from db.connection import Connection, DataPool
from db.data.outbox import measure_waiting
from db.data.replays import Replay
from queryd.events import Mode
from queryd.registry import URL_VARIABLE
from queryd.results import ResultReader
from queryd.topics import read_topic_identity
from replay.compare import compare
from replay.comparison import Comparison
from replay.journal import Journal, opened_journal
from replay.kinds import Judge
from replay.letters import LetterJudge, LetterLine, describe_letter
from replay.log import pin
from replay.outlet import Outlet
from replay.pace import LagGuard, measure_group_lag
from replay.patch import Patch
from replay.plan import OnProgress, Plan, describe_topic, judge_ranges, make_plan, read_marks, read_ranges
from replay.refused import PlanStale, ReplayRefused
from replay.requests import RequestJudge
from replay.run import OnPublished, Outcome, Replayer, is_marked
from replay.spec import ReplayName, ReplaySpec
from replay.statuses import StatusJudge
from telemetry.traces import close_traces, set_up_traces

# For a plan or a list of letters, whose copies are not published.
_NO_REPLAY = str(uuid.UUID(int=0))


@dataclass(frozen=True, slots=True)
class Servers:
    """What a replay works with. `hash_key` is that of the requests' fingerprints; it replaces a given spec's."""

    data_url: str = field(repr=False)
    kafka: dict[str, Any] = field(repr=False)
    has_transactions: bool
    executor_group: str
    hash_key: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Pace:
    """Records a second, and how many records of live traffic may wait before the replay does; 0 for any."""

    rate: float
    max_lag: int


async def plan_replay(servers: Servers, spec: ReplaySpec, on_progress: OnProgress) -> Plan:
    """The plan, and nothing else. Raises as `make_plan`."""
    spec = replace(spec, hash_key=servers.hash_key)
    async with opened_journal(servers.data_url) as journal:
        return await make_plan(journal.connection, servers.kafka, spec, _make_judge(spec, _NO_REPLAY), on_progress)


async def list_letters(servers: Servers, spec: ReplaySpec) -> list[LetterLine]:
    """The dead letters that are asked for, those that would not be sent as well. Raises as `make_plan`."""
    spec = replace(spec, hash_key=servers.hash_key)
    async with opened_journal(servers.data_url) as journal:
        judge = _make_judge(spec, _NO_REPLAY)
        pinned = await asyncio.to_thread(pin, servers.kafka, spec.topics, spec.window)
        lines: list[LetterLine] = []
        async for verdicts in judge_ranges(journal.connection, servers.kafka, judge, pinned.ranges):
            lines += [describe_letter(each) for each in verdicts if each.copy is not None or each.skip is not None]
        return lines


async def begin_replay(
    servers: Servers,
    spec: ReplaySpec,
    *,
    plan_hash: str,
    replay_id: str,
    actor: str,
    reason: str,
    pace: Pace,
    on_planning: OnProgress,
    on_progress: OnPublished,
) -> Outcome:
    """Plan again, and carry it out if its hash is still `plan_hash`.

    Raises `PlanStale`, and as `make_plan` and `Replayer.run`.
    """
    spec = replace(spec, hash_key=servers.hash_key)
    async with opened_journal(servers.data_url) as journal:
        judge = _make_judge(spec, replay_id)
        planned = await make_plan(journal.connection, servers.kafka, spec, judge, on_planning)
        if planned.hash != plan_hash:
            raise PlanStale(
                f"what would be replayed now is not what plan {plan_hash} says: nothing was published. "
                f"Look at the plan again; its hash is {planned.hash} now"
            )
        replay = await journal.begin(
            replay_id=replay_id,
            kind=spec.name.value,
            actor=actor,
            reason=reason,
            plan=planned.to_row(),
            org_id=spec.selection.org_id,
            user_id=spec.selection.user_id,
        )
        return await _run(servers, journal, replay, spec, pace, on_progress)


async def resume_replay(
    servers: Servers, replay_id: str, patch: Patch, pace: Pace, on_progress: OnPublished
) -> Outcome:
    """Continue a replay from its checkpoint; raises as `Replayer.run`."""
    async with opened_journal(servers.data_url) as journal:
        replay = await journal.resume(replay_id)
        spec = await _read_spec(servers, replay, patch)
        return await _run(servers, journal, replay, spec, pace, on_progress)


async def compare_replay(
    servers: Servers, pool: DataPool, replay_id: str, patience: float, on_progress: OnProgress
) -> Comparison:
    """Compare the queries of a replay as new ones with the original ones.

    Waits until they have ended, or none has for `patience` seconds. Raises `ReplayRefused` for another replay, and as
    `Replayer.run` and `replay.compare.compare`.
    """
    async with opened_journal(servers.data_url) as journal:
        replay = await journal.find(replay_id)
        if not replay.plan.get("options", {}).get("as_new"):
            raise ReplayRefused(f"replay {replay_id} made no new queries: only one with --as-new can be compared")
        judge = _make_judge(await _read_spec(servers, replay, Patch()), replay_id)
        pairs: list[tuple[str, str]] = []
        marks = read_marks(replay)
        async for verdicts in judge_ranges(journal.connection, servers.kafka, judge, read_ranges(replay)):
            copies = [verdict.copy for verdict in verdicts if is_marked(marks, verdict.record)]
            pairs += [(each.was, each.query_id) for each in copies if each is not None and each.was and each.query_id]
    return await compare(pool, ResultReader(), pairs, patience=patience, on_progress=on_progress)


async def _read_spec(servers: Servers, replay: Replay, patch: Patch) -> ReplaySpec:
    """The spec of a replay; `ReplayRefused` if a topic, a setting or the patch is not what it was at its beginning."""
    plan, spec = replay.plan, ReplaySpec.read(replay.kind, replay.plan, patch, servers.hash_key)
    was, now = plan["options"], spec.options
    if was.get("hash_key") != now.get("hash_key"):
        raise ReplayRefused(
            "QUERYD_SQL_HASH_KEY is not what it was when the replay began, so that no request could be told from "
            "another: set it again, or cancel the replay and plan a new one"
        )
    if "registry" in was and was["registry"] != now.get("registry"):
        before, after = ("set", "not set") if was["registry"] else ("not set", "set")
        raise ReplayRefused(
            f"{URL_VARIABLE} was {before} when the replay began and is {after}, so that other records can be read than "
            "then: undo that, or cancel the replay and plan a new one"
        )
    if was.get("patch_digest") != patch.digest(servers.hash_key):
        raise ReplayRefused(
            "give the same --set again as at the replay's beginning: its values are kept nowhere. "
            f"It changes {', '.join(was.get('patched') or ('nothing',))}"
        )
    for topic, identity in plan["topics"].items():
        found = await asyncio.to_thread(read_topic_identity, servers.kafka, topic)
        if describe_topic(found) != identity:
            raise ReplayRefused(
                f"{topic} is not the topic that replay {replay.id} was planned for: it was made anew, or is another "
                "cluster's. What it was about is gone; cancel it if it has not ended, and plan again"
            )
    return spec


async def _run(
    servers: Servers, journal: Journal, replay: Replay, spec: ReplaySpec, pace: Pace, on_progress: OnPublished
) -> Outcome:
    set_up_traces("replay")
    is_status = spec.name is ReplayName.STATUS
    # A last event must not follow its query's tombstone, so only a transaction may carry it, where there are any.
    outlet = Outlet(servers.kafka, f"queryd-replay-{replay.id}" if is_status and servers.has_transactions else None)
    # Requests delay those who wait for executors; events delay those who wait for the relay.
    measure = (
        partial(_measure_outbox, journal.connection, pace.max_lag)
        if is_status
        else partial(_measure_executors, servers)
    )
    replayer = Replayer(
        journal,
        replay,
        _make_judge(spec, replay.id),
        outlet,
        servers.kafka,
        rate=pace.rate,
        guard=LagGuard(measure, pace.max_lag),
        on_progress=on_progress,
    )
    try:
        with _stopped_by_signals(replayer.stop):
            return await replayer.run()
    finally:
        await outlet.close()
        close_traces()


def _make_judge(spec: ReplaySpec, replay_id: str) -> Judge:
    """Raises `ReplayRefused`."""
    match spec.name:
        case ReplayName.REQUESTS:
            return RequestJudge(spec, replay_id).judge
        case ReplayName.DEAD_LETTERS:
            return LetterJudge(spec, replay_id).judge
        case ReplayName.STATUS:
            return StatusJudge(spec, replay_id).judge
        case ReplayName.STATE_DB:
            raise ReplayRefused("a rebuild of the state database is no replay of records")
        case _:
            assert_never(spec.name)


async def _measure_executors(servers: Servers) -> int:
    topics = [mode.topic.value for mode in Mode]
    return await asyncio.to_thread(measure_group_lag, servers.kafka, servers.executor_group, topics)


async def _measure_outbox(connection: Connection, most: int) -> int:
    events, _ = await measure_waiting(connection, most + 1)
    return events


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the batch under way, and no more."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
