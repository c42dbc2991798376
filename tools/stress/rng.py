"""A machine with a source of random numbers: one ring of buffers to be filled (virtio 1.3, 5.4)."""

from __future__ import annotations

from typing import ClassVar, Final

from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.verdict import Failure

BYTES: Final = 64
ENOUGH: Final = 8  # bytes that are never twice the same by chance


class RngMachine(Machine):
    """See the file's head."""

    kind: ClassVar[str] = "rng"
    work_index: ClassVar[int] = 0

    def good_chain(self) -> None:
        """Add a buffer to be filled."""
        self.work.driver.add([], [(self.arena.take(BYTES), BYTES)])

    def probe(self) -> None:
        """Have two buffers filled: with something, and not with the same."""
        self.good_chain()
        self.good_chain()
        self.work.kick()
        used = self.work.take(2)
        got = [self.memory.read(one.chain.writable[0][0], one.length or 0) for one in used]
        self.give(used)
        if not all(got) or (len(set(got)) == 1 and len(got[0]) >= ENOUGH):
            raise Failure(f"random numbers are {[one.hex() for one in got]}")
