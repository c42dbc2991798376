"""Chains that are rare and right: cut anywhere, into many parts, with nothing in some, in odd places and orders."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Final

from vhostmp.tools.stress.arena import Arena, TopArena
from vhostmp.tools.stress.blk import T_IN, BlkMachine
from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.memory import PAGE
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.ring import DESC_BYTES, INDIRECT, NEXT, WRITE, Segment
from vhostmp.tools.stress.split import pack_descriptor

LAYOUT: Final = "virtio 1.3, 2.7.4.2: no assumptions about the layout of descriptors"
INDIRECT_SOURCE: Final = "virtio 1.3, 2.7.5.3 and 2.8.7"
REGIONS: Final = "vhost-user, Memory regions description"
PARTS: Final = 30
"""Descriptors of a chain at most: disks may take few (seg_max)."""
BYTES: Final = 12
ODD_GPA: Final = 3 << 30

Shape = Callable[[Sequence[Segment]], Sequence[Segment]]


def cut(segment: Segment, places: Sequence[int]) -> list[Segment]:
    """Cut a segment at these places; the same place twice gives a segment of no bytes."""
    gpa, size = segment
    return [(gpa + a, b - a) for a, b in itertools.pairwise([0, *sorted(min(at, size) for at in places), size])]


def first_cut(*places: int) -> Shape:
    """Cut the first segment at these places."""

    def shape(segments: Sequence[Segment]) -> Sequence[Segment]:
        return [*cut(segments[0], places), *segments[1:]] if segments else []

    return shape


def last_cut(*places: int) -> Shape:
    """Cut the last segment at these places, counted from its end."""

    def shape(segments: Sequence[Segment]) -> Sequence[Segment]:
        if not segments:
            return []
        size = segments[-1][1]
        return [*segments[:-1], *cut(segments[-1], [max(size - at, 0) for at in places])]

    return shape


def at_random(rng: random.Random, most: int) -> Shape:
    """Cut every segment at up to `most` places."""

    def shape(segments: Sequence[Segment]) -> Sequence[Segment]:
        return [
            part
            for one in segments
            for part in cut(one, [rng.randrange(one[1] + 1) for _ in range(rng.randrange(most + 1))])
            if part[1]
        ]

    return shape


def shaped(machine: Machine, shape: Shape, count: int = 2, *, indirect: bool = False) -> None:
    """Do `count` requests whose segments are cut so."""
    machine.shape, machine.spread = shape, PARTS
    for _ in range(count):
        machine.offer(1, indirect=indirect)
        machine.go()
        machine.collect()


@clause("edge", "first-part-split", source=f"{LAYOUT}; 5.1.6.6", rings=FORMATS)
def split_first(ctx: Context) -> None:
    """The first part of a request, with its header, is cut in two at every byte."""
    machine = ctx.machine(ctx.setup(num=256))
    for at in range(1, 40):
        shaped(machine, first_cut(at))


@clause("edge", "last-part-split", source=LAYOUT, rings=FORMATS)
def split_last(ctx: Context) -> None:
    """The last part of a request is cut in two at every byte from its end."""
    machine = ctx.machine(ctx.setup(num=256))
    for at in range(1, 40):
        shaped(machine, last_cut(at))


@clause("edge", "bytes-apart", source=LAYOUT, rings=FORMATS)
def bytes_apart(ctx: Context) -> None:
    """Each of the first bytes, and each of the last ones, is in a descriptor of its own."""
    machine = ctx.machine(ctx.setup(num=512))
    for count in (2, 5, BYTES, 20):
        shaped(machine, first_cut(*range(1, count)))
        shaped(machine, last_cut(*range(1, count)))


@clause("edge", "cut-at-random", source=LAYOUT, rings=FORMATS)
def cut_at_random(ctx: Context) -> None:
    """Requests are cut anywhere, into any number of descriptors."""
    machine = ctx.machine(ctx.setup(num=512))
    shaped(machine, at_random(ctx.rng, 8), 60)


@clause("edge", "cut-at-random-indirect", source=f"{LAYOUT}; {INDIRECT_SOURCE}", rings=FORMATS)
def cut_in_tables(ctx: Context) -> None:
    """Requests are cut anywhere, in indirect tables."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = ctx.machine(ctx.setup(num=512))
    shaped(machine, at_random(ctx.rng, 8), 60, indirect=True)


@clause("edge", "no-bytes-first", source="virtio 1.3, 2.7.5 and 2.8.5: len may be 0; CVE-2023-5158", rings=FORMATS)
def nothing_first(ctx: Context) -> None:
    """The first descriptor of each direction has no bytes."""
    shaped(ctx.machine(ctx.setup(num=256)), first_cut(0), 8)


@clause("edge", "no-bytes-last", source="virtio 1.3, 2.7.5 and 2.8.5: len may be 0; CVE-2023-5158", rings=FORMATS)
def nothing_last(ctx: Context) -> None:
    """The last descriptor of each direction has no bytes."""
    shaped(ctx.machine(ctx.setup(num=256)), last_cut(0), 8)


@clause("edge", "no-bytes-between", source="virtio 1.3, 2.7.5 and 2.8.5: len may be 0; CVE-2023-5158", rings=FORMATS)
def nothing_between(ctx: Context) -> None:
    """Between descriptors with bytes stand some with none."""
    shaped(ctx.machine(ctx.setup(num=256)), first_cut(5, 5, 12, 12, 12), 8)


