"""Stopping, going on, and coming back: by GET_VRING_BASE, over another connection, a thousand times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from vhostmp.tools.stress.clause import FORMATS, SETTLE, Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request, bits, has
from vhostmp.tools.stress.frontend import u64
from vhostmp.tools.stress.link import DEFAULT_PROTOCOL
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.verdict import Failure, NotApplicable

STOPS: Final = 25
RECONNECTS: Final = 1000
WARM: Final = 200
GROWTH: Final = 1 << 20
"""Bytes that a back-end may keep more after the reconnections than before: what an allocator holds back."""
PLACE: Final = 0xFFFF
"""The half of a base that says how far the ring was available."""
BASE_SOURCE: Final = "vhost-user, VHOST_USER_GET_VRING_BASE; Vring descriptor indices for packed virtqueues"


@clause("good", "base-is-where-it-stopped", source=BASE_SOURCE, rings=FORMATS)
def base(ctx: Context) -> None:
    """GET_VRING_BASE returns where the device is in the available ring, after any number of requests."""
    machine = ctx.machine(ctx.setup(num=16))
    for count in (0, 1, 5, 16, 7, 30, 3):
        for _ in range(count):
            machine.offer(1)
            machine.go()
            machine.collect()
        bases = machine.stop_all()
        for ring, at in zip(machine.rings, bases, strict=True):
            if ring is machine.work and at & PLACE != ring.base & PLACE:
                raise Failure(f"ring {ring.index} stopped at {at & PLACE:#x}, its used index is {ring.base & PLACE:#x}")
        machine.resume(bases)


@clause("good", "base-of-packed", source=BASE_SOURCE, rings=("packed",))
def packed_base(ctx: Context) -> None:
    """The base of a packed ring has both halves: where it is available to, and where it is used to."""
    machine = ctx.machine(ctx.setup(num=16))
    for _ in range(3):
        machine.traffic(5)
        for ring in machine.rings:
            got = machine.stop(ring)
            if got >> 16 != got & 0xFFFF:
                raise Failure(f"ring {ring.index}, in which nothing is under way, stopped at {got:#010x}")
        machine.start_all()


@clause("good", "resume-at-base", source="vhost-user, Ring states", rings=FORMATS)
def resume(ctx: Context) -> None:
    """Rings with requests in them are stopped, and started at the bases they returned: each is done once."""
    machine = ctx.machine()
    for _ in range(STOPS):
        machine.offer(16)
        machine.go()
        time.sleep(ctx.rng.random() * 0.001)
        machine.resume(machine.stop_all())
        machine.give(machine.work.take(16))
        machine.work.driver.check_idle()
        machine.forget()  # a frame that came back to a stopped ring is lost
    machine.traffic()


@clause("good", "stop-is-real", source="vhost-user, Ring states: stopped, the ring is not processed", rings=FORMATS)
def real_stop(ctx: Context) -> None:
    """After the reply to GET_VRING_BASE the device touches neither ring nor buffers, and is not woken by a kick."""
    machine = ctx.machine()
    machine.traffic()
    bases = machine.stop_all()
    machine.offer(8)
    machine.go()
    before = machine.memory.snapshot()
    for ring in machine.rings:
        ring.called(0)
        ring.notify()
    time.sleep(SETTLE)
    ctx.unwritten(machine, before)
    if any(ring.called(0) for ring in machine.rings):
        raise Failure("a stopped ring interrupts")
    machine.resume(bases)
    machine.collect()


@clause("good", "stop-one", source="vhost-user, Ring states: each ring has its own", rings=FORMATS, devices=("net",))
def stop_one(ctx: Context) -> None:
    """The receive ring stops and starts; frames are taken from the transmit ring meanwhile, or wait there."""
    machine = ctx.net()
    for _ in range(5):
        machine.traffic(8)
        at = machine.stop(machine.rx())
        machine.start(machine.rx(), base=at)
        machine.rx().notify()
    machine.traffic(8)


@clause("good", "reconnect", source="vhost-user, Backend reconnection (the rings are in the guest)", rings=FORMATS)
def reconnect(ctx: Context) -> None:
    """The guest goes on over another connection, ten times; the rings were stopped, or nothing was said."""
    machine = ctx.machine()
    for turn in range(10):
        machine.traffic(20)
        if turn % 2:
            bases = machine.stop_all()
            machine.link.close()
            machine.rejoin(ctx.link())
            machine.resume(bases)
        else:
            machine.link.close()
            machine.rejoin(ctx.link())
        for ring in machine.rings:
            ring.notify()


@clause("good", "reconnect-with-requests", source="vhost-user, Inflight I/O tracking; 2.7.14", rings=("split",))
def reconnect_busy(ctx: Context) -> None:
    """The connection breaks with requests in a split ring; over the next one they are done, from the used index on."""
    if ctx.target.device == "blk" and has(ctx.facts.protocol, ProtocolFeature.INFLIGHT_SHMFD):
        raise NotApplicable("requests may be done in any order: see inflight-resume")
    machine = ctx.machine()
    ring = machine.work
    for _ in range(10):
        machine.offer(16)
        machine.go()
        machine.link.close()
        machine.rejoin(ctx.link())
        for each in machine.rings:
            each.notify()
        machine.give(ring.take(len(ring.driver.in_flight)))
        ring.driver.check_idle()
        machine.forget()


@clause("good", "reconnect-1000", source="vhost-user, Communication: one front-end after the other", seconds=90)
def reconnect_1000(ctx: Context) -> None:
    """A thousand front-ends come, set rings up, and go: memory and descriptors stay as many."""
    stays_flat(ctx, lambda: ctx.machine(ctx.setup(num=8)))


def stays_flat(ctx: Context, connect: Callable[[], Machine]) -> None:
    """Have a thousand front-ends come and go. Failure when the back-end has more descriptors or memory afterwards."""
    before = (0, 0)
    for turn in range(RECONNECTS):
        if turn == WARM:
            before = footprint(ctx)
        with connect() as machine:
            if turn % 50 == 0:
                machine.probe()
    with connect() as machine:
        machine.probe()
    if ctx.process is None:
        return
    until = time.monotonic() + 3
    while (now := footprint(ctx))[0] > before[0] and time.monotonic() < until:
        time.sleep(0.02)
    if now[0] > before[0]:
        raise Failure(f"{now[0] - before[0]} descriptors more are open after {RECONNECTS - WARM} connections")
    if now[1] > before[1] + GROWTH:
        raise Failure(f"{(now[1] - before[1]) >> 10} KiB more are resident after {RECONNECTS - WARM} connections")


def footprint(ctx: Context) -> tuple[int, int]:
    """Return how many descriptors the back-end has open, and how much memory is its own."""
    if ctx.process is None:
        return 0, 0
    time.sleep(0.05)
    return sum(ctx.process.descriptors().values()), ctx.process.resident()


@clause("good", "reset-owner", source="vhost-user, VHOST_USER_RESET_OWNER: ignored, or rings are disabled")
def reset_owner(ctx: Context) -> None:
    """RESET_OWNER, which is deprecated; then all is negotiated anew on the same connection, and works."""
    link = ctx.link()
    machine = ctx.machine(link=link)
    machine.probe()
    machine.stop_all()
    link.must(Request.RESET_OWNER)
    link.look()
    link.take(DEFAULT_PROTOCOL)
    ctx.machine(link=link).traffic()


@clause("good", "reset-device", source="vhost-user, VHOST_USER_RESET_DEVICE", rings=FORMATS)
def reset_device(ctx: Context) -> None:
    """RESET_DEVICE brings rings and features back to the first day; what is negotiated anew works."""
    ctx.need_protocol(ProtocolFeature.RESET_DEVICE)
    link = ctx.link(more=[ProtocolFeature.RESET_DEVICE])
    for num in (64, 16):
        machine = ctx.machine(ctx.setup(num=num), link=link)
        machine.traffic()
        machine.stop_all()
        link.must(Request.RESET_DEVICE)
        machine.offer(1)
        machine.go()
        if not machine.work.quiet(SETTLE / 2):
            raise Failure("a ring works after RESET_DEVICE")


@clause("good", "reset-of-other-features", source="vhost-user, VHOST_USER_RESET_DEVICE; virtio 1.3, 2.4")
def reset_to_others(ctx: Context) -> None:
    """After RESET_DEVICE the driver is another one: it takes fewer features, and then the other format of rings."""
    ctx.need_protocol(ProtocolFeature.RESET_DEVICE)
    link = ctx.link(more=[ProtocolFeature.RESET_DEVICE])
    masks = [ctx.features(), ctx.features(without=[Feature.EVENT_IDX, Feature.NET_MRG_RXBUF])]
    masks.append(ctx.features() | bits(Feature.RING_PACKED) & ctx.facts.features)
    for mask in masks:
        machine = ctx.machine(ctx.setup(features=mask), link=link)
        machine.traffic()
        machine.stop_all()
        link.must(Request.RESET_DEVICE)
    link.must(Request.SET_FEATURES, u64(ctx.features()))
