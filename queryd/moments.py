"""Parse DuckDB's text of dates and timestamps, including infinities, years BC and years after 9999."""

import re

import pyarrow as pa
import pyarrow.compute as pc

_MOMENT = re.compile(
    r"(\d{4,})-(\d\d)-(\d\d)( \(BC\))?(?:[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?([+-]\d\d(?::?\d\d)?|Z)?)?"
)
_INFINITIES = {"infinity": 1, "-infinity": -1}
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_SECONDS = 86_400
# Days from 0000-03-01 to 1970-01-01.
_EPOCH_DAYS = 719_468
_CYCLE_YEARS, _CYCLE_DAYS = 400, 146_097


def is_moment(type_: pa.DataType) -> bool:
    """True for dates and timestamps."""
    return bool(pa.types.is_date(type_) or pa.types.is_timestamp(type_))


def parse(texts: pa.Array, target: pa.DataType) -> pa.Array:
    """Parse texts as dates or timestamps. An infinity is the type's largest number, as in DuckDB's Parquet files.

    Raises `ValueError` for another text, and pyarrow's errors for a value outside the type's range.
    """
    try:
        # Arrow's parser is fast, but it reads only the years 0 to 9999.
        return pc.cast(texts, target)
    except pa.ArrowInvalid:
        bits = 32 if pa.types.is_date32(target) else 64
        numbers = [None if text is None else _count(text, target, bits) for text in texts.to_pylist()]
        return pa.array(numbers, pa.int32() if bits == 32 else pa.int64()).view(target)


def _count(text: str, target: pa.DataType, bits: int) -> int:
    """Return the number of the type's units since 1970."""
    if text in _INFINITIES:
        return _INFINITIES[text] * ((1 << (bits - 1)) - 1)
    found = _MOMENT.fullmatch(text)
    if found is None:
        raise ValueError("the text is no date or timestamp")
    year = 1 - int(found[1]) if found[4] else int(found[1])
    days = _count_days(year, int(found[2]), int(found[3]))
    if pa.types.is_date(target):
        return days
    seconds = days * _DAY_SECONDS + int(found[5] or 0) * 3600 + int(found[6] or 0) * 60 + int(found[7] or 0)
    seconds -= _read_offset(found[9])
    per_second = _PER_SECOND[str(target.unit)]
    return seconds * per_second + int((found[8] or "").ljust(9, "0")) * per_second // 10**9


def _count_days(year: int, month: int, day: int) -> int:
    """Return a date's days since 1970, in the proleptic Gregorian calendar; the year 0 is 1 BC."""
    # Count years from March, so that a leap day is a year's last day.
    year -= month <= 2
    cycle, of_cycle = divmod(year, _CYCLE_YEARS)
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return cycle * _CYCLE_DAYS + of_cycle * 365 + of_cycle // 4 - of_cycle // 100 + of_year - _EPOCH_DAYS


def _read_offset(text: str | None) -> int:
    if text is None or text == "Z":
        return 0
    digits = text[1:].replace(":", "")
    seconds = int(digits[:2]) * 3600 + int(digits[2:] or 0) * 60
    return -seconds if text[0] == "-" else seconds
