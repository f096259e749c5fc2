"""The environment of the embedded stack, of `queryd up` and `queryd demo`, and of commands that use the stack.

The user's environment contains variables for other programs: a proxy, an AWS profile, a Postgres service, another
stack's addresses. Each would send queryd's clients to the wrong server, so queryd keeps only the variables named here.
It keeps no locale: without one Python uses UTF-8, which it needs to read the path of an editable install.
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

# Replaces the user's configuration files and the operating system's proxy settings.
_OWN = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "PGSYSCONFDIR": os.devnull,
    "PGSERVICEFILE": os.devnull,
    "PGPASSFILE": os.devnull,
    "NO_PROXY": f"{LOOPBACK},localhost",
}

# The variables that say which stack a process uses.
ADDRESSES = (
    *("QUERYD_KAFKA_BOOTSTRAP", "QUERYD_DATA_URL", "QUERYD_STATE_URL", "QUERYD_DATASETS_PG_URL"),
    *("QUERYD_RESULTS_URL", "AWS_ENDPOINT_URL"),
)


def isolate(*, settings: bool) -> None:
    """Remove the user's variables from this process's environment; with `settings`, keep `QUERYD_*` and `OTEL_*`."""
    prefixes = _SETTING_PREFIXES if settings else ()
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(prefixes)}
    os.environ.clear()
    os.environ.update(kept | _OWN)


def isolate_from_sourced_stack() -> None:
    """Isolate `queryd up`: keep the user's settings, except those that the shell took from a stack's `.queryd/env`."""
    folder = find_sourced_stack()
    isolate(settings=True)
    if folder is None:
        return
    # Only a stack with the embedded broker sets this. With an external Kafka the user set its address, so keep it.
    embedded = os.environ.get("QUERYD_RELAY_TRANSACTIONS") == "false"
    dropped = {*ADDRESSES, "QUERYD_SCRATCH", "QUERYD_DATASETS_ACCESS_KEY_ID", "QUERYD_DATASETS_SECRET_ACCESS_KEY"}
    dropped |= {"QUERYD_RELAY_TRANSACTIONS", "QUERYD_KAFKA_FETCH_WAIT"} if embedded else set()
    for name in dropped if embedded else dropped - {"QUERYD_KAFKA_BOOTSTRAP"}:
        os.environ.pop(name, None)


def find_sourced_stack() -> Path | None:
    """Return the folder of the stack whose `.queryd/env` the shell sourced; None if there is none."""
    scratch = os.environ.get("QUERYD_SCRATCH")
    if not scratch:
        return None
    folder = Path(scratch).parent
    try:
        password = (folder / "postgres" / "password").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    # The password identifies the stack, since a restart does not change it.
    return folder if f":{password}@" in os.environ.get("QUERYD_DATA_URL", "") else None


def describe_stale_stack() -> str | None:
    """Return why a command can't reach the stack that the environment names; None if no problem is known.

    An embedded stack listens on loopback, so a connection attempt answers immediately.
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
    # Only some servers are down; the command's own error names them.
    return None


def read_env_file(path: Path) -> dict[str, str]:
    """Read a file of `queryd up` as a shell would; empty if the file is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    named = (line.partition("=") for line in lines)
    return {name: _unquote(value) for name, separator, value in named if separator}


def write_env_lines(variables: Mapping[str, str]) -> str:
    """Format variables for such a file, quoting only values that a shell would change."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())


def _unquote(value: str) -> str:
    try:
        return "".join(shlex.split(value))
    except ValueError:
        # queryd did not write this line; treat the unpaired quote as part of the value.
        return value


def _is_silent(address: str) -> bool:
    return _is_local(address) and not accepts(_port(address))


def _is_local(address: str) -> bool:
    return _split(address)[0] == LOOPBACK


def _port(address: str) -> int:
    return int(_split(address)[1])


def _split(address: str) -> tuple[str, str]:
    """Split a URL or `host:port` into host and port."""
    place = urlsplit(address).netloc or address
    host, _, port = place.rpartition("@")[2].rpartition(":")
    return (host, port) if port.isdigit() else ("", "")
