"""Double fetches: a field is changed by another process while the device reads it.

A device that reads a field twice may check one value and use the other. What comes out must follow from one of both:
used lengths that fit, nothing written outside of what both allow, the contents of one buffer or of the other.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Final

from vhostmp.tools.stress.blk import SECTOR, T_IN, T_OUT, BlkMachine, request_header
from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature
from vhostmp.tools.stress.flip import Flipper, Width
from vhostmp.tools.stress.hostile import HOLE, prepared
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.net import ADDRESSES, NetMachine, make_frame
from vhostmp.tools.stress.packed import WRAP
from vhostmp.tools.stress.ring import DESC_BYTES, INDIRECT, NEXT, WRITE, DeviceError, Part
from vhostmp.tools.stress.verdict import Failure

SOURCE: Final = "CVE-2020-14375; CVE-2015-8550"
SECONDS: Final = 0.4
"""How long each field is flipped."""
BATCH: Final = 8
LEN, FLAGS_SPLIT, NEXT_SPLIT, ID_PACKED = 8, 12, 14, 12  # offsets in a descriptor
HEADER: Final = 12
LONG = 0xFFFFFFF0

Place = tuple[int, Width, int, int]
"""Guest-physical address of a field, its width, and the two values."""


def _race(
    ctx: Context, machine: Machine, prepare: Callable[[], Place], check: Callable[[], None] | None = None
) -> None:
    """Make chains, flip a field of them while the device reads, look at what came of it, and reset: again and again."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        gpa, width, first, second = prepare()
        region = machine.memory.region_of(gpa)
        ring = machine.work
        before = machine.memory.snapshot()
        given = machine.given()
        # What only one of the two values gives is given, too.
        given += [(ring.driver.avail_gpa, 4), (gpa, 8)]
        with Flipper(region.buf, gpa - region.gpa, width, first, second):
            ring.driver.publish()
            ring.notify()
            ring.quiet(0.01)
            time.sleep(0.002)
            machine.stop(ring)
        try:
            ring.driver.reap()
        except DeviceError as error:
            raise Failure(f"ring {ring.index}: {error}") from None
        ctx.unwritten(machine, before, given)
        machine.reset()
        machine.probe()


def _slot(machine: Machine, number: int = 0) -> int:
    """Return the address of the descriptor that is written next, or `number` behind it."""
    driver = machine.work.driver
    if machine.setup.packed:
        return driver.desc_gpa + DESC_BYTES * (((driver.avail_idx & ~WRAP) + number) % driver.num)
    slots = list(driver.free)
    return driver.desc_gpa + DESC_BYTES * slots[number]


def _chains(machine: Machine, count: int = BATCH) -> None:
    for _ in range(count):
        machine.work.driver.add_parts(machine.good_parts())


@clause("hostile", "fetch-len", source=SOURCE, rings=FORMATS)
def fetch_len(ctx: Context) -> None:
    """The length of a descriptor: right, and 2^32 - 16."""
    machine = prepared(ctx)

    def prepare() -> Place:
        at, length = _slot(machine), machine.good_parts()[0][1]
        _chains(machine)
        return at + LEN, "I", length, LONG

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-len-at-end", source=SOURCE + "; CVE-2018-1059", rings=FORMATS)
def fetch_len_at_end(ctx: Context) -> None:
    """The length of a descriptor at the end of memory: to the end, and beyond it."""
    machine = prepared(ctx)
    end = machine.memory.regions[1].end

    def prepare() -> Place:
        at = _slot(machine)
        parts = machine.good_parts()
        addr, length, flags = parts[0]
        machine.memory.write(end - length, machine.memory.read(addr, length))
        machine.work.driver.add_parts([(end - length, length, flags), *parts[1:]])
        return at + LEN, "I", length, length + 65536

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-addr", source=SOURCE, rings=FORMATS)
def fetch_addr(ctx: Context) -> None:
    """The address of a descriptor: a buffer, and where there is no memory."""
    machine = prepared(ctx)

    def prepare() -> Place:
        at = _slot(machine)
        parts = machine.good_parts()
        machine.work.driver.add_parts(parts)
        _chains(machine)
        return at, "Q", parts[0][0], HOLE

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-flags-write", source=SOURCE + "; virtio 1.3, 2.7.4.2", rings=("split",))
def fetch_flags(ctx: Context) -> None:
    """The direction of a descriptor."""
    machine = prepared(ctx)

    def prepare() -> Place:
        at = _slot(machine)
        parts = machine.good_parts()
        _, _, flags = parts[0]
        machine.work.driver.add_parts(parts)
        given = flags | (NEXT if len(parts) > 1 else 0)
        return at + FLAGS_SPLIT, "H", given, given ^ WRITE

    _race_both(ctx, machine, prepare)


