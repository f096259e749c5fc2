"""Connections to a database, and the two kinds of error that its callers tell apart.

`DatabaseUnavailable`: nothing is wrong with the statement, wait and repeat it. Everything else is psycopg's own error.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NewType, Self

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


class Pool(AsyncConnectionPool[Connection]):
    """A pool that keeps the reason of its last failed connection; psycopg's own error does not contain the reason."""

    def __init__(self, conninfo: str, **options: Any) -> None:
        self.refusal: str | None = None
        pool = self

        class Connecting(psycopg.AsyncConnection[tuple[Any, ...]]):
            @classmethod
            async def connect(cls, *arguments: Any, **keywords: Any) -> Self:
                try:
                    connection = await super().connect(*arguments, **keywords)
                except psycopg.Error as error:
                    pool.refusal = describe(error)
                    raise
                pool.refusal = None
                return connection

        super().__init__(conninfo, connection_class=Connecting, **options)


# Two databases that must not be mistaken for each other.
DataPool = NewType("DataPool", Pool)
StatePool = NewType("StatePool", Pool)

# A peer that accepts and never answers: connecting gives up after 5 s, unacknowledged bytes after 10 s, a silent
# connection after 5 s + 3 probes of 2 s. Our longest statement moves 500 queries in some 100 ms; 20 s is a hung server.
_CONNECT_SECONDS = 5
_CONNINFO: dict[str, Any] = {
    "connect_timeout": _CONNECT_SECONDS,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "options": (
        "-c statement_timeout=20s -c idle_in_transaction_session_timeout=30s -c timezone=UTC"
        # Our statements take arrays of at most some hundred keys: planning them anew for each length costs more than
        # running them.
        " -c plan_cache_mode=force_generic_plan"
    ),
}
# Replace connections this often, because each keeps its plans: in a new installation those are for empty tables.
_LIFETIME_SECONDS = 60.0
# How long to wait for a free connection before the database counts as unavailable.
_POOL_SECONDS = 10.0


# Not the statement's fault either: a server that has just failed over to a replica, a session that it ended, and a
# prepared plan that a migration has outdated.
_PASSING = (
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.FeatureNotSupported,
)


class DatabaseUnavailable(Exception):
    """The database can't be reached, is shutting down, or asked to repeat the transaction: wait and repeat it."""


def conninfo(url: str, application: str) -> str:
    """`url` with our timeouts; `application` is what `pg_stat_activity` shows."""
    return make_conninfo(url, **_CONNINFO, application_name=f"queryd {application}")


def make_pool(url: str, application: str, size: int) -> Pool:
    """A pool that is not open yet. It connects in the background and goes on trying while the server is away."""
    return Pool(
        conninfo(url, application),
        min_size=1,
        max_size=size,
        # Every statement of ours is used again and again: prepare it at its first use.
        kwargs={"prepare_threshold": 0},
        open=False,
        timeout=_POOL_SECONDS,
        max_lifetime=_LIFETIME_SECONDS,
        # How long the pool itself tries before it reports; the next request for a connection starts it again.
        reconnect_timeout=_POOL_SECONDS,
        name=application,
    )


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """One transaction on one connection of the pool; raises `DatabaseUnavailable`."""
    with unavailable_told_apart(pool):
        async with pool.connection() as connection:
            yield connection


@asynccontextmanager
async def statement(pool: Pool) -> AsyncIterator[Connection]:
    """A connection on which each statement is its own transaction, without the round trips of BEGIN and COMMIT; raises
    `DatabaseUnavailable`."""
    with unavailable_told_apart(pool):
        async with pool.connection() as connection:
            await connection.set_autocommit(True)
            try:
                yield connection
            finally:
                if not connection.closed:
                    await connection.set_autocommit(False)


@contextmanager
def unavailable_told_apart(pool: Pool | None = None) -> Iterator[None]:
    """Turn psycopg's errors about the connection, the server's state and concurrency into `DatabaseUnavailable`.

    If `pool` has no connection, its `refusal` gives the reason.
    """
    try:
        yield
    except PoolTimeout as error:
        why = None if pool is None else pool.refusal
        raise DatabaseUnavailable("no connection within 10 s" + ("" if why is None else f": {why}")) from error
    except (psycopg.OperationalError, psycopg.InterfaceError, *_PASSING) as error:
        raise DatabaseUnavailable(describe(error)) from error


def describe(error: psycopg.Error) -> str:
    """Describe an error for the log, without its message, which may quote values.

    The description is the class and the SQLSTATE. libpq gives no SQLSTATE for a failed connection; then the description
    says whether the server refused the login or did not answer.
    """
    name = type(error).__name__
    if error.sqlstate is not None:
        return f"{name} {error.sqlstate}"
    if error.pgconn is None:
        return name
    if error.pgconn.needs_password:
        return "the server requires a password, and the URL has none"
    if error.pgconn.used_password:
        return "the server refuses the login: the password, the role or the database is wrong"
    return f"{name}: no answer from a server" if "FATAL" not in str(error) else "the server refuses the connection"
