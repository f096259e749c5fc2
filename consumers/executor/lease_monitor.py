"""Finds dead leases: the number of renewals of a dead lease stands still, on our own clock, for the lease's length.

No wall clock decides this. While the database is out of reach no holder can renew, so an observation starts again
after an outage.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from db.clock import elapsed
from db.data.runs import RunState
from db.retrying import ASKED_AGAIN_SECONDS

# The executor and the reaper read more often than this. After a longer gap the database was out of reach, for holders
# too, or this process was stopped.
_LONGEST_GAP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Observation:
    """`since` is when a lease was first seen with its present token and number of renewals."""

    token: str
    renewal: int | None
    since: float


class LeaseMonitor:
    """The leases that one loop of this process observes."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._observed: dict[str, _Observation] = {}
        self._observed_at = elapsed()
        # By then every live holder has renewed its lease after the last outage.
        self._renewed_by = self._observed_at

    def forget(self) -> None:
        """Begin the observation again, because the database did not answer."""
        self._observed = {}
        self._renewed_by = elapsed() + ASKED_AGAIN_SECONDS

    def observe(self, states: Iterable[RunState], asked_at: float) -> set[str]:
        """Compare leases with the last observation; returns the ids of queries whose lease is dead.

        `states` were read after `asked_at` on `elapsed`'s clock. Leases that are not among them are forgotten.
        """
        now = elapsed()
        last = self._observed if now - self._observed_at <= _LONGEST_GAP_SECONDS else {}
        self._observed, self._observed_at = {}, now
        dead = set()
        for state in states:
            if state.lease_token is None:
                continue
            seen = last.get(state.query_id)
            # A lease that was handed back and claimed again has another token, and may have the same number.
            if seen is None or (seen.token, seen.renewal) != (state.lease_token, state.lease_renewal):
                seen = _Observation(state.lease_token, state.lease_renewal, now)
            self._observed[state.query_id] = seen
            if asked_at - seen.since >= self._lease_seconds and asked_at >= self._renewed_by:
                dead.add(state.query_id)
        return dead
