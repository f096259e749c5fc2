"""Parse and format sizes in bytes: `1GB`, `512MiB`."""

import re

_UNITS: dict[str, int] = {
    "b": 1,
    **{f"{letter}b": 1000 ** (power + 1) for power, letter in enumerate("kmgtp")},
    **{f"{letter}ib": 1024 ** (power + 1) for power, letter in enumerate("kmgtp")},
}
_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,15})?) *([a-z]*)")
_SHOWN = ("PiB", "TiB", "GiB", "MiB", "KiB")
MUST_BE = "must be a size: bytes, or a number with kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB or TiB (of 1024)"


def read_size(text: str) -> int:
    """Parse a size such as `1073741824`, `1GiB` or `1.5 GB` into bytes; raises `ValueError`."""
    matched = _SIZE.fullmatch(text.strip().lower())
    unit = None if matched is None else _UNITS.get(matched[2] or "b")
    if matched is None or unit is None:
        raise ValueError(MUST_BE)
    whole, _, part = matched[1].partition(".")
    # Calculate with integers, since a float can't represent large sizes exactly.
    scaled: int = int(whole + part) * unit
    size, rest = divmod(scaled, int("1" + "0" * len(part)))
    if rest:
        raise ValueError("must be a whole number of bytes")
    return size


def show_size(size: int) -> str:
    """Format a size in the largest unit that gives a whole number: `1 GiB`, `1 GB`, `1,500 B`."""
    for name in _SHOWN:
        for unit in (name, name.replace("i", "").replace("K", "k")):
            if size and size % _UNITS[unit.lower()] == 0:
                return f"{size // _UNITS[unit.lower()]:,} {unit}"
    return f"{size:,} B"
