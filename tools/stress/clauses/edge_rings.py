"""Rings and memory in rare places: of one entry, at an end, on one page, in files of all kinds, in all slots."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final

from vhostmp.tools.stress.arena import Arena
from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request
from vhostmp.tools.stress.frontend import mem_table, single_region
from vhostmp.tools.stress.machine import Machine, Ring
from vhostmp.tools.stress.memory import PAGE, Region
from vhostmp.tools.stress.packed import packed_layout
from vhostmp.tools.stress.ring import DESC_BYTES, RingLayout
from vhostmp.tools.stress.target import SLOTS_PLAIN
from vhostmp.tools.stress.verdict import NotApplicable

REGIONS: Final = "vhost-user, Memory regions description"
LAYOUT: Final = "virtio 1.3, 2.7 and 2.8.10.1: alignment of the parts of a ring"
FAR_GPA: Final = 6 << 30
HUGE: Final = 2 << 20
NUM: Final = 16
AVAIL_BYTES: Final = 6 + 2 * NUM
USED_BYTES: Final = 6 + 8 * NUM
MOST_SLOTS: Final = 509  # what QEMU has at most


@clause("edge", "one-entry", source="virtio 1.3, 2.7 and 2.8.10.1: any size", rings=FORMATS, devices=("net", "rng"))
def one_entry(ctx: Context) -> None:
    """Rings of one entry: full with one request."""
    machine = ctx.machine(ctx.setup(num=1))
    machine.traffic(60)


@clause("edge", "one-entry-indirect", source="virtio 1.3, 2.7.5.3 and 2.8.7", rings=FORMATS)
def one_entry_indirect(ctx: Context) -> None:
    """Rings of one entry, which is a table."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = ctx.machine(ctx.setup(num=1))
    for _ in range(30):
        machine.offer(1, indirect=True)
        machine.go()
        machine.collect()


def laid(machine: Machine, ring: Ring, region: Region, start: int) -> int:
    """Put a ring, not yet started, at byte `start` of a region. Returns where it ends."""
    num = ring.layout.num
    layout = packed_layout(start, num) if machine.setup.packed else RingLayout.at(start, num)
    ring.place(region, layout)
    return layout.end


@clause("edge", "rings-on-one-page", source=LAYOUT, rings=FORMATS)
def one_page(ctx: Context) -> None:
    """All rings lie on one page, each right behind the one before."""
    machine = ctx.machine(ctx.setup(num=NUM), start=False)
    at = 0
    for ring in machine.rings:
        at = laid(machine, ring, machine.rings[0].region, at)
    machine.start_all().traffic(100)


