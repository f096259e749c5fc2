"""`queryd limits`."""

import re
from dataclasses import asdict
from typing import Annotated

import typer

from access.limits import OrgLimits, change, list_own, read_own, reset
from db.data.limits import OwnLimits
from service.cli.database import uuid_argument, with_data
from service.cli.output import complain, print_fields, print_json, read_size_option, show_rows
from service.cli.query import Json
from service.settings import load_settings
from service.sizes import show_size

app = typer.Typer(help="What an org may use at once and at most.", no_args_is_help=True)

# What takes a limit away from an org, so that the installation's holds again.
_DEFAULT = "default"
# No column holds more digits.
_NUMBER = re.compile("[0-9]{1,19}")
_VALUE = f"A number above 0, or `{_DEFAULT}`."
_SIZE_VALUE = f"A size above 0 such as 10GiB, or `{_DEFAULT}`."
_SIZES = frozenset({"bytes_scanned", "result_bytes"})

# What a row says that sets nothing.
_BARE = asdict(OrgLimits())

Org = Annotated[str, typer.Argument(help="The org's id.")]


@app.command()
def show(org: Org, as_json: Json = False) -> None:
    """Show the limits in force for an org, and which are its own."""
    org_id = uuid_argument(org, "the org")
    _print(org_id, with_data(lambda pool: read_own(pool, org_id)), as_json)


@app.command("set")
def set_(
    org: Org,
    running: Annotated[str | None, typer.Option(help=f"Queries that run at once, on all workers. {_VALUE}")] = None,
    queued: Annotated[str | None, typer.Option(help=f"Queries that wait. {_VALUE}")] = None,
    timeout: Annotated[str | None, typer.Option(help=f"Seconds that a query runs. {_VALUE}")] = None,
    bytes_scanned: Annotated[str | None, typer.Option(help=f"Most bytes that a query may read. {_SIZE_VALUE}")] = None,
    result_bytes: Annotated[str | None, typer.Option(help=f"Most bytes of a result. {_SIZE_VALUE}")] = None,
    result_rows: Annotated[str | None, typer.Option(help=f"Rows of a result. {_VALUE}")] = None,
    weight: Annotated[str | None, typer.Option(help=f"The org's share beside others that wait. {_VALUE}")] = None,
    as_json: Json = False,
) -> None:
    """Change what is given of an org's own limits, and leave the rest."""
    org_id = uuid_argument(org, "the org")
    given = {
        "running_queries": running,
        "queued_queries": queued,
        "timeout_seconds": timeout,
        "bytes_scanned": bytes_scanned,
        "result_bytes": result_bytes,
        "result_rows": result_rows,
        "weight": weight,
    }
    changes = {name: _read(name, text) for name, text in given.items() if text is not None}
    if not changes:
        complain("give at least one limit, see `queryd limits set --help`", 2)
    _print(org_id, with_data(lambda pool: change(pool, org_id, changes)), as_json)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the orgs that have limits of their own, with those."""
    show_rows("limits", [asdict(own) for own in with_data(list_own)], as_json)


@app.command("reset")
def reset_(org: Org, as_json: Json = False) -> None:
    """Forget an org's own limits, so that the defaults hold."""
    org_id = uuid_argument(org, "the org")
    with_data(lambda pool: reset(pool, org_id))
    _print(org_id, None, as_json)


def _read(name: str, text: str) -> int | None:
    if text == _DEFAULT:
        return None
    if name in _SIZES:
        return read_size_option(text, name)
    if not _NUMBER.fullmatch(text):
        complain(f"{name} must be a number above 0, or `{_DEFAULT}`", 2)
    return int(text)


def _print(org_id: str, own: OwnLimits | None, as_json: bool) -> None:
    """The limits in force; those that the org has of its own are named."""
    defaults = load_settings().org_limits()
    in_force = asdict(defaults if own is None else defaults.overridden_by(own))
    # The row always has a weight.
    names = [] if own is None else [name for name, value in _BARE.items() if getattr(own, name) != value]
    if as_json:
        print_json({"org_id": org_id, **in_force, "own": names})
        return
    print_fields(
        {"org_id": org_id} | {name: _format_limit(name, value, name in names) for name, value in in_force.items()}
    )


def _format_limit(name: str, value: int | None, own: bool) -> str:
    amount = "no limit" if value is None else show_size(value) if name in _SIZES else str(value)
    return amount + ("" if own else " (default)")