@clause("edge", "descriptors-in-any-order", source="virtio 1.3, 2.7.13.1 and 2.8.15", rings=FORMATS)
def any_order(ctx: Context) -> None:
    """Descriptors are linked in any order, and ids are given out in any."""
    machine = ctx.machine(ctx.setup(num=128))
    for _ in range(20):
        machine.work.driver.shuffle(ctx.rng)
        shaped(machine, first_cut(3, 9), 4)


@clause("edge", "across-two-regions", source=REGIONS, rings=FORMATS)
def across_two(ctx: Context) -> None:
    """Buffers begin in one region of memory and end in the next, which lies elsewhere in the front-end."""
    machine = with_pages(ctx, 2)
    for before in (1, 2, 7, 12, 15, 16, 17, 40, 59, 71):
        machine.use(Arena(ODD_GPA + PAGE - before, PAGE, align=1))


@clause("edge", "across-many-regions", source=REGIONS, rings=FORMATS)
def across_many(ctx: Context) -> None:
    """Buffers of one request reach over three regions of memory of a page each."""
    machine = with_pages(ctx, 6)
    if isinstance(machine, BlkMachine):
        usual, machine.arena = machine.arena, Arena(ODD_GPA + PAGE - 20, 4 * PAGE, align=1)
        machine.request(T_IN, 0, size=2 * PAGE)
        machine.arena = usual
    elif isinstance(machine, NetMachine):
        machine.post()
        machine.tx().driver.add([(ODD_GPA + PAGE - 20, PAGE + 40)])
        machine.tx().kick()
        machine.tx().take(1)
        machine.forget()
        machine.traffic()
    else:
        machine.work.driver.add([], [(ODD_GPA + PAGE - 20, PAGE + 40)])
        machine.work.kick()
        machine.work.take(1)


def with_pages(ctx: Context, count: int) -> Machine:
    """Return a machine with so many regions of a page, each where the one before ends."""
    machine = ctx.machine(start=False)
    for at in range(count):
        machine.memory.add(ODD_GPA + at * PAGE, PAGE)
    machine.set_mem_table()
    return machine.start_all()


@clause("edge", "buffers-at-a-regions-end", source=REGIONS, rings=FORMATS)
def at_the_end(ctx: Context) -> None:
    """The last byte of a buffer is the last of its region, and nothing lies behind it."""
    machine = with_pages(ctx, 1)
    for _ in range(4):
        machine.use(TopArena(ODD_GPA, PAGE))


@clause("edge", "table-anywhere", source=INDIRECT_SOURCE, rings=FORMATS)
def table_anywhere(ctx: Context) -> None:
    """Indirect tables that are not aligned, that begin in one region and end in another, that end where memory ends."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = with_pages(ctx, 2)
    border = ODD_GPA + PAGE
    for cuts in ((3,), (3, 5, 7, 9)):
        machine.shape, machine.spread = first_cut(*cuts), PARTS
        for place in (ODD_GPA + 1, ODD_GPA + 7, *(border - before for before in (1, 8, 15, 16, 17, 24))):
            machine.tables = Arena(place, PAGE, align=1)
            machine.use(machine.arena, indirect=True)
        machine.tables = TopArena(border, PAGE)
        machine.use(machine.arena, indirect=True)


@clause("edge", "table-in-any-order", source=f"{INDIRECT_SOURCE}: chained by next", rings=("split",))
def table_shuffled(ctx: Context) -> None:
    """The entries of an indirect table are linked in another order than they stand in."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = ctx.machine()
    where = machine.arena.take(PAGE)
    machine.shape, machine.spread = first_cut(3, 5, 7, 9), PARTS
    for _ in range(20):
        machine.tables = Arena(where, PAGE)
        machine.offer(1, indirect=True)
        (chain,) = machine.work.driver.in_flight.values()
        parts = [(gpa, size, 0) for gpa, size in chain.readable]
        parts += [(gpa, size, WRITE) for gpa, size in chain.writable]
        places = [0, *ctx.rng.sample(range(1, len(parts)), len(parts) - 1)]
        for place, following, (gpa, size, flags) in zip(places, [*places[1:], 0], parts, strict=True):
            flags |= NEXT if following else 0  # noqa: PLW2901
            machine.memory.write(where + DESC_BYTES * place, pack_descriptor(gpa, size, flags, following))
        machine.go()
        machine.collect()


@clause("edge", "table-after-descriptors", source="virtio 1.3, 2.7.5.3.2: direct ones, then a table", rings=("split",))
def table_after(ctx: Context) -> None:
    """A chain of ordinary descriptors whose last one is an indirect table."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = ctx.machine()
    machine.shape, machine.spread = first_cut(3, 9), PARTS
    driver = machine.work.driver
    for _ in range(20):
        machine.offer(1)
        (chain,) = driver.in_flight.values()
        gpa, size = (chain.writable or chain.readable)[-1]
        flags = WRITE if chain.writable else 0
        parts = [(at, length, flags) for at, length in cut((gpa, size), [size // 2]) if length]
        table = machine.put(driver.pack_table(parts))
        driver.write_descriptor(chain.slots[-1], pack_descriptor(table, DESC_BYTES * len(parts), INDIRECT))
        machine.go()
        machine.collect()
