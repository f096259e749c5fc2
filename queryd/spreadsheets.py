"""Make a CSV result safe for spreadsheets, which read some texts as formulas."""

import csv
import io
import re
import sys
from typing import IO

# The characters that start a formula in Excel, LibreOffice or Google Sheets, after any spaces. Some of these programs
# also accept the full-width forms.
_FORMULA = re.compile("[\\s\ufeff\0]*[=+\\-@\t\r＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-](inf|nan)")


def write_for_spreadsheet(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a CSV file row by row, so that a spreadsheet runs no formula from it.

    A field or a header name that would be a formula gets a leading apostrophe; numbers do not change. The copy starts
    with a byte order mark, which Excel needs to read UTF-8. The copy is for people: NULL and empty text look the same
    in it. Programs should read the result itself.

    Args:
        source: The result's file, opened in binary mode, at its start.
        target: The file for the copy, opened in binary mode.
    """
    # The csv module's default limit is smaller than a result's longest field.
    csv.field_size_limit(sys.maxsize)
    read = io.TextIOWrapper(source, encoding="utf-8", newline="")
    written = io.TextIOWrapper(target, encoding="utf-8-sig", newline="")
    try:
        rows = csv.writer(written)
        for row in csv.reader(read):
            rows.writerow([_make_safe(field) for field in row])
        written.flush()
    finally:
        read.detach()
        written.detach()


def _make_safe(field: str) -> str:
    return f"'{field}" if _FORMULA.match(field) and not _NUMBER.fullmatch(field) else field