def _race_both(ctx: Context, machine: Machine, prepare: Callable[[], Place]) -> None:
    """As `_race`, for fields that say which parts the device may write: it may write to all of them."""

    def prepared_place() -> Place:
        place = prepare()
        for chain in machine.work.driver.in_flight.values():
            chain.writable = [*chain.readable, *chain.writable]
        return place

    _race(ctx, machine, prepared_place)


@clause("hostile", "fetch-flags-next", source=SOURCE + "; CVE-2019-9547", rings=("split",))
def fetch_next_flag(ctx: Context) -> None:
    """NEXT on a descriptor that goes on at itself: a chain without an end, and one of one."""
    machine = prepared(ctx)

    def prepare() -> Place:
        at = _slot(machine)
        number = (at - machine.work.driver.desc_gpa) // DESC_BYTES
        addr, length, flags = machine.good_parts()[0]
        machine.work.driver.add_parts([(addr, length, flags)])
        machine.memory.write(at + NEXT_SPLIT, struct.pack("<H", number))
        return at + FLAGS_SPLIT, "H", flags, flags | NEXT

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-flags-indirect", source=SOURCE + "; CVE-2011-2212", rings=("split",))
def fetch_indirect_flag(ctx: Context) -> None:
    """INDIRECT on a descriptor whose buffer is a table, and data."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = prepared(ctx)

    def prepare() -> Place:
        at = _slot(machine)
        parts = machine.good_parts()
        raw = machine.work.driver.pack_table(parts)
        table = machine.put(raw)
        machine.work.driver.add_parts([(table, len(raw), 0)])
        for chain in machine.work.driver.in_flight.values():
            chain.writable = [*chain.writable, *((addr, length) for addr, length, flags in parts if flags & WRITE)]
        return at + FLAGS_SPLIT, "H", 0, INDIRECT

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-next", source=SOURCE + "; libvhost-user 758ef96a2d", rings=("split",))
def fetch_next(ctx: Context) -> None:
    """The next one of a descriptor: one in the table, and one that is not."""
    machine = prepared(ctx)

    def prepare() -> Place:
        at, following = _slot(machine), (_slot(machine, 1) - machine.work.driver.desc_gpa) // DESC_BYTES
        addr, length, flags = machine.good_parts()[0]
        machine.work.driver.add_parts([(addr, length // 2, flags), (addr + length // 2, length - length // 2, flags)])
        return at + NEXT_SPLIT, "H", following, 0xFFFF

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-avail-index", source=SOURCE + "; virtio 1.3, 2.7.13.3", rings=("split",))
def fetch_avail_index(ctx: Context) -> None:
    """The available index: what is there, and more than the ring holds."""
    machine = prepared(ctx)

    def prepare() -> Place:
        _chains(machine)
        index = int(machine.work.driver.avail_idx)
        return machine.work.driver.avail_gpa + 2, "H", index, (index + 0x4000) & 0xFFFF

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-avail-entry", source=SOURCE + "; CVE-2021-45464", rings=("split",))
def fetch_avail_entry(ctx: Context) -> None:
    """An entry of the available ring: a head, and one that is none."""
    machine = prepared(ctx)

    def prepare() -> Place:
        driver = machine.work.driver
        place = int(driver.avail_idx) % driver.num
        head = driver.add_parts(machine.good_parts())
        return driver.avail_gpa + 4 + 2 * place, "H", head, 0xFFFF

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-packed-flags", source=SOURCE + "; CVE-2026-16457; virtio 1.3, 2.8.1", rings=("packed",))
def fetch_packed_flags(ctx: Context) -> None:
    """The flags of a packed descriptor: available, and available with INDIRECT and NEXT."""
    machine = prepared(ctx)

    def prepare() -> Place:
        at = _slot(machine)
        flags = (1 << 7) if int(machine.work.driver.avail_idx) & WRAP else (1 << 15)
        addr, length, own = machine.good_parts()[0]
        machine.work.driver.add_parts([(addr, length, own)])
        return at + 14, "H", flags | own, flags | own | INDIRECT | NEXT

    _race_both(ctx, machine, prepare)


@clause("hostile", "fetch-packed-id", source=SOURCE + "; virtio 1.3, 2.8.5", rings=("packed",))
def fetch_packed_id(ctx: Context) -> None:
    """The id of a packed descriptor: what comes back is one of both, and it harms nobody."""
    machine = prepared(ctx)

    def prepare() -> Place:
        at = _slot(machine)
        number = machine.work.driver.add_parts(machine.good_parts()[:1])
        machine.work.driver.in_flight[number ^ 1] = machine.work.driver.in_flight[number]
        machine.work.driver.order.append(number ^ 1)
        return at + ID_PACKED, "H", number, number ^ 1

    _race(ctx, machine, prepare)


def _table_race(ctx: Context, offset: int, width: Width, second: int) -> None:
    """Flip a field of the first entry of an indirect table."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = prepared(ctx)

    def prepare() -> Place:
        parts = machine.good_parts()
        raw = machine.work.driver.pack_table(parts)
        table = machine.put(raw)
        readable = [(addr, length) for addr, length, flags in parts if not flags & WRITE]
        writable = [(addr, length) for addr, length, flags in parts if flags & WRITE]
        machine.work.driver.add_table(table, readable, writable)
        first = int.from_bytes(raw[offset : offset + struct.calcsize(width)], "little")
        return table + offset, width, first, second

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-table-len", source="DPDK re-reads indirect tables; " + SOURCE, rings=FORMATS)
def fetch_table_len(ctx: Context) -> None:
    """The length of an entry of an indirect table."""
    _table_race(ctx, LEN, "I", LONG)


