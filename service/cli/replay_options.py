"""The options that the replay commands share, each defined once."""

import getpass
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Annotated, Any, get_type_hints

import typer

from queryd.events import ErrorCode, Mode, Status
from replay.commands import Pace
from replay.log import Window
from replay.patch import Patch
from replay.spec import HeaderRules, ReplayName, ReplaySpec, Selection
from service.cli.database import optional_uuid
from service.cli.output import WRONGLY_ASKED, complain, read_time
from service.cli.parameters import split_pair
from service.cli.query import Json

ReplayId = Annotated[str, typer.Argument(metavar="ID", help="The replay's id.")]
Codes = Annotated[list[ErrorCode] | None, typer.Option("--error-code", help="Only with this error code.")]
NewId = Annotated[str | None, typer.Option("--id", help="The replay's id; by default a new one.")]
Patience = Annotated[float, typer.Option("--patience", help="Give up when no query ends for this many seconds.", min=1)]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="field=value in every letter, as JSON or text; again at a resume.")
]
# The default time limit of a batch query: after that much silence no query will end any more.
PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Which records, and which of their headers."""

    since: Annotated[
        str | None, typer.Option("--since", help="Records of this time or later, in UTC: 2026-11-23T10:00:00Z.")
    ] = None
    until: Annotated[str | None, typer.Option("--until", help="Records from before this time, in UTC.")] = None
    partition: Annotated[list[int] | None, typer.Option(help="Only this partition; may be repeated.")] = None
    from_offset: Annotated[int | None, typer.Option(help="From this offset of the one partition.", min=0)] = None
    to_offset: Annotated[int | None, typer.Option(help="Up to this offset, without it.", min=0)] = None
    key: Annotated[list[str] | None, typer.Option(help="Only this key; may be repeated.")] = None
    header: Annotated[list[str] | None, typer.Option(help="Only with this header: name=value.")] = None
    org: Annotated[str | None, typer.Option(help="Only this org's.")] = None
    user: Annotated[str | None, typer.Option(help="Only this user's; requires --org.")] = None
    mode: Annotated[Mode | None, typer.Option(help="Only this lane's.")] = None
    status: Annotated[list[Status] | None, typer.Option(help="Only queries with this status.")] = None
    allow_header: Annotated[list[str] | None, typer.Option(help="Copies keep only the headers so named.")] = None
    deny_header: Annotated[list[str] | None, typer.Option(help="Copies lose the headers so named.")] = None

    def make_spec(self, name: ReplayName, codes: Sequence[str] | None, **own: Any) -> ReplaySpec:
        """What to replay; `own` are fields of this kind of replay. Exits with 2 for a usage error."""
        if self.user is not None and self.org is None:
            complain("--user requires --org", WRONGLY_ASKED)
        selection = Selection(
            keys=frozenset(self.key or ()),
            headers=frozenset(split_pair(each, "--header wants name=value") for each in self.header or ()),
            org_id=optional_uuid(self.org, "--org"),
            user_id=optional_uuid(self.user, "--user"),
            mode=None if self.mode is None else self.mode.value,
            statuses=frozenset(each.value for each in self.status or ()),
            error_codes=frozenset(codes or ()),
        )
        rules = HeaderRules(
            frozenset(each.lower() for each in self.allow_header or ()),
            frozenset(each.lower() for each in self.deny_header or ()),
        )
        return ReplaySpec(name, self._read_window(), selection, rules, **own)

    def _read_window(self) -> Window:
        window = Window(
            partitions=frozenset(self.partition or ()),
            from_offset=self.from_offset,
            to_offset=self.to_offset,
            since=read_time(self.since, "--since"),
            until=read_time(self.until, "--until"),
        )
        if window.has_offsets and len(window.partitions) != 1:
            complain("offsets belong to one partition: give one --partition with them", WRONGLY_ASKED)
        if self.from_offset is not None and self.to_offset is not None and self.from_offset >= self.to_offset:
            complain("--from-offset must lie before --to-offset", WRONGLY_ASKED)
        if window.since is not None and window.until is not None and window.since >= window.until:
            complain("--since must be earlier than --until", WRONGLY_ASKED)
        if window.until is not None and window.until > datetime.now(UTC):
            complain("--until lies in the future, and future records can't be planned: take a past time", WRONGLY_ASKED)
        return window


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Whether to plan or to carry a plan out."""

    execute: Annotated[str | None, typer.Option(help="Carry out the plan that has this hash.")] = None
    reason: Annotated[str | None, typer.Option(help="Why, for the audit.")] = None
    by: Annotated[str | None, typer.Option(help="Who; by default the account's name.")] = None
    as_json: Json = False

    @property
    def actor(self) -> str:
        """Who replays: `--by`, else this process's account. Exits with 2 if the account has no name."""
        if self.by:
            return self.by
        try:
            return getpass.getuser()
        except (OSError, KeyError):
            complain("this account has no name: say who replays, --by NAME", WRONGLY_ASKED)

    def require_reason(self) -> str:
        """The reason; exits with 2 if it is missing."""
        if self.reason is None or not self.reason.strip():
            complain("say why: --reason is kept with the replay for the audit", WRONGLY_ASKED)
        return self.reason


@dataclass(frozen=True, slots=True)
class PaceOptions(Pace):
    """How fast to publish."""

    # A broker and an executor on two cores publish as much beside live traffic without a visible delay.
    rate: Annotated[float, typer.Option(help="Records a second.", min=1)] = 1000.0
    # Some seconds of an executor's admission.
    max_lag: Annotated[int, typer.Option(help="Wait while more live records than this wait; 0: never.", min=0)] = 10_000


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options, each a parameter whose type is one of this module's dataclasses.

    Typer reads a command's options from its signature, so this one names every option of the groups.
    """
    groups: dict[str, Any] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.annotation in _GROUPS:
            group = groups[parameter.name] = parameter.annotation
            hints = get_type_hints(group, include_extras=True)
            options += [
                inspect.Parameter(each.name, _KEYWORD, default=each.default, annotation=hints[each.name])
                for each in fields(group)
            ]
        else:
            options.append(parameter.replace(kind=_KEYWORD))

    def run(**values: Any) -> None:
        made = {
            name: group(**{each.name: values.pop(each.name) for each in fields(group) if each.name in values})
            for name, group in groups.items()
        }
        command(**values, **made)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run


_GROUPS = (RecordOptions, PlanOptions, PaceOptions)
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def read_patch(changes: list[str] | None) -> Patch:
    """The values of --set."""
    values: dict[str, Any] = {}
    for change in changes or ():
        name, text = split_pair(change, "--set wants name=value")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return Patch(values)
