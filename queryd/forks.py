"""What happens to a client whose process forks: its threads stay in the parent.

In the child its calls would wait for those threads for ever. The destructor of librdkafka's clients joins them as well:
a child that only drops the client, or ends, would hang. So each owner of such a client notes the process that made it;
in a child its calls raise `ClientStopped`, and it is never destroyed.
"""

import ctypes
import os
import weakref

from queryd.errors import ClientStopped

_owners: "weakref.WeakSet[object]" = weakref.WeakSet()


class Origin:
    """The process in which its owner was made."""

    def __init__(self, owner: object) -> None:
        self._pid = os.getpid()
        _owners.add(owner)

    def check(self) -> None:
        """Raises `ClientStopped` in any other process."""
        if os.getpid() != self._pid:
            raise ClientStopped(
                f"the client was made in process {self._pid}, and process {os.getpid()} is its fork: make the client "
                "after the fork, in each worker"
            )


def _keep_alive() -> None:
    for owner in list(_owners):
        # One reference that nobody gives back: not even the interpreter's end runs the destructor.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_keep_alive)
