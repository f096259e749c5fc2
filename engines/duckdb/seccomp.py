"""seccomp: system calls that no query needs are refused to this process, whatever code runs in it.

A filter is a program for the kernel's classic BPF machine (<linux/filter.h>, <linux/seccomp.h>). It names what is
refused, not what is allowed: DuckDB, its extensions, OpenSSL and two C libraries need some hundred calls which differ
by version, and a forgotten one would break queries. What is refused is what leads out: other programs and processes,
other processes' memory and signals, the kernel's own machinery, attributes of files (Landlock does not bound them),
channels between processes, servers, and sockets that are neither plain TCP nor UDP.
"""

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
# All threads at once: here there is one, but the rule shall not depend on that. And on kernels before 5.16 without the
# slow defence against speculation that they give to every process with a filter: nothing compiles a caller's code here.
_FLAG_TSYNC, _FLAG_SPEC_ALLOW = 1, 4

# struct seccomp_data: the call's number, the architecture, an instruction pointer, six arguments of 64 bits.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000

_CLONE_THREAD = 0x10000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_SOCK_STREAM, _SOCK_DGRAM = 1, 2
_SOCK_TYPE = 0xF
# Landlock's rule for TCP ports does not bind other protocols: MPTCP and SCTP, for example, would bypass it.
_IPPROTO_TCP, _IPPROTO_UDP = 6, 17
# Landlock does not see a connection that a send opens, by a flag of the call or an option of the socket. A socket with
# an upper layer protocol (ULP) may become an SMC socket.
_MSG_FASTOPEN = 0x20000000
_TCP_FASTOPEN, _TCP_FASTOPEN_CONNECT, _TCP_ULP = 23, 30, 31
# FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_SETVERSION, FS_IOC_ENABLE_VERITY: attributes of files
# that were opened for reading; TIOCSTI, TIOCLINUX: input for a terminal.
_IOCTLS = (0x40086602, 0x40046602, 0x401C5820, 0x40087602, 0x40806685, 0x5412, 0x541C)
# Calls of the x32 ABI have this bit; nothing of ours is built for it, and it would be a way around the numbers below.
_X32 = 0x40000000


@dataclass(frozen=True, slots=True)
class _Machine:
    """One architecture: its audit number, and its numbers of the calls that every kernel names alike."""

    audit: int
    refused: dict[str, int]
    clone: int
    socket: int
    prlimit: int
    ioctl: int
    setsockopt: int
    # The first argument of these calls is a process.
    signals: tuple[int, ...]
    # The sending calls, each with the index of its flags argument.
    sending: tuple[tuple[int, int], ...]


# Newer calls have the same number everywhere.
_EVERYWHERE = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "process_mrelease": 448,
    "fchmodat2": 452,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "file_getattr": 468,
    "file_setattr": 469,
}
_CLONE3 = 435

