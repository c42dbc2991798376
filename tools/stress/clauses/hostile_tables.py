"""Indirect tables as an enemy writes them."""

from __future__ import annotations

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature
from vhostmp.tools.stress.hostile import (
    FAR,
    HOLE,
    add_table,
    attempt,
    attempt_table,
    enlarged,
    prepared,
    writable,
)
from vhostmp.tools.stress.machine import BUFFERS_GPA, Machine
from vhostmp.tools.stress.ring import DESC_BYTES, INDIRECT, NEXT, WRITE
from vhostmp.tools.stress.split import pack_descriptor

MANY = 65537


def _machine(ctx: Context) -> Machine:
    ctx.need(Feature.INDIRECT_DESC)
    return prepared(ctx)


def _raw_table(ctx: Context, machine: Machine, length: int, at: int | None = None) -> None:
    """Publish an indirect descriptor of so many bytes over an ordinary request's table."""
    parts = machine.good_parts()
    raw = machine.work.driver.pack_table(parts)
    table = machine.put(raw + bytes(64)) if at is None else at
    add_table(machine, table, length, parts)
    attempt(ctx, machine)


@clause("hostile", "indirect-not-negotiated", source="virtio 1.3, 2.7.5.3.1", rings=FORMATS)
def not_negotiated(ctx: Context) -> None:
    """An indirect table, and INDIRECT_DESC was not negotiated."""
    machine = prepared(ctx, ctx.setup(features=ctx.features(without=(Feature.INDIRECT_DESC,))))
    attempt_table(ctx, machine, machine.good_parts())


@clause("hostile", "indirect-in-indirect", source="virtio 1.3, 2.7.5.3.1", rings=FORMATS)
def nested(ctx: Context) -> None:
    """A table whose only entry is another table, and one that holds itself."""
    machine = _machine(ctx)
    raw = machine.work.driver.pack_table(machine.good_parts())
    attempt_table(ctx, machine, [(machine.put(raw), len(raw), INDIRECT)])
    at = machine.arena.take(DESC_BYTES)
    attempt_table(ctx, machine, [(at, DESC_BYTES, INDIRECT)], at=at)


@clause("hostile", "indirect-with-next", source="virtio 1.3, 2.7.5.3.1 and 2.8.19", rings=FORMATS)
def with_next(ctx: Context) -> None:
    """A descriptor with INDIRECT and NEXT, and more behind it."""
    machine = _machine(ctx)
    inner = machine.good_parts()
    raw = machine.work.driver.pack_table(inner)
    outer = (machine.put(raw), len(raw), INDIRECT | NEXT)
    last = (machine.put(bytes(16)), 16, inner[-1][2])
    head = machine.work.driver.add_parts([outer, last])
    machine.work.driver.in_flight[head].writable = writable([*inner, last])
    attempt(ctx, machine)


@clause(
    "hostile", "indirect-empty", source="virtio 1.3, 2.7.5.3; QEMU: zero-length packed indirect table", rings=FORMATS
)
def empty(ctx: Context) -> None:
    """A table of no bytes."""
    _raw_table(ctx, _machine(ctx), 0)


@clause("hostile", "indirect-odd-length", source="virtio 1.3, 2.7.5.3", rings=FORMATS)
def odd_length(ctx: Context) -> None:
    """Tables whose length is no multiple of 16."""
    machine = _machine(ctx)
    for length in (1, 15, 17, 40):
        _raw_table(ctx, machine, length)


@clause("hostile", "indirect-huge", source="virtio 1.3, 2.7.5.3; 65536 entries at most", rings=FORMATS)
def huge(ctx: Context) -> None:
    """Tables of 65,537 entries, and of 4 GiB."""
    machine = _machine(ctx)
    for length in (MANY * DESC_BYTES, 0xFFFFFFF0):
        _raw_table(ctx, machine, length)


