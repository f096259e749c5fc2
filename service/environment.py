"""The environment of the embedded stack, of `queryd up` and `queryd demo` and of commands beside them.

The user's own one is full of what other programs need: a proxy, an AWS profile, a Postgres service, another stack's
addresses. Each would send our clients elsewhere, so that only what is named here is kept. No locale is: without one
Python takes one with UTF-8, which it needs to read the path of an editable install.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from service.embedded.ports import LOOPBACK, accepts

_KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ"),
    *("TERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"),
)
_SETTING_PREFIXES = ("QUERYD_", "OTEL_")

# Instead of the user's files and of what the operating system knows about proxies.
_OWN = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "PGSYSCONFDIR": os.devnull,
    "PGSERVICEFILE": os.devnull,
    "PGPASSFILE": os.devnull,
    "NO_PROXY": f"{LOOPBACK},localhost",
}

# What says which stack a process works with.
ADDRESSES = (
    *("QUERYD_KAFKA_BOOTSTRAP", "QUERYD_DATA_URL", "QUERYD_STATE_URL", "QUERYD_DATASETS_PG_URL"),
    *("QUERYD_RESULTS_URL", "AWS_ENDPOINT_URL"),
)


def isolate(*, settings: bool) -> None:
    """Give this process an environment of ours; with `settings`, the user's `QUERYD_*` and `OTEL_*` are kept."""
    prefixes = _SETTING_PREFIXES if settings else ()
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(prefixes)}
    os.environ.clear()
    os.environ.update(kept | _OWN)


def isolate_from_sourced_stack() -> None:
    """The same for `queryd up`, which keeps settings, but none that the shell has from a stack's `.queryd/env`."""
    folder = find_sourced_stack()
    isolate(settings=True)
    if folder is None:
        return
    # Only a stack with the embedded broker says so: with an outside Kafka the user has named it.
    embedded = os.environ.get("QUERYD_RELAY_TRANSACTIONS") == "false"
    dropped = {*ADDRESSES, "QUERYD_SCRATCH", "QUERYD_DATASETS_ACCESS_KEY_ID", "QUERYD_DATASETS_SECRET_ACCESS_KEY"}
    dropped |= {"QUERYD_RELAY_TRANSACTIONS"} if embedded else set()
    for name in dropped if embedded else dropped - {"QUERYD_KAFKA_BOOTSTRAP"}:
        os.environ.pop(name, None)


def find_sourced_stack() -> Path | None:
    """The folder of the stack whose `.queryd/env` this environment was taken from; None where it is of no stack."""
    scratch = os.environ.get("QUERYD_SCRATCH")
    if not scratch:
        return None
    folder = Path(scratch).parent
    try:
        password = (folder / "postgres" / "password").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    # Over restarts the password stays.
    return folder if f":{password}@" in os.environ.get("QUERYD_DATA_URL", "") else None


def describe_stale_stack() -> str | None:
    """Why a command can't reach the stack that the environment names; None where nothing is known to be wrong.

    A stack of ours listens on loopback, so that it can be asked at once.
    """
    folder = find_sourced_stack()
    if folder is None:
        return None
    silent = [name for name in ADDRESSES if _is_silent(os.environ.get(name, ""))]
    if not silent:
        return None
    current = read_env_file(folder / "env")
    if any(name in current and current[name] != os.environ[name] for name in silent):
        again = f"set -a; . {shlex.quote(str(folder / 'env'))}; set +a"
        return f"this shell has the environment of an earlier start of the stack in {folder}: run `{again}` again"
    if len(silent) == sum(_is_local(os.environ.get(name, "")) for name in ADDRESSES):
        return f"the stack in {folder} is not running: start it with `queryd up` in {folder.parent}"
    # One of its servers is away, which the command itself says best.
    return None


def read_env_file(path: Path) -> dict[str, str]:
    """What `queryd up` has written, as a shell would read it; nothing where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    named = (line.partition("=") for line in lines)
    return {name: _unquote(value) for name, separator, value in named if separator}


def write_env_lines(variables: Mapping[str, str]) -> str:
    """The text of such a file. Only what a shell would read otherwise is quoted."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())


def _unquote(value: str) -> str:
    try:
        return "".join(shlex.split(value))
    except ValueError:
        # Not written by us: an unpaired quote is part of the value.
        return value


def _is_silent(address: str) -> bool:
    return _is_local(address) and not accepts(_port(address))


def _is_local(address: str) -> bool:
    return _split(address)[0] == LOOPBACK


def _port(address: str) -> int:
    return int(_split(address)[1])


def _split(address: str) -> tuple[str, str]:
    """Host and port of a URL or of `host:port`."""
    place = urlsplit(address).netloc or address
    host, _, port = place.rpartition("@")[2].rpartition(":")
    return (host, port) if port.isdigit() else ("", "")