@clause("hostile", "fetch-table-addr", source="DPDK re-reads indirect tables; " + SOURCE, rings=FORMATS)
def fetch_table_addr(ctx: Context) -> None:
    """The address of an entry of an indirect table."""
    _table_race(ctx, 0, "Q", HOLE)


@clause("hostile", "fetch-table-next", source="DPDK re-reads indirect tables; " + SOURCE, rings=("split",))
def fetch_table_next(ctx: Context) -> None:
    """The flags of an entry of an indirect table: an end, and a circle."""
    _table_race(ctx, FLAGS_SPLIT, "H", NEXT | INDIRECT)


# ---- what comes out, where frames come back


def _echoed(
    ctx: Context, machine: NetMachine, prepare: Callable[[], Place], allowed: Callable[[], list[bytes]]
) -> None:
    """Flip a field under a frame that is sent: what comes back is what one of both values makes of it."""
    ctx.need_echo()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        machine.post()
        gpa, width, first, second = prepare()
        region = machine.memory.region_of(gpa)
        with Flipper(region.buf, gpa - region.gpa, width, first, second):
            machine.tx().driver.publish()
            machine.tx().notify()
            machine.tx().quiet(0.02)
            machine.rx().quiet(0.02)
        frames = [frame[ADDRESSES:] for frame in allowed()]
        for used in machine.rx().driver.reap():
            got = machine.memory.read(used.chain.writable[0][0], used.length or 0)[HEADER + ADDRESSES :]
            if got not in frames:
                raise Failure(f"{len(got) + ADDRESSES} bytes came back that are neither of the two frames")
        machine.reset()
        machine.probe()


def _net(ctx: Context) -> NetMachine:
    machine = ctx.net()
    machine.probe()
    return machine


@clause("hostile", "fetch-frame-addr", source=SOURCE, rings=FORMATS, devices=("net",))
def fetch_frame_addr(ctx: Context) -> None:
    """The address of a frame: two frames that are both there; one of them comes back, and no mixture."""
    machine = _net(ctx)
    one, other = make_frame(1, 1400), make_frame(2, 1400)

    def prepare() -> Place:
        at, first, second = _slot(machine), machine.put(machine.packet(one)), machine.put(machine.packet(other))
        machine.work.driver.add_parts([(first, HEADER + len(one), 0)])
        return at, "Q", first, second

    _echoed(ctx, machine, prepare, lambda: [one, other])


@clause("hostile", "fetch-frame-len", source=SOURCE, rings=FORMATS, devices=("net",))
def fetch_frame_len(ctx: Context) -> None:
    """The length of a frame: it comes back as long as one of both says."""
    machine = _net(ctx)
    frame = make_frame(3, 1400)

    def prepare() -> Place:
        at, gpa = _slot(machine), machine.put(machine.packet(frame))
        machine.work.driver.add_parts([(gpa, HEADER + len(frame), 0)])
        return at + LEN, "I", HEADER + len(frame), HEADER + 100

    _echoed(ctx, machine, prepare, lambda: [frame, frame[:100]])


@clause(
    "hostile", "fetch-header-csum", source="DPDK 285e6b8b18: csum_start fetched twice", rings=FORMATS, devices=("net",)
)
def fetch_header_csum(ctx: Context) -> None:
    """Where a checksum begins: in the packet, and far behind it."""
    _header_race(ctx, 6, 14, 0xFFF0)


