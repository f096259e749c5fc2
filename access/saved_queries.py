"""Saving, changing and removing queries. Whether a text may run at all its caller asks the engine before."""

from access.visibility import InvalidRegistration, check_visibility
from db.connection import DataPool, statement, transaction
from db.data import saved_queries
from db.data.saved_queries import SavedQuery
from queryd.codec import MAX_SQL_BYTES


class NoSuchSavedQuery(Exception):
    """There is no saved query with that id."""


def check_saved(name: str | None, query: str | None, visibility: str | None) -> None:
    """Judge what is not None; raises `InvalidRegistration`."""
    if visibility is not None:
        check_visibility(visibility)
    if name is not None and not name.strip():
        raise InvalidRegistration("a saved query needs a name")
    if query is not None and not query.strip():
        raise InvalidRegistration("a saved query needs a text")
    if query is not None and len(query.encode()) > MAX_SQL_BYTES:
        raise InvalidRegistration(f"a saved query has at most {MAX_SQL_BYTES} bytes")


async def save_query(
    pool: DataPool, *, org_id: str, user_id: str, name: str, query: str, visibility: str
) -> SavedQuery:
    """Save a query; raises `InvalidRegistration` and `DatabaseUnavailable`."""
    check_saved(name, query, visibility)
    async with transaction(pool) as connection:
        return await saved_queries.insert_saved(
            connection, org_id=org_id, user_id=user_id, name=name, query=query, visibility=visibility
        )


async def find_saved(pool: DataPool, saved_query_id: str) -> SavedQuery:
    """One saved query; raises `NoSuchSavedQuery` and `DatabaseUnavailable`."""
    async with statement(pool) as connection:
        return _there(await saved_queries.find_saved(connection, saved_query_id))


async def edit_saved(
    pool: DataPool, saved_query_id: str, *, name: str | None, query: str | None, visibility: str | None
) -> SavedQuery:
    """Change what is not None. Requests that were admitted with another text fail instead of running the new one.

    Raises `InvalidRegistration`, `NoSuchSavedQuery` and `DatabaseUnavailable`.
    """
    check_saved(name, query, visibility)
    async with statement(pool) as connection:
        return _there(
            await saved_queries.update_saved(connection, saved_query_id, name=name, query=query, visibility=visibility)
        )


async def remove_saved(pool: DataPool, saved_query_id: str) -> bool:
    """Remove a saved query for everybody. While results refer to it its row stays, without its text and private.

    Returns whether the row is gone. Raises `NoSuchSavedQuery` and `DatabaseUnavailable`. Killed between the two steps,
    it leaves an unused row to retention.
    """
    async with transaction(pool) as connection:
        _there(await saved_queries.empty_saved(connection, saved_query_id))
    async with transaction(pool) as connection:
        return await saved_queries.delete_unused(connection, saved_query_id)


def _there(saved: SavedQuery | None) -> SavedQuery:
    if saved is None:
        raise NoSuchSavedQuery("there is no saved query with that id")
    return saved
