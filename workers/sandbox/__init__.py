"""What a worker, a pager and the spawner may do: as little as they need.

Who is kept out. A guest, or a front-end, that has found a hole in a ring's code and runs code of its own in a worker;
and mistakes of back-ends in Python. Such a process is left with what it has in its hands: guest memory and eventfds of
the devices that it serves, descriptors of their back-ends, the control segment, the channel, the log.

Four fences, each by itself enough for most of it:

1. *Descriptors*: whatever the process was not given is closed (`keep_only`).
2. *Capabilities*: none, in no set, and none to be had by an exec (no_new_privs, bounding set). From the spawner on.
3. *Landlock*: no path at all, no TCP, no abstract socket and no signal to anybody outside, as far as the kernel knows
   them, should a call that takes a path get past the next fence.
4. *seccomp*: the calls of calls.py, of which tests/integration/test_sandbox_calls.py shows that each is needed.

Order. The spawner drops capabilities, all but CAP_DAC_READ_SEARCH, so that a module can be read that root alone could
not read otherwise. A worker closes descriptors, imports the modules that its back-ends in Python come from, makes what
it needs of its own (eventfd, epoll, an asynchronous context), and then closes 2 to 4 for good, before it has seen a
byte of a guest's. So a module may open what it needs while it is imported; its objects may not.

Without it (`--sandbox off`, `Pool(sandbox=False)`) workers have all the rights of the control process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection
from typing import Final

from vhostmp.errors import SysError
from vhostmp.workers.sandbox import kernel
from vhostmp.workers.sandbox.bpf import KILL_PROCESS
from vhostmp.workers.sandbox.calls import PAGER, PYTHON, WORKER, program, template

CAP_DAC_READ_SEARCH: Final = 1 << 2
#: Rights of Landlock by the version that has brought them: linux/landlock.h.
FS_RIGHTS: Final = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
NET_RIGHTS: Final = {4: 0b11}
SCOPES: Final = {6: 0b11}
STANDARD_STREAMS: Final = frozenset((0, 1, 2))


def check() -> None:
    """Judge, before anything is started, whether this machine can do it. SysError: it cannot; says what to do."""
    if not kernel.has_filters(KILL_PROCESS):
        raise SysError(
            f"no seccomp filters here (machine {kernel.MACHINE}): serve without a sandbox, by --sandbox off",
            errno.ENOSYS,
        )


def prepare() -> None:
    """Do once, in the spawner, what is the same for all whom it forks."""
    for kind in (WORKER, PYTHON, PAGER):
        template(kind)


def shed_capabilities(kept: int = 0) -> None:
    """Give up every capability but those `kept` (a mask), and what an exec could bring. In every thread to come.

    SysError when the kernel has not even no_new_privs.
    """
    try:
        with contextlib.suppress(PermissionError):  # without CAP_SETPCAP there is nothing that we could lose
            kernel.drop_bounding_set()
        with contextlib.suppress(OSError):  # before Linux 4.3 there are none
            kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
        kernel.set_capabilities(kernel.permitted_capabilities() & kept)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise SysError.wrap("cannot give up capabilities", error) from error


def keep_only(fds: Collection[int]) -> None:
    """Close every descriptor but these and the standard streams."""
    for name in os.listdir("/proc/self/fd"):
        if (fd := int(name)) not in fds and fd not in STANDARD_STREAMS:
            with contextlib.suppress(OSError):  # that of the listing
                os.close(fd)


def restrict() -> None:
    """Give up capabilities and paths, for good, in this thread and in those that it starts. SysError.

    Threads that run already keep what they have of that; the filter concerns them too (`close`).
    """
    shed_capabilities()
    restrict_paths()


def close(kind: str, channel: int) -> None:
    """Give up the rest, for good: for a process of this kind (calls.py) whose channel is that descriptor.

    Every thread of the process is concerned, and what it starts. SysError: the kernel cannot do it.
    """
    try:
        kernel.install_filter(program(kind, os.getpid(), channel))
    except OSError as error:
        raise SysError.wrap("cannot install the seccomp filter of a worker", error) from error


def restrict_paths() -> int:
    """Deny paths, TCP and what Landlock has beyond that. Returns its version, 0: the kernel has none, or it is off."""
    version = kernel.landlock_abi()
    if version:
        fs, net, scopes = (
            sum(bits for since, bits in rights.items() if since <= version)
            for rights in (FS_RIGHTS, NET_RIGHTS, SCOPES)
        )
        try:
            kernel.landlock_restrict(fs, net, scopes)
        except OSError as error:
            raise SysError.wrap("cannot restrict a worker's paths", error) from error
    return version
