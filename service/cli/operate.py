"""`queryd db upgrade` and `db platform`, `topics apply`, `bucket apply` and `doctor`."""

import asyncio
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

import psycopg
import typer
from rich.console import Console

from db.health import DATA, STATE, SWAPPED, has_other_schema
from db.migrations.upgrade import upgrade_data, upgrade_state
from db.state.platform import create_platform_tables
from queryd.registry import registry_in_use
from service.bucket import apply_bucket
from service.cli.output import complain, print_json, print_rows
from service.cli.query import Json
from service.diagnosis import explain_postgres
from service.doctor import Finding, examine
from service.settings import load_settings
from service.topics import apply_topics


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    db = typer.Typer(help="The schemas of the two databases.", no_args_is_help=True)
    db.command("upgrade")(upgrade)
    db.command("platform")(platform)
    topics = typer.Typer(help="The topics.", no_args_is_help=True)
    topics.command("apply")(apply)
    bucket = typer.Typer(help="The results bucket.", no_args_is_help=True)
    bucket.command("apply")(apply_results_bucket)
    app.add_typer(db, name="db")
    app.add_typer(topics, name="topics")
    app.add_typer(bucket, name="bucket")
    app.command()(doctor)


# A group of one command is still a group: `queryd db upgrade`, not `queryd db`.


def upgrade(as_json: Json = False) -> None:
    """Bring both databases to this version's schema. Safe to repeat, and for two at once."""
    settings = load_settings()
    both = (
        ("QUERYD_DATA_URL", settings.data_url.get_secret_value(), DATA, upgrade_data),
        ("QUERYD_STATE_URL", settings.state_url.get_secret_value(), STATE, upgrade_state),
    )
    apart = settings.data_url != settings.state_url
    for name, url, schema, run in both:
        try:
            # One database may contain both schemas, but only if both variables name it.
            if apart and asyncio.run(has_other_schema(url, schema)):
                complain(f"{name}: {SWAPPED}")
            run(url)
        except psycopg.Error as error:
            complain(f"{name}: {explain_postgres(name, url, error)}")
    if as_json:
        print_json({"data": "upgraded", "state": "upgraded"})
    else:
        print("data: upgraded\nstate: upgraded")


def platform(as_json: Json = False) -> None:
    """Make the platform's own orgs, users and tasks in the state database where they are missing: only for a
    development machine, as elsewhere they are the platform's. Safe to repeat."""
    url = load_settings().state_url.get_secret_value()
    try:
        create_platform_tables(url)
    except psycopg.Error as error:
        complain(f"QUERYD_STATE_URL: {explain_postgres('QUERYD_STATE_URL', url, error)}")
    if as_json:
        print_json({"platform": "there"})
    else:
        print("platform: there")


def apply(as_json: Json = False) -> None:
    """Make missing topics and put the settings of the others right; with a schema registry, register the schemas, and
    hold new versions against all older ones. Safe to repeat."""
    settings = load_settings()
    registry = registry_in_use()
    done = apply_topics(settings.kafka, settings.partitions, settings.replication)
    if registry is not None:
        done |= registry.apply()
    if as_json:
        print_json(done)
    else:
        print_rows("topics", [{"topic": name, "done": what} for name, what in done.items()])


def apply_results_bucket(as_json: Json = False) -> None:
    """Make the bucket of QUERYD_RESULTS_URL where it is missing, and wait until it takes an object. Safe to repeat."""
    settings = load_settings()
    done = apply_bucket(settings.bucket)
    if as_json:
        print_json({settings.bucket: done})
    else:
        print(f"{settings.bucket}: {done}")


def doctor(as_json: Json = False) -> None:
    """Can everything be reached, and what is to be fixed? Exit code 1 if something is."""
    findings = examine(load_settings())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    if any(finding.state == "wrong" for finding in findings):
        raise SystemExit(1)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one line per finding to a pipe; on a terminal print the advice on separate lines within its width."""
    if not sys.stdout.isatty():
        print_rows("findings", [{"state": each.state, "what": each.what, "advice": each.advice} for each in findings])
        return
    width, indent = Console().width, " " * 9
    for each in findings:
        print(f"{each.state:<9}{each.what}")
        print(textwrap.fill(each.advice, width, initial_indent=indent, subsequent_indent=indent))
