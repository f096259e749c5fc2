"""Who sees a row that has an org, a user and a visibility: the one rule for datasets and saved queries, as SQL."""

from typing import LiteralString

_VISIBLE = """({row}.visibility = 'public'
    OR ({row}.org_id = {org_id}
        AND ({row}.visibility = 'org'
             OR ({row}.visibility = 'private' AND {row}.user_id = {user_id})
             OR ({row}.visibility LIKE 'role:%%' AND substr({row}.visibility, 6) = ANY({roles})))))"""


def visible(
    row: LiteralString,
    *,
    org_id: LiteralString = "%(org_id)s::uuid",
    user_id: LiteralString = "%(user_id)s::uuid",
    roles: LiteralString = "%(roles)s::text[]",
) -> LiteralString:
    """The condition that the caller sees `row`, a table's alias. The others say who the caller is; a NULL is nobody."""
    return _VISIBLE.format(row=row, org_id=org_id, user_id=user_id, roles=roles)
