"""Post-copy: a guest runs here while pages of its memory are still elsewhere, and its front-end brings them when asked.

Rules: nothing here waits for the front-end. A page that is asked for concerns three parties, none of them the control
process's threads: the worker that waits for it, the pager, whose faults the front-end is told of, and the relay between
the two (shm/_relay.pyx, workers/pager.py have why and how). The control process itself reads no guest memory.

Theory of operation. `advise` starts a pager and returns its userfaultfd for the front-end. From `listen` on, memory
tables are *paged*: `map` has the pager map each region, so that the front-end can be told at which addresses it will
see faults, and a worker that maps the table hands over a userfaultfd before it gets the configuration. Replacements do
so too: they may fault with their first look at a ring. `end` closes the workers' userfaultfds, which releases whoever
waits there (every page has come), and ends the pager.

When the front-end dies, or the pager, pages will not come. Rings are stopped then; a worker that waits for a page, or
comes to do so while they are being stopped, is killed, and never sees zeroes in its place: `abandon`.

Where the control process may be killed and another go on (adoption.py), the workers' userfaultfds are in the store too:
the end of ours must not let go who waits. Who adopts kills those workers before it lets the store close them.

The dirty log and the IOTLB are no guest memory and are not paged.

Who may call: any thread, as with the device's verbs; the pool's lock excludes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from vhostmp.errors import LocalError, SysError, VhostError, WorkerDied
from vhostmp.parts import Pages
from vhostmp.shm._relay import Relay
from vhostmp.shm._userfault import new_userfaultfd
from vhostmp.shm.memory import ADDRESS_END, MemoryRegion
from vhostmp.workers.channel import close_all

if TYPE_CHECKING:
    from vhostmp.workers.processes import PagerProcess, WorkerProcess

log = logging.getLogger(__name__)

DEVICE: Final = "/dev/userfaultfd"
PAGE_BYTES: Final = 4096
#: How long the relay's thread may take to end: it is in a system call that a worker has made wait, else.
JOIN_SECONDS: Final = 1.0


class PagersOf(Protocol):
    """What is needed of a pool."""

    @property
    def lock(self) -> threading.RLock:
        """Guards everything."""
        ...

    @property
    def sandboxed(self) -> bool:
        """Whether its processes have given up what they do not need."""
        ...

    def new_pager(self) -> PagerProcess:
        """Start a pager, which the caller closes."""
        ...

    def hold(self, fd: int, /) -> str | None:
        """Keep a descriptor open over our death; return its name; None: nothing is kept."""
        ...

    def release(self, names: Sequence[str], /) -> None:
        """Keep some no longer."""
        ...


class Paging:
    """One post-copy of one device: its pager and its relay, from ADVISE to END."""

    def __init__(self, pool: PagersOf, pager: PagerProcess, userfault_fds: list[int], notice: int) -> None:
        """Take over a pager that has just started; it is closed if this fails. VhostError, OSError.

        `notice`: the eventfd that is signalled when the pager is lost.
        """
        self.pager: Final = pager
        self.pool: Final = pool
        self.held: dict[int, list[str]] = {}  # by memory table: who waits for a page must not be let go by our death
        self.userfault_fds: Final = userfault_fds
        self._addresses: dict[tuple[int, int, int, int], int] = {}
        try:
            self.relay: Final = Relay(pager.touches.fileno(), notice)
            self._thread: Final = threading.Thread(target=self.relay.run, name="vhostmp-relay", daemon=True)
            self._thread.start()
        except RuntimeError as error:
            pager.close()
            raise SysError(f"cannot start post-copy: {error}", errno.EAGAIN) from error
        except BaseException:
            pager.close()
            raise

    def new_userfaultfd(self) -> int:
        """Return a userfaultfd of the pager, the caller's: the last one tells of its faults. VhostError."""
        _, fds = self.pager.ask({"op": "userfaultfd"}, self.userfault_fds)
        if len(fds) != 1:
            close_all(fds)
            raise WorkerDied(f"pager (pid {self.pager.pid}) sent no userfaultfd")
        return fds[0]

    def map(self, regions: Sequence[MemoryRegion]) -> list[int]:
        """Have the pager map what it has not yet; return its address of each region's first byte. VhostError."""
        return [self._map(region) for region in regions]

    def _map(self, region: MemoryRegion) -> int:
        status = os.fstat(region.fd)
        key = (status.st_dev, status.st_ino, region.mmap_offset, region.size)
        if key not in self._addresses:
            described = [region.gpa, region.size, region.uva, region.mmap_offset]
            answer, fds = self.pager.ask({"op": "map", "region": described}, [region.fd])
            close_all(fds)
            address = answer.get("address")
            if (
                not isinstance(address, int)
                or not region.mmap_offset <= address < ADDRESS_END - region.size
                or (address - region.mmap_offset) % PAGE_BYTES  # where it has the file's first byte
            ):
                raise WorkerDied(f"pager (pid {self.pager.pid}) says that it mapped a region at {address!r}")
            self._addresses[key] = address
        return self._addresses[key]

    def close(self) -> None:
        """End it: workers' faults are their own again, who waits for a page goes on."""
        self.relay.close()
        self.pool.release([name for names in self.held.values() for name in names])
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            log.error("the relay's thread does not end: a worker has made its userfaultfd wait")
        self.pager.close()


