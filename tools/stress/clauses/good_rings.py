"""Virtqueues as a careful driver uses them: of every size, full, wrapped, polled, in order, indirect."""

from __future__ import annotations

import time
from typing import Final

import attrs

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature, Request
from vhostmp.tools.stress.frontend import vring
from vhostmp.tools.stress.link import REJECTED
from vhostmp.tools.stress.machine import Machine, Ring
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.verdict import Failure

MANDATORY: Final = 256  # what QEMU gives rings unless told
LARGEST: Final = 32768
ODD: Final = (3, 5, 7, 31, 100, 255, 1000, 32767)
MANY: Final = 70_000


def accepted(ctx: Context, num: int) -> bool:
    """Whether the back-end takes rings of `num` entries; it is asked on a connection of its own."""
    with ctx.machine(ctx.setup(num=2), start=False) as machine:
        return machine.link.try_(Request.SET_VRING_NUM, vring(0, num)) not in REJECTED


def sized(ctx: Context, num: int, rounds: int = 1) -> None:
    """Have rings of `num` entries do so much that they go round, if they are small."""
    with ctx.machine(ctx.setup(num=num)) as machine:
        try:
            machine.traffic(min(3 * num, 200) * rounds)
        except Failure as failure:
            raise Failure(f"rings of {num} entries: {failure}") from None


@clause("good", "ring-sizes", source="virtio 1.3, 2.7 (a power of two, 32768 at most) and 2.8.10.1", rings=FORMATS)
def sizes(ctx: Context) -> None:
    """Rings of every power of two that is accepted, which are at least those from 2 to 256."""
    for shift in range(1, 16):
        num = 1 << shift
        if num <= MANDATORY or accepted(ctx, num):
            sized(ctx, num)


@clause("good", "ring-sizes-odd", source="virtio 1.3, 2.8.10.1: a packed ring has any size", rings=("packed",))
def odd_sizes(ctx: Context) -> None:
    """Packed rings of sizes that are no power of two."""
    for num in ODD:
        if num <= MANDATORY or accepted(ctx, num):
            sized(ctx, num)


@clause(
    "good", "ring-sizes-differ", source="virtio 1.3, 5.1.2: each ring has its own size", rings=FORMATS, devices=("net",)
)
def differing_sizes(ctx: Context) -> None:
    """A pair whose rings have different sizes."""
    for num in (64, 8):
        with ctx.net(ctx.setup(num=64), start=False) as machine:
            machine.resize(machine.rx(), num)
            machine.resize(machine.tx(), 72 - num)
            machine.start_all().traffic(100)


@clause(
    "good", "ring-resized", source="vhost-user, VHOST_USER_SET_VRING_NUM; GET_VRING_BASE stops a ring", rings=FORMATS
)
def resized(ctx: Context) -> None:
    """Rings are stopped, given another size, and started again."""
    machine = ctx.machine(ctx.setup(num=64))
    for num in (16, 64, 4, 32):
        machine.traffic()
        for ring in machine.rings:
            machine.stop(ring)
            machine.resize(ring, num)
        machine.start_all()
    machine.traffic()


@clause("good", "wrap-at-65536", source="virtio 1.3, 2.7.13.3: indices are free-running", rings=("split",))
def wrap(ctx: Context) -> None:
    """Indices pass 65,536 from bases before it, and every other byte's boundary."""
    for base in (65535, 65520, 65472, 32760, 255):
        with ctx.machine(ctx.setup(base=base)) as machine:
            machine.traffic(80)


@clause("good", "wrap-counters", source="virtio 1.3, 2.8.1", rings=("packed",))
def wrap_counters(ctx: Context) -> None:
    """Wrap counters turn many times, from every place in a short ring."""
    for num in (2, 3, 5, 8):
        for base in range(num):
            with ctx.machine(ctx.setup(num=num, base=base)) as machine:
                machine.traffic(6 * num)


@clause("good", "long-run", source="virtio 1.3, 2.7.13.3 and 2.8.1", rings=FORMATS, seconds=60)
def long_run(ctx: Context) -> None:
    """70,000 chains through one ring: each comes back once."""
    machine = ctx.machine(ctx.setup(num=256))
    ring = machine.work
    room = 256 // machine.good_width
    machine.good_chain()
    (pattern,) = ring.driver.in_flight.values()
    machine.go()
    done = len(ring.take(1))
    while done < MANY:
        for _ in range(room):
            ring.driver.add(pattern.readable, pattern.writable)
        ring.kick()
        while ring.driver.in_flight:
            done += _come_back(machine, ring)
    ring.driver.check_idle()