_MACHINES = {
    "x86_64": _Machine(
        audit=0xC000003E,
        clone=56,
        socket=41,
        prlimit=302,
        ioctl=16,
        setsockopt=54,
        signals=(62, 234),
        sending=((44, 3), (46, 2), (307, 3)),
        refused={
            "listen": 50,
            "accept": 43,
            "accept4": 288,
            "fork": 57,
            "vfork": 58,
            "execve": 59,
            "execveat": 322,
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "kcmp": 312,
            "mknod": 133,
            "mknodat": 259,
            "mount": 165,
            "umount2": 166,
            "pivot_root": 155,
            "chroot": 161,
            "setns": 308,
            "unshare": 272,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "create_module": 174,
            "init_module": 175,
            "delete_module": 176,
            "finit_module": 313,
            "kexec_load": 246,
            "kexec_file_load": 320,
            "personality": 135,
            "modify_ldt": 154,
            "uselib": 134,
            "adjtimex": 159,
            "settimeofday": 164,
            "clock_settime": 227,
            "clock_adjtime": 305,
            "acct": 163,
            "swapon": 167,
            "swapoff": 168,
            "reboot": 169,
            "sethostname": 170,
            "setdomainname": 171,
            "iopl": 172,
            "ioperm": 173,
            "quotactl": 179,
            "syslog": 103,
            "name_to_handle_at": 303,
            "open_by_handle_at": 304,
            "chmod": 90,
            "fchmod": 91,
            "fchmodat": 268,
            "chown": 92,
            "fchown": 93,
            "lchown": 94,
            "fchownat": 260,
            "utime": 132,
            "utimes": 235,
            "futimesat": 261,
            "utimensat": 280,
            "setxattr": 188,
            "lsetxattr": 189,
            "fsetxattr": 190,
            "getxattr": 191,
            "lgetxattr": 192,
            "fgetxattr": 193,
            "listxattr": 194,
            "llistxattr": 195,
            "flistxattr": 196,
            "removexattr": 197,
            "lremovexattr": 198,
            "fremovexattr": 199,
            "truncate": 76,
            "link": 86,
            "linkat": 265,
            "symlink": 88,
            "symlinkat": 266,
            "shmget": 29,
            "shmat": 30,
            "shmctl": 31,
            "shmdt": 67,
            "semget": 64,
            "semop": 65,
            "semctl": 66,
            "semtimedop": 220,
            "msgget": 68,
            "msgsnd": 69,
            "msgrcv": 70,
            "msgctl": 71,
            "mq_open": 240,
            "mq_unlink": 241,
            "mq_timedsend": 242,
            "mq_timedreceive": 243,
            "mq_notify": 244,
            "mq_getsetattr": 245,
            "inotify_init": 253,
            "inotify_init1": 294,
            "inotify_add_watch": 254,
            "inotify_rm_watch": 255,
            "fanotify_init": 300,
            "fanotify_mark": 301,
            "setpriority": 141,
            "sched_setparam": 142,
            "sched_setscheduler": 144,
            "sched_setattr": 314,
            "ioprio_set": 251,
            "migrate_pages": 256,
            "move_pages": 279,
            "get_robust_list": 274,
            "tkill": 200,
            "rt_sigqueueinfo": 129,
            "rt_tgsigqueueinfo": 297,
        },
    ),
    "aarch64": _Machine(
        audit=0xC00000B7,
        clone=220,
        socket=198,
        prlimit=261,
        ioctl=29,
        setsockopt=208,
        signals=(129, 131),
        sending=((206, 3), (211, 2), (269, 3)),
        refused={
            "listen": 201,
            "accept": 202,
            "accept4": 242,
            "execve": 221,
            "execveat": 281,
            "ptrace": 117,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "kcmp": 272,
            "mknodat": 33,
            "mount": 40,
            "umount2": 39,
            "pivot_root": 41,
            "chroot": 51,
            "setns": 268,
            "unshare": 97,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "init_module": 105,
            "delete_module": 106,
            "finit_module": 273,
            "kexec_load": 104,
            "kexec_file_load": 294,
            "personality": 92,
            "adjtimex": 171,
            "settimeofday": 170,
            "clock_settime": 112,
            "clock_adjtime": 266,
            "acct": 89,
            "swapon": 224,
            "swapoff": 225,
            "reboot": 142,
            "sethostname": 161,
            "setdomainname": 162,
            "quotactl": 60,
            "syslog": 116,
            "name_to_handle_at": 264,
            "open_by_handle_at": 265,
            "fchmod": 52,
            "fchmodat": 53,
            "fchownat": 54,
            "fchown": 55,
            "utimensat": 88,
            "setxattr": 5,
            "lsetxattr": 6,
            "fsetxattr": 7,
            "getxattr": 8,
            "lgetxattr": 9,
            "fgetxattr": 10,
            "listxattr": 11,
            "llistxattr": 12,
            "flistxattr": 13,
            "removexattr": 14,
            "lremovexattr": 15,
            "fremovexattr": 16,
            "truncate": 45,
            "linkat": 37,
            "symlinkat": 36,
            "shmget": 194,
            "shmctl": 195,
            "shmat": 196,
            "shmdt": 197,
            "semget": 190,
            "semctl": 191,
            "semtimedop": 192,
            "semop": 193,
            "msgget": 186,
            "msgctl": 187,
            "msgrcv": 188,
            "msgsnd": 189,
            "mq_open": 180,
            "mq_unlink": 181,
            "mq_timedsend": 182,
            "mq_timedreceive": 183,
            "mq_notify": 184,
            "mq_getsetattr": 185,
            "inotify_init1": 26,
            "inotify_add_watch": 27,
            "inotify_rm_watch": 28,
            "fanotify_init": 262,
            "fanotify_mark": 263,
            "setpriority": 140,
            "sched_setparam": 118,
            "sched_setscheduler": 119,
            "sched_setattr": 274,
            "ioprio_set": 30,
            "migrate_pages": 238,
            "move_pages": 239,
            "get_robust_list": 100,
            "tkill": 130,
            "rt_sigqueueinfo": 138,
            "rt_tgsigqueueinfo": 240,
        },
    ),
}


def refused_calls() -> dict[str, int]:
    """The calls that are refused whatever their arguments, with their numbers on this machine."""
    return _MACHINES[os.uname().machine].refused | _EVERYWHERE | {"clone3": _CLONE3}


def restrict(*, local_sockets: bool = False) -> bool:
    """Refuse those calls to the whole process for good. False where the system or the architecture has no such filter.

    `local_sockets` allows connections to every Unix socket, since a filter can't see their paths. Raises `OSError` if
    the kernel has seccomp and refuses the filter.
    """
    if not sys.platform.startswith("linux"):
        return False
    machine = _MACHINES.get(os.uname().machine)
    if machine is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs can't be set")
    code = b"".join(_program(machine, os.getpid(), local_sockets=local_sockets))
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: how many, and where.
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    number = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
    flags = ctypes.c_long(_FLAG_TSYNC | _FLAG_SPEC_ALLOW)
    arguments = (ctypes.c_long(_SET_MODE_FILTER), flags, ctypes.c_char_p(program))
    if library.syscall(ctypes.c_long(number), *arguments) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(ctypes.get_errno(), "the kernel refuses the seccomp filter")


