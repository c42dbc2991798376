"""The system calls by which a process gives up rights: prctl, capset, seccomp, Landlock. Thin, by ctypes.

Each raises OSError with the kernel's errno. Numbers are those of x86-64 and aarch64; other machines have no sandbox.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_NAME, PR_SET_PDEATHSIG = 15, 1
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
CAPABILITY_VERSION_3: Final = 0x20080522
CAPABILITIES_MAX: Final = 64
SECCOMP_SET_MODE_FILTER, SECCOMP_GET_ACTION_AVAIL = 1, 2
#: All threads of the process; no mitigation of speculative store bypass, which costs and which we had not before.
SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1 << 0, 1 << 2
LANDLOCK_CREATE_RULESET_VERSION: Final = 1

#: AUDIT_ARCH_*, and the numbers that differ, by machine.
_MACHINES: Final = {
    "x86_64": (0xC000003E, {"seccomp": 317, "capset": 126}),
    "aarch64": (0xC00000B7, {"seccomp": 277, "capset": 91}),
}
MACHINE: Final = platform.machine()
NUMBERS: Final = {
    "landlock_create_ruleset": 444,
    "landlock_restrict_self": 446,
    **_MACHINES.get(MACHINE, (0, dict[str, int]()))[1],
}
"""The system calls that are made here, by name."""


def architecture() -> int:
    """Return what seccomp calls this machine (AUDIT_ARCH_*). OSError with ENOSYS where the sandbox has no table."""
    if MACHINE not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {MACHINE}")
    return _MACHINES[MACHINE][0]


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(name: str, *arguments: object) -> int:
    architecture()
    return _checked(_libc.syscall(ctypes.c_long(NUMBERS[name]), *arguments))


def prctl(option: int, *arguments: int | bytes) -> int:
    """Set what this process is and may: the system call of that name."""
    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in arguments]
    return _checked(_libc.prctl(option, *words, *(ctypes.c_ulong(0) for _ in range(4 - len(words)))))


def set_capabilities(kept: int) -> None:
    """Keep these capabilities (a mask), of those that this thread has, effective and permitted; none is inherited."""
    low, high = kept & 0xFFFF_FFFF, kept >> 32
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    _syscall("capset", header, struct.pack("=6I", low, low, 0, high, high, 0))


def permitted_capabilities() -> int:
    """Return the mask of capabilities that this process may have in force. Source: proc(5), CapPrm."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next((int(line.split()[1], 16) for line in status if line.startswith("CapPrm:")), 0)


def drop_bounding_set() -> None:
    """Take every capability from what an exec could give this process. EPERM without CAP_SETPCAP."""
    for capability in range(CAPABILITIES_MAX):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != errno.EINVAL:  # that is one which the kernel does not know: the end
                raise
            return


def install_filter(program: bytes) -> None:
    """Have every thread of this process go through a seccomp filter, for good. Needs no_new_privs."""
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    described = Program(len(program) // 8, ctypes.addressof(code))
    flags = SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW
    while True:
        try:
            stranger = _syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(described))
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & SECCOMP_FILTER_FLAG_SPEC_ALLOW:
                raise
            flags &= ~SECCOMP_FILTER_FLAG_SPEC_ALLOW  # before Linux 4.17
            continue
        if stranger:
            raise OSError(errno.EBUSY, f"thread {stranger} has a filter of its own")
        return


def has_filters(action: int) -> bool:
    """Whether the kernel has seccomp filters with this action, and we its numbers."""
    try:
        _syscall("seccomp", SECCOMP_GET_ACTION_AVAIL, 0, struct.pack("=I", action))
    except OSError:
        return False
    return True


def landlock_abi() -> int:
    """Return which version of Landlock the kernel has, 0 for none."""
    try:
        return _syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0


def landlock_restrict(fs: int, net: int, scoped: int) -> None:
    """Deny this thread, and what it starts, these rights everywhere. EINVAL: the kernel does not know one of them."""
    ruleset = struct.pack("=QQQ", fs, net, scoped)
    size = 24 if scoped else 16 if net else 8  # older kernels know a shorter struct landlock_ruleset_attr
    fd = _syscall("landlock_create_ruleset", ruleset, ctypes.c_size_t(size), 0)
    try:
        _syscall("landlock_restrict_self", fd, 0)
    finally:
        os.close(fd)
