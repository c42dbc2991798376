"""Requests to a disk, and to a source of random numbers, as an enemy makes them."""

from __future__ import annotations

import struct

from vhostmp.tools.stress.blk import HEADER, S_OK, SECTOR, T_FLUSH, T_GET_ID, T_IN, T_OUT, UNWRITTEN, request_header
from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.hostile import attempt, attempt_parts, prepared
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.ring import WRITE, Part
from vhostmp.tools.stress.verdict import Failure

BLK = ("blk",)
T_DISCARD = 11
T_WRITE_ZEROES = 13
TOP = 1 << 64
LAST_SECTOR = TOP - 1


def _request(ctx: Context, machine: Machine, header: bytes, *data: Part, fails: bool = True) -> None:
    """Make a request of this header and these parts: it ends with an error, or it breaks the ring."""
    status = machine.put(bytes([UNWRITTEN]))
    parts: list[Part] = [(machine.put(header), len(header), 0), *data, (status, 1, WRITE)]
    machine.work.driver.add_parts(parts)
    ctx.harmless(machine, machine.work)
    if fails and machine.memory.read(status, 1)[0] == S_OK:
        raise Failure(f"a request that cannot be done ended well: {header.hex()}")
    ctx.recovers(machine)


def _room(machine: Machine, size: int) -> Part:
    return (machine.arena.take(size), size, WRITE)