@clause("hostile", "indirect-longer-than-ring", source="CVE-2011-2212; virtio 1.3, 2.7.5.3.1", rings=FORMATS)
def longer_than_ring(ctx: Context) -> None:
    """A table of 1,025 entries, each with a byte, on a ring of 64."""
    machine = _machine(ctx)
    for flags in (0, WRITE):
        at = machine.put(bytes(1100))
        attempt_table(ctx, machine, [(at + place, 1, flags) for place in range(1025)])


@clause("hostile", "indirect-of-65536", source="CVE-2011-2212; CVE-2019-3900", rings=FORMATS)
def of_65536(ctx: Context) -> None:
    """Several tables of 65,536 entries of no bytes: the device does not work on them for ever."""
    machine = _machine(ctx)
    at = machine.arena.take(DESC_BYTES << 16)
    raw = machine.work.driver.pack_table([(at, 0, 0)] * (1 << 16))
    machine.memory.write(at, raw)
    for _ in range(16):
        machine.work.driver.add_parts([(at, len(raw), INDIRECT)])
    attempt(ctx, machine)


@clause("hostile", "indirect-in-hole", source="CVE-2021-3748; virtio 1.3, 2.7.5.3", rings=FORMATS)
def in_hole(ctx: Context) -> None:
    """A table where there is no memory."""
    _raw_table(ctx, _machine(ctx), DESC_BYTES, HOLE)


@clause("hostile", "indirect-past-region", source="CVE-2018-1059", rings=FORMATS)
def past_region(ctx: Context) -> None:
    """A table whose last entry lies behind a region, and one whose last entry is cut in two by its end."""
    machine = _machine(ctx)
    end = machine.memory.region_of(BUFFERS_GPA).end
    for before in (DESC_BYTES, DESC_BYTES + 8):
        good = machine.good_parts()[0]
        machine.memory.write(end - before, machine.work.driver.pack_table([good, good])[:before])
        _raw_table(ctx, machine, 2 * DESC_BYTES, end - before)


@clause("hostile", "indirect-across-regions", source="libvhost-user 85805ee887; virtio 1.3, 2.7.5.3", rings=FORMATS)
def across_regions(ctx: Context) -> None:
    """A table that begins in one region and ends in the next, right behind it: taken, or refused, but not misread."""
    ctx.need(Feature.INDIRECT_DESC)
    border = FAR + 0x10000
    machine = enlarged(ctx, (FAR, 0x10000), (border, 0x10000))
    for before in (DESC_BYTES, 8, 2 * DESC_BYTES):
        parts = [*machine.good_parts()[:-1], *[(machine.put(bytes(16)), 8, machine.good_parts()[-1][2])] * 3]
        attempt_table(ctx, machine, parts, at=border - before)


@clause("hostile", "indirect-is-ring", source="virtio 1.3, 2.7.5.3; CVE-2024-3446", rings=FORMATS)
def is_ring(ctx: Context) -> None:
    """A table that is the ring's own descriptors."""
    machine = _machine(ctx)
    driver = machine.work.driver
    driver.add_parts([(driver.desc_gpa, DESC_BYTES * machine.setup.num, INDIRECT)])
    attempt(ctx, machine, [(BUFFERS_GPA, machine.setup.buffers)], books=False)  # it names every buffer there was


@clause("hostile", "indirect-write-flag", source="virtio 1.3, 2.7.5.3.2 and 2.8.19", rings=FORMATS)
def write_flag(ctx: Context) -> None:
    """WRITE on the descriptor of a table, which the device has to ignore: the request is done."""
    machine = _machine(ctx)
    parts = machine.good_parts()
    raw = machine.work.driver.pack_table(parts)
    readable = [(addr, length) for addr, length, flags in parts if not flags & WRITE]
    machine.work.driver.add_table(machine.put(raw), readable, writable(parts), flags=WRITE)
    machine.work.kick()
    machine.work.take(1)


