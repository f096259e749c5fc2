"""Landlock: the kernel takes from this process every file, and every TCP port, that it is not given here.

From <linux/landlock.h>; the kernel's documentation "Landlock: unprivileged access control" has the rules. Nobody needs
rights for it, and it can't be undone. Each version of it (ABI) knows more kinds of access; what a kernel does not know
is left out.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH, _NET_PORT = 1, 2
_PR_SET_NO_NEW_PRIVS = 38

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
# Executing, reading, writing, removing and making anything: what the first version knows.
_FIRST = (1 << 13) - 1
_READ = _READ_FILE | _READ_DIR
# What one may do to a file, as opposed to a folder.
_OF_FILES = _READ_FILE | _WRITE_FILE | _TRUNCATE
# In folders of ours: everything but executing, device nodes, sockets and pipes.
_CHANGE = _READ | _WRITE_FILE | _TRUNCATE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8

_BIND_TCP, _CONNECT_TCP = 1, 2
# No signals and no abstract Unix sockets to whoever stands outside.
_SCOPES = 0b11


@dataclass(frozen=True, slots=True)
class Allowed:
    """What stays allowed: files and folders to read, folders to change, and TCP ports to connect to."""

    readable: tuple[Path, ...]
    changeable: tuple[Path, ...]
    ports: tuple[int, ...]


def supported_abi() -> int:
    """The version that this kernel offers; 0 where it offers none, as on macOS."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)))


def restrict(allowed: Allowed) -> int:
    """Take everything else from this thread and those that it will start; returns the version that holds, 0 for none.

    Since version 4 that includes TCP. Raises `OSError` where the kernel has Landlock and refuses these rules.
    """
    abi = supported_abi()
    if abi == 0:
        return 0
    files, ports, scopes = _handled(abi)
    attributes = struct.pack("=QQQ", files, ports, scopes)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        _allow_files(ruleset, allowed.readable, _READ & files)
        _allow_files(ruleset, allowed.changeable, _CHANGE & files)
        for port in allowed.ports if ports else ():
            _call(_ADD_RULE, ruleset, _NET_PORT, struct.pack("=QQ", _CONNECT_TCP, port), 0)
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs can't be set")
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi


def _handled(abi: int) -> tuple[int, int, int]:
    """What is denied unless allowed: kinds of access to files, to ports, and scopes."""
    files = _FIRST | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0) | (_IOCTL_DEV if abi >= 5 else 0)
    return files, _BIND_TCP | _CONNECT_TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0


def _allow_files(ruleset: int, paths: Iterable[Path], access: int) -> None:
    for path in paths:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # What isn't there, or is out of reach anyway, needs no rule.
            continue
        try:
            of_kind = access if path.is_dir() else access & _OF_FILES
            _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", of_kind, place), 0)
        finally:
            os.close(place)


def _call(number: int, *arguments: int | bytes) -> int:
    """A system call. Raises `OSError`."""
    library = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    answer: int = library.syscall(ctypes.c_long(number), *given)
    if answer < 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses a Landlock rule")
    return answer
