"""Guest memory for the oracle: the same regions a MemoryMap maps, in plain Python."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import attrs

from vhostmp.errors import LocalError
from vhostmp.shm.memory import MemoryRegion


@attrs.frozen
class _Mapped:
    gpa: int
    size: int
    offset: int
    map: mmap.mmap


class OracleMemory:
    """Regions of guest memory, read and written by guest-physical address."""

    def __init__(self, regions: Iterable[MemoryRegion]) -> None:
        """Map each region; descriptors stay the caller's."""
        self._regions = [
            _Mapped(region.gpa, region.size, region.mmap_offset, mmap.mmap(region.fd, region.mmap_offset + region.size))
            for region in regions
        ]

    def close(self) -> None:
        """Unmap. Idempotent."""
        for region in self._regions:
            region.map.close()
        self._regions = []

    def _find(self, gpa: int) -> _Mapped | None:
        for region in self._regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return region
        return None

    def run(self, gpa: int) -> int:
        """Return how many bytes there are from `gpa` to the end of its region, 0 when it is in none."""
        region = self._find(gpa)
        return 0 if region is None else region.gpa + region.size - gpa

    def translate(self, gpa: int, size: int) -> int | None:
        """Return something that is not None when `size` bytes at `gpa` lie in one region (there is no address here)."""
        return gpa if self.run(gpa) > 0 and size <= self.run(gpa) else None

    def read(self, gpa: int, size: int) -> bytes:
        """Copy bytes out; LocalError unless they lie in one region."""
        region = self._find(gpa)
        if region is None or size > self.run(gpa):
            raise LocalError(f"gpa {gpa:#x} + {size} is not in one memory region")
        start = region.offset + gpa - region.gpa
        return region.map[start : start + size]

    def write(self, gpa: int, data: bytes) -> None:
        """Copy bytes in; LocalError unless they fit in one region."""
        region = self._find(gpa)
        if region is None or len(data) > self.run(gpa):
            raise LocalError(f"gpa {gpa:#x} + {len(data)} is not in one memory region")
        start = region.offset + gpa - region.gpa
        region.map[start : start + len(data)] = data
