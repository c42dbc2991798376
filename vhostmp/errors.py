"""The error tree.

::

    VhostError                  what every caller may catch; .errno is the kernel's error for the same mistake
    |- LocalError               our caller did wrong (bad argument, wrong state); nothing has changed
    |- PeerError                the front-end broke the vhost-user protocol
    |- GuestError               the driver broke the virtio rules
    |  '- QueueBroken           ... and its virtqueue has been stopped
    |- WorkerDied               a worker process ended while we waited for it
    |- SynchronizeTimeout       a worker stayed inside a read-side section for longer than the time limit
    '- SysError                 a system call failed; wraps the OSError

Messages are lower case, carry the numbers and end without a period.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterable


class VhostError(Exception):
    """Base of every error vhostmp raises. `errno` is the error a Linux vhost ioctl would return."""

    default_errno: int = _errno.EINVAL

    def __init__(self, message: str, errno: int | None = None) -> None:
        """Keep the message and the errno (`default_errno` of the class where none is given)."""
        super().__init__(message)
        self.errno = self.default_errno if errno is None else errno


class LocalError(VhostError):
    """Our caller made a mistake; the state is as before the call."""


class RingsLost(LocalError):
    """New memory is in force, and rings that are not in it were stopped: something has changed."""

    default_errno = _errno.EFAULT

    def __init__(self, rings: Iterable[int]) -> None:
        """Say which."""
        self.rings = tuple(rings)
        super().__init__(f"rings {list(self.rings)} are not in the new memory: stopped")


class PeerError(VhostError):
    """The front-end broke the vhost-user protocol."""

    default_errno = _errno.EPROTO


class GuestError(VhostError):
    """The driver in the guest broke the virtio rules."""

    default_errno = _errno.EFAULT


class QueueBroken(GuestError):
    """A virtqueue was stopped since its driver broke the rules; no index has moved."""


class WorkerDied(VhostError):
    """A worker process ended while an answer from it was awaited."""

    default_errno = _errno.ESRCH


class SynchronizeTimeout(VhostError):
    """A worker stayed inside a read-side section beyond the time limit; what it may use is kept, not freed."""

    default_errno = _errno.ETIMEDOUT


class SysError(VhostError):
    """A system call failed. The OSError is the cause."""

    @classmethod
    def wrap(cls, what: str, error: OSError) -> SysError:
        """Make a SysError that says what was tried and why it failed."""
        return cls(f"{what}: {error.strerror or error}", error.errno)
