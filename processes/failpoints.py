"""Named places at which a test may end or stop this very process. Without `QUERYD_FAILPOINTS` they do nothing.

The variable names a folder. A file there that is called like a failpoint arms it for the first process that passes: it
takes the file away and sends itself the signal that the file names, `KILL` where it is empty.
"""

import os
import signal
from enum import StrEnum
from pathlib import Path

FAILPOINTS_VARIABLE = "QUERYD_FAILPOINTS"


class Failpoint(StrEnum):
    """Every named place, by the process that passes it."""

    # The executor, along a query's way.
    ADMIT_BEFORE = "executor.admit.before"
    ADMIT_AFTER = "executor.admit.after"
    CLAIM_AFTER = "executor.claim.after"
    EXECUTE_AFTER = "executor.execute.after"
    PUT_BEFORE = "executor.put.before"
    PUT_AFTER = "executor.put.after"
    STORE_AFTER = "executor.store.after"
    FINISH_BEFORE = "executor.finish.before"
    FINISH_AFTER = "executor.finish.after"
    HAND_BACK_BEFORE = "executor.hand_back.before"
    DEAD_LETTER_BEFORE = "executor.dead_letter.before"
    DEAD_LETTER_AFTER = "executor.dead_letter.after"
    CANCEL_BEFORE = "executor.cancel.before"
    CANCEL_AFTER = "executor.cancel.after"
    # A DuckDB child.
    CHILD_BEFORE = "child.before"
    CHILD_AFTER = "child.after"
    # The relay, around its Kafka transaction.
    RELAY_BEFORE = "relay.before"
    RELAY_PRODUCING = "relay.producing"
    RELAY_BEFORE_COMMIT = "relay.commit.before"
    RELAY_COMMITTED = "relay.commit.after"
    RELAY_DELETED = "relay.deleted"
    # The projector.
    PROJECT_BEFORE = "projector.before"
    PROJECT_AFTER = "projector.after"


_folder = os.environ.get(FAILPOINTS_VARIABLE)


def failpoint(place: Failpoint) -> None:
    """Pass a place, or end there."""
    if _folder is not None:
        _fire(Path(_folder) / place)


def _fire(armed: Path) -> None:
    taken = armed.with_name(f"{armed.name}.{os.getpid()}")
    try:
        armed.rename(taken)
    except FileNotFoundError:
        return
    number = signal.Signals[f"SIG{taken.read_text(encoding='ascii').strip() or 'KILL'}"]
    taken.unlink()
    os.kill(os.getpid(), number)
