"""What a careful driver asks of a source of random numbers."""

from __future__ import annotations

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.rng import ENOUGH
from vhostmp.tools.stress.verdict import Failure

RNG = ("rng",)


@clause("good", "rng-sizes", source="virtio 1.3, 5.4.6: one byte at least", rings=FORMATS, devices=RNG)
def sizes(ctx: Context) -> None:
    """Buffers of every size are filled, with one byte at least and no two alike."""
    machine = ctx.machine()
    seen: set[bytes] = set()
    for size in (1, 2, 7, 16, 64, 4096, 65536, 1 << 20):
        gpa = machine.arena.take(size)
        machine.work.driver.add([], [(gpa, size)])
        machine.work.kick()
        (used,) = machine.work.take(1)
        got = machine.memory.read(gpa, used.length or 0)
        if not got:
            raise Failure(f"a buffer of {size} bytes came back with nothing in it")
        head = got[:ENOUGH]
        if len(head) == ENOUGH and head in seen:
            raise Failure("the same numbers came twice")
        seen.add(head)


@clause(
    "good",
    "rng-untouched-behind",
    source="virtio 1.3, 2.7.8.2: len is what was written",
    rings=FORMATS,
    devices=RNG,
)
def untouched(ctx: Context) -> None:
    """Behind a buffer nothing is written."""
    machine = ctx.machine()
    for size in (1, 63, 64, 4097):
        gpa = machine.put(bytes(size + 64))
        machine.work.driver.add([], [(gpa, size)])
        machine.work.kick()
        (used,) = machine.work.take(1)
        if any(machine.memory.read(gpa + size, 64)) or used.length is None:
            raise Failure(f"bytes behind a buffer of {size} were written")


@clause("good", "rng-many-parts", source="virtio 1.3, 5.4.6", rings=FORMATS, devices=RNG)
def parts(ctx: Context) -> None:
    """A buffer in many parts."""
    machine = ctx.machine()
    for count in (2, 16, 63):
        places = [(machine.arena.take(16), 16) for _ in range(count)]
        machine.work.driver.add([], places)
        machine.work.kick()
        (used,) = machine.work.take(1)
        if not used.length:
            raise Failure(f"a buffer of {count} parts came back with nothing in it")
