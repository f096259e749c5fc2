"""`queryd retention`, `retention delete-org` and `retention delete-user`."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import typer

from db.data.retention import Scope
from db.health import DATA, require_schema
from results.retention.deletion import Deleted, DeletionRules, delete_for_good
from results.retention.sweep import SweepUnderWay, Swept
from results.store import StoreAccess
from service.cli.database import uuid_argument
from service.cli.output import complain, print_fields, print_json, show_fields
from service.cli.query import Json
from service.settings import Settings, load_settings
from service.topics import TOPICS, days_until_forgotten
from service.wiring import make_retention

app = typer.Typer(help="Remove what has outlived its time; or one org or user, for good.", invoke_without_command=True)

# An executor's own sweep is short, or lists a large bucket: then it does what was asked for.
_PATIENCE_SECONDS = 60.0

Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]

_Answer = TypeVar("_Answer")


@app.callback()
def sweep(context: typer.Context, as_json: Json = False) -> None:
    """Remove expired results, what dead attempts and processes left behind, and old rows. Safe to repeat."""
    if context.invoked_subcommand is not None:
        return
    settings = load_settings()

    async def work(access: StoreAccess) -> Swept:
        return await make_retention(settings, access).sweep(patience_seconds=_PATIENCE_SECONDS)

    show_fields(asdict(_run(settings, work)), as_json)


@app.command()
def delete_org(
    org: Annotated[str, typer.Argument(help="The org's id.")], yes: Yes = False, as_json: Json = False
) -> None:
    """Delete everything of an org for good: queries, results, saved queries, datasets, limits, log entries."""
    _delete(Scope(uuid_argument(org, "the org")), f"org {org}", yes, as_json)


@app.command()
def delete_user(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    org: Annotated[str, typer.Option(help="The org in which.")],
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete everything of a user in an org for good: queries, results, saved queries, datasets, log entries."""
    scope = Scope(uuid_argument(org, "--org"), uuid_argument(user, "the user"))
    _delete(scope, f"user {user} in org {org}", yes, as_json)


def _delete(scope: Scope, whose: str, yes: bool, as_json: bool) -> None:
    settings = load_settings()
    if not yes:
        _ask(whose)
    rules = DeletionRules(settings.data_url.get_secret_value(), settings.bucket, settings.lease_seconds)

    async def work(access: StoreAccess) -> Deleted:
        return await delete_for_good(rules, access, scope)

    deleted = _run(settings, work)
    today = datetime.now(UTC).date()
    forgotten = {spec.name.value: today + timedelta(days_until_forgotten(spec)) for spec in TOPICS}
    fields: dict[str, Any] = {"org_id": scope.org_id, "user_id": scope.user_id, **asdict(deleted)}
    last = max(forgotten.values())
    if as_json:
        print_json(fields | {"forgotten_by_topic": forgotten, "forgotten_on": last})
    else:
        print_fields(fields)
        print(f"on {last} the topics will have forgotten too")


def _ask(whose: str) -> None:
    if not sys.stdin.isatty():
        complain("this deletes for good: give --yes", 2)
    if not typer.confirm(f"Delete everything of {whose} for good?", err=True):
        complain("nothing was deleted")


def _run(settings: Settings, work: Callable[[StoreAccess], Awaitable[_Answer]]) -> _Answer:
    """Run `work` with access to the bucket and return its result."""

    async def run() -> _Answer:
        await require_schema(settings.data_url.get_secret_value(), DATA)
        return await work(StoreAccess())

    try:
        return asyncio.run(run())
    except SweepUnderWay as error:
        complain(f"{error}; repeat the command when it is done")
