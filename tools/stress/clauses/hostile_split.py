"""Split rings as an enemy writes them: heads, links and indices. The work ring is hit; it alone may suffer."""

from __future__ import annotations

import os
from collections.abc import Iterable

from vhostmp.tools.stress.clause import Context, clause
from vhostmp.tools.stress.consts import Feature
from vhostmp.tools.stress.hostile import attempt, prepared, writable
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.ring import NEXT
from vhostmp.tools.stress.split import SplitDriver, pack_descriptor
from vhostmp.tools.stress.verdict import Failure

SPLIT = ("split",)
ROUND = 1 << 16
FEW = 40  # fewer than the receive buffers that are posted after a probe


def split(machine: Machine) -> SplitDriver:
    """Return the work ring's driver."""
    driver = machine.work.driver
    assert isinstance(driver, SplitDriver)
    return driver


def _linked(ctx: Context, machine: Machine, links: Iterable[int]) -> None:
    """Publish a chain of descriptors that each go on at the next of `links`, whatever follows from it."""
    addr, length, flags = machine.good_parts()[0]
    links = list(links)
    head = split(machine).add_parts([(addr, length, flags)] * len(links))
    for slot, following in zip(split(machine).in_flight[head].slots, links, strict=True):
        split(machine).write_descriptor(slot, pack_descriptor(addr, length, flags | NEXT, following))
    attempt(ctx, machine, writable([(addr, length, flags)]))


@clause("hostile", "ring-next-loop", source="CVE-2019-9547; virtio 1.3, 2.7.5.2", rings=SPLIT)
def next_loop(ctx: Context) -> None:
    """Chains that run in a circle: of one descriptor, of two, and of all."""
    machine = prepared(ctx)
    for count in (1, 2, machine.setup.num):
        machine.reset()
        machine.probe()
        slots = list(split(machine).free)[:count]
        _linked(ctx, machine, [*slots[1:], slots[0]])


@clause("hostile", "ring-next-outside", source="CVE-2021-29631; CVE-2021-45464; virtio 1.3, 2.7.5.2", rings=SPLIT)
def next_outside(ctx: Context) -> None:
    """A descriptor whose next one is not in the table."""
    machine = prepared(ctx)
    for following in (machine.setup.num, 0x7FFF, 0xFFFF):
        _linked(ctx, machine, [following])


@clause("hostile", "ring-head-outside", source="SPDK; CVE-2021-45464; libvhost-user 758ef96a2d", rings=SPLIT)
def head_outside(ctx: Context) -> None:
    """An available ring that names a descriptor which is not in the table."""
    machine = prepared(ctx)
    for head in (machine.setup.num, 0x7FFF, 0x8000, 0xFFFF):
        split(machine).offer(head)
        attempt(ctx, machine)


@clause("hostile", "ring-avail-jump", source="virtio 1.3, 2.7.13.3.1; DPDK virtio_net.c does not check", rings=SPLIT)
def avail_jump(ctx: Context) -> None:
    """An available index further ahead than the ring has entries."""
    machine = prepared(ctx)
    for ahead in (machine.setup.num + 1, 2 * machine.setup.num, 0x8000):
        _moved(ctx, machine, ahead)


@clause("hostile", "ring-avail-backwards", source="virtio 1.3, 2.7.6", rings=SPLIT)
def avail_backwards(ctx: Context) -> None:
    """An available index that goes back."""
    machine = prepared(ctx)
    for back in (1, machine.setup.num, 8):
        _moved(ctx, machine, -back)


def _moved(ctx: Context, machine: Machine, by: int) -> None:
    """Move the available index over entries that were never written: what comes back may be any chain, or none."""
    driver = split(machine)
    driver.avail_idx = (driver.avail_idx + by) % ROUND
    attempt(ctx, machine, _everything_named(machine), books=False)


