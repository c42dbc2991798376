"""A machine with a disk: requests of a header, data and a status byte (virtio 1.3, 5.2.6)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from vhostmp.tools.stress.machine import Machine, Ring
from vhostmp.tools.stress.ring import WRITE, Part, Segment, Used
from vhostmp.tools.stress.verdict import Failure

SECTOR: Final = 512
HEADER: Final = 16
T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
S_OK: Final = 0
ID_BYTES: Final = 20
UNWRITTEN: Final = 0xEE


def request_header(kind: int, sector: int = 0) -> bytes:
    """Return the 16 bytes of struct virtio_blk_req before its data."""
    return struct.pack("<IIQ", kind, 0, sector)


class BlkMachine(Machine):
    """See the file's head."""

    kind: ClassVar[str] = "blk"
    work_index: ClassVar[int] = 0

    def add_request(
        self, ring: Ring, kind: int, sector: int = 0, *, size: int = 0, data: bytes = b"", indirect: bool = False
    ) -> int:
        """Add a request that reads `size` bytes or writes `data`. Returns its status byte's address."""
        header = self.put(request_header(kind, sector) + data)
        room = self.arena.take(size + 1)
        self.memory.write(room + size, bytes([UNWRITTEN]))
        readable: list[Segment] = [(header, HEADER)]
        if data:
            readable.append((header + HEADER, len(data)))
        apart = size and ring.layout.num > 2  # noqa: PLR2004 - in a shorter ring there is no place for three
        writable: Sequence[Segment] = [(room, size), (room + size, 1)] if apart else [(room, size + 1)]
        self.add(ring, readable, writable, indirect=indirect)
        return room + size

    def good_chain(self, *, indirect: bool = False) -> None:
        """Add a request for the first sector."""
        self.add_request(self.work, T_IN, size=SECTOR, indirect=indirect)

    @property
    def good_width(self) -> int:
        """How many descriptors a request has."""
        return 3

    def good_parts(self) -> list[Part]:
        """Return a request for the first sector."""
        header, room = self.put(request_header(T_IN)), self.arena.take(SECTOR + 1)
        return [(header, HEADER, 0), (room, SECTOR, WRITE), (room + SECTOR, 1, WRITE)]

    def request(self, kind: int, sector: int = 0, *, size: int = 0, data: bytes = b"", ring: int = 0) -> bytes:
        """Do a request and return what was read. Failure when its status is not OK."""
        status = self.add_request(self.rings[ring], kind, sector, size=size, data=data)
        self.rings[ring].kick()
        (used,) = self.rings[ring].take(1)
        code = self.memory.read(status, 1)[0]
        got = self.memory.read(status - size, size)
        self.give([used])
        if code != S_OK:
            raise Failure(f"request {kind} of sector {sector} ended with status {code}")
        return got  # the length may be said to be less (virtio 1.3, 2.7.8.2); the driver has seen that it is not more

    def give(self, used: Iterable[Used]) -> None:
        """Free both buffers of requests that came back."""
        for one in used:
            self.arena.give(one.chain.readable[0][0])
            self.arena.give(one.chain.writable[0][0])

    def traffic(self, count: int = 32) -> None:
        """Read `count` sectors by every ring that runs."""
        for ring in self.rings:
            for _ in range(count if ring.running else 0):
                self.request(T_IN, 0, size=SECTOR, ring=ring.index)

    def probe(self) -> None:
        """Read the first sector by every ring that runs, twice: it is the same."""
        for ring in self.rings:
            if ring.running:
                first = self.request(T_IN, 0, size=SECTOR, ring=ring.index)
                if self.request(T_IN, 0, size=SECTOR, ring=ring.index) != first:
                    raise Failure("the first sector has changed, and nobody wrote it")