def _come_back(machine: Machine, ring: Ring) -> int:
    """Wait until chains came back, and return how many.

    Frames may wait to be sent until there is room for what comes back, which may come when those before them are back.
    """
    until = time.monotonic() + ring.patience
    while isinstance(machine, NetMachine) and machine.echoes and time.monotonic() < until:
        machine.discard()
        if found := ring.take(0):
            return len(found)
        time.sleep(0.0005)
    return len(ring.take())


@clause("good", "ring-full", source="virtio 1.3, 2.7.6", rings=FORMATS)
def full(ctx: Context) -> None:
    """Every entry of a ring is made available at once, again and again."""
    machine = ctx.machine(ctx.setup(num=32))
    for _ in range(20):
        machine.offer(32 // machine.good_width)
        machine.go()
        machine.collect()


@clause("good", "ring-full-before-start", source="vhost-user, Ring states; virtio 1.3, 3.1.1", rings=FORMATS)
def full_before_start(ctx: Context) -> None:
    """Rings that are filled, and kicked, before the device learns of them."""
    machine = ctx.machine(ctx.setup(num=32), start=False)
    machine.offer(32 // machine.good_width)
    machine.go()
    machine.start_all().collect()
    machine.traffic()


@clause("good", "polling", source="vhost-user, VHOST_USER_SET_VRING_CALL: bit 8, no descriptor", rings=FORMATS)
def polling(ctx: Context) -> None:
    """No call eventfd: the driver polls."""
    ctx.machine(ctx.setup(call=False)).traffic(100)


@clause("good", "one-at-a-time", source="virtio 1.3, 2.7.7 and 2.7.10, 2.8.10", rings=FORMATS)
def one_at_a_time(ctx: Context) -> None:
    """Every request is waited for, by its interrupt, before the next: with and without the event index, over a wrap."""
    for without in ([], [Feature.EVENT_IDX]):
        base = 0 if ctx.packed else (1 << 16) - 40
        machine = ctx.machine(ctx.setup(features=ctx.features(without=without), base=base))
        for _ in range(60):
            machine.offer(1)
            machine.go()
            machine.collect()
        machine.close()


@clause("good", "used-event-exact", source="virtio 1.3, 2.7.7.2 and 2.8.10", rings=FORMATS)
def used_event(ctx: Context) -> None:
    """An interrupt comes for exactly the chain that the driver asked to be interrupted for, however far ahead."""
    ctx.need(Feature.EVENT_IDX)
    machine = ctx.machine()
    ring = machine.work
    for ahead in (0, 1, 2, 7, 15):
        ring.called(0)
        ring.driver.want_interrupt_at(ahead, machine.good_width)
        machine.offer(16)
        machine.go()
        if not ring.called():
            raise Failure(f"no interrupt for the chain {ahead} ahead, which was asked for")
        machine.collect()


@clause("good", "in-order", source="virtio 1.3, 2.7.9 and 2.8.8", rings=FORMATS)
def in_order(ctx: Context) -> None:
    """With IN_ORDER chains come back in the order in which they were made available."""
    ctx.need(Feature.IN_ORDER)
    machine = ctx.machine(ctx.setup(features=ctx.features(Feature.IN_ORDER), num=32))
    machine.traffic(200)
    for _ in range(5):
        machine.offer(32 // machine.good_width)
        machine.go()
        machine.collect()


@clause("good", "indirect", source="virtio 1.3, 2.7.5.3 and 2.8.7", rings=FORMATS)
def indirect(ctx: Context) -> None:
    """Requests in indirect tables, among others that are not."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = ctx.machine()
    for direct in (False, True, False, False):
        machine.offer(10, indirect=not direct)
        machine.offer(5)
        machine.go()
        machine.collect()
    machine.traffic()


@clause("good", "queues-all", source="vhost-user, Multiple queue support", rings=FORMATS)
def all_queues(ctx: Context) -> None:
    """Every ring that the back-end has, at the same time."""
    setup = ctx.setup(rings=min(ctx.facts.queues, 32), features=ctx.features(Feature.NET_MQ), num=32)
    ctx.machine(attrs.evolve(setup, buffers=16 << 20)).traffic()


@clause(
    "good", "queues-some", source="vhost-user, Multiple queue support; VHOST_USER_SET_VRING_ENABLE", devices=("net",)
)
def some_queues(ctx: Context) -> None:
    """One pair stops and starts while the others go on."""
    if ctx.facts.queues < 2 * 2:
        ctx.need(Feature.NET_MQ)
    machine = ctx.net(ctx.setup(rings=4, features=ctx.features(Feature.NET_MQ), num=32))
    for pair in machine.pairs:
        machine.traffic(8)
        bases = [(ring, machine.stop(ring)) for ring in (machine.rx(pair), machine.tx(pair))]
        machine.traffic(8)
        for ring, base in bases:
            machine.start(ring, base=base)
    machine.traffic(8)