@clause("hostile", "indirect-unaligned", source="virtio 1.3, 2.7.5.3: no alignment is asked for", rings=FORMATS)
def unaligned(ctx: Context) -> None:
    """A table at an odd address: done, or refused, but no fault."""
    machine = _machine(ctx)
    attempt_table(ctx, machine, machine.good_parts(), at=machine.arena.take(256) + 3)


@clause("hostile", "indirect-behind-direct", source="virtio 1.3, 2.7.5.3.2", rings=("split",))
def behind_direct(ctx: Context) -> None:
    """Direct descriptors with a table behind them, as the specification allows: no harm."""
    machine = _machine(ctx)
    parts = machine.good_parts()
    piece = (machine.put(bytes(8)), 8, parts[-1][2])
    raw = machine.work.driver.pack_table([piece, piece])
    head = machine.work.driver.add_parts([*parts, (machine.put(raw), len(raw), INDIRECT)])
    machine.work.driver.in_flight[head].writable = writable([*parts, piece, piece])
    attempt(ctx, machine)


@clause("hostile", "indirect-next-loop", source="CVE-2019-9547; virtio 1.3, 2.7.5.3", rings=("split",))
def loop(ctx: Context) -> None:
    """A table whose entries run in a circle."""
    machine = _machine(ctx)
    addr, length, flags = machine.good_parts()[0]
    for entries in ((0,), (1, 0), (1, 2, 0)):
        raw = b"".join(pack_descriptor(addr, length, flags | NEXT, following) for following in entries)
        add_table(machine, machine.put(raw), len(raw), [(addr, length, flags)] * len(entries))
        attempt(ctx, machine)


@clause("hostile", "indirect-next-outside", source="CVE-2021-45464; virtio 1.3, 2.7.5.3", rings=("split",))
def next_outside(ctx: Context) -> None:
    """Entries whose next one is not in the table."""
    machine = _machine(ctx)
    for following in (2, 3, 0x7FFF, 0xFFFF):
        addr, length, flags = machine.good_parts()[0]
        raw = pack_descriptor(addr, length, flags | NEXT, following) + pack_descriptor(addr, length, flags)
        # What a device finds that reads on: descriptors that look good.
        add_table(machine, machine.put(raw + raw[16:] * 8), len(raw), [(addr, length, flags)] * 2)
        attempt(ctx, machine)


@clause("hostile", "indirect-bad-entries", source="virtio 1.3, 2.7.4, 2.7.5.3", rings=FORMATS)
def bad_entries(ctx: Context) -> None:
    """Tables with an entry in a hole, of 2^32 - 1 bytes, and of the wrong direction."""
    machine = _machine(ctx)
    for place in range(len(machine.good_parts())):
        for kind in range(3):
            parts = machine.good_parts()
            addr, length, flags = parts[place]
            parts[place] = ((HOLE, length, flags), (addr, 0xFFFFFFFF, flags), (addr, length, flags ^ WRITE))[kind]
            attempt_table(ctx, machine, parts)


@clause("hostile", "indirect-many", source="CVE-2011-2212; CVE-2019-3900", rings=FORMATS)
def many(ctx: Context) -> None:
    """A ring full of bad tables among good ones."""
    machine = _machine(ctx)
    for place in range(machine.setup.num):
        parts = machine.good_parts()
        raw = machine.work.driver.pack_table(parts)
        add_table(machine, machine.put(raw), (len(raw), 0, 8, 1 << 20)[place % 4], parts)
    attempt(ctx, machine)


@clause("hostile", "indirect-alone-in-packed-chain", source="virtio 1.3, 2.8.19", rings=("packed",))
def behind_direct_packed(ctx: Context) -> None:
    """A table behind direct descriptors: not allowed in packed rings."""
    machine = _machine(ctx)
    parts = machine.good_parts()
    raw = machine.work.driver.pack_table(parts)
    head = machine.work.driver.add_parts([*parts, (machine.put(raw), len(raw), INDIRECT)])
    machine.work.driver.in_flight[head].writable *= 2
    attempt(ctx, machine)
