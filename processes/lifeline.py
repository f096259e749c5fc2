"""A service process that `queryd up` started ends with it: a pipe whose other end only the starter holds."""

import os
import signal
import threading

LIFELINE_VARIABLE = "QUERYD_LIFELINE_FD"


def hold_lifeline() -> None:
    """Watch the inherited pipe named by `QUERYD_LIFELINE_FD`, if any: at its end the process kills itself.

    SIGKILL and no tidying, because everything is safe against crashes and the starter may have died by `kill -9`.
    Raises `ValueError` for a variable that is no number and `OSError` for one that is no open file.
    """
    variable = os.environ.get(LIFELINE_VARIABLE)
    if variable is None:
        return
    descriptor = int(variable)
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_watch, args=(descriptor,), name="lifeline", daemon=True).start()


def _watch(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
