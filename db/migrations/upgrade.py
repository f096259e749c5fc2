"""Bring a database to the newest version of its schema.

Only an upgrade imports alembic and SQLAlchemy: the command line and the services import this module, and the two take
0.3 s and 24 MB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

_DB = Path(__file__).resolve().parent.parent

# The same timeout as for queryd's other connections.
_CONNECT_SECONDS = 5
# Any fixed number that nothing else on the server uses: two processes that upgrade at once take turns.
_UPGRADE_LOCK = 7_105_113_001


def upgrade_data(url: str) -> None:
    """Upgrade Postgres data; `url` is a libpq URI. Safe to repeat, and for two processes at once.

    Raises psycopg's errors.
    """
    _upgrade(url, _DB / "data" / "versions", "queryd_data_version")


def upgrade_state(url: str) -> None:
    """Upgrade our tables in Postgres state, leaving the platform's own alone."""
    _upgrade(url, _DB / "state" / "versions", "queryd_state_version")


@contextmanager
def _psycopg_errors() -> Iterator[None]:
    """Raise psycopg's errors instead of SQLAlchemy's wrappers."""
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    try:
        yield
    except DBAPIError as error:
        if error.orig is None:
            raise
        raise error.orig from None


def _upgrade(url: str, versions: Path, version_table: str) -> None:
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from sqlalchemy import create_engine, text  # noqa: PLC0415
    from sqlalchemy.pool import NullPool  # noqa: PLC0415

    # SQLAlchemy only carries alembic here; the connection itself is made by psycopg from the libpq URI.
    engine = create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(url, connect_timeout=_CONNECT_SECONDS),
        poolclass=NullPool,
    )
    with _psycopg_errors(), engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _UPGRADE_LOCK})
        config = Config()
        config.set_main_option("script_location", str(_DB / "migrations"))
        config.set_main_option("version_locations", str(versions))
        config.set_main_option("path_separator", "newline")
        config.attributes["connection"] = connection
        config.attributes["version_table"] = version_table
        command.upgrade(config, "head")
