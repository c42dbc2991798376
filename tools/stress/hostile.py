"""What hostile clauses have in common: a bad chain is published, judged, and the device used again.

Rules: see `Context.harmless` for the verdict. Every attempt ends with a reset and a probe, so that the next one begins
well, and so that a ring which cannot be set up again is found at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vhostmp.tools.stress.clause import Context
from vhostmp.tools.stress.link import Link
from vhostmp.tools.stress.machine import Machine, Setup
from vhostmp.tools.stress.ring import INDIRECT, WRITE, Part

Corrupt = Callable[[Part], Part]
"""Makes a bad part of a good one."""

FAR = 2 << 30
"""Guest-physical address of memory that a clause adds for itself."""
HOLE = 3 << 30
"""Guest-physical address at which there never is memory."""


def prepared(ctx: Context, setup: Setup | None = None, link: Link | None = None) -> Machine:
    """Return a machine whose rings run and have been used: a network card has receive buffers posted."""
    machine = ctx.machine(setup, link)
    machine.probe()
    return machine


def enlarged(ctx: Context, *regions: tuple[int, int]) -> Machine:
    """Return a prepared machine with more regions of memory (gpa, bytes)."""
    machine = ctx.machine(start=False)
    for gpa, size in regions:
        machine.memory.add(gpa, size)
    machine.set_mem_table()
    machine.start_all()
    machine.probe()
    return machine


def writable(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """Return where a device may write that is given these parts."""
    return [(addr, length) for addr, length, flags in parts if flags & WRITE and not flags & INDIRECT]


def attempt(ctx: Context, machine: Machine, allowed: Iterable[tuple[int, int]] = (), *, books: bool = True) -> None:
    """Publish what was put into the work ring; it must harm that ring alone, and all must work after a reset."""
    ctx.harmless(machine, machine.work, writable=allowed, books=books)
    ctx.recovers(machine)


def attempt_parts(ctx: Context, machine: Machine, parts: Sequence[Part]) -> None:
    """Publish a chain of these parts on the work ring; see `attempt`."""
    machine.work.driver.add_parts(parts)
    attempt(ctx, machine, writable(parts))


def add_table(machine: Machine, table: int, length: int, parts: Iterable[Part], flags: int = 0) -> None:
    """Add a chain whose last descriptor is a table of `length` bytes, with these parts in it if it is taken."""
    head = machine.work.driver.add_parts([(table, length, INDIRECT | flags)])
    machine.work.driver.in_flight[head].writable = writable(parts)


def attempt_table(
    ctx: Context, machine: Machine, parts: Sequence[Part], *, flags: int = 0, at: int | None = None
) -> None:
    """Publish an indirect table of these parts on the work ring; see `attempt`. `flags`: more of the outer one's."""
    raw = machine.work.driver.pack_table(parts)
    table = machine.put(raw) if at is None else at
    if at is not None:
        machine.memory.write(at, raw)
    add_table(machine, table, len(raw), parts, flags)
    attempt(ctx, machine)


def attempt_each(ctx: Context, corrupt: Corrupt, *, machine: Machine | None = None) -> None:
    """Publish an ordinary request as often as it has parts, with another part corrupted each time."""
    machine = machine or prepared(ctx)
    for place in range(len(machine.good_parts())):
        parts = machine.good_parts()
        parts[place] = corrupt(parts[place])
        attempt_parts(ctx, machine, parts)
