"""`queryd db upgrade`, `topics apply` and `doctor`."""

from dataclasses import asdict

import psycopg
import typer

from db.migrations.upgrade import upgrade_data, upgrade_state
from service.cli.output import complain, print_json, print_rows
from service.cli.query import Json
from service.doctor import examine
from service.settings import load_settings
from service.topics import TopicsRefused, apply_topics


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    db = typer.Typer(help="The schemas of the two databases.", no_args_is_help=True)
    db.command("upgrade")(upgrade)
    topics = typer.Typer(help="The topics.", no_args_is_help=True)
    topics.command("apply")(apply)
    app.add_typer(db, name="db")
    app.add_typer(topics, name="topics")
    app.command()(doctor)


# A group of one command is still a group: `queryd db upgrade`, not `queryd db`.


def upgrade(as_json: Json = False) -> None:
    """Bring both databases to this version's schema. Safe to repeat, and for two at once."""
    settings = load_settings()
    for name, url, run in (
        ("QUERYD_DATA_URL", settings.data_url, upgrade_data),
        ("QUERYD_STATE_URL", settings.state_url, upgrade_state),
    ):
        try:
            run(url.get_secret_value())
        except psycopg.OperationalError as error:
            complain(f"{name}: the database does not answer ({type(error).__name__})")
    if as_json:
        print_json({"data": "upgraded", "state": "upgraded"})
    else:
        print("data: upgraded\nstate: upgraded")


def apply(as_json: Json = False) -> None:
    """Make missing topics and put the settings of the others right. Safe to repeat."""
    settings = load_settings()
    try:
        done = apply_topics(settings.kafka, settings.partitions, settings.replication)
    except TopicsRefused as error:
        complain(str(error))
    if as_json:
        print_json(done)
    else:
        print_rows("topics", [{"topic": name, "done": what} for name, what in done.items()])


def doctor(as_json: Json = False) -> None:
    """Can everything be reached, and what is to be fixed? Exit code 1 if something is."""
    findings = examine(load_settings())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_rows("findings", [asdict(finding) for finding in findings])
    if any(finding.state == "wrong" for finding in findings):
        raise SystemExit(1)
