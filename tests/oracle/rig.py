"""A split ring in guest memory with a driver on one side and either device on the other.

`Rig` makes the memory (one memfd a region), the driver and the device side: the compiled ring (`kind` "cython") or
the plain-Python one ("oracle"). Both see the same bytes through mappings of their own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from tests.oracle.memory import OracleMemory
from tests.oracle.packed import PackedVring as PackedOracle
from tests.oracle.split import Vring as OracleVring
from vhostmp.shm._memory import MemoryMap
from vhostmp.shm.memory import MemoryRegion
from vhostmp.tools.stress.packed import WRAP, PackedDriver, packed_layout
from vhostmp.tools.stress.ring import F_RING_PACKED, RingLayout
from vhostmp.tools.stress.split import SplitDriver
from vhostmp.workers._vring import Vring as CompiledVring

KINDS: Final = ("cython", "oracle")
BASE: Final = 0x10000  # gpa of the first region
SIZE: Final = 0x10000  # its size, bytes
UVA: Final = 0x7000_0000_0000
LATER: Final = 1 << 32  # how far apart the regions' front-end addresses are


class ChainLike(Protocol):
    """A chain of either device side."""

    @property
    def head(self) -> int:
        """Index of its first descriptor."""
        ...

    @property
    def readable(self) -> list[tuple[int, int]]:
        """What the device reads: (gpa, bytes)."""
        ...

    @property
    def writable(self) -> list[tuple[int, int]]:
        """What the device writes: (gpa, bytes)."""
        ...


class Ring(Protocol):
    """The interface that both device sides have."""

    @property
    def last_avail_idx(self) -> int:
        """Next available entry to take."""
        ...

    @property
    def used_idx(self) -> int:
        """Used index published."""
        ...

    @property
    def broken(self) -> str | None:
        """Why the ring is broken."""
        ...

    def pop(self) -> ChainLike | None:
        """Take a chain."""
        ...

    def push(self, head: int, length: int) -> None:
        """Stage a used element."""
        ...

    def publish(self) -> bool:
        """Publish what is staged; whether to interrupt."""
        ...

    def enable_notify(self) -> bool:
        """Ask for kicks; whether more arrived."""
        ...

    def disable_notify(self) -> None:
        """Ask for no kicks."""
        ...


class Region:
    """One region of guest memory: a memfd, mapped here for the driver and the test."""

    def __init__(self, gpa: int, size: int, uva: int) -> None:
        """Make `size` zeroed bytes at `gpa`."""
        self.fd: Final = os.memfd_create("rig", os.MFD_CLOEXEC)
        os.truncate(self.fd, size)
        self._map: Final = mmap.mmap(self.fd, size)
        self.buf: Final = memoryview(self._map)
        self.region: Final = MemoryRegion(gpa=gpa, size=size, uva=uva, fd=self.fd)

    def close(self) -> None:
        """Unmap and close."""
        self.buf.release()
        self._map.close()
        os.close(self.fd)


class Regions:
    """Guest memory: its regions, mapped here, and the table of them for either device side."""

    def __init__(self, kind: str, places: Sequence[tuple[int, int]]) -> None:
        """Make regions (gpa, size), and the memory table of the compiled ring ("cython") or the oracle."""
        self.kind: Final = kind
        self.regions: Final = [Region(gpa, length, UVA + LATER * i) for i, (gpa, length) in enumerate(places)]
        table = [region.region for region in self.regions]
        self.mem: Final[MemoryMap | OracleMemory] = MemoryMap(table) if kind == "cython" else OracleMemory(table)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory as the guest does, over borders of regions too."""
        while data:
            for region in self.regions:
                offset = gpa - region.region.gpa
                if 0 <= offset < region.region.size:
                    part = data[: region.region.size - offset]
                    region.buf[offset : offset + len(part)] = part
                    gpa, data = gpa + len(part), data[len(part) :]
                    break
            else:
                raise ValueError(f"no region holds {gpa:#x}")

    def close(self) -> None:
        """Unmap and close everything."""
        self.mem.close()
        for region in self.regions:
            region.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class Rig(Regions):
    """Memory, driver and device side of one ring. The ring stands at the start of the first region."""

    def __init__(
        self,
        kind: str,
        num: int = 8,
        *,
        features: int = 0,
        first_idx: int = 0,
        size: int = SIZE,
        more: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Set it up; `more` are further regions, (gpa, size), beside the first of `size` bytes at BASE."""
        super().__init__(kind, [(BASE, size), *more])
        self.layout: Final = RingLayout.at(0, num)
        self.driver: Final = SplitDriver(
            self.regions[0].buf, self.layout, gpa=BASE, features=features, first_idx=first_idx
        )
        self.features: Final = features
        self.ring: Final = self.attach(first_idx)
        self.data: Final = (BASE + self.layout.end + 0xFF) & ~0xFF  # first byte after the ring, on a 256-byte line

    def attach(self, last_avail_idx: int = 0, features: int | None = None) -> Ring:
        """Make another device side on the same ring and memory."""
        return self.attach_at(self.layout.num, last_avail_idx, features)

    def attach_at(
        self,
        num: int,
        last_avail_idx: int = 0,
        features: int | None = None,
        *,
        desc: int | None = None,
        avail: int | None = None,
        used: int | None = None,
    ) -> Ring:
        """Make a device side of any size at any addresses."""
        places = (
            self.driver.desc_gpa if desc is None else desc,
            self.driver.avail_gpa if avail is None else avail,
            self.driver.used_gpa if used is None else used,
        )
        bits = self.features if features is None else features
        if isinstance(self.mem, OracleMemory):
            return OracleVring(self.mem, num, *places, features=bits, last_avail_idx=last_avail_idx)
        return CompiledVring(self.mem, num, *places, features=bits, last_avail_idx=last_avail_idx)

    def ring_bytes(self) -> bytes:
        """Everything of the ring: descriptor table, available ring, used ring."""
        return bytes(self.regions[0].buf[: self.layout.end])

    def offer(self, heads: Iterable[int]) -> bool:
        """Make heads available, whatever they are, and publish."""
        for head in heads:
            self.driver.offer(head)
        return self.driver.publish()

    def close(self) -> None:
        """Unmap and close everything."""
        self.driver.close()
        super().close()


class PackedRig(Regions):
    """Memory, driver and device side of one packed ring, which stands at the start of the first region."""

    def __init__(
        self,
        kind: str,
        num: int = 8,
        *,
        features: int = 0,
        first_idx: int = WRAP,
        size: int = SIZE,
        more: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Set it up as a Rig; `first_idx` is a position."""
        super().__init__(kind, [(BASE, size), *more])
        self.features: Final = features | F_RING_PACKED
        self.layout: Final = packed_layout(0, num)
        self.driver: Final = PackedDriver(
            self.regions[0].buf, self.layout, gpa=BASE, features=self.features, first_idx=first_idx
        )
        places = self.driver.desc_gpa, self.driver.avail_gpa, self.driver.used_gpa
        bits = self.features
        self.ring: Final[PackedOracle | CompiledVring] = (
            PackedOracle(self.mem, num, *places, features=bits, last_avail_idx=first_idx)
            if isinstance(self.mem, OracleMemory)
            else CompiledVring(self.mem, num, *places, features=bits, last_avail_idx=first_idx)
        )
        self.data: Final = (BASE + self.layout.end + 0xFF) & ~0xFF  # first byte after the ring, on a 256-byte line

    def ring_bytes(self) -> bytes:
        """Everything of the ring."""
        return bytes(self.regions[0].buf[: self.layout.end])

    def close(self) -> None:
        """Unmap and close everything."""
        self.driver.close()
        super().close()


class MakeRig(Protocol):
    """A function that makes a Rig; it is closed when the test ends."""

    def __call__(
        self,
        num: int = 8,
        *,
        features: int = 0,
        first_idx: int = 0,
        size: int = SIZE,
        more: Sequence[tuple[int, int]] = (),
    ) -> Rig:
        """Make one; see Rig."""
        ...
