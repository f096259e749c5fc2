"""The headers that queryd adds to a record's own when it becomes a dead letter."""

from enum import StrEnum

DEAD_PREFIX = "queryd_dead_"


class DeadCode(StrEnum):
    """Why a record is a dead letter."""

    UNDECODABLE = "UNDECODABLE"
    INVALID_REQUEST = "INVALID_REQUEST"
    CONFLICT = "CONFLICT"
