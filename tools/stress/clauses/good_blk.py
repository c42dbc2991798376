"""What a careful driver asks of a disk."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from vhostmp.tools.stress.blk import ID_BYTES, SECTOR, T_FLUSH, T_GET_ID, T_IN, T_OUT, BlkMachine
from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.clauses.good_messages import read_config
from vhostmp.tools.stress.consts import ProtocolFeature, bits, has
from vhostmp.tools.stress.verdict import Failure, NotApplicable

T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13
RANGE: Final = struct.Struct("<QII")  # struct virtio_blk_discard_write_zeroes
AREA: Final = 128
"""Sectors that the clauses write to, from the first one on."""
BLK: Final = ("blk",)


class BlkFeature(IntEnum):
    """Feature bits of a disk. Source: virtio 1.3, 5.2.3."""

    RO = 5
    FLUSH = 9
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14


def disk(ctx: Context, *needed: BlkFeature, writable: bool = True, rings: int = 1) -> BlkMachine:
    """Return a machine with a disk with these features. NotApplicable when it has them not, or is read-only."""
    if writable and has(ctx.facts.features, BlkFeature.RO):
        raise NotApplicable("the disk is read-only")
    for one in needed:
        if not has(ctx.facts.features, one):
            raise NotApplicable(f"VIRTIO_BLK_F_{one.name} is not offered")
    return ctx.blk(ctx.setup(features=ctx.features() | bits(*needed), rings=rings))


@clause("good", "blk-write-read", source="virtio 1.3, 5.2.6", rings=FORMATS, devices=BLK)
def write_read(ctx: Context) -> None:
    """What was written is read back, in requests of one sector and of many."""
    machine = disk(ctx)
    for count in (1, 2, 8, 64, AREA):
        data = ctx.rng.randbytes(count * SECTOR)
        first = ctx.rng.randrange(AREA - count + 1)
        machine.request(T_OUT, first, data=data)
        if machine.request(T_IN, first, size=len(data)) != data:
            raise Failure(f"{count} sectors from {first} on are not what was written")


@clause("good", "blk-sectors", source="virtio 1.3, 5.2.6: sectors of 512 bytes", rings=FORMATS, devices=BLK)
def sectors(ctx: Context) -> None:
    """Sectors written one by one in random order are read as a whole, and the other way round."""
    machine = disk(ctx)
    wanted = [ctx.rng.randbytes(SECTOR) for _ in range(AREA)]
    for at in ctx.rng.sample(range(AREA), AREA):
        machine.request(T_OUT, at, data=wanted[at])
    if machine.request(T_IN, 0, size=AREA * SECTOR) != b"".join(wanted):
        raise Failure("the whole is not what was written sector by sector")
    for at in ctx.rng.sample(range(AREA), 16):
        if machine.request(T_IN, at, size=SECTOR) != wanted[at]:
            raise Failure(f"sector {at} is not what was written")


@clause("good", "blk-many-at-once", source="virtio 1.3, 5.2.6", rings=FORMATS, devices=BLK)
def at_once(ctx: Context) -> None:
    """A ring full of writes, then a ring full of reads of the same sectors."""
    machine = disk(ctx)
    ring = machine.rings[0]
    many = ring.layout.num // 3
    wanted = {at: ctx.rng.randbytes(SECTOR) for at in ctx.rng.sample(range(AREA), many)}
    done = [machine.add_request(ring, T_OUT, at, data=data) for at, data in wanted.items()]
    finish(machine, done)
    done = [machine.add_request(ring, T_IN, at, size=SECTOR) for at in wanted]
    finish(machine, done)
    for at, status in zip(wanted, done, strict=True):
        if machine.memory.read(status - SECTOR, SECTOR) != wanted[at]:
            raise Failure(f"sector {at} is not what was written")


def finish(machine: BlkMachine, statuses: list[int]) -> None:
    """Have the requests of the first ring done. Failure when one does not end well."""
    ring = machine.rings[0]
    ring.kick()
    ring.take(len(statuses))
    bad = [code for at in statuses if (code := machine.memory.read(at, 1)[0])]
    if bad:
        raise Failure(f"{len(bad)} of {len(statuses)} requests ended with a status like {bad[0]}")


@clause("good", "blk-flush", source="virtio 1.3, 5.2.6.2: VIRTIO_BLK_T_FLUSH", rings=FORMATS, devices=BLK)
def flush(ctx: Context) -> None:
    """Writes are flushed."""
    machine = disk(ctx, BlkFeature.FLUSH)
    for at in range(8):
        machine.request(T_OUT, at, data=ctx.rng.randbytes(SECTOR))
        machine.request(T_FLUSH)


@clause("good", "blk-get-id", source="virtio 1.3, 5.2.6: VIRTIO_BLK_T_GET_ID, 20 bytes", rings=FORMATS, devices=BLK)
def get_id(ctx: Context) -> None:
    """The disk says its name, the same each time."""
    machine = disk(ctx, writable=False)
    names = {machine.request(T_GET_ID, size=ID_BYTES) for _ in range(3)}
    if len(names) > 1:
        raise Failure(f"the disk has {len(names)} names")


@clause("good", "blk-discard", source="virtio 1.3, 5.2.6: VIRTIO_BLK_T_DISCARD", rings=FORMATS, devices=BLK)
def discard(ctx: Context) -> None:
    """Sectors are discarded; those beside them stay, and it can be written there again."""
    machine = disk(ctx, BlkFeature.DISCARD)
    data = ctx.rng.randbytes(AREA * SECTOR)
    machine.request(T_OUT, 0, data=data)
    machine.request(T_DISCARD, data=RANGE.pack(32, 64, 0))
    if machine.request(T_IN, 0, size=32 * SECTOR) != data[: 32 * SECTOR]:
        raise Failure("sectors before those that were discarded have changed")
    if machine.request(T_IN, 96, size=32 * SECTOR) != data[96 * SECTOR :]:
        raise Failure("sectors behind those that were discarded have changed")
    machine.request(T_OUT, 32, data=data[: 64 * SECTOR])
    if machine.request(T_IN, 32, size=64 * SECTOR) != data[: 64 * SECTOR]:
        raise Failure("discarded sectors do not hold what was written to them")


@clause("good", "blk-write-zeroes", source="virtio 1.3, 5.2.6: VIRTIO_BLK_T_WRITE_ZEROES", rings=FORMATS, devices=BLK)
def write_zeroes(ctx: Context) -> None:
    """Ranges of sectors become zeroes, with and without leave to unmap them; those beside them stay."""
    machine = disk(ctx, BlkFeature.WRITE_ZEROES)
    for flags in (0, 1):
        data = ctx.rng.randbytes(AREA * SECTOR)
        machine.request(T_OUT, 0, data=data)
        machine.request(T_WRITE_ZEROES, data=RANGE.pack(10, 7, flags))
        wanted = data[: 10 * SECTOR] + bytes(7 * SECTOR) + data[17 * SECTOR :]
        if machine.request(T_IN, 0, size=AREA * SECTOR) != wanted:
            raise Failure("other sectors than those asked for are zero, or not all of them")


@clause("good", "blk-capacity", source="virtio 1.3, 5.2.4: capacity", devices=BLK)
def capacity(ctx: Context) -> None:
    """The last sector of the capacity that the configuration space tells can be read."""
    ctx.need_protocol(ProtocolFeature.CONFIG)
    machine = disk(ctx, writable=False)
    (count,) = struct.unpack("<Q", read_config(machine.link, 0, 8))
    if not count:
        raise Failure("the capacity is 0")
    machine.request(T_IN, count - 1, size=SECTOR)


@clause("good", "blk-queues", source="virtio 1.3, 5.2.2; Multiple queue support", rings=FORMATS, devices=BLK)
def queues(ctx: Context) -> None:
    """What one queue writes the others read."""
    machine = disk(ctx, BlkFeature.MQ, rings=min(ctx.facts.queues, 8))
    for ring in machine.rings:
        data = ctx.rng.randbytes(SECTOR)
        machine.request(T_OUT, ring.index, data=data, ring=ring.index)
        for other in machine.rings:
            if machine.request(T_IN, ring.index, size=SECTOR, ring=other.index) != data:
                raise Failure(f"queue {other.index} reads something else than queue {ring.index} wrote")