@attrs.frozen(eq=False)
class PagedTable:
    """The pages of one memory table; see `parts.Pages`. `ranges`: (first, end, target) of shm/_relay.pyx by region."""

    paging: Paging
    ranges: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, paging: Paging, regions: Sequence[MemoryRegion]) -> PagedTable:
        """Have the regions mapped. A worker and the pager map each file from its start (MemoryMap)."""
        ranges: list[tuple[int, int, int]] = []
        for region, address in zip(regions, paging.map(regions), strict=True):
            block = max(PAGE_BYTES, os.fstat(region.fd).st_blksize)  # a huge page is named by its first byte
            end = -(-(region.mmap_offset + region.size) // PAGE_BYTES) * PAGE_BYTES
            ranges.append((region.mmap_offset // block * block, end, address - region.mmap_offset))
        return cls(paging, tuple(ranges))

    @property
    def active(self) -> bool:
        """Whether faults are relayed."""
        return not self.paging.relay.closed

    def userfault_fds(self) -> list[int]:
        """Return what a process needs to make a userfaultfd."""
        return self.paging.userfault_fds

    def add(self, worker: WorkerProcess, table: int, mappings: Any, fds: list[int]) -> None:
        """Relay a worker's faults. WorkerDied, and the worker is killed, when its answer makes no sense."""
        relay = self.paging.relay
        try:
            starts = [int(start) for start, _ in mappings]
            if len(fds) != 1 or any(not 0 <= start < ADDRESS_END or start % PAGE_BYTES for start in starts):
                raise ValueError
            ranges = [(start, *known) for start, known in zip(starts, self.ranges, strict=True)]
        except (TypeError, ValueError, OverflowError):
            close_all(fds)
            worker.kill()
            raise WorkerDied(f"worker {worker.index} (pid {worker.pid}) did not say where its memory is") from None
        if (name := self.paging.pool.hold(fds[0])) is not None:
            self.paging.held.setdefault(table, []).append(name)
        try:
            relay.add(worker.index, worker.pid, table, fds[0], worker.pidfd, ranges)
        except (VhostError, OSError, MemoryError) as error:  # what it would miss it would read as zeroes
            worker.kill()
            raise WorkerDied(f"worker {worker.index} (pid {worker.pid}): {error}") from error
        worker.relays = {known for known in worker.relays if not known.closed} | {relay}

    def drop(self, table: int) -> None:
        """Forget a memory table: no worker uses it."""
        self.paging.relay.drop(table)
        self.paging.pool.release(self.paging.held.pop(table, []))


class DevicePostcopy:
    """Post-copy of one device. Lives as long as the device; idle but while its guest comes in.

    QEMU speaks for each queue pair by itself: as many ADVISE come, and as many END, of which the last ends it. The last
    ADVISE is answered with the userfaultfd that tells of faults, those before with such that never say anything: QEMU
    looks for the address among the regions of the pair by whose userfaultfd it has read it, forgets a fault that it
    does not find there, and tells its first pair's regions first and advises it last.
    """

    def __init__(
        self, pool: PagersOf, name: str, advises_max: int, has_memory: Callable[[], bool], device_fd: int = -1
    ) -> None:
        """Be idle. `make` looks whether there can be post-copy; `device_fd`, of /dev/userfaultfd, is taken over.

        SysError when there is no room for a descriptor.
        """
        try:
            self._notice: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            close_all([device_fd])
            raise SysError.wrap("cannot make an eventfd", error) from error
        self._pool: Final = pool
        self._name: Final = name
        self._advises_max: Final = advises_max
        self._has_memory: Final = has_memory
        self._userfault_fds: Final = [device_fd] if device_fd >= 0 else []
        self._closed = False
        self._paging: Paging | None = None
        self._advised = 0
        self.listening = False
        """Whether memory tables are paged."""

    @classmethod
    def make(cls, pool: PagersOf, name: str, advises_max: int, has_memory: Callable[[], bool]) -> DevicePostcopy | None:
        """Return one for a device; None where this process may not make userfaultfds, which is logged.

        `advises_max`: how many ADVISE are one too few to be refused; `has_memory`: whether the device has some.
        """
        try:
            return cls(pool, name, advises_max, has_memory, may_make_userfaultfds(sandboxed=pool.sandboxed))
        except VhostError as error:
            log.info("device %s: post-copy is not offered: %s", name, error)
            return None

    def advise(self) -> int:
        """POSTCOPY_ADVISE: start a pager, return its userfaultfd, the caller's. LocalError out of order; VhostError."""
        with self._pool.lock:
            if self.listening or self._advised == self._advises_max:
                raise LocalError("post-copy has begun already", errno.EBUSY)
            try:
                if self._paging is None:
                    self._paging = Paging(self._pool, self._pool.new_pager(), self._userfault_fds, self._notice)
                fd = self._paging.new_userfaultfd()
            except OSError as error:
                raise SysError.wrap("cannot start post-copy", error) from error
            self._advised += 1
            return fd

    def listen(self) -> None:
        """POSTCOPY_LISTEN: page every memory table from now on. LocalError before ADVISE, or when there is one."""
        with self._pool.lock:
            if self._paging is None:
                raise LocalError("POSTCOPY_ADVISE comes first")
            if not self.listening and self._has_memory():
                raise LocalError("memory is set already: it comes after POSTCOPY_LISTEN", errno.EBUSY)
            self.listening = True

    def end(self) -> None:
        """POSTCOPY_END: all pages are there. LocalError before LISTEN."""
        with self._pool.lock:
            if not self.listening:
                raise LocalError("POSTCOPY_LISTEN comes first")
            self._advised -= 1
            if not self._advised:
                self.stop()

    def map(self, regions: Sequence[MemoryRegion]) -> list[int]:
        """Return at which address the front-end will see faults in the first byte of each region. LocalError, SysError.

        The regions have been checked (MemoryRegion.check); nobody touches their pages yet.
        """
        with self._pool.lock:
            if self._paging is None or not self.listening:
                raise LocalError("POSTCOPY_LISTEN comes first")
            return self._paging.map(regions)

    def pages(self, regions: Sequence[MemoryRegion]) -> Pages | None:
        """Return what brings the pages of a memory table; None: nothing is missing. VhostError."""
        with self._pool.lock:
            if self._paging is None or not self.listening:
                self.stop()  # a migration that was advised of post-copy and came to an end without
                return None
            return PagedTable.of(self._paging, regions)

    def fileno(self) -> int:
        """Return the descriptor that is readable once the pager is lost, until `stop`."""
        return self._notice

    def abandon(self) -> None:
        """No more pages will come: workers that wait for one are killed, and those that will, until `stop`."""
        with self._pool.lock:
            if self._paging is not None:
                self._paging.relay.abandon()

    def stop(self) -> None:
        """End it, in whatever state. Idempotent."""
        with self._pool.lock:
            paging, self._paging = self._paging, None
            self._advised = 0
            self.listening = False
            if paging is not None:
                faults, pages = paging.relay.faults, paging.relay.pages
                log.info("device %s: post-copy has ended: %d faults, %d pages", self._name, faults, pages)
                paging.close()
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._notice)

    def close(self) -> None:
        """End for good. Idempotent."""
        self.stop()
        if not self._closed:
            self._closed = True
            close_all([self._notice, *self._userfault_fds])

    def snapshot(self) -> dict[str, Any] | None:
        """Return what `vhostmp show` prints of it; None while it is idle."""
        paging = self._paging
        if paging is None:
            return None
        relay = paging.relay
        return {
            "listening": self.listening,
            "pager_pid": paging.pager.pid,
            "faults": relay.faults,
            "pages": relay.pages,
            "killed": relay.killed,
        }


def may_make_userfaultfds(*, sandboxed: bool = False) -> int:
    """Find out how this process, and those that it starts, make userfaultfds that see faults in system calls.

    Those that are `sandboxed` need the device (Linux 6.1): what the system call takes, they do not have.

    Returns: -1: by the system call; else a descriptor of /dev/userfaultfd, the caller's.
    Raises: SysError: not at all; it says what to do.
    """
    if not sandboxed:
        try:
            os.close(new_userfaultfd())
        except SysError as error:
            if error.errno != errno.EPERM:
                raise
        else:
            return -1
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if sandboxed:
            raise SysError(f"workers in a sandbox need {DEVICE} for it: {error.strerror}", error.errno) from error
        raise SysError(
            f"no permission for userfaultfd: it takes CAP_SYS_PTRACE, {DEVICE}, or vm.unprivileged_userfaultfd=1",
            errno.EPERM,
        ) from error
    try:
        os.close(new_userfaultfd(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd
