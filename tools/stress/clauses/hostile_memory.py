"""Memory tables as an enemy sends them, and memory that goes away."""

from __future__ import annotations

import mmap
import os

from vhostmp.tools.stress.clause import FORMATS, SETTLE, Context, clause
from vhostmp.tools.stress.consts import ProtocolFeature, Request
from vhostmp.tools.stress.frontend import mem_table, region, single_region
from vhostmp.tools.stress.hostile import prepared
from vhostmp.tools.stress.link import Outcome
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.memory import Region
from vhostmp.tools.stress.messages import (
    MEMORY_BYTES,
    Maker,
    Row,
    connected,
    directory,
    empty_memfd,
    eventfd,
    memfd,
    null_device,
    pipe,
    readonly,
    regular_file,
    table,
)
from vhostmp.tools.stress.verdict import Failure

TOP = 1 << 64
HALF = MEMORY_BYTES // 2
UVA = 0x6000_0000_0000
FAR = 1 << 40
POISON = 0xA5
MOST = 8  # regions in a table

SLOTS = (ProtocolFeature.CONFIGURE_MEM_SLOTS,)
SOURCE = "vhost-user, memory regions description"


def _row(id_: str, question: str, *tables: bytes, fds: tuple[Maker, ...] = (memfd,), source: str = "") -> Row:
    return Row(f"mem-table-{id_}", question, source or SOURCE, Request.SET_MEM_TABLE, tables, fds)


_ONE = region(FAR, MEMORY_BYTES, UVA)
_TWO = (memfd, memfd)

