"""A guest's memory as a front-end has it: regions of shared memory, by guest-physical address.

Rules: the front-end's virtual addresses (userspace_addr) and the guest's (guest_phys_addr) differ by a number that no
two regions share, so that a back-end which takes the one for the other fails at once. Between two regions lies a hole,
unless a test asks otherwise. Nothing is checked here: tests write where a guest may write, which is anywhere.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from typing import Final

import attrs

from vhostmp.tools.stress.frontend import region

PAGE: Final = mmap.PAGESIZE
_UVA: Final = 0x7A00_0000_0000
_SKEW: Final = 0x10_0000_0000


@attrs.define(eq=False)
class Region:
    """A region of guest memory: a memfd and its mapping here."""

    gpa: int
    uva: int
    fd: int
    offset: int
    map: mmap.mmap = attrs.field(repr=False)
    buf: memoryview = attrs.field(repr=False)
    shift: int = 0
    """What is added to `gpa` for the device: behind an IOMMU the driver knows the region by other addresses."""

    @classmethod
    def create(cls, gpa: int, size: int, uva: int, *, offset: int = 0, shift: int = 0) -> Region:
        """Allocate `size` bytes (whole pages), zeroed, `offset` bytes into a file of their own. Raises: OSError."""
        fd = os.memfd_create("vhostmp-stress", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, offset + size)
            map_ = mmap.mmap(fd, size, offset=offset)
        except BaseException:
            os.close(fd)
            raise
        return cls(gpa, uva, fd, offset, map_, memoryview(map_), shift)

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.map)

    @property
    def end(self) -> int:
        """The first guest-physical address behind it."""
        return self.gpa + self.size

    def packed(self) -> bytes:
        """Return its description as SET_MEM_TABLE and ADD_MEM_REG have it."""
        return region(self.gpa + self.shift, self.size, self.uva, self.offset)

    def exchange(self, other: Region) -> None:
        """Have the addresses of two regions of one size stand for each other's memory."""
        mine = (self.uva, self.fd, self.offset, self.map, self.buf)
        self.uva, self.fd, self.offset, self.map, self.buf = other.uva, other.fd, other.offset, other.map, other.buf
        other.uva, other.fd, other.offset, other.map, other.buf = mine

    def close(self) -> None:
        """Unmap it and close the file."""
        self.buf.release()
        self.map.close()
        os.close(self.fd)


class Memory:
    """A guest's memory: regions that do not overlap."""

    def __init__(self, shift: int = 0) -> None:
        """Begin with none. `shift`: see Region."""
        self.regions: list[Region] = []
        self._made = 0
        self._shift: Final = shift

    def add(self, gpa: int, size: int, *, offset: int = 0) -> Region:
        """Add a region of zeroes at `gpa`."""
        self._made += 1
        new = Region.create(gpa, size, _UVA + gpa + self._made * _SKEW, offset=offset, shift=self._shift)
        self.regions.append(new)
        return new

    def remove(self, old: Region) -> None:
        """Take a region out and free it."""
        self.regions.remove(old)
        old.close()

    def region_of(self, gpa: int) -> Region:
        """Return the region that holds an address; KeyError when none does."""
        for one in self.regions:
            if one.gpa <= gpa < one.end:
                return one
        raise KeyError(f"no guest memory at {gpa:#x}")

    def uva(self, gpa: int) -> int:
        """Return the front-end's virtual address of a guest-physical one."""
        one = self.region_of(gpa)
        return one.uva + gpa - one.gpa

    def read(self, gpa: int, size: int) -> bytes:
        """Read, across adjacent regions too."""
        data = b""
        while len(data) < size:
            one = self.region_of(gpa + len(data))
            start = gpa + len(data) - one.gpa
            data += bytes(one.buf[start : start + size - len(data)])
        return data

    def write(self, gpa: int, data: bytes) -> None:
        """Write, across adjacent regions too."""
        done = 0
        while done < len(data):
            one = self.region_of(gpa + done)
            start = gpa + done - one.gpa
            part = data[done : done + one.size - start]
            one.buf[start : start + len(part)] = part
            done += len(part)

    def snapshot(self) -> dict[int, bytes]:
        """Copy all of it, by the regions' addresses."""
        return {one.gpa: bytes(one.buf) for one in self.regions}

    def written(self, before: dict[int, bytes], allowed: Iterable[tuple[int, int]] = ()) -> list[int]:
        """Return addresses (one a page at most) that changed since a snapshot, but for `allowed` (gpa, length)."""
        spans = sorted(allowed)
        found: list[int] = []
        for one in self.regions:
            old = before.get(one.gpa)
            if old is None or bytes(one.buf) == old:
                continue
            now = bytearray(one.buf)
            for gpa, length in spans:
                low, high = max(gpa - one.gpa, 0), min(gpa - one.gpa + length, one.size)
                if low < high:
                    now[low:high] = old[low:high]
            for page in range(0, one.size, PAGE):
                here, there = bytes(now[page : page + PAGE]), old[page : page + PAGE]
                if here != there:
                    pairs = zip(here, there, strict=True)
                    found.append(one.gpa + page + next(at for at, (new, was) in enumerate(pairs) if new != was))
        return found

    def close(self) -> None:
        """Free all of it."""
        for one in self.regions:
            one.close()
        self.regions = []
