"""What a case's verbs are about on either side: tables of memory, addresses of rings, descriptors."""

from __future__ import annotations

from typing import Final, Protocol

from tests.kernel.arena import Arena, Tap
from tests.kernel.case import REGIONS, RingPlan, Step
from vhostmp.tools.stress.ring import RingLayout

MANY_REGIONS: Final = 65  # more than a kernel with its default max_mem_regions takes
PIECE: Final = 0x100
NOT_OPEN: Final = 999
Region = tuple[int, int, int]
"""Of guest memory: gpa, bytes, and where in the file."""


class Side(Protocol):
    """Who carries out a case's verbs."""

    @property
    def tap(self) -> Tap:
        """The network's side of its tap."""
        ...

    def forget(self) -> None:
        """Stop, and be as if just opened."""
        ...

    def verb(self, step: Step, plan: RingPlan) -> int | None:
        """Carry out a verb and return its result. OSError with the verb's error."""
        ...

    def wait_idle(self) -> None:
        """Wait until all is done that the last kick and the last frame gave to do."""
        ...


def _many() -> list[Region]:
    gpa, _, offset = REGIONS[-1]
    pieces = ((gpa + PIECE * i, PIECE, offset + PIECE * i) for i in range(MANY_REGIONS - len(REGIONS) + 1))
    return [*REGIONS[:-1], *pieces]


_TABLES: Final[dict[str, list[Region]]] = {
    "all": [*REGIONS],
    "none": [],
    "no rings": [*REGIONS[1:]],
    "part": [*REGIONS[:-1]],
    "empty region": [*REGIONS, (0x200000, 0, 0)],
    "wrap": [*REGIONS, (2**64 - 0x8000, 0x10000, 0)],
    "overlap": [*REGIONS, (0x8000, 0x10000, 0x30000)],
    "many": _many(),
}


def regions(kind: str) -> list[Region]:
    """Return a memory table by name."""
    return _TABLES[kind]


def ring_addresses(arena: Arena, plan: RingPlan, value: dict[str, int]) -> dict[str, int]:
    """Return the arguments of set_vring_addr: a ring's true places, and how far each is moved from there."""
    place = RingLayout.at(plan.start, plan.num)
    parts = {"desc": place.desc, "avail": place.avail, "used": place.used}
    found = {name: arena.memory.address + at + value.get(name, 0) for name, at in parts.items()}
    found["flags"] = value.get("flags", 0)
    found["log"] = (place.used if found["flags"] & 1 else 0) + value.get("log", 0)
    return found


def descriptor(arena: Arena, own: int, kind: str) -> int | None:
    """Return the descriptor that a verb is given: an eventfd, none, one that is not open, one that is no eventfd."""
    return {"event": own, "none": None, "closed": NOT_OPEN, "file": arena.file}[kind]


def ring_descriptor(arena: Arena, step: Step) -> int | None:
    """Return what the kick, call or err verb of a ring is given; a ring that is none has those of the first."""
    fds = {"set_vring_kick": arena.kicks, "set_vring_call": arena.calls, "set_vring_err": arena.errs}[step.name]
    return descriptor(arena, fds[step.ring if step.ring < len(fds) else 0], step.value)
