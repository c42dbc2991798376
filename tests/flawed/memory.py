"""Guest memory of the small back-end, with its dirty log."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Sequence

import attrs

PAGE = 4096
REGIONS_MAX = 8
TABLE_HEAD = 8  # bytes of a table before its regions
REGION_BYTES = 32


class Refused(Exception):
    """A message cannot be carried out; the text says why."""


@attrs.frozen
class Region:
    """A mapped region."""

    gpa: int
    size: int
    uva: int
    offset: int
    map: mmap.mmap

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.gpa + self.size


def map_file(fd: int, size: int) -> mmap.mmap:
    """Map the first bytes of a shared-memory file. Refused for anything else, or when it is shorter."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size < size:
        raise Refused(f"no file of {size} bytes")
    try:
        return mmap.mmap(fd, size)
    except OSError as error:
        raise Refused(str(error)) from error


class GuestMemory:
    """The table of regions. Read and written by guest-physical address; `oracle.split.Memory` is what rings need."""

    def __init__(self, *, short: bool = False) -> None:
        """Begin with none. `short`: a region's end is not looked at."""
        self.short = short
        self.regions: list[Region] = []
        self.log: mmap.mmap | None = None
        self.logging = False

    def load(self, table: Sequence[tuple[int, int, int, int]], fds: Sequence[int]) -> list[Region]:
        """Map the regions (gpa, size, uva, offset) of a new table. Refused when one of them is wrong."""
        new: list[Region] = []
        try:
            for (gpa, size, uva, offset), fd in zip(table, fds, strict=True):
                if size == 0 or max(gpa, uva, offset) + size >= 1 << 63 or offset % PAGE:
                    raise Refused("region of impossible size or offset")
                if any(gpa < one.end and one.gpa < gpa + size for one in new):
                    raise Refused("regions overlap")
                if any(uva < one.uva + one.size and one.uva < uva + size for one in new):
                    raise Refused("regions overlap in the front-end")
                new.append(Region(gpa, size, uva, offset, map_file(fd, offset + size)))
        except BaseException:
            unmap(new)
            raise
        return new

    def gpa_of(self, uva: int) -> int:
        """Translate an address of the front-end's. Refused when it is in no region."""
        for one in self.regions:
            if one.uva <= uva < one.uva + one.size:
                return one.gpa + uva - one.uva
        raise Refused(f"{uva:#x} is in no region")

    def _find(self, gpa: int) -> Region | None:
        return next((one for one in self.regions if one.gpa <= gpa < one.end), None)

    def run(self, gpa: int, /) -> int:
        """Bytes from `gpa` to its region's end, 0 outside."""
        one = self._find(gpa)
        if one and self.short:
            return 1 << 32
        return one.end - gpa if one else 0

    def read(self, gpa: int, size: int, /) -> bytes:
        """Copy bytes out of one region."""
        one = self._find(gpa)
        assert one
        start = one.offset + gpa - one.gpa
        data = one.map[start : start + size]
        assert len(data) == size  # elsewhere this is a segmentation fault
        return data

    def write(self, gpa: int, data: bytes, /) -> None:
        """Copy bytes into one region, and log that."""
        one = self._find(gpa)
        assert one
        start = one.offset + gpa - one.gpa
        one.map[start : start + len(data)] = data
        self.mark(gpa, len(data))

    def mark(self, gpa: int, size: int) -> None:
        """Log that bytes were written. Source: vhost-user, "Migration"."""
        if self.log is not None and self.logging and size:
            for page in range(gpa // PAGE, (gpa + size - 1) // PAGE + 1):
                if page // 8 < len(self.log):
                    self.log[page // 8] |= 1 << page % 8

    def close(self) -> None:
        """Unmap everything."""
        unmap(self.regions)
        self.regions = []
        if self.log is not None:
            self.log.close()
            self.log = None


def unmap(regions: Sequence[Region]) -> None:
    """Unmap regions."""
    for one in regions:
        one.map.close()


def parse_table(payload: bytes) -> list[tuple[int, int, int, int]]:
    """Read the payload of SET_MEM_TABLE: (gpa, size, uva, offset) of each region. Refused when it is not one."""
    if len(payload) < TABLE_HEAD:
        raise Refused("no memory table")
    count = struct.unpack_from("=I", payload)[0]
    if not 0 < count <= REGIONS_MAX or len(payload) != TABLE_HEAD + REGION_BYTES * count:
        raise Refused(f"{count} regions in {len(payload)} bytes")
    return [struct.unpack_from("=QQQQ", payload, TABLE_HEAD + REGION_BYTES * place) for place in range(count)]
