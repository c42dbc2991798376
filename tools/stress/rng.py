"""A machine with a source of random numbers: one ring of buffers to be filled (virtio 1.3, 5.4)."""

from __future__ import annotations

from typing import ClassVar, Final

from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.ring import WRITE, Part
from vhostmp.tools.stress.verdict import Failure

BYTES: Final = 64
ENOUGH: Final = 8  # bytes that are never twice the same by chance


class RngMachine(Machine):
    """See the file's head."""

    kind: ClassVar[str] = "rng"
    work_index: ClassVar[int] = 0

    def good_chain(self, *, indirect: bool = False) -> None:
        """Add a buffer to be filled."""
        self.add(self.work, writable=[(self.arena.take(BYTES), BYTES)], indirect=indirect)

    def fill(self, count: int) -> list[bytes]:
        """Have `count` buffers filled, and return what is in them. Failure when one is empty or two are the same."""
        for _ in range(count):
            self.good_chain()
        ring = self.work
        ring.kick()
        used = ring.take(count)
        got = [self.memory.read(one.chain.writable[0][0], one.length or 0) for one in used]
        self.give(used)
        long = [one for one in got if len(one) >= ENOUGH]
        if not all(got) or len(set(long)) < len(long):
            raise Failure(f"random numbers are {[one.hex() for one in got]}")
        return got

    def traffic(self, count: int = 32) -> None:
        """Have `count` buffers filled."""
        most = self.work.layout.num
        for first in range(0, count, most):
            self.fill(min(most, count - first))

    def good_parts(self) -> list[Part]:
        """Return a buffer to be filled."""
        return [(self.arena.take(BYTES), BYTES, WRITE)]

    def probe(self) -> None:
        """Have two buffers filled: with something, and not with the same."""
        self.traffic(2)
