"""What each replay command does: from its options to a plan, and from a plan to its end."""

import asyncio
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from db.connection import DataPool
from db.data.replays import Replay
from queryd.events import Mode
from queryd.registry import URL_VARIABLE, registry_in_use
from queryd.results import ResultReader
from replay.compare import compare
from replay.comparison import Comparison
from replay.copies import HeaderRules
from replay.journal import Journal, ReplayRefused, opened_journal
from replay.kinds import ReplayKind, ReplayName
from replay.letters import LetterLine, LetterReplay, Patch, describe_letter
from replay.log import Window, pin
from replay.outlet import Outlet
from replay.pace import GroupLag, Lag, LagGuard, OutboxLag
from replay.plan import Plan, PlanStale, judge_ranges, plan, read_asked
from replay.requests import RequestReplay, digest_key
from replay.run import Outcome, Progress, Replayer, check_topics, describe_plan, list_pairs
from replay.selection import Selection
from replay.statuses import StatusReplay
from telemetry.traces import close_traces, set_up_traces


@dataclass(frozen=True, slots=True)
class Servers:
    """What a replay works with. `hash_key` is that of the requests' fingerprints."""

    data_url: str = field(repr=False)
    kafka: dict[str, Any] = field(repr=False)
    has_transactions: bool
    executor_group: str
    hash_key: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody wants to have replayed. `patch` is for dead letters, `as_new` for requests."""

    name: ReplayName
    window: Window
    selection: Selection
    headers: HeaderRules = field(default_factory=HeaderRules)
    lanes: tuple[Mode, ...] = tuple(Mode)
    as_new: bool = False
    patch: Patch = field(default_factory=Patch)
    max_redrives: int = 3

    def kind(self, replay_id: str, servers: Servers) -> ReplayKind:
        """The replay under that id."""
        match self.name:
            case ReplayName.REQUESTS:
                return RequestReplay(
                    replay_id=replay_id,
                    lanes=self.lanes,
                    window=self.window,
                    selection=self.selection,
                    headers=self.headers,
                    as_new=self.as_new,
                    hash_key=servers.hash_key,
                )
            case ReplayName.DEAD_LETTERS:
                return LetterReplay(
                    replay_id,
                    self.window,
                    self.selection,
                    self.headers,
                    self.patch,
                    self.max_redrives,
                    servers.hash_key,
                )
            case ReplayName.STATUS:
                return StatusReplay(replay_id, self.window, self.selection, self.headers)
            case ReplayName.STATE_DB:
                # The command line takes it another way: nothing of it is published.
                raise ReplayRefused("a rebuild of the state database is no replay of records")

    @classmethod
    def read(cls, replay: Replay, patch: Patch, servers: Servers) -> "Asked":
        """What a replay's row says was asked for. The patch, which no row keeps, is given again; raises
        `ReplayRefused` where it is another one, or the key of fingerprints is, or a schema registry has come or
        gone."""
        options = replay.plan["options"]
        if options.get("hash_key") != digest_key(servers.hash_key):
            raise ReplayRefused(
                "QUERYD_SQL_HASH_KEY is not what it was when the replay began, so that no request could be told from "
                "another: set it again, or cancel the replay and plan a new one"
            )
        registry = registry_in_use() is not None
        if options.get("registry", registry) != registry:
            was, now = ("not set", "set") if registry else ("set", "not set")
            raise ReplayRefused(
                f"{URL_VARIABLE} was {was} when the replay began and is {now}, so that other records can be read than "
                "then: undo that, or cancel the replay and plan a new one"
            )
        if options.get("patch_digest") != patch.digest(servers.hash_key):
            raise ReplayRefused(
                "give the same --set again as at the replay's beginning: its values are kept nowhere. "
                f"It changes {', '.join(options.get('patched') or ('nothing',))}"
            )
        window, selection, headers = read_asked(replay.plan["asked"])
        return cls(
            name=ReplayName(replay.kind),
            window=window,
            selection=selection,
            headers=headers,
            lanes=tuple(mode for mode in Mode if mode.topic.value in replay.plan["topics"]),
            as_new=bool(options.get("as_new", False)),
            patch=patch,
            max_redrives=int(options.get("max_redrives", 0)),
        )


@dataclass(frozen=True, slots=True)
class Pace:
    """Records a second, and how many may wait in live traffic before the replay does; 0 for any."""

    rate: float
    max_lag: int


@dataclass(frozen=True, slots=True)
class Cause:
    """Who replays, and why."""

    actor: str
    reason: str


async def plan_replay(servers: Servers, asked: Asked, told: Callable[[int, int], None]) -> Plan:
    """The plan, and nothing else. Raises as `replay.plan.plan`."""
    async with opened_journal(servers.data_url) as journal:
        kind = asked.kind(str(uuid.UUID(int=0)), servers)
        return await _plan(journal, servers, asked, kind, told)


async def list_letters(servers: Servers, asked: Asked) -> list[LetterLine]:
    """The dead letters that are asked for, those that would not be sent as well. Raises as `plan_replay`."""
    async with opened_journal(servers.data_url) as journal:
        kind = asked.kind(str(uuid.UUID(int=0)), servers)
        pinned = await asyncio.to_thread(pin, servers.kafka, kind.topics, asked.window)
        lines: list[LetterLine] = []
        async for verdicts in judge_ranges(journal.connection, servers.kafka, kind.begin(), pinned.ranges):
            lines += [describe_letter(each) for each in verdicts if each.copy is not None or each.skip is not None]
        return lines


async def begin_replay(
    servers: Servers,
    asked: Asked,
    *,
    expected: str,
    replay_id: str,
    cause: Cause,
    pace: Pace,
    planning: Callable[[int, int], None],
    told: Callable[[Progress], None],
) -> Outcome:
    """Plan again, and carry it out if it is still the plan whose hash is `expected`.

    Raises `PlanStale`, and as `replay.plan.plan` and `Replayer.run`.
    """
    async with opened_journal(servers.data_url) as journal:
        kind = asked.kind(replay_id, servers)
        planned = await _plan(journal, servers, asked, kind, planning)
        if planned.hash != expected:
            raise PlanStale(
                f"what would be replayed now is not what plan {expected} says: nothing was published. "
                f"Look at the plan again; its hash is {planned.hash} now"
            )
        await journal.begin(
            replay_id=replay_id,
            kind=asked.name.value,
            actor=cause.actor,
            reason=cause.reason,
            plan=describe_plan(planned, kind, asked.window, asked.selection, asked.headers),
            org_id=asked.selection.org_id,
            user_id=asked.selection.user_id,
        )
        return await _run(servers, journal, await journal.find(replay_id), kind, pace, told)


async def resume_replay(
    servers: Servers, replay_id: str, patch: Patch, pace: Pace, told: Callable[[Progress], None]
) -> Outcome:
    """Go on where it was left; raises as `Replayer.run`."""
    async with opened_journal(servers.data_url) as journal:
        replay = await journal.resume(replay_id)
        asked = Asked.read(replay, patch, servers)
        kind = asked.kind(replay_id, servers)
        pinned = await asyncio.to_thread(pin, servers.kafka, kind.topics, Window())
        check_topics(replay, pinned.topics)
        return await _run(servers, journal, replay, kind, pace, told)


async def compare_replay(
    servers: Servers, pool: DataPool, replay_id: str, patience: float, told: Callable[[int, int], None]
) -> Comparison:
    """Compare the queries of a replay as new ones with what they were.

    Waits until they have ended, or none has for `patience` seconds. Raises `ReplayRefused` for another replay, and as
    `Replayer.run` and `replay.compare.compare`.
    """
    async with opened_journal(servers.data_url) as journal:
        replay = await journal.find(replay_id)
        if not replay.plan.get("options", {}).get("as_new"):
            raise ReplayRefused(f"replay {replay_id} made no new queries: only one with --as-new can be compared")
        kind = Asked.read(replay, Patch(), servers).kind(replay_id, servers)
        pinned = await asyncio.to_thread(pin, servers.kafka, kind.topics, Window())
        check_topics(replay, pinned.topics)
        pairs = await list_pairs(journal, servers.kafka, kind, replay)
    return await compare(pool, ResultReader(), pairs, patience=patience, told=told)


async def _plan(
    journal: Journal, servers: Servers, asked: Asked, kind: ReplayKind, told: Callable[[int, int], None]
) -> Plan:
    return await plan(journal.connection, servers.kafka, kind, asked.window, asked.selection, asked.headers, told)


async def _run(
    servers: Servers,
    journal: Journal,
    replay: Replay,
    kind: ReplayKind,
    pace: Pace,
    told: Callable[[Progress], None],
) -> Outcome:
    set_up_traces("replay")
    # The last events of queries must not follow a deletion: only a transaction can be taken back.
    is_fenced = kind.name is ReplayName.STATUS and servers.has_transactions
    outlet = Outlet(servers.kafka, f"queryd-replay-{replay.id}" if is_fenced else None)
    replayer = Replayer(
        journal,
        outlet,
        servers.kafka,
        kind,
        rate=pace.rate,
        guard=LagGuard(_find_lag(servers, journal, kind, pace), pace.max_lag),
        told=told,
    )
    try:
        with _stopped_by_signals(replayer.stop):
            return await replayer.run(replay)
    finally:
        await outlet.close()
        close_traces()


def _find_lag(servers: Servers, journal: Journal, kind: ReplayKind, pace: Pace) -> Lag:
    """Who suffers from requests are those who wait for executors; from events, those who wait for the relay."""
    if kind.name is ReplayName.STATUS:
        return OutboxLag(journal.connection, pace.max_lag)
    return GroupLag(servers.kafka, servers.executor_group, [mode.topic.value for mode in Mode])


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
