"""What a device's configuration is made of, control side: immutable states, and the parts they name.

A *part* is something that workers hold too (a memory table mapped, a back-end made, a descriptor): it has an id that is
never used again, it is sent to a worker once, and it owns its descriptors here until no state in force names it.
A *state* is everything that a device's front-end and its back-end have set. Verbs make a new state from the old one;
the flush puts it in force (flush.py).
"""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import attrs

from vhostmp.shm.memory import MemoryTable
from vhostmp.workers.channel import close_all

_ids: Final = itertools.count(1)


def duplicate(fd: int) -> int:
    """Duplicate a descriptor, close-on-exec. OSError when it is not open."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


@attrs.frozen(eq=False)
class Part:
    """A part; equal to itself alone. `fds` are owned unless `borrowed`."""

    fds: tuple[int, ...] = ()
    borrowed: bool = False
    id: int = attrs.field(factory=lambda: next(_ids))

    def close(self) -> None:
        """Close what it owns. No state in force names it any more."""
        if not self.borrowed:
            close_all(self.fds)


@attrs.frozen(eq=False)
class MemoryPart(Part):
    """A memory table; `table`'s descriptors are the part's."""

    table: MemoryTable = attrs.field(factory=MemoryTable)

    @classmethod
    def keep(cls, table: MemoryTable) -> MemoryPart:
        """Make a part of a table with borrowed descriptors, which it duplicates. OSError when there are too many."""
        fds: list[int] = []
        try:
            for region in table:
                fds.append(duplicate(region.fd))
        except OSError:
            close_all(fds)
            raise
        regions = tuple(attrs.evolve(region, fd=fd) for region, fd in zip(table, fds, strict=True))
        return cls(fds=tuple(fds), table=MemoryTable(regions))

    def describe(self) -> dict[str, Any]:
        """Return what a worker needs beside the descriptors."""
        regions = [{"gpa": r.gpa, "size": r.size, "uva": r.uva, "mmap_offset": r.mmap_offset} for r in self.table]
        return {"id": self.id, "regions": regions}


@attrs.frozen(eq=False)
class BackendPart(Part):
    """A back-end: what a worker makes it from. `fds` has one descriptor a group of queues, or none.

    With `shared` every worker gets all of them.
    """

    kind: str = "null"
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    shared: bool = False

    def describe(self, groups: Iterable[int]) -> tuple[dict[str, Any], list[int]]:
        """Return what a worker that serves these groups of queues needs, and the descriptors for it."""
        served = list(groups)
        described = {"id": self.id, "kind": self.kind, "groups": served, "options": dict(self.options)}
        if self.shared or not self.fds:
            return described, list(self.fds)
        return described, [self.fds[group] for group in served]


class Setup(Protocol):
    """An open back-end, as the control process has it. What it does with requests or packets is the workers'."""

    @property
    def spec(self) -> str:
        """What the user wrote to name it."""
        ...

    def part(self, features: int, /) -> BackendPart:
        """Set it up for the features that the guest acked; a new part, from which workers make theirs.

        Raises LocalError when the guest has acked what it cannot carry, SysError when the kernel refuses.
        """
        ...

    def close(self) -> None:
        """Close its descriptors. No worker uses them any more."""
        ...


@attrs.frozen
class RingState:
    """One virtqueue as set by the front-end. Addresses are the front-end's (uva); size in entries, 0 until set."""

    size: int = 0
    desc: int | None = None
    avail: int = 0
    used: int = 0
    base: int = 0
    kick: Part | None = None
    call: Part | None = None
    err: Part | None = None
    started: bool = False
    enabled: bool = False
    start_id: int = 0
    busyloop_us: int = 0

    def parts(self) -> list[Part]:
        """List the parts that it names."""
        return [part for part in (self.kick, self.call, self.err) if part is not None]


@attrs.frozen
class DeviceState:
    """One device."""

    backend: BackendPart
    rings: tuple[RingState, ...]
    features: int = 0
    memory: MemoryPart | None = None

    @property
    def live(self) -> bool:
        """Whether any ring is started: then workers are concerned by every change."""
        return any(ring.started for ring in self.rings)

    def parts(self) -> set[Part]:
        """Return all parts that it names."""
        found: set[Part] = {self.backend, *(part for ring in self.rings for part in ring.parts())}
        if self.memory is not None:
            found.add(self.memory)
        return found

    def with_ring(self, index: int, **changes: Any) -> DeviceState:
        """Return the state with one ring changed."""
        rings = list(self.rings)
        rings[index] = attrs.evolve(rings[index], **changes)
        return attrs.evolve(self, rings=tuple(rings))


def is_eventfd(fd: int) -> bool:
    """Whether an open descriptor is an eventfd. OSError when it is not open."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