def _program(machine: _Machine, pid: int, *, local_sockets: bool) -> list[bytes]:
    """The filter. A jump counts the instructions that it passes over."""
    numbers = sorted({*machine.refused.values(), *_EVERYWHERE.values()})
    listed: list[bytes] = []
    for number in numbers:
        listed += [_jump(_EQUAL, number, 0, 1), _refuse(errno.EPERM)]
    return [
        _load(_ARCHITECTURE),
        _jump(_EQUAL, machine.audit, 1, 0),
        _step(_RETURN, _KILL),
        _load(_NUMBER),
        _jump(_AT_LEAST, _X32, 0, 1),
        _refuse(errno.EPERM),
        # Its flags lie in memory, where no filter sees them; without it, threads are made by `clone`.
        _jump(_EQUAL, _CLONE3, 0, 1),
        _refuse(errno.ENOSYS),
        *listed,
        *_when(
            machine.clone,
            [_load(_argument(0)), _jump(_ANY_BIT, _CLONE_THREAD, 1, 0), _refuse(errno.EPERM)],
        ),
        # Of one's own limits, which the hard ones bound.
        *_when(machine.prlimit, _unless(0, 0)),
        *_when(machine.socket, _judge_socket(local_sockets=local_sockets)),
        *[step for number in machine.signals for step in _when(number, _unless(0, pid))],
        *[step for number, flags in machine.sending for step in _when(number, _judge_flags(flags))],
        *_when(machine.setsockopt, _judge_option()),
        *_when(machine.ioctl, _refuse_any(1, _IOCTLS)),
        _step(_RETURN, _ALLOW),
    ]


def _judge_socket(*, local_sockets: bool) -> list[bytes]:
    """Allow plain TCP and UDP, and the netlink protocol for addresses and routes, which `getaddrinfo` needs."""
    allow, refuse = _step(_RETURN, _ALLOW), _refuse(errno.EAFNOSUPPORT)

    def protocols(*allowed: int) -> list[bytes]:
        steps = [_load(_argument(2))]
        for protocol in allowed:
            steps += [_jump(_EQUAL, protocol, 0, 1), allow]
        return [*steps, refuse]

    def block(value: int, then: list[bytes]) -> list[bytes]:
        """Return the steps for one value; they end in a verdict."""
        return [_jump(_EQUAL, value, 0, len(then)), *then]

    by_type = [
        _load(_argument(1)),
        _step(_AND, _SOCK_TYPE),
        *block(_SOCK_STREAM, protocols(0, _IPPROTO_TCP)),
        *block(_SOCK_DGRAM, protocols(0, _IPPROTO_UDP)),
        refuse,
    ]
    return [
        _load(_argument(0)),
        *(block(_AF_UNIX, [allow]) if local_sockets else []),
        *block(_AF_NETLINK, protocols(0)),
        *block(_AF_INET, by_type),
        *block(_AF_INET6, by_type),
        refuse,
    ]


def _judge_flags(index: int) -> list[bytes]:
    """Refuse flags with which a send opens a connection."""
    return [_load(_argument(index)), _jump(_ANY_BIT, _MSG_FASTOPEN, 0, 1), _refuse(errno.EPERM)]


def _judge_option() -> list[bytes]:
    """Refuse TCP options that connect without a call of `connect`."""
    refused = _refuse_any(2, (_TCP_FASTOPEN, _TCP_FASTOPEN_CONNECT, _TCP_ULP))
    return [_load(_argument(1)), _jump(_EQUAL, _IPPROTO_TCP, 0, len(refused)), *refused]


def _refuse_any(index: int, values: Sequence[int]) -> list[bytes]:
    """Refuse the call if the argument is one of the values."""
    steps = [_load(_argument(index))]
    for value in values:
        steps += [_jump(_EQUAL, value, 0, 1), _refuse(errno.EPERM)]
    return steps


def _unless(index: int, value: int) -> list[bytes]:
    """Refuse the call unless the argument is the value."""
    return [_load(_argument(index)), _jump(_EQUAL, value, 1, 0), _refuse(errno.EPERM)]


def _when(number: int, then: list[bytes]) -> list[bytes]:
    """Steps for one call, with its number loaded before and after."""
    return [_jump(_EQUAL, number, 0, len(then)), *then, _load(_NUMBER)]


def _argument(index: int) -> int:
    """Where the low half of an argument stands; these machines are little-endian, and flags and families fit."""
    return _ARGUMENTS + 8 * index


def _load(offset: int) -> bytes:
    return _step(_LOAD, offset)


def _refuse(error: int) -> bytes:
    return _step(_RETURN, _ERROR | error)


def _jump(code: int, value: int, yes: int, no: int) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _step(code: int, value: int) -> bytes:
    return _jump(code, value, 0, 0)
