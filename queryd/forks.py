"""Protect a client in a forked process. Its threads exist only in the parent.

In the child its calls would wait for these threads forever. The destructor of librdkafka's clients joins them too, so a
child that drops the client, or exits, would hang. So each owner of such a client records the process that created it.
In a child its calls raise `ClientStopped`, and its destructor never runs.
"""

import ctypes
import os
import weakref

from queryd.errors import ClientStopped

_owners: "weakref.WeakSet[object]" = weakref.WeakSet()


class Origin:
    """The process that created the owner."""

    def __init__(self, owner: object) -> None:
        self._pid = os.getpid()
        _owners.add(owner)

    def check(self) -> None:
        """Raises `ClientStopped` in another process."""
        if os.getpid() != self._pid:
            raise ClientStopped(
                f"process {self._pid} created the client and process {os.getpid()} is a fork of it: create the client "
                "after the fork, in each worker"
            )


def _keep_alive() -> None:
    for owner in list(_owners):
        # Leak one reference, so that the destructor never runs, not even at the interpreter's exit.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_keep_alive)
