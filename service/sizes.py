"""Sizes in bytes, as people write and read them: `1GB`, `512MiB`."""

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
    """The bytes of `1073741824`, `1GiB`, `1.5 GB`; raises `ValueError`."""
    matched = _SIZE.fullmatch(text.strip().lower())
    unit = None if matched is None else _UNITS.get(matched[2] or "b")
    if matched is None or unit is None:
        raise ValueError(MUST_BE)
    whole, _, part = matched[1].partition(".")
    # In integers: a float has too few digits for the sizes at which one byte counts.
    scaled: int = int(whole + part) * unit
    size, rest = divmod(scaled, int("1" + "0" * len(part)))
    if rest:
        raise ValueError("must be a whole number of bytes")
    return size


def show_size(size: int) -> str:
    """The size in the largest unit of which it is a whole number, or else in bytes: `1 GiB`, `1 GB`, `1,500 B`."""
    for name in _SHOWN:
        for unit in (name, name.replace("i", "").replace("K", "k")):
            if size and size % _UNITS[unit.lower()] == 0:
                return f"{size // _UNITS[unit.lower()]:,} {unit}"
    return f"{size:,} B"
