"""One case of the kernel oracle: two rings, and a list of steps, verbs and traffic; plain numbers, so that it is JSON.

A step is a name, a ring and a value. What the values mean is in `play.py`, which carries them out on either side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, Self

import attrs

RX: Final = 0
TX: Final = 1

#: Guest memory: gpa, bytes, and where in the file. Neighbours in guest memory that are none in the file, and a hole.
REGIONS: Final = (
    (0x0, 0x30000, 0x0),
    (0x30000, 0x14000, 0x5C000),
    (0x44000, 0x14000, 0x48000),
    (0x58000, 0x18000, 0x30000),
    (0x100000, 0x10000, 0x70000),
)
MEMORY_BYTES: Final = 0x80000
#: Each ring has so much room in the first region, from a multiple of it on; then come the indirect tables.
RING_ROOM: Final = 0x10000
TABLES: Final = range(0x20000, 0x30000)
#: Where buffers are, of either ring, in a row and far away.
DATA: Final = (range(0x30000, 0x48000), range(0x48000, 0x70000))
FAR_DATA: Final = (range(0x100000, 0x108000), range(0x108000, 0x110000))
HOLE: Final = 0x80000
PAGE: Final = 4096


def pieces(gpa: int, length: int) -> Iterator[tuple[int, int]]:
    """Say where in the file a range of guest memory lies: (offset, bytes). Parts outside are left out."""
    for start, size, offset in REGIONS:
        low, high = max(gpa, start), min(gpa + length, start + size)
        if low < high:
            yield offset + low - start, high - low


@attrs.frozen
class RingPlan:
    """Where a ring lies in the first region, in bytes, how many entries it has, and where its indices start."""

    start: int
    num: int
    base: int = 0


@attrs.frozen
class Step:
    """One thing to do."""

    name: str
    ring: int = 0
    value: Any = None

    def __str__(self) -> str:
        """For people."""
        return f"{self.name}({self.ring}{'' if self.value is None else f', {json.dumps(self.value)}'})"


@attrs.frozen
class Case:
    """What both sides are given. `features` are those that the driver goes by."""

    rings: tuple[RingPlan, RingPlan]
    features: int
    steps: tuple[Step, ...]
    seed: str = ""

    def dump(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "seed": self.seed,
            "features": self.features,
            "rings": [[ring.start, ring.num, ring.base] for ring in self.rings],
            "steps": [[step.name, step.ring, step.value] for step in self.steps],
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Self:
        """The reverse of `dump`."""
        rx, tx = (RingPlan(*ring) for ring in dumped["rings"])
        steps = tuple(Step(*step) for step in dumped["steps"])
        return cls((rx, tx), dumped["features"], steps, dumped["seed"])
