"""What an org may use: its own limits, and the installation's where it has none."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from access.visibility import InvalidRegistration
from db.connection import Connection, DataPool, transaction
from db.data.limits import OwnLimits, change_own_limits, list_own_limits, read_own_limits, reset_own_limits

_MOST_INT = 2**31 - 1
_MOST_BIGINT = 2**63 - 1
_MOST = dict.fromkeys(("bytes_scanned", "result_bytes", "result_rows"), _MOST_BIGINT)


@dataclass(frozen=True, slots=True)
class OrgLimits:
    """The limits in force for one org; None is no limit. Seconds, bytes, rows.

    `weight` is the org's share of a lane's slots beside other orgs that wait: 2 gets twice what 1 gets.
    """

    weight: int = 1
    running_queries: int | None = None
    queued_queries: int | None = None
    timeout_seconds: int | None = None
    bytes_scanned: int | None = None
    result_bytes: int | None = None
    result_rows: int | None = None

    def overridden_by(self, own: OwnLimits) -> "OrgLimits":
        """These as defaults, and what the org has of its own."""
        values: dict[str, Any] = {each.name: getattr(own, each.name) for each in fields(self)}
        return OrgLimits(**{name: getattr(self, name) if value is None else value for name, value in values.items()})


def least(*limits: int | None) -> int | None:
    """The smallest of several limits, of which None is none."""
    return min((limit for limit in limits if limit is not None), default=None)


async def read_limits(connection: Connection, org_ids: Collection[str], defaults: OrgLimits) -> dict[str, OrgLimits]:
    """The limits in force for each of the orgs."""
    own = await read_own_limits(connection, org_ids)
    return {org_id: defaults.overridden_by(own[org_id]) if org_id in own else defaults for org_id in org_ids}


async def read_own(pool: DataPool, org_id: str) -> OwnLimits | None:
    """What an org has of its own, if anything; raises `DatabaseUnavailable`."""
    async with transaction(pool) as connection:
        return (await read_own_limits(connection, [org_id])).get(org_id)


async def list_own(pool: DataPool) -> list[OwnLimits]:
    """Every org that has limits of its own; raises `DatabaseUnavailable`."""
    async with transaction(pool) as connection:
        return await list_own_limits(connection)


async def change(pool: DataPool, org_id: str, changes: Mapping[str, int | None]) -> OwnLimits:
    """Change some of an org's own limits, by name; None is the default again.

    Raises `InvalidRegistration` and `DatabaseUnavailable`.
    """
    for name, value in changes.items():
        most = _MOST.get(name, _MOST_INT)
        if value is not None and not 1 <= value <= most:
            raise InvalidRegistration(f"{name} must be from 1 to {most}")
    async with transaction(pool) as connection:
        return await change_own_limits(connection, org_id, changes)


async def reset(pool: DataPool, org_id: str) -> bool:
    """Forget an org's own limits; False where there were none. Raises `DatabaseUnavailable`."""
    async with transaction(pool) as connection:
        return await reset_own_limits(connection, org_id)
