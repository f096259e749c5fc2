"""A replay that is refused."""


class ReplayRefused(Exception):
    """A replay can't be planned, begin, go on or end. The sentence says why, and what to do instead."""


class PlanStale(ReplayRefused):
    """What would be done now is not what was planned: plan again."""
