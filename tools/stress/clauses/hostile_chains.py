"""Chains of descriptors as an enemy writes them, of either format. The work ring is hit; it alone may suffer."""

from __future__ import annotations

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.hostile import (
    FAR,
    HOLE,
    Corrupt,
    attempt,
    attempt_each,
    attempt_parts,
    enlarged,
    prepared,
    writable,
)
from vhostmp.tools.stress.machine import BUFFERS_GPA, Machine
from vhostmp.tools.stress.ring import NEXT, WRITE, Part

TOP = 1 << 64
GAP = 0x10000
LONGEST = 4  # parts of an ordinary request, at most


def _end(machine: Machine) -> int:
    return machine.memory.region_of(BUFFERS_GPA).end


@clause("hostile", "desc-len-max", source="CVE-2016-7422; kvmtool CVE-2021-45464; virtio 1.3, 2.7.4", rings=FORMATS)
def len_max(ctx: Context) -> None:
    """A length of 2^32 - 1."""
    attempt_each(ctx, lambda part: (part[0], 0xFFFFFFFF, part[2]))


@clause("hostile", "desc-len-sum", source="CVE-2020-14378; virtio 1.3, 2.7.4 (2^32 bytes at most)", rings=FORMATS)
def len_sum(ctx: Context) -> None:
    """Lengths whose sum passes 2^32, and is small again in 32 bits."""
    machine = prepared(ctx)
    for flags in (0, WRITE):
        room = machine.put(bytes(64))
        half: Part = (room, 1 << 31, flags)
        attempt_parts(ctx, machine, [half, half, (room, 64, flags)])


@clause("hostile", "desc-addr-wraps", source="CVE-2018-1059; CVE-2023-41051", rings=FORMATS)
def addr_wraps(ctx: Context) -> None:
    """An address so high that address and length wrap at 2^64."""
    machine = prepared(ctx)
    attempt_each(ctx, lambda part: (TOP - 1, 2, part[2]), machine=machine)
    attempt_each(ctx, lambda part: (TOP - 0x1000, 0x1000 + BUFFERS_GPA & 0xFFFFFFFF, part[2]), machine=machine)


@clause("hostile", "desc-past-region", source="CVE-2018-1059; CVE-2020-14376", rings=FORMATS)
def past_region(ctx: Context) -> None:
    """A buffer that begins on the last byte of a region and is 64 KiB long."""
    machine = prepared(ctx)
    attempt_each(ctx, lambda part: (_end(machine) - 1, 0x10000, part[2]), machine=machine)


@clause("hostile", "desc-one-byte-past-region", source="CVE-2020-14377; CVE-2023-41051", rings=FORMATS)
def one_past(ctx: Context) -> None:
    """A buffer that ends one byte behind a region."""
    machine = prepared(ctx)
    attempt_each(ctx, lambda part: (_end(machine) - part[1] + 1, part[1], part[2]), machine=machine)


@clause("hostile", "desc-in-hole", source="CVE-2021-3748; virtio 1.3, 2.7.5", rings=FORMATS)
def in_hole(ctx: Context) -> None:
    """A buffer where there is no memory."""
    attempt_each(ctx, lambda part: (HOLE, part[1], part[2]))


@clause("hostile", "desc-at-zero", source="virtio 1.3, 2.7.5", rings=FORMATS)
def at_zero(ctx: Context) -> None:
    """A buffer at address 0, where there is no memory."""
    attempt_each(ctx, lambda part: (0, part[1], part[2]))


@clause("hostile", "desc-at-userspace-address", source="vhost-user, memory regions: descriptors are guest-physical")
def at_userspace_address(ctx: Context) -> None:
    """A descriptor with the front-end's own address, where a guest-physical one belongs."""
    machine = prepared(ctx)
    attempt_each(ctx, lambda part: (machine.memory.uva(part[0]), part[1], part[2]), machine=machine)


@clause("hostile", "desc-across-gap", source="CVE-2013-0311", rings=FORMATS)
def across_gap(ctx: Context) -> None:
    """A buffer that begins in one region and ends in another, with a hole between."""
    machine = enlarged(ctx, (FAR, GAP), (FAR + 2 * GAP, GAP))
    attempt_each(ctx, lambda part: (FAR + GAP - 64, GAP + 128, part[2]), machine=machine)


@clause("hostile", "desc-zero-length-only", source="CVE-2016-6490; CVE-2020-10725", rings=FORMATS)
def zero_only(ctx: Context) -> None:
    """A chain of one descriptor of no bytes."""
    machine = prepared(ctx)
    for flags in (0, WRITE):
        attempt_parts(ctx, machine, [(machine.put(bytes(1)), 0, flags)])


@clause("hostile", "desc-zero-length-all", source="CVE-2023-5158; CVE-2019-14835", rings=FORMATS)
def zero_all(ctx: Context) -> None:
    """A chain as long as the ring, of descriptors of no bytes."""
    machine = prepared(ctx)
    for flags in (0, WRITE):
        attempt_parts(ctx, machine, [(machine.put(bytes(1)), 0, flags)] * machine.setup.num)


