"""What a dead letter says about itself: headers that are added to those of the record."""

from enum import StrEnum

DEAD_PREFIX = "queryd_dead_"


class DeadCode(StrEnum):
    """Why a record is a dead letter."""

    UNDECODABLE = "UNDECODABLE"
    INVALID_REQUEST = "INVALID_REQUEST"
    CONFLICT = "CONFLICT"