table(
    [
        _row("of-nine", "Nine regions.", mem_table(*[region(FAR, 4096, UVA)] * 9)),
        _row("of-2-32", "2^32 - 1 regions.", mem_table(_ONE, count=0xFFFFFFFF), source="passt vhost_user.c:445"),
        _row("of-33", "33 regions, and 8 descriptors.", mem_table(*[_ONE] * 8, count=33), fds=(memfd,) * MOST),
        _row("gpa-wraps", "A region past the last guest-physical address.", mem_table(region(TOP - 4096, 8192, UVA))),
        _row("uva-wraps", "A region past the front-end's last address.", mem_table(region(FAR, 8192, TOP - 4096))),
        _row("offset-wraps", "A region whose offset and size wrap.", mem_table(region(FAR, 8192, UVA, TOP - 4096))),
        _row("size-wraps", "A region of nearly 2^64 bytes.", mem_table(region(4096, TOP - 4096, UVA))),
        _row(
            "beyond-file",
            "Regions that end behind the end of their file.",
            mem_table(region(FAR, MEMORY_BYTES, UVA, 4096)),
            mem_table(region(FAR, 2 * MEMORY_BYTES, UVA)),
            mem_table(region(FAR, 1 << 45, UVA)),
        ),
        _row(
            "overlap",
            "Regions that overlap in guest-physical addresses.",
            mem_table(region(FAR, HALF + 4096, UVA), region(FAR + HALF, HALF, 2 * UVA)),
            fds=_TWO,
            source="DPDK checks in ADD_MEM_REG alone",
        ),
        _row(
            "overlap-uva",
            "Regions that overlap in the front-end's addresses.",
            mem_table(region(FAR, HALF, UVA), region(2 * FAR, HALF, UVA + HALF - 4096)),
            fds=_TWO,
            source="DPDK checks in ADD_MEM_REG alone",
        ),
        _row(
            "twice",
            "The same region twice.",
            mem_table(_ONE, _ONE),
            fds=_TWO,
            source="DPDK checks in ADD_MEM_REG alone",
        ),
        _row("fewer-fds", "Two regions, and one descriptor.", mem_table(_ONE, region(2 * FAR, 4096, 2 * UVA))),
        _row("more-fds", "One region, and three descriptors.", mem_table(_ONE), fds=(*_TWO, memfd)),
        _row("no-fds", "A region, and no descriptor.", mem_table(_ONE), fds=()),
        *(
            _row(f"fd-{name}", f"Guest memory in {text}.", mem_table(_ONE), fds=(maker,))
            for name, text, maker in (
                ("null", "/dev/null", null_device),
                ("pipe", "a pipe", pipe),
                ("socket", "a socket", connected),
                ("eventfd", "an eventfd", eventfd),
                ("directory", "a directory", directory),
                ("empty", "a file of no bytes", empty_memfd),
                ("file", "an empty regular file", regular_file),
                ("read-only", "a file that may only be read", readonly),
            )
        ),
        Row(
            "mem-table-empty",
            "No regions, and regions of no bytes.",
            SOURCE,
            Request.SET_MEM_TABLE,
            [mem_table(), mem_table(region(FAR, 0, UVA))],
            may=True,
        ),
        Row(
            "mem-table-offset-unaligned",
            "A region that does not begin at a page of its file.",
            SOURCE,
            Request.SET_MEM_TABLE,
            [mem_table(region(FAR, 4096, UVA, 1))],
            [memfd],
            may=True,
        ),
        Row(
            "mem-slot-no-fd",
            "ADD_MEM_REG without a descriptor.",
            "vhost-user, ADD_MEM_REG",
            Request.ADD_MEM_REG,
            [single_region(_ONE)],
            protocol=SLOTS,
        ),
        Row(
            "mem-slot-two-fds",
            "ADD_MEM_REG with two descriptors.",
            "vhost-user, ADD_MEM_REG",
            Request.ADD_MEM_REG,
            [single_region(_ONE)],
            _TWO,
            protocol=SLOTS,
        ),
        Row(
            "mem-slot-overlap",
            "ADD_MEM_REG over memory that there is.",
            "vhost-user, ADD_MEM_REG",
            Request.ADD_MEM_REG,
            [
                lambda machine: single_region(region(machine.memory.regions[0].gpa, MEMORY_BYTES, UVA)),
                lambda machine: single_region(region(FAR, MEMORY_BYTES, machine.memory.regions[1].uva)),
            ],
            [memfd],
            protocol=SLOTS,
        ),
        Row(
            "mem-slot-garbage",
            "ADD_MEM_REG of regions that wrap or pass the end of their file.",
            "vhost-user, ADD_MEM_REG",
            Request.ADD_MEM_REG,
            [
                single_region(region(TOP - 4096, 8192, UVA)),
                single_region(region(FAR, 8192, TOP - 4096)),
                single_region(region(FAR, 2 * MEMORY_BYTES, UVA)),
                single_region(region(FAR, 8192, UVA, TOP - 4096)),
            ],
            [memfd],
            protocol=SLOTS,
        ),
        Row(
            "mem-slot-remove-unknown",
            "REM_MEM_REG of a region that there is not, and with another size.",
            "vhost-user, REM_MEM_REG",
            Request.REM_MEM_REG,
            [single_region(_ONE), lambda machine: single_region(region(machine.memory.regions[1].gpa, 4096, UVA))],
            protocol=SLOTS,
        ),
    ]
)


@clause("hostile", "mem-slots-exhausted", source="vhost-user, GET_MAX_MEM_SLOTS; slot > max")
def slots_exhausted(ctx: Context) -> None:
    """More regions than there are slots."""
    ctx.need_protocol(*SLOTS)
    machine = prepared(ctx)
    link, fd = machine.link, ctx.memfd(4096)
    for slot in range(ctx.facts.slots - len(machine.memory.regions)):
        link.must(Request.ADD_MEM_REG, single_region(region(FAR + 8192 * slot, 4096, UVA + 8192 * slot)), [fd])
    if ctx.rejects(link, Request.ADD_MEM_REG, single_region(region(2 * FAR, 4096, 2 * UVA)), [fd]) is Outcome.CLOSED:
        return
    machine.probe()


@clause("hostile", "mem-slot-of-live-ring", source="vhost-user, REM_MEM_REG")
def slot_of_live_ring(ctx: Context) -> None:
    """REM_MEM_REG of the memory in which rings run: refused, or the rings stand still; nothing is written there."""
    ctx.need_protocol(*SLOTS)
    machine = prepared(ctx)
    ring = machine.memory.regions[0]
    outcome = machine.link.try_(Request.REM_MEM_REG, single_region(ring.packed()))
    if outcome is Outcome.CLOSED:
        return
    if outcome is Outcome.REFUSED:
        machine.probe()
        return
    _gone(ctx, machine)
    machine.link.must(Request.ADD_MEM_REG, single_region(ring.packed()), [ring.fd])
    ctx.recovers(machine)