@clause("hostile", "fetch-header-gso", source="DPDK 285e6b8b18; CVE-2024-43897", rings=FORMATS, devices=("net",))
def fetch_header_gso(ctx: Context) -> None:
    """The size of segments: a thousand bytes, and none."""
    _header_race(ctx, 4, 1000, 0, kind=1)


def _header_race(ctx: Context, offset: int, first: int, second: int, kind: int = 0) -> None:
    features = ctx.features(Feature.NET_CSUM, Feature.NET_HOST_TSO4)
    machine = prepared(ctx, ctx.setup(features=features))

    def prepare() -> Place:
        header = struct.pack("<BBHHHHH", 1, kind, 54, 1000, 14, 16, 0)
        gpa = machine.put(header + make_frame(5, 1400))
        machine.work.driver.add_parts([(gpa, HEADER + 1400, 0)])
        return gpa + offset, "H", first, second

    _race(ctx, machine, prepare)


@clause("hostile", "fetch-rx-len", source=SOURCE + "; CVE-2014-0077", rings=FORMATS, devices=("net",))
def fetch_rx_len(ctx: Context) -> None:
    """The length of a receive buffer: room for a frame, and for a few bytes of it. Nothing is written behind it."""
    ctx.need_echo()
    features = ctx.features(without=(Feature.NET_MRG_RXBUF,))
    until = time.monotonic() + SECONDS
    machine = ctx.net(ctx.setup(features=features))
    while time.monotonic() < until:
        rx = machine.rx()
        room = machine.arena.take(4096)
        at = rx.driver.desc_gpa + DESC_BYTES * (0 if machine.setup.packed else next(iter(rx.driver.free)))
        rx.driver.add_parts([(room, 1500, WRITE)])
        rx.kick()
        machine.send(machine.next_frame(1400))
        region = machine.memory.region_of(at)
        with Flipper(region.buf, at + LEN - region.gpa, "I", 1500, 100):
            machine.tx().driver.publish()
            machine.tx().notify()
            rx.quiet(0.02)
        if any(machine.memory.read(room + 1500, 4096 - 1500)):
            raise Failure("the device wrote behind a receive buffer")
        rx.driver.reap()
        machine.reset()


# ---- disks


def _disk(ctx: Context) -> BlkMachine:
    machine = ctx.blk()
    machine.probe()
    return machine


@clause("hostile", "fetch-blk-sector", source=SOURCE, rings=FORMATS, devices=("blk",))
def fetch_sector(ctx: Context) -> None:
    """The sector of a read: two that are there; the data are of one of them."""
    machine = _disk(ctx)
    written = [bytes([number + 1]) * SECTOR for number in range(2)]
    for number, data in enumerate(written):
        machine.request(T_OUT, number, data=data)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        header = machine.put(request_header(T_IN, 0))
        room = machine.arena.take(SECTOR + 1)
        parts: list[Part] = [(header, 16, 0), (room, SECTOR, WRITE), (room + SECTOR, 1, WRITE)]
        machine.work.driver.add_parts(parts)
        region = machine.memory.region_of(header)
        with Flipper(region.buf, header + 8 - region.gpa, "I", 0, 1):
            machine.work.driver.publish()
            machine.work.notify()
            machine.work.quiet(0.05)
        machine.work.driver.reap()
        if machine.memory.read(room + SECTOR, 1) == b"\0" and machine.memory.read(room, SECTOR) not in written:
            raise Failure("what was read is of neither of the two sectors")
        machine.reset()


@clause("hostile", "fetch-blk-sector-outside", source=SOURCE, rings=FORMATS, devices=("blk",))
def fetch_sector_outside(ctx: Context) -> None:
    """The sector of a read: the first, and one behind the end."""
    _blk_race(ctx, 12, 0, 0x00FFFFFF)


@clause("hostile", "fetch-blk-type", source=SOURCE, rings=FORMATS, devices=("blk",))
def fetch_type(ctx: Context) -> None:
    """What a request is: a read, and something that there is not."""
    _blk_race(ctx, 0, T_IN, 99)


def _blk_race(ctx: Context, offset: int, first: int, second: int) -> None:
    machine = _disk(ctx)

    def prepare() -> Place:
        parts = machine.good_parts()
        machine.work.driver.add_parts(parts)
        _chains(machine, 4)
        return parts[0][0] + offset, "I", first, second

    _race(ctx, machine, prepare)