@clause("hostile", "desc-zero-length-first", source="CVE-2023-5158; CVE-2016-6490", rings=FORMATS)
def zero_first(ctx: Context) -> None:
    """A request behind a descriptor of no bytes."""
    machine = prepared(ctx)
    parts = machine.good_parts()
    attempt_parts(ctx, machine, [(machine.put(bytes(1)), 0, parts[0][2]), *parts])


@clause("hostile", "desc-zero-length-last", source="CVE-2023-5158; CVE-2016-6490", rings=FORMATS)
def zero_last(ctx: Context) -> None:
    """A request before a descriptor of no bytes."""
    machine = prepared(ctx)
    parts = machine.good_parts()
    attempt_parts(ctx, machine, [*parts, (machine.put(bytes(1)), 0, parts[-1][2])])


@clause("hostile", "desc-zero-length-in-hole", source="CVE-2020-10725; CVE-2016-6490", rings=FORMATS)
def zero_in_hole(ctx: Context) -> None:
    """No bytes, where there is no memory."""
    attempt_each(ctx, lambda part: (HOLE, 0, part[2]))


@clause("hostile", "desc-readable-after-writable", source="virtio 1.3, 2.7.4.2", rings=FORMATS)
def readable_after_writable(ctx: Context) -> None:
    """What the device reads behind what it writes."""
    machine = prepared(ctx)
    for _ in range(2):
        attempt_parts(ctx, machine, [(machine.arena.take(64), 64, WRITE), *machine.good_parts()[:1]])
        parts = machine.good_parts()
        attempt_parts(ctx, machine, [(machine.arena.take(16), 16, WRITE), *parts, (machine.put(bytes(64)), 64, 0)])


@clause("hostile", "desc-wrong-direction", source="virtio 1.3, 2.7.5, 5.1.6, 5.2.6", rings=FORMATS)
def wrong_direction(ctx: Context) -> None:
    """A request with the direction of each part turned round."""
    machine = prepared(ctx)
    attempt_each(ctx, lambda part: (part[0], part[1], part[2] ^ WRITE), machine=machine)
    parts = [(addr, length, flags ^ WRITE) for addr, length, flags in machine.good_parts()]
    attempt_parts(ctx, machine, parts)


@clause("hostile", "desc-reserved-flags", source="virtio 1.3, 2.7.5 and 2.8.1", rings=FORMATS)
def reserved_flags(ctx: Context) -> None:
    """Flags that nobody has given a meaning."""
    attempt_each(ctx, lambda part: (part[0], part[1], part[2] | 0x7F78))


@clause("hostile", "desc-next-on-last", source="virtio 1.3, 2.7.5 and 2.8.6; CVE-2026-16457", rings=FORMATS)
def next_on_last(ctx: Context) -> None:
    """A chain whose last descriptor says that it goes on."""
    machine = prepared(ctx)
    parts = machine.good_parts()
    parts[-1] = (parts[-1][0], parts[-1][1], parts[-1][2] | NEXT)
    machine.work.driver.add_parts(parts)
    attempt(ctx, machine, writable(parts), books=False)  # what lies behind it has a buffer id of its own


@clause("hostile", "desc-at-ring", source="CVE-2024-3446: data that are the device's own ring", rings=FORMATS)
def at_ring(ctx: Context) -> None:
    """Buffers that lie on the ring's own descriptors, and on the parts behind them."""
    machine = prepared(ctx)
    for gpa in (machine.work.driver.desc_gpa, machine.work.driver.avail_gpa, machine.work.driver.used_gpa):
        parts = [(gpa, length, flags) for _, length, flags in machine.good_parts()]
        machine.work.driver.add_parts(parts)
        attempt(ctx, machine, [(machine.work.region.gpa, machine.work.region.size)], books=False)


@clause("hostile", "desc-many-bad", source="virtio 1.3, 2.7.4; CVE-2016-5403", rings=FORMATS)
def many_bad(ctx: Context) -> None:
    """A ring full of chains, each bad in another way."""
    machine = prepared(ctx)
    kinds: tuple[Corrupt, ...] = (
        lambda part: (HOLE, part[1], part[2]),
        lambda part: (part[0], 0xFFFFFFFF, part[2]),
        lambda part: (part[0], 0, part[2]),
        lambda part: (TOP - 1, part[1], part[2] ^ WRITE),
    )
    allowed: list[tuple[int, int]] = []
    while len(machine.work.driver.free) >= LONGEST:
        parts = [ctx.rng.choice(kinds)(part) for part in machine.good_parts()]
        machine.work.driver.add_parts(parts)
        allowed += writable(parts)
    attempt(ctx, machine, allowed)


@clause("hostile", "desc-bad-amid-good", source="CVE-2014-0055; CVE-2022-26353", rings=FORMATS)
def bad_amid_good(ctx: Context) -> None:
    """A bad chain between good ones: what comes back is whole, each chain at most once."""
    machine = prepared(ctx)
    allowed: list[tuple[int, int]] = []
    for bad in (False, False, False, True, False, False, False):
        parts = machine.good_parts()
        if bad:
            parts[0] = (HOLE, parts[0][1], parts[0][2])
        machine.work.driver.add_parts(parts)
        allowed += writable(parts)
    attempt(ctx, machine, allowed)
