"""The `queryd` command: puts the rooms on this process's own path and hands over to `service.cli`.

An installed wheel carries the rooms as `queryd/_rooms/…`, so that `queryd` is its only top-level name; a checkout has
them beside the package. The rooms are never put on the path of a program that merely imports `queryd`.
"""

import importlib
import os
import runpy
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _open_rooms() -> None:
    """Put the rooms first on this process's path."""
    rooms = _PACKAGE / "_rooms"
    sys.path.insert(0, str(rooms if rooms.is_dir() else _PACKAGE.parent))


def room_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a room's module as a process of its own, such as `engines.duckdb.child`.

    `-P` keeps the working directory off the path: a caller's folder named `db` must not shadow ours.
    """
    return [sys.executable, "-P", str(_PACKAGE / "__main__.py"), "--room", module, *arguments]


def main() -> None:
    """Run the command line, or with `--room MODULE` that module."""
    _open_rooms()
    if sys.argv[1:2] == ["--room"]:
        module = sys.argv[2]
        sys.argv = [module, *sys.argv[3:]]
        runpy.run_module(module, run_name="__main__")
        return
    try:
        importlib.import_module("service.cli").main()
    except KeyboardInterrupt:
        # Also while the imports are still under way, which take a second.
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`queryd … | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    if sys.path[:1] == [str(_PACKAGE)]:
        # Run as a file without -P: the package's own folder is no place to import from.
        del sys.path[0]
    main()