@clause("hostile", "mem-table-without-ring", source="CVE-2026-74580; CVE-2026-93782")
def table_without_ring(ctx: Context) -> None:
    """A table without the memory in which rings run: refused, or the rings stand still; nothing is written there."""
    machine = prepared(ctx)
    buffers = machine.memory.regions[1]
    outcome = machine.link.try_(Request.SET_MEM_TABLE, mem_table(buffers.packed()), [buffers.fd])
    if outcome is Outcome.CLOSED:
        return
    if outcome is Outcome.REFUSED:
        machine.probe()
        return
    _gone(ctx, machine)
    machine.set_mem_table()
    ctx.recovers(machine)


def _gone(ctx: Context, machine: Machine) -> None:
    """Use rings whose memory the device was told is gone."""
    machine.good_chain()
    machine.work.driver.publish()
    before = machine.memory.snapshot()
    machine.work.notify()
    machine.work.quiet(SETTLE)
    ctx.unwritten(machine, before)


def _moved(old: Region) -> Region:
    """Return a copy of a region in another file, at the same addresses."""
    new = Region.create(old.gpa, old.size, old.uva, offset=old.offset)
    new.buf[:] = old.buf
    return new


def _swap(ctx: Context, machine: Machine) -> None:
    """Give the device other memory of the same shape while nothing is in flight, and poison the old one."""
    machine.reset()
    old = list(machine.memory.regions)
    new = [_moved(one) for one in old]
    machine.set_mem_table(new)
    machine.memory.regions[:] = new
    for ring in machine.rings:
        ring.region = new[0]
        ring.driver.rebase(new[0].buf)
    for one in old:
        one.buf[:] = bytes([POISON]) * one.size
    machine.probe()
    for one in old:
        touched = bytes(one.buf) != bytes([POISON]) * one.size
        one.close()
        if touched:
            raise Failure("the device wrote to memory that SET_MEM_TABLE had taken away")
    del ctx


@clause("hostile", "mem-table-same-numbers", source="DPDK keeps the old file", rings=FORMATS)
def same_numbers(ctx: Context) -> None:
    """The same table with other files: the device uses the new ones, and never again the old."""
    machine = prepared(ctx)
    for _ in range(8):
        _swap(ctx, machine)


@clause("hostile", "mem-table-swapped-busy", source="CVE-2026-93782; CVE-2013-4127", rings=FORMATS)
def swapped_busy(ctx: Context) -> None:
    """Buffers moved while requests are on their way: after the acknowledgement nothing is written to the old ones."""
    machine = prepared(ctx)
    for _ in range(12):
        old = machine.memory.regions[1]
        for _ in range(16):
            machine.good_chain()
        machine.work.kick()
        new = _moved(old)
        machine.memory.regions[1] = new
        machine.set_mem_table()
        old.buf[:] = bytes([POISON]) * old.size
        machine.work.notify()
        machine.work.quiet(0.02)
        touched = bytes(old.buf) != bytes([POISON]) * old.size
        old.close()
        if touched:
            raise Failure("the device wrote to memory after SET_MEM_TABLE, which took it away, was acknowledged")
        ctx.recovers(machine)


@clause("hostile", "memory-truncated", source="SIGBUS; mmap(2)", may_kill=True)
def truncated(ctx: Context) -> None:
    """The file under a running ring is truncated: a process may die of it, but not the one that listens."""
    machine = ctx.machine(start=False)
    extra = machine.memory.add(FAR, 64 * mmap.PAGESIZE)
    machine.set_mem_table()
    machine.start_all()
    machine.probe()
    parts = machine.good_parts()
    ring = machine.work
    ring.driver.add_parts([(extra.gpa, length, flags) for _, length, flags in parts])
    os.ftruncate(extra.fd, 0)
    ring.driver.publish()
    ring.notify()
    ring.quiet(SETTLE)
    machine.link.close()