@clause("hostile", "blk-sector-outside", source="virtio 1.3, 5.2.6.2; CVE-2026-48914", rings=FORMATS, devices=BLK)
def sector_outside(ctx: Context) -> None:
    """Sectors behind the end of the disk, and so far behind that their bytes wrap."""
    machine = prepared(ctx)
    for sector in (1 << 40, (TOP // SECTOR) - 1, TOP // SECTOR, 1 << 63, LAST_SECTOR):
        _request(ctx, machine, request_header(T_IN, sector), _room(machine, SECTOR))
        _request(ctx, machine, request_header(T_OUT, sector), (machine.put(bytes(SECTOR)), SECTOR, 0))


@clause("hostile", "blk-odd-size", source="virtio 1.3, 5.2.6.1: whole sectors", rings=FORMATS, devices=BLK)
def odd_size(ctx: Context) -> None:
    """Reads of bytes that are no whole sectors: the driver's fault, and a device need not mind."""
    machine = prepared(ctx)
    for size in (1, SECTOR - 1, SECTOR + 1):
        _request(ctx, machine, request_header(T_IN), _room(machine, size), fails=False)


@clause("hostile", "blk-type-unknown", source="virtio 1.3, 5.2.6", rings=FORMATS, devices=BLK)
def type_unknown(ctx: Context) -> None:
    """Requests that there are not."""
    machine = prepared(ctx)
    for kind in (2, 3, 99, 0x7FFFFFFF, 0xFFFFFFFF):
        _request(ctx, machine, request_header(kind), _room(machine, SECTOR))
    for kind in (5, 0x80000000):  # a flush, and a barrier before a read, from before virtio 1.0: some know them
        _request(ctx, machine, request_header(kind), _room(machine, SECTOR), fails=False)


@clause("hostile", "blk-header-short", source="CVE-2020-14378; virtio 1.3, 5.2.6", rings=FORMATS, devices=BLK)
def header_short(ctx: Context) -> None:
    """Requests of fewer bytes than a header."""
    machine = prepared(ctx)
    for size in (1, 8, HEADER - 1):
        _request(ctx, machine, request_header(T_IN)[:size], _room(machine, SECTOR))


@clause("hostile", "blk-header-in-pieces", source="CVE-2022-2132's kind; virtio 1.3, 2.7.4", rings=FORMATS, devices=BLK)
def header_in_pieces(ctx: Context) -> None:
    """Headers of sixteen descriptors of a byte."""
    machine = prepared(ctx)
    header = request_header(T_IN)
    pieces: list[Part] = [(machine.put(header[at : at + 1]), 1, 0) for at in range(HEADER)]
    attempt_parts(ctx, machine, [*pieces, _room(machine, SECTOR), _room(machine, 1)])


@clause("hostile", "blk-no-status", source="virtio 1.3, 5.2.6; CVE-2021-45464", rings=FORMATS, devices=BLK)
def no_status(ctx: Context) -> None:
    """Requests without a byte for their status."""
    machine = prepared(ctx)
    header = machine.put(request_header(T_IN))
    attempt_parts(ctx, machine, [(header, HEADER, 0)])
    data = machine.put(request_header(T_OUT) + bytes(SECTOR))
    attempt_parts(ctx, machine, [(data, HEADER, 0), (data + HEADER, SECTOR, 0)])
    attempt_parts(ctx, machine, [(machine.put(request_header(T_FLUSH)), HEADER, 0), (header, 0, WRITE)])


@clause("hostile", "blk-write-of-nothing", source="virtio 1.3, 5.2.6", rings=FORMATS, devices=BLK)
def of_nothing(ctx: Context) -> None:
    """Reads and writes without data, and a flush with some."""
    machine = prepared(ctx)
    _request(ctx, machine, request_header(T_IN), fails=False)
    _request(ctx, machine, request_header(T_OUT), fails=False)
    _request(ctx, machine, request_header(T_FLUSH), _room(machine, SECTOR), fails=False)
    _request(ctx, machine, request_header(T_GET_ID), _room(machine, 1), fails=False)
    _request(ctx, machine, request_header(T_GET_ID), fails=False)


@clause("hostile", "blk-wrong-direction", source="virtio 1.3, 5.2.6; 2.7.4.2", rings=FORMATS, devices=BLK)
def wrong_direction(ctx: Context) -> None:
    """A read into what may only be read, and a write from what may only be written."""
    machine = prepared(ctx)
    _request(ctx, machine, request_header(T_IN), (machine.put(bytes(SECTOR)), SECTOR, 0), fails=False)
    _request(ctx, machine, request_header(T_OUT), _room(machine, SECTOR), fails=False)


@clause(
    "hostile", "blk-ranges-garbage", source="virtio 1.3, 5.2.6.2: discard, write zeroes", rings=FORMATS, devices=BLK
)
def ranges_garbage(ctx: Context) -> None:
    """Ranges to discard and to zero that wrap, that are cut short, or that have flags that there are not."""
    machine = prepared(ctx)
    for kind in (T_DISCARD, T_WRITE_ZEROES):
        for raw in (
            struct.pack("<QII", LAST_SECTOR, 0xFFFFFFFF, 0),
            struct.pack("<QII", 1 << 55, 8, 0),
            struct.pack("<QII", 0, 1, 0xFFFFFFFE),
            bytes(15),
            bytes(17),
        ):
            _request(ctx, machine, request_header(kind), (machine.put(raw), len(raw), 0))


@clause(
    "hostile", "blk-reset-busy", source="CVE-2026-50624; CVE-2026-43248; virtio 1.3, 2.4", rings=FORMATS, devices=BLK
)
def reset_busy(ctx: Context) -> None:
    """Rings stopped with requests on their way: after the answer nothing is written any more."""
    machine = prepared(ctx)
    for _ in range(20):
        for _ in range(16):
            machine.good_chain()
        machine.work.kick()
        machine.stop(machine.work)
        before = machine.memory.snapshot()
        machine.work.notify()
        machine.work.quiet(0.01)
        ctx.unwritten(machine, before)
        ctx.recovers(machine)


@clause("hostile", "rng-large", source="CVE-2026-50624; virtio 1.3, 5.4.6", rings=FORMATS, devices=("rng",))
def rng_large(ctx: Context) -> None:
    """Buffers of a megabyte for random numbers, many at a time."""
    machine = prepared(ctx)
    room = machine.arena.take(1 << 20)
    for _ in range(machine.setup.num):
        machine.work.driver.add_parts([(room, 1 << 20, WRITE)])
    attempt(ctx, machine, [(room, 1 << 20)])


@clause(
    "hostile", "rng-mixed", source="virtio 1.3, 5.4.6.1: buffers to be written alone", rings=FORMATS, devices=("rng",)
)
def rng_mixed(ctx: Context) -> None:
    """Buffers of which the device may write a part only."""
    machine = prepared(ctx)
    attempt_parts(ctx, machine, [(machine.put(bytes(8)), 8, 0), _room(machine, 8)])
    attempt_parts(ctx, machine, [_room(machine, 1)] * 32)
