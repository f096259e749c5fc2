"""The command line."""

import sys

import typer

from service.cli import datasets, operate, query, run, saved
from service.settings import WrongSetting

app = typer.Typer(
    name="queryd",
    help="SQL by event: requests come from Kafka, results go to S3.",
    no_args_is_help=True,
    # A traceback with local variables would show SQL and credentials.
    pretty_exceptions_enable=False,
    add_completion=False,
)
run.add_commands(app)
query.add_commands(app)
operate.add_commands(app)
app.add_typer(datasets.app, name="datasets")
app.add_typer(saved.app, name="saved")


def main() -> None:
    """Run the command line. A wrong setting is one line on stderr and exit code 2."""
    try:
        app()
    except WrongSetting as error:
        print(f"queryd: {error}", file=sys.stderr)
        sys.exit(2)
