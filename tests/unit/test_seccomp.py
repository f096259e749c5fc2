"""The seccomp filter for both architectures, run on a BPF machine of the test's own: one of them is never at hand."""

import errno
import struct

import pytest

from engines.duckdb import seccomp

_ALLOWED, _KILLED = 0x7FFF0000, 0x80000000
_OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}
# read, write, mmap, openat, futex, connect, getrandom: what every process needs.
_NEEDED = {"x86_64": (0, 1, 9, 257, 202, 42, 318), "aarch64": (63, 64, 222, 56, 98, 203, 278)}


_PID = 4711


def _run(name: str, number: int, *arguments: int, audit: int | None = None, local_sockets: bool = False) -> int:
    """What the filter of that architecture answers to a call."""
    machine = seccomp._MACHINES[name]
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    call = struct.pack("<IIQ6Q", number, machine.audit if audit is None else audit, 0, *padded)
    steps = [struct.unpack("=HBBI", step) for step in seccomp._program(machine, _PID, local_sockets=local_sockets)]
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
        # Local; TCP, UDP with SOCK_CLOEXEC, raw; IPv6 TCP, raw; routes, audit; packets; machines of a hypervisor; SMC.
        (1, 1, 0, False),
        (2, 1, 0, True),
        (2, 1, 6, True),
        # MPTCP, with and without flags and on IPv6; SCTP, DCCP, UDP-Lite, a ping.
        (2, 1, 262, False),
        (2, 0x80801, 262, False),
        (10, 1, 262, False),
        (2, 1, 132, False),
        (2, 6, 33, False),
        (2, 2, 136, False),
        (2, 2, 1, False),
        (10, 2, 58, False),
        # What fits neither kind.
        (2, 1, 17, False),
        (2, 2, 6, False),
        (43, 1, 0, False),
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
def test_sockets_are_plain_tcp_or_udp_or_ask_for_routes(
    name: str, family: int, kind: int, protocol: int, allowed: bool
) -> None:
    answer = _run(name, seccomp._MACHINES[name].socket, family, kind, protocol)
    assert answer == (_ALLOWED if allowed else _refused(errno.EAFNOSUPPORT))


def test_local_sockets_are_made_where_postgres_is_reached_by_one(name: str) -> None:
    number = seccomp._MACHINES[name].socket
    assert _run(name, number, 1, 1, 0, local_sockets=True) == _ALLOWED
    assert _run(name, number, 2, 1, 6, local_sockets=True) == _ALLOWED
    assert _run(name, number, 2, 1, 262, local_sockets=True) == _refused(errno.EAFNOSUPPORT)


def test_no_connection_is_made_by_sending(name: str) -> None:
    machine = seccomp._MACHINES[name]
    for number, index in machine.sending:
        before = (0,) * index
        # MSG_NOSIGNAL alone, and MSG_FASTOPEN with it.
        assert _run(name, number, *before, 0x4000) == _ALLOWED
        assert _run(name, number, *before, 0x20004000) == _refused(errno.EPERM)
    for option in (23, 30, 31):
        assert _run(name, machine.setsockopt, 3, 6, option) == _refused(errno.EPERM)
    # TCP_NODELAY, and SO_RCVTIMEO_NEW or whatever has one of those numbers elsewhere.
    for level, option in ((6, 1), (1, 23), (1, 30), (0, 31)):
        assert _run(name, machine.setsockopt, 3, level, option) == _ALLOWED


def test_a_files_attributes_are_not_set_through_a_descriptor(name: str) -> None:
    number = seccomp._MACHINES[name].ioctl
    for command in (0x40086602, 0x401C5820, 0x40806685, 0x5412):
        assert _run(name, number, 3, command) == _refused(errno.EPERM)
    # FIONREAD, TCGETS
    for command in (0x541B, 0x5401):
        assert _run(name, number, 3, command) == _ALLOWED


def test_signals_go_to_oneself_only(name: str) -> None:
    for number in seccomp._MACHINES[name].signals:
        assert _run(name, number, _PID, 6) == _ALLOWED
        for other in (0, 1, _PID + 1, 0xFFFFFFFF):
            assert _run(name, number, other, 0) == _refused(errno.EPERM)


def test_limits_are_changed_of_oneself_only(name: str) -> None:
    prlimit = seccomp._MACHINES[name].prlimit
    assert _run(name, prlimit, 0) == _ALLOWED
    assert _run(name, prlimit, _PID) == _refused(errno.EPERM)


def test_another_architectures_numbers_are_no_way_around(name: str) -> None:
    other = seccomp._MACHINES[_OTHER[name]].audit
    assert _run(name, 0, audit=other) == _KILLED
    assert _run(name, 0x40000000 | 59) == _refused(errno.EPERM)
