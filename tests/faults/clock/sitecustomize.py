"""Lets a test move the wall clock of one Python process: this folder stands first on that process's `PYTHONPATH`.

`FAULTS_CLOCK` names a file of eight bytes, a double in the machine's order: the seconds by which `time.time` and
`datetime.now` are off. It is mapped into memory, so that whoever writes it moves the clock at once. Monotonic clocks,
and those of C libraries such as librdkafka, stay as they are.
"""

import ctypes
import gc
import mmap
import os
import struct
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any


def _move_clocks(file: Path) -> None:
    with file.open("rb") as opened:
        shift = mmap.mmap(opened.fileno(), 8, access=mmap.ACCESS_READ)

    def seconds() -> float:
        return float(struct.unpack("d", shift[:8])[0])

    true_time, true_now = time.time, datetime.now

    def shifted_time() -> float:
        return true_time() + seconds()

    def shifted_now(_cls: type[datetime], tz: tzinfo | None = None) -> datetime:
        return true_now(tz) + timedelta(seconds=seconds())

    def shifted_utcnow(_cls: type[datetime]) -> datetime:
        return shifted_now(_cls, UTC).replace(tzinfo=None)

    time.time = shifted_time
    time.time_ns = lambda: int(shifted_time() * 1e9)
    # A subclass would not do: values that C code makes are of the type itself, and then no instances of it.
    members: dict[str, Any] = gc.get_referents(datetime.__dict__)[0]
    members["now"] = classmethod(shifted_now)
    members["utcnow"] = classmethod(shifted_utcnow)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime))


if "FAULTS_CLOCK" in os.environ:
    _move_clocks(Path(os.environ["FAULTS_CLOCK"]))
