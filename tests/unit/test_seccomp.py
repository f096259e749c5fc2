"""The seccomp filter for both architectures, run on a BPF machine of the test's own: one of them is never at hand."""

import errno
import struct

import pytest

from engines.duckdb import seccomp

_ALLOWED, _KILLED = 0x7FFF0000, 0x80000000
_OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}
# read, write, mmap, openat, futex, connect, getrandom: what every process needs.
_NEEDED = {"x86_64": (0, 1, 9, 257, 202, 42, 318), "aarch64": (63, 64, 222, 56, 98, 203, 278)}


def _run(name: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter of that architecture answers to a call."""
    machine = seccomp._MACHINES[name]
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    call = struct.pack("<IIQ6Q", number, machine.audit if audit is None else audit, 0, *padded)
    steps = [struct.unpack("=HBBI", step) for step in seccomp._program(machine)]
    loaded, at = 0, 0
    while True:
        code, yes, no, value = steps[at]
        at += 1
        match code:
            case 0x20:
                [loaded] = struct.unpack_from("<I", call, value)
            case 0x54:
                loaded &= value
            case 0x15:
                at += yes if loaded == value else no
            case 0x35:
                at += yes if loaded >= value else no
            case 0x45:
                at += yes if loaded & value else no
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"the machine knows no step {code:#x}")


def _refused(error: int) -> int:
    return 0x00050000 | error


@pytest.fixture(params=["x86_64", "aarch64"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_leads_out_is_refused_and_what_is_needed_is_not(name: str) -> None:
    machine = seccomp._MACHINES[name]
    for number in (*machine.refused.values(), *seccomp._EVERYWHERE.values()):
        assert _run(name, number) == _refused(errno.EPERM)
    for number in _NEEDED[name]:
        assert _run(name, number) == _ALLOWED


def test_threads_may_be_made_and_processes_not(name: str) -> None:
    clone = seccomp._MACHINES[name].clone
    # What pthread_create and what fork asks for.
    assert _run(name, clone, 0x3D0F00) == _ALLOWED
    assert _run(name, clone, 0x1200011) == _refused(errno.EPERM)
    assert _run(name, 435) == _refused(errno.ENOSYS)


@pytest.mark.parametrize(
    ("family", "kind", "protocol", "allowed"),
    [
        # Local; TCP, UDP with SOCK_CLOEXEC, raw; IPv6 TCP, raw; routes, audit; packets; machines of a hypervisor.
        (1, 1, 0, True),
        (2, 1, 6, True),
        (2, 0x80002, 17, True),
        (2, 3, 1, False),
        (10, 1, 0, True),
        (10, 3, 58, False),
        (16, 0x80003, 0, True),
        (16, 3, 9, False),
        (17, 3, 0, False),
        (40, 1, 0, False),
    ],
)
def test_sockets_are_ip_local_or_ask_for_routes(
    name: str, family: int, kind: int, protocol: int, allowed: bool
) -> None:
    answer = _run(name, seccomp._MACHINES[name].socket, family, kind, protocol)
    assert answer == (_ALLOWED if allowed else _refused(errno.EAFNOSUPPORT))


def test_limits_are_changed_of_oneself_only(name: str) -> None:
    prlimit = seccomp._MACHINES[name].prlimit
    assert _run(name, prlimit, 0) == _ALLOWED
    assert _run(name, prlimit, 4711) == _refused(errno.EPERM)


def test_another_architectures_numbers_are_no_way_around(name: str) -> None:
    other = seccomp._MACHINES[_OTHER[name]].audit
    assert _run(name, 0, audit=other) == _KILLED
    assert _run(name, 0x40000000 | 59) == _refused(errno.EPERM)
