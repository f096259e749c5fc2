"""The command line."""

import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from service.cli import datasets, limits, operate, query, replay, retention, run, saved, watch
from service.cli.failures import FAILURES, describe_defect, describe_failure
from service.cli.output import DEFECT, WRONGLY_ASKED, complain
from service.environment import describe_stale_stack
from service.settings import WrongSetting, describe_unknown, find_unknown_variables, load_env_file
from telemetry.logs import set_up_logs

app = typer.Typer(
    name="queryd",
    help="SQL by event: requests come from Kafka, results go to S3.",
    no_args_is_help=True,
    # A traceback with local variables would show SQL and credentials.
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"queryd {version('queryd')}")
        raise typer.Exit


# Commands that start a stack or a service. They wait for their servers themselves.
_STARTING = frozenset({"up", "demo", "run"})


@app.callback()
def start(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """SQL by event: requests come from Kafka, results go to S3."""
    unknown = find_unknown_variables()
    if unknown:
        print(f"queryd: ignored: {'; '.join(describe_unknown(*each) for each in unknown.items())}", file=sys.stderr)
    if context.invoked_subcommand not in _STARTING and "--help" not in sys.argv:
        load_env_file()
        stale = describe_stale_stack()
        if stale is not None:
            raise WrongSetting(stale)


run.add_commands(app)
query.add_commands(app)
watch.add_commands(app)
operate.add_commands(app)
app.add_typer(datasets.app, name="datasets")
app.add_typer(saved.app, name="saved")
app.add_typer(limits.app, name="limits")
app.add_typer(retention.app, name="retention")
app.add_typer(replay.app, name="replay")


def main() -> None:
    """Run the command line. Every error is one line on stderr and an exit code from docs/operations.md."""
    # A command reports its errors itself, so libraries log only errors. Services and `up` configure logging again.
    set_up_logs("ERROR")
    try:
        # Without standalone mode a usage error is one line too, not typer's box of six lines.
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        _complain_of_usage(error)
    except typer.Abort:
        complain("stopped")
    except WrongSetting as error:
        complain(str(error), WRONGLY_ASKED)
    except FAILURES as error:
        complain(describe_failure(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "" if error.filename is None else f" {error.filename}"
        complain(f"operating system error{where}: {error.strerror or type(error).__name__}")
    except Exception as error:
        if os.environ.get("QUERYD_LOG_LEVEL") == "DEBUG":
            raise
        complain(describe_defect(error), DEFECT)
    sys.exit(code if isinstance(code, int) else 0)


def _complain_of_usage(error: typer.TyperException) -> NoReturn:
    sentence = error.format_message().removesuffix(".").replace("Value error, ", "")
    if not sentence.strip():
        # The text is empty if a group was called without a command; typer has printed the help.
        sys.exit(WRONGLY_ASKED)
    context = getattr(error, "ctx", None)
    command = "queryd" if context is None else context.command_path
    complain(f"{' '.join(sentence.split())}; see `{command} --help`", error.exit_code)