def _everything_named(machine: Machine) -> list[tuple[int, int]]:
    """Return where the descriptors in the table point to, whoever wrote them, and when."""
    driver = split(machine)
    table = bytes(driver.buf[driver.layout.desc : driver.layout.avail])
    return [
        (int.from_bytes(table[at : at + 8], "little"), int.from_bytes(table[at + 8 : at + 12], "little"))
        for at in range(0, 16 * driver.num, 16)
    ]


@clause("hostile", "ring-head-twice", source="cloud-hypervisor CVE-2026-45782", rings=SPLIT)
def head_twice(ctx: Context) -> None:
    """The same chain made available twice at once: done one after the other, or refused; never more used than that."""
    machine = prepared(ctx)
    driver = split(machine)
    start, head = driver.used_idx, driver.add_parts(machine.good_parts())
    driver.offer(head)
    given = machine.given()
    ctx.harmless(machine, machine.work, writable=given, books=False)
    used = (driver.used_idx - start) % ROUND
    if used > 2:  # noqa: PLR2004
        raise Failure(f"two chains were made available, and {used} came back")
    ctx.recovers(machine)


@clause("hostile", "ring-head-again-and-again", source="CVE-2016-5403", rings=SPLIT)
def head_for_ever(ctx: Context) -> None:
    """One chain published 5,000 times without a look at what comes back: the device bounds what it has in flight."""
    machine = prepared(ctx)
    driver, ring = split(machine), machine.work
    head = driver.add_parts(machine.good_parts())
    for count in range(5000):
        driver.offer(head)
        driver.publish()
        if count % 50 == 0:
            ring.notify()
    attempt(ctx, machine, books=False)


@clause("hostile", "ring-used-event-any", source="virtio 1.3, 2.7.7, 2.7.10", rings=SPLIT)
def used_event_any(ctx: Context) -> None:
    """Any numbers as used_event: only interrupts depend on it, chains come back."""
    ctx.need(Feature.EVENT_IDX)
    machine = prepared(ctx)
    for _ in range(4):
        driver = split(machine)
        for _ in range(FEW):
            machine.good_chain()
            driver.set_used_event(ctx.rng.randrange(ROUND))
            driver.publish()
            machine.work.notify()
            if machine.work.quiet(machine.work.patience):
                raise Failure("a chain did not come back")
            machine.give(driver.reap())
        driver.want_interrupts()
        ctx.recovers(machine)


@clause("hostile", "ring-avail-flags-any", source="virtio 1.3, 2.7.6", rings=SPLIT)
def avail_flags_any(ctx: Context) -> None:
    """Any numbers as the available ring's flags: chains come back."""
    machine = prepared(ctx)
    driver = split(machine)
    for flags in (0xFFFF, 0xFFFE, 2, 0x8001):
        machine.good_chain()
        driver.set_avail_flags(flags)
        driver.publish()
        machine.work.notify()
        if machine.work.quiet(machine.work.patience):
            raise Failure(f"a chain did not come back, with flags {flags:#x} in the available ring")
        machine.give(driver.reap())
    driver.set_avail_flags(0)
    ctx.recovers(machine)


@clause("hostile", "ring-used-overwritten", source="CVE-2024-3446; virtio 1.3, 2.7.8", rings=SPLIT)
def used_overwritten(ctx: Context) -> None:
    """The driver overwrites the used ring: a device keeps its own books, and does not read them back."""
    machine = prepared(ctx)
    for _ in range(4):
        driver = split(machine)
        used = driver.layout.used
        machine.good_chain()
        driver.buf[used : driver.layout.end] = ctx.rng.randbytes(driver.layout.end - used)
        attempt(ctx, machine, books=False)


@clause("hostile", "ring-kicks-without-work", source="virtio 1.3, 2.7.13.4; CVE-2026-74356", rings=SPLIT)
def kicks_without_work(ctx: Context) -> None:
    """Ten thousand kicks of a ring in which there is nothing, and of one that is broken."""
    machine = prepared(ctx)
    for _ in range(2):
        for _ in range(10_000):
            os.eventfd_write(machine.work.kick_fd, 1)
        split(machine).offer(0xFFFF)
        split(machine).publish()
    ctx.recovers(machine)