@clause("edge", "ring-at-a-regions-end", source=LAYOUT, rings=FORMATS)
def ring_at_end(ctx: Context) -> None:
    """Each ring lies in memory of its own, and its last byte is the last of that."""
    machine = ctx.machine(ctx.setup(num=NUM), start=False)
    for ring in machine.rings:
        region = machine.memory.add(FAR_GPA + ring.index * HUGE, PAGE)
        if machine.setup.packed:  # the descriptors last
            ring.place(region, RingLayout(NUM, PAGE - DESC_BYTES * NUM, 0, 4, 8))
        else:  # the available ring last
            ring.place(region, RingLayout(NUM, 0, PAGE - AVAIL_BYTES, PAGE // 2, PAGE // 2 + USED_BYTES))
    machine.set_mem_table()
    machine.start_all().traffic(100)


@clause("edge", "parts-of-a-ring-apart", source=LAYOUT, rings=FORMATS)
def parts_apart(ctx: Context) -> None:
    """The three parts of a ring are far from one another and in no order, each aligned as little as it may be."""
    machine = ctx.machine(ctx.setup(num=NUM), start=False)
    region = machine.memory.add(FAR_GPA, 16 * PAGE)
    for ring in machine.rings:
        at = ring.index * 4 * PAGE
        desc, avail, used = at + 2 * PAGE + 16, at + 3 * PAGE + (4 if machine.setup.packed else 2), at + 4
        ring.place(region, RingLayout(NUM, desc, avail, used, used + (4 if machine.setup.packed else USED_BYTES)))
    machine.set_mem_table()
    machine.start_all().traffic(100)


@clause("edge", "file-offset", source=f"{REGIONS}: mmap offset", rings=FORMATS)
def file_offset(ctx: Context) -> None:
    """Memory that begins some pages into its file."""
    machine = ctx.machine(start=False)
    regions = [machine.memory.add(FAR_GPA + at * HUGE, 16 * PAGE, offset=at * PAGE) for at in (1, 3, 16)]
    machine.set_mem_table()
    machine.start_all()
    for one in regions:
        machine.use(Arena(one.gpa, one.size), 8)


@clause("edge", "one-file-twice", source=REGIONS, rings=FORMATS)
def twice(ctx: Context) -> None:
    """The same file is two regions at different addresses: what is written by one is read by the other."""
    machine = ctx.machine(start=False)
    one = machine.memory.add(FAR_GPA, 16 * PAGE)
    fd = ctx.fd(os.dup(one.fd))
    map_ = mmap.mmap(fd, one.size)
    alias = Region(one.gpa + HUGE, one.uva + HUGE, os.dup(fd), 0, map_, memoryview(map_))
    machine.memory.regions.append(alias)
    machine.set_mem_table()
    machine.start_all()
    for where in (one, alias, one, alias):
        machine.use(Arena(where.gpa, where.size), 8)


@clause("edge", "one-file-in-parts", source=f"{REGIONS}: mmap offset", rings=FORMATS)
def in_parts(ctx: Context) -> None:
    """Two regions are two parts of one file, as of a machine with a hole in its memory."""
    machine = ctx.machine(start=False)
    low = machine.memory.add(FAR_GPA, 16 * PAGE)
    os.ftruncate(low.fd, 2 * low.size)
    map_ = mmap.mmap(low.fd, low.size, offset=low.size)
    high = Region(low.gpa + HUGE, low.uva + HUGE, os.dup(low.fd), low.size, map_, memoryview(map_))
    machine.memory.regions.append(high)
    machine.set_mem_table()
    machine.start_all()
    for where in (low, high):
        machine.use(Arena(where.gpa, where.size), 8)


@clause("edge", "huge-pages", source=REGIONS, rings=FORMATS)
def huge_pages(ctx: Context) -> None:
    """Memory of huge pages."""
    machine = ctx.machine(start=False)
    try:
        fd = os.memfd_create("vhostmp-stress", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        os.ftruncate(fd, HUGE)
        map_ = mmap.mmap(fd, HUGE)
        map_[0] = 0
    except OSError as error:
        raise NotApplicable(f"this machine has no huge page to spare: {errno.errorcode[error.errno or 0]}") from None
    machine.memory.regions.append(Region(FAR_GPA, 0x7B00_0000_0000, fd, 0, map_, memoryview(map_)))
    machine.set_mem_table()
    machine.start_all()
    machine.use(Arena(FAR_GPA, HUGE), 16)


@clause("edge", "all-memory-slots", source="vhost-user, VHOST_USER_GET_MAX_MEM_SLOTS; ADD_MEM_REG", rings=FORMATS)
def all_slots(ctx: Context) -> None:
    """As many regions as there are slots for, 509 at most, all in use, then all taken out again but two."""
    ctx.need_protocol(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    machine = ctx.machine()
    extra = [
        machine.add_region(FAR_GPA + at * 2 * PAGE, PAGE)
        for at in range(min(ctx.facts.slots, MOST_SLOTS) - len(machine.memory.regions))
    ]
    for one in [extra[0], extra[-1], *ctx.rng.sample(extra, min(len(extra), 40))]:
        machine.use(Arena(one.gpa, one.size))
    ctx.rng.shuffle(extra)
    for one in extra:
        machine.remove_region(one)
    machine.traffic()


@clause("edge", "slots-without-table", source="vhost-user, VHOST_USER_ADD_MEM_REG: instead of SET_MEM_TABLE")
def no_table(ctx: Context) -> None:
    """All memory is plugged in region by region, after an empty beginning."""
    ctx.need_protocol(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    machine = ctx.machine(start=False)
    for one in machine.memory.regions:
        machine.link.must(Request.REM_MEM_REG, single_region(one.packed()))
    for one in reversed(machine.memory.regions):
        machine.link.must(Request.ADD_MEM_REG, single_region(one.packed()), [one.fd])
    machine.start_all().traffic()


@clause("edge", "table-of-any-order", source=REGIONS)
def table_order(ctx: Context) -> None:
    """The regions of a table come in any order of their addresses."""
    machine = ctx.machine(start=False)
    for at in range(SLOTS_PLAIN - len(machine.memory.regions)):
        machine.memory.add(FAR_GPA + at * HUGE, PAGE)
    regions = list(machine.memory.regions)
    for _ in range(5):
        ctx.rng.shuffle(regions)
        told = [one.packed() for one in regions]
        machine.link.must(Request.SET_MEM_TABLE, mem_table(*told), [one.fd for one in regions])
    machine.start_all().traffic()
