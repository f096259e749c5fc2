"""A CSV result for people who open it in a spreadsheet, which takes some texts for formulas."""

import csv
import io
import re
import sys
from typing import IO

# With what a formula begins in Excel, LibreOffice or Google Sheets, after whatever spaces; some take the wide forms.
_FORMULA = re.compile("[\\s\ufeff\0]*[=+\\-@\t\r＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-](inf|nan)")


def write_for_spreadsheet(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a CSV file, row by row, as a spreadsheet shows it without running anything.

    A field, or a name in the header, that would be a formula gets an apostrophe before it; numbers stay as they are.
    The copy begins with a byte order mark, without which Excel does not read UTF-8. It is for people: NULL and the
    empty text look alike in it, and a program should read the result itself.

    Args:
        source: The result's file, in bytes, at its beginning.
        target: Where the copy is written, in bytes.
    """
    # A field may be as long as a row of a result.
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
