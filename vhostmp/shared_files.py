"""The verbs by which a front-end gives what it shares beside guest memory: the dirty log, and what is in flight.

Files of its own that workers map (shm/_filemap.pyx). Rules: as in device.py, whose base this is.
"""

from __future__ import annotations

import errno

import attrs

from vhostmp.errors import LocalError
from vhostmp.kept_device import RecordedDevice
from vhostmp.parts import InflightPart, LogPart, eventfd_part


class SharedFiles(RecordedDevice):
    """The part of a device that takes such files."""

    def _check_owner(self) -> None:
        """Raise LocalError unless the device is open and has an owner."""
        raise NotImplementedError

    def set_log_base(self, fd: int, size: int, offset: int) -> None:
        """Say where writes are logged while LOG_ALL is acked: `size` bytes from byte `offset` of a file, a bit a page.

        The descriptor is borrowed. After the return no worker writes to the old log, ever. EINVAL, EBADF, EACCES or
        EFAULT for a range that no worker can write (LogPart.keep). Pages beyond its end are not logged but counted.
        """
        with self._lock:
            self._check_owner()
            self._commit(attrs.evolve(self._state, log=LogPart.keep(fd, size, offset)))

    def set_log_fd(self, fd: int | None) -> None:
        """Set the eventfd (borrowed) that is signalled when pages were logged; None: there is none. EINVAL, EBADF."""
        with self._lock:
            self._check_owner()
            part = None if fd is None else eventfd_part(fd, "log descriptor")
            self._commit(attrs.evolve(self._state, log_fd=part))

    def set_inflight(self, fd: int, offset: int, size: int, num_queues: int, queue_size: int) -> None:
        """Say where packed rings note what they have in flight: `size` bytes from byte `offset` of a file (borrowed).

        It has parts for rings 0 to `num_queues` - 1, of `queue_size` entries each. A part that somebody has begun
        says, at the next start, where its ring stands, whatever the base; starts after that go by the base. EBUSY
        while a ring runs; EINVAL or EACCES for what no worker can use (InflightPart.keep).
        """
        with self._lock:
            self._check_owner()
            self._settle()
            if self._state.live:
                raise LocalError("rings run: stop them before they get a region of what is in flight", errno.EBUSY)
            part = InflightPart.keep(fd, offset, size, num_queues, queue_size)
            ringed = tuple(
                attrs.evolve(ring, recover=index < num_queues) for index, ring in enumerate(self._state.rings)
            )
            self._commit(attrs.evolve(self._state, inflight=part, rings=ringed))
