"""Guest memory: what a front-end tells us of it, the immutable table of it, and memory that we allocate ourselves.

Addresses come in two kinds here, both of them numbers to us and nothing more: `gpa`, guest-physical, used in
descriptors; `uva`, the front-end's own user address, used in ring addresses. A worker maps the regions
(`_memory.MemoryMap`); the control process only does arithmetic with them and never reads guest memory.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Final, Self

import attrs

from vhostmp.errors import LocalError
from vhostmp.shm.segment import Segment

ADDRESS_END: Final = 1 << 64
#: Where the front-end's addresses of memory made by GuestMemory start: any number would do, it differs from the gpa on
#: purpose, so that whoever mixes the two up is found out.
DEFAULT_UVA_BASE: Final = 0x7000_0000_0000


@attrs.frozen
class MemoryRegion:
    """One piece of guest memory as a front-end describes it: VhostUserMemoryRegion with its descriptor.

    gpa, size, mmap_offset are bytes; `uva` is the front-end's userspace_addr. `fd` is borrowed: whoever keeps the
    region duplicates it.
    """

    gpa: int
    size: int
    uva: int
    fd: int
    mmap_offset: int = 0

    def check(self) -> None:
        """Refuse a region that no worker could map. LocalError says which number is wrong: EFAULT for those of Linux.

        A region must lie in a regular file (memfd, POSIX shm, hugetlbfs, a file) that is open for reading and writing
        and long enough: a mapping beyond the end would be a SIGBUS later.
        Source: vhost-user, "Memory region description".
        """
        if self.size <= 0:
            raise LocalError(f"memory region at gpa {self.gpa:#x} has size {self.size}", errno.EFAULT)
        for name, start in (("gpa", self.gpa), ("userspace_addr", self.uva), ("mmap_offset", self.mmap_offset)):
            if start < 0 or start + self.size > ADDRESS_END:
                raise LocalError(f"memory region {name} {start:#x} + size {self.size:#x} wraps", errno.EFAULT)
        try:
            status = os.fstat(self.fd)
            access = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError as error:
            raise LocalError(
                f"memory region at gpa {self.gpa:#x}: bad file descriptor {self.fd}", errno.EBADF
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise LocalError(f"memory region at gpa {self.gpa:#x}: descriptor is not a file that can be mapped")
        if access != os.O_RDWR:
            raise LocalError(
                f"memory region at gpa {self.gpa:#x}: descriptor is not open for reading and writing", errno.EACCES
            )
        if status.st_size < self.mmap_offset + self.size:
            raise LocalError(
                f"memory region at gpa {self.gpa:#x}: file has {status.st_size:#x} bytes, "
                f"mmap_offset + size is {self.mmap_offset + self.size:#x}"
            )


@attrs.frozen
class MemoryTable:
    """An immutable table of regions that do not overlap, sorted by gpa. Its descriptors belong to whoever made it."""

    regions: tuple[MemoryRegion, ...] = ()

    @classmethod
    def build(cls, regions: Sequence[MemoryRegion], max_regions: int) -> MemoryTable:
        """Check each region and all of them together; LocalError with E2BIG above `max_regions`, EINVAL on overlap."""
        if len(regions) > max_regions:
            raise LocalError(f"{len(regions)} memory regions, at most {max_regions}", errno.E2BIG)
        for region in regions:
            region.check()
        ordered = sorted(regions, key=lambda region: region.gpa)
        for kind in ("gpa", "uva"):
            by_kind = sorted((getattr(region, kind), region.size) for region in regions)
            for (start, size), (following, _) in itertools.pairwise(by_kind):
                if start + size > following:
                    raise LocalError(f"memory regions overlap: {kind} {start:#x} + {size:#x} and {following:#x}")
        return cls(tuple(ordered))

    def contains_uva(self, uva: int, size: int) -> bool:
        """Whether `size` bytes at front-end address `uva` lie in one region."""
        return any(region.uva <= uva and uva + size <= region.uva + region.size for region in self.regions)

    def __iter__(self) -> Iterator[MemoryRegion]:
        """Walk the regions by ascending gpa."""
        return iter(self.regions)

    def __len__(self) -> int:
        """Count the regions."""
        return len(self.regions)


class GuestMemory:
    """Guest memory that we allocate: a named POSIX shared-memory segment, one region.

    For hypervisors that embed the library, the demo and the tests. The creator closes it.
    """

    def __init__(self, segment: Segment, gpa: int, uva: int) -> None:
        """Wrap a segment; use `create`."""
        self._segment = segment
        self.size: Final = segment.size
        self.gpa: Final = gpa
        self.uva: Final = uva

    @classmethod
    def create(cls, size: int, *, gpa: int = 0, uva: int | None = None) -> Self:
        """Allocate `size` zeroed bytes. `uva` defaults to gpa + DEFAULT_UVA_BASE. SysError when there is no room."""
        return cls(Segment.create(size), gpa, DEFAULT_UVA_BASE + gpa if uva is None else uva)

    @property
    def name(self) -> str:
        """The segment's name, for another process that opens it."""
        return self._segment.name

    @property
    def fd(self) -> int:
        """The segment's descriptor; it stays the segment's."""
        return self._segment.fd

    @property
    def buf(self) -> memoryview:
        """The bytes, writable."""
        return self._segment.buf

    @property
    def region(self) -> MemoryRegion:
        """The region to hand to `set_mem_table`."""
        return MemoryRegion(gpa=self.gpa, size=self.size, uva=self.uva, fd=self.fd)

    def unlink(self) -> None:
        """Remove the name now; the memory lives as long as somebody maps it or holds its descriptor."""
        self._segment.unlink()

    def close(self) -> None:
        """Unmap, close, unlink. Idempotent. Workers that still have it mapped keep their mapping."""
        self._segment.close()

    def __enter__(self) -> Self:
        """Return itself: the memory is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
