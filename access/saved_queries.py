"""Saving queries."""

from access.visibility import InvalidRegistration, check_visibility
from db.connection import DataPool, transaction
from db.data.saved_queries import SavedQuery, insert_saved
from queryd.codec import MAX_SQL_BYTES


async def save_query(
    pool: DataPool, *, org_id: str, user_id: str, name: str, query: str, visibility: str
) -> SavedQuery:
    """Save a query; raises `InvalidRegistration`."""
    check_visibility(visibility, user_id)
    if not name.strip():
        raise InvalidRegistration("a saved query needs a name")
    if len(query.encode()) > MAX_SQL_BYTES:
        raise InvalidRegistration(f"a saved query has at most {MAX_SQL_BYTES} bytes")
    async with transaction(pool) as connection:
        return await insert_saved(
            connection, org_id=org_id, user_id=user_id, name=name, query=query, visibility=visibility
        )
