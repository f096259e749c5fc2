"""The options of replays, and what they come to."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from queryd.events import ErrorCode, Mode, Status
from replay.commands import Asked
from replay.copies import HeaderRules
from replay.letters import Patch
from replay.log import Window
from replay.selection import Selection
from service.cli.database import optional_uuid
from service.cli.output import complain, read_time

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
Codes = Annotated[list[ErrorCode] | None, typer.Option("--error-code", help="Only with this error code.")]
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
    typer.Option("--set", help="field=value in every letter, as JSON or text; again at a resume."),
]


def read_window(
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
        since=read_time(since, "--since"),
        until=read_time(until, "--until"),
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


def read_selection(
    keys: list[str] | None,
    headers: list[str] | None,
    org: str | None,
    user: str | None,
    mode: Mode | None,
    statuses: list[Status] | None,
    codes: Sequence[str] | None,
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


def read_headers(allowed: list[str] | None, denied: list[str] | None) -> HeaderRules:
    return HeaderRules(
        frozenset(name.lower() for name in allowed or ()), frozenset(name.lower() for name in denied or ())
    )


def read_patch(changes: list[str] | None) -> Patch:
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


def check_one_topic(asked: Asked) -> None:
    if len(asked.lanes) > 1 and (asked.window.from_offset is not None or asked.window.to_offset is not None):
        complain("offsets are one topic's own: give --mode with them", 2)
