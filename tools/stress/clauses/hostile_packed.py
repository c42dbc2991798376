"""Packed rings as an enemy writes them: flags, ids and event suppression. The work ring is hit; it alone may suffer."""

from __future__ import annotations

from vhostmp.tools.stress.clause import Context, clause
from vhostmp.tools.stress.hostile import HOLE, attempt, prepared
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.packed import AVAIL, DESC, USED, WRAP, PackedDriver, pack_packed
from vhostmp.tools.stress.ring import DESC_BYTES, INDIRECT, NEXT, WRITE
from vhostmp.tools.stress.verdict import Failure

PACKED = ("packed",)


def packed(machine: Machine) -> PackedDriver:
    """Return the work ring's driver."""
    driver = machine.work.driver
    assert isinstance(driver, PackedDriver)
    return driver


def _filled(ctx: Context, machine: Machine, flags: int, *, buffer_id: int | None = None, more: int = 0) -> None:
    """Fill the ring with descriptors of these flags, from the next one on: it breaks at the most.

    AVAIL or USED, which makes each available, is added; unless `more` is given instead, and as it is.
    """
    driver = packed(machine)
    addr, length, _ = machine.good_parts()[0]
    start = driver.avail_idx & ~WRAP
    wrap = bool(driver.avail_idx & WRAP)
    for place in range(driver.num):
        at = (start + place) % driver.num
        here = wrap if at >= start else not wrap
        available = more or (AVAIL if here else USED)
        raw = pack_packed(addr, length, place if buffer_id is None else buffer_id, flags | available)
        driver.write_descriptor(at, raw)
    attempt(ctx, machine, [(addr, length)] if flags & WRITE else [], books=False)


@clause("hostile", "packed-all-next", source="CVE-2026-16457; virtio 1.3, 2.8.6", rings=PACKED)
def all_next(ctx: Context) -> None:
    """A ring of descriptors that each have NEXT: a chain without an end."""
    machine = prepared(ctx)
    for flags in (NEXT, NEXT | WRITE):
        _filled(ctx, machine, flags)


@clause("hostile", "packed-flags-both", source="CVE-2026-16457; virtio 1.3, 2.8.1", rings=PACKED)
def flags_both(ctx: Context) -> None:
    """Descriptors with AVAIL and USED both set, or neither, wherever the wrap counter is."""
    machine = prepared(ctx)
    for flags in (AVAIL | USED, 1 << 3):
        _filled(ctx, machine, 0, more=flags)


@clause("hostile", "packed-wrap-flipped", source="virtio 1.3, 2.8.1", rings=PACKED)
def wrap_flipped(ctx: Context) -> None:
    """A ring that is available by both wrap counters in turn."""
    machine = prepared(ctx)
    for flags in (USED, AVAIL):
        _filled(ctx, machine, 0, more=flags)


@clause("hostile", "packed-all-indirect", source="virtio 1.3, 2.8.7, 2.8.19", rings=PACKED)
def all_indirect(ctx: Context) -> None:
    """A ring of descriptors with INDIRECT and NEXT."""
    machine = prepared(ctx)
    for flags in (INDIRECT | NEXT, INDIRECT | NEXT | WRITE):
        _filled(ctx, machine, flags)


@clause("hostile", "packed-id-outside", source="virtio 1.3, 2.8.5; SPDK", rings=PACKED)
def id_outside(ctx: Context) -> None:
    """Buffer ids that are not below the ring's size: refused, or returned as they are."""
    machine = prepared(ctx)
    for buffer_id in (machine.setup.num, 0x7FFF, 0xFFFF):
        _filled(ctx, machine, 0, buffer_id=buffer_id)


@clause("hostile", "packed-id-twice", source="cloud-hypervisor CVE-2026-45782, as packed rings have it", rings=PACKED)
def id_twice(ctx: Context) -> None:
    """A ring full of chains of the same id."""
    machine = prepared(ctx)
    _filled(ctx, machine, 0, buffer_id=0)


@clause("hostile", "packed-batch-bad", source="CVE-2020-10725", rings=PACKED)
def batch_bad(ctx: Context) -> None:
    """Descriptors as a device takes four at a time: addresses that are none, and lengths of 0, in each place."""
    machine = prepared(ctx)
    for place in range(4):
        for bad in ((HOLE, 64), (0xDEADBEEFDEADBEEF, 64), (0, 0)):
            machine.reset()
            machine.probe()
            while packed(machine).avail_idx % 4:
                machine.good_chain()
            machine.work.kick()
            machine.work.quiet(0.01)
            for number in range(4):
                addr, length, flags = machine.good_parts()[0]
                machine.work.driver.add_parts([(*bad, flags) if number == place else (addr, length, flags)])
            ctx.harmless(machine, machine.work)
    ctx.recovers(machine)


@clause("hostile", "packed-event-reserved", source="virtio 1.3, 2.8.10: RING_EVENT_FLAGS 3 is reserved", rings=PACKED)
def event_reserved(ctx: Context) -> None:
    """Event suppression with the reserved flags, and with an offset that is not in the ring: chains come back."""
    machine = prepared(ctx)
    num = machine.setup.num
    for position, flags in ((0, 3), (0xFFFF, 3), (num, DESC), (0x7FFF, DESC), (0xFFFF, 0xFFFF), (num | WRAP, DESC)):
        machine.good_chain()
        packed(machine).set_driver_event(position, flags)
        machine.work.driver.publish()
        machine.work.notify()
        if machine.work.quiet(machine.work.patience):
            raise Failure(f"a chain did not come back, with event suppression {position:#x}, {flags:#x}")
        machine.give(machine.work.driver.reap())
    packed(machine).want_interrupts()
    ctx.recovers(machine)


@clause("hostile", "packed-unfinished-chain", source="virtio 1.3, 2.8.6, 2.8.21", rings=PACKED)
def unfinished(ctx: Context) -> None:
    """A chain whose first descriptors are available and whose last one is not: waited for, or refused, not used."""
    machine = prepared(ctx)
    driver = packed(machine)
    addr, length, flags = machine.good_parts()[0]
    start, wrap = driver.avail_idx & ~WRAP, bool(driver.avail_idx & WRAP)
    available = AVAIL if wrap else USED
    for place in (1, 0):
        driver.write_descriptor(start + place, pack_packed(addr, length, 0, flags | NEXT | available))
    attempt(ctx, machine, [(addr, length)], books=False)


@clause("hostile", "packed-garbage", source="virtio 1.3, 2.8; CVE-2026-16457", rings=PACKED)
def garbage(ctx: Context) -> None:
    """Rings of random bytes."""
    machine = prepared(ctx)
    for _ in range(8):
        driver = packed(machine)
        size = DESC_BYTES * driver.num
        table = bytearray(ctx.rng.randbytes(size))
        for at in range(0, size, DESC_BYTES):
            table[at + 4 : at + 8] = b"\xff\xff\xff\xff"  # the address is nobody's memory
        driver.buf[driver.layout.desc : driver.layout.desc + size] = bytes(table)
        attempt(ctx, machine, books=False)
