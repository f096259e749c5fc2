"""`queryd fetch --csv-safe`: a CSV result that is safe to open in a spreadsheet."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from queryd.events import OutputFormat
from queryd.spreadsheets import write_for_spreadsheet
from service.cli.output import complain


def write(
    fetch_to: Callable[[Path], None], output: Path | None, output_format: str | None, *, has_other_output: bool
) -> None:
    """Fetch a result into a temporary file, and write its safe copy to `output` in one step."""
    if has_other_output:
        complain("--csv-safe can't be combined with --link, --json or --error", 2)
    if output_format != OutputFormat.CSV:
        complain(f"--csv-safe is for csv, and this result is {output_format}: submit it with --format csv", 2)
    with tempfile.TemporaryDirectory(prefix="queryd-fetch-") as folder:
        fetched, safe = Path(folder) / "fetched", Path(folder) / "safe"
        fetch_to(fetched)
        try:
            if output is None:
                with fetched.open("rb") as source:
                    write_for_spreadsheet(source, sys.stdout.buffer)
                return
            with fetched.open("rb") as source, safe.open("wb") as target:
                write_for_spreadsheet(source, target)
        except BrokenPipeError:
            raise
        except OSError as error:
            complain(f"can't write {output or 'the output'}: {error.strerror}")
        _move(safe, output)


def _move(whole: Path, output: Path) -> None:
    draft = output.with_name(f"{output.name}.draft")
    try:
        draft.write_bytes(whole.read_bytes())
        draft.replace(output)
    except OSError as error:
        draft.unlink(missing_ok=True)
        complain(f"can't write {output}: {error.strerror}")
