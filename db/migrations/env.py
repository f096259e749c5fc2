"""Alembic's entry point for both databases: `db.migrations.upgrade` hands over the connection and the version table."""

from alembic import context

_connection = context.config.attributes["connection"]
context.configure(connection=_connection, version_table=context.config.attributes["version_table"])
with context.begin_transaction():
    context.run_migrations()
