"""Rings behind an IOMMU whose driver, or front-end, is an enemy: pages go while they are used, questions stay open.

What is taken back (INVALIDATE), or may only be read from now on (UPDATE), the back-end must not use, or not write to,
once the message has been acknowledged: it is somebody else's memory then. Source: vhost-user, "IOMMU support".
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable

from vhostmp.tools.stress.blk import SECTOR, T_IN, BlkMachine
from vhostmp.tools.stress.clause import FORMATS, SETTLE, Context, clause
from vhostmp.tools.stress.consts import Feature, Request
from vhostmp.tools.stress.frontend import REPLY, VERSION, message, u64, vring_addr
from vhostmp.tools.stress.hostile import add_table, attempt, attempt_parts
from vhostmp.tools.stress.iommu import BACKEND_IOTLB_MSG, INVALIDATE, PAGE, READ, RW, WRITE, Iommu, iotlb
from vhostmp.tools.stress.link import Outcome
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.memory import Region
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.ring import DESC_BYTES
from vhostmp.tools.stress.ring import WRITE as F_WRITE
from vhostmp.tools.stress.verdict import Failure, NotApplicable

SOURCE = "vhost-user, IOMMU support"
TOP = (1 << 64) - 1
NOWHERE = 0x5000_0000_0000
"""I/O virtual address that is never mapped, and address of the front-end's at which there is no memory."""
FAR = 2 << 30
LOAD = 16
"""Requests that are under way when pages go."""
ROUNDS = 12
QUESTIONS = 1000
"""How many questions a second a back-end may ask about what nobody answers."""

TakeBack = Callable[[Machine, Iommu], list[Region]]
"""Takes something away; returns the regions that must not be written to any more."""


def _rings(machine: Machine) -> Region:
    return machine.memory.regions[0]


def _buffers(machine: Machine) -> Region:
    return machine.memory.regions[1]


def _goes_on(machine: Machine) -> None:
    """Check that what the work ring has comes back, now that all is mapped again."""
    ring = machine.work
    ring.notify()
    ring.take(len(ring.driver.in_flight))


def _gone_busy(ctx: Context, take_back: TakeBack) -> None:
    """Have something taken back, again and again, at any moment of some requests: it is not written to afterwards.

    Then it is mapped again: what waited for it goes on, and the device is as it was after a reset.
    """
    machine, iommu = ctx.behind()
    machine.probe()
    until = time.monotonic() + ctx.seconds
    for turn in range(ROUNDS):
        iommu.deaf = True
        machine.offer(LOAD // machine.good_width)
        machine.go()
        _pause(ctx.rng)
        closed = take_back(machine, iommu)
        machine.offer(2)  # in case that all was done by then
        machine.work.driver.publish()
        before = machine.memory.snapshot()
        machine.work.notify()
        machine.work.quiet(SETTLE / 5)
        bad = [at for at in machine.memory.written(before) if any(one.gpa <= at < one.end for one in closed)]
        if bad:
            raise Failure(f"written to after it was taken back: {', '.join(map(hex, bad[:4]))}")
        machine.link.get_u64(Request.GET_FEATURES)
        iommu.deaf = False
        iommu.allow_all()
        _goes_on(machine)
        ctx.recovers(machine)
        if turn and time.monotonic() > until:
            break


def _pause(rng: random.Random) -> None:
    """Wait for any number of microseconds, busily: a sleep would be too long."""
    until = time.perf_counter() + rng.random() * 300e-6
    while time.perf_counter() < until:
        pass


@clause("hostile", "iotlb-invalidated-busy", source=f"{SOURCE}: IOTLB_MSG, INVALIDATE", rings=FORMATS, seconds=60)
def invalidated_busy(ctx: Context) -> None:
    """All buffers are unmapped while requests are under way: none is written to once that is acknowledged."""

    def take_back(machine: Machine, iommu: Iommu) -> list[Region]:
        buffers = _buffers(machine)
        iommu.take_back(buffers.gpa, buffers.size)
        return [buffers]

    _gone_busy(ctx, take_back)


@clause("hostile", "iotlb-downgrade", source=f"{SOURCE}: IOTLB_MSG, permission flags", rings=FORMATS, seconds=60)
def downgrade(ctx: Context) -> None:
    """All buffers may only be read from now on, while requests are under way: none is written to afterwards."""

    def take_back(machine: Machine, iommu: Iommu) -> list[Region]:
        buffers = _buffers(machine)
        iommu.renew(buffers, READ)
        return [buffers]

    _gone_busy(ctx, take_back)


@clause("hostile", "iotlb-ring-unmapped", source=f"{SOURCE}: rings are looked up, too", rings=FORMATS, seconds=60)
def ring_unmapped(ctx: Context) -> None:
    """The rings' own pages are unmapped while requests are under way: they are not written to, and then go on."""

    def take_back(machine: Machine, iommu: Iommu) -> list[Region]:
        rings = _rings(machine)
        iommu.take_back(rings.gpa, rings.size)
        return [rings]

    _gone_busy(ctx, take_back)


@clause("hostile", "iotlb-ring-read-only", source=f"{SOURCE}: permission flags; virtio 1.3, 2.7.8", rings=FORMATS)
def ring_read_only(ctx: Context) -> None:
    """The rings' own pages may only be read from now on: the used ring is not written to."""

    def take_back(machine: Machine, iommu: Iommu) -> list[Region]:
        rings = _rings(machine)
        iommu.renew(rings, READ)
        return [rings]

    _gone_busy(ctx, take_back)


@clause("hostile", "iotlb-all-gone", source=f"{SOURCE}: IOTLB_MSG, INVALIDATE", rings=FORMATS, seconds=60)
def all_gone(ctx: Context) -> None:
    """Everything is unmapped at once, by one message of 2^64 - 4096 bytes, while requests are under way."""

    def take_back(machine: Machine, iommu: Iommu) -> list[Region]:
        if iommu.try_(iotlb(0, TOP - PAGE + 1, kind=INVALIDATE)) is not Outcome.ACCEPTED:
            for one in machine.memory.regions:
                iommu.take_back(one.gpa, one.size)
        for one in machine.memory.regions:
            iommu.forbid(one.gpa, one.size)
        return machine.memory.regions

    _gone_busy(ctx, take_back)


@clause("hostile", "iotlb-storm", source=f"{SOURCE}: IOTLB_MSG, while rings are read", rings=FORMATS, seconds=90)
def storm(ctx: Context) -> None:
    """Entries come and go, at random, while requests are under way: all of them are done in the end."""
    machine, iommu = ctx.behind()
    machine.probe()
    until = time.monotonic() + ctx.seconds
    while time.monotonic() < until:
        machine.offer(LOAD // machine.good_width)
        machine.go()
        for _ in range(32):
            one = ctx.rng.choice(machine.memory.regions)
            page = one.gpa + ctx.rng.randrange(one.size // PAGE) * PAGE
            if ctx.rng.randrange(2):
                iommu.try_(iotlb(page, PAGE, kind=INVALIDATE))
            else:
                iommu.try_(iotlb(page, PAGE, one.uva + page - one.gpa, ctx.rng.randrange(1, RW + 1)))
            iommu.serve()
        iommu.allow_all()
        _goes_on(machine)
        ctx.recovers(machine)


@clause("hostile", "iotlb-outside-used", source=f"{SOURCE}: addresses must be within the regions", rings=FORMATS)
def outside_used(ctx: Context) -> None:
    """A buffer's page stands for what is no memory, for half of some, or for its last bytes and what follows."""
    machine, iommu = ctx.behind()
    machine.probe()
    buffers = _buffers(machine)
    last = buffers.uva + buffers.size
    for uva, size in (
        (NOWHERE, PAGE),
        (0, PAGE),
        (last - PAGE // 2, PAGE),
        (last - 16, 2 * PAGE),
        (TOP - PAGE + 1, PAGE),
    ):
        iommu.deaf = True
        parts = machine.good_parts()
        iommu.take_back(buffers.gpa, buffers.size)
        for at in sorted({addr // PAGE * PAGE for addr, _, _ in parts}):
            if iommu.try_(iotlb(at, size, uva)) is Outcome.CLOSED:
                raise Failure(
                    "an entry that cannot be used ends the connection: its front-end cannot know of the guest"
                )
        machine.work.driver.add_parts(parts)
        ctx.harmless(machine, machine.work)
        iommu.deaf = False
        ctx.recovers(machine)


@clause("hostile", "iotlb-ring-outside", source=f"{SOURCE}: addresses must be within the regions", rings=FORMATS)
def ring_outside(ctx: Context) -> None:
    """A ring's page stands for what is no memory, or for the end of some: it is served again once that is put right."""
    machine, iommu = ctx.behind()
    rings = _rings(machine)
    for uva in (NOWHERE, 0, rings.uva + rings.size - 16, rings.uva + 1):
        machine.probe()
        iommu.take_back(rings.gpa, rings.size)
        iommu.deaf = True
        for at in range(rings.gpa, rings.end, PAGE):
            iommu.try_(iotlb(at, PAGE, uva))
        parts = machine.good_parts()
        before = machine.memory.snapshot()
        machine.work.driver.add_parts(parts)
        given = [*machine.given(), (rings.gpa, rings.size)]
        machine.work.driver.publish()
        machine.work.notify()
        machine.work.quiet(SETTLE / 5)
        ctx.unwritten(machine, before, given)
        iommu.deaf = False
        ctx.recovers(machine)


@clause("hostile", "iotlb-ring-neighbour", source=f"{SOURCE}: entries of several rings", rings=FORMATS)
def neighbour(ctx: Context) -> None:
    """The entry of all rings goes by way of one ring's page; for another ring's there comes one that is not enough."""
    machine, iommu = ctx.behind()
    rings = _rings(machine)
    first, last = (one.layout.desc // PAGE * PAGE for one in (machine.rings[0], machine.rings[-1]))
    if first == last:
        raise NotApplicable("there is one ring")
    for access in (READ, WRITE, 0):
        machine.probe()
        iommu.renew(rings)
        iommu.deaf = True
        iommu.try_(iotlb(rings.gpa + first, PAGE, kind=INVALIDATE))
        machine.rings[-1].notify()
        machine.rings[-1].quiet(SETTLE / 10)
        iommu.try_(iotlb(rings.gpa + last, PAGE, rings.uva + last, access))
        machine.rings[-1].notify()
        machine.rings[-1].quiet(SETTLE / 10)
        machine.link.get_u64(Request.GET_FEATURES)
        iommu.deaf = False
        iommu.allow_all()
        ctx.recovers(machine)


@clause("hostile", "iotlb-answer-wrong", source=f"{SOURCE}: IOTLB_MSG, a miss", rings=FORMATS)
def answer_wrong(ctx: Context) -> None:
    """Questions are answered by entries for the page beside, for other accesses, for none, or by the address alone."""
    answers: tuple[Callable[[int, int, int], bytes], ...] = (
        lambda page, uva, access: iotlb(page + PAGE, PAGE, uva + PAGE, RW),
        lambda page, uva, access: iotlb(page, PAGE, uva, RW & ~access or READ if access != RW else READ),
        lambda page, uva, access: iotlb(page, PAGE, uva, 0),
        lambda page, uva, access: iotlb(page, 1, uva, RW),
        lambda page, uva, access: iotlb(page, PAGE, kind=INVALIDATE),
    )
    for answer in answers:
        machine, iommu = ctx.behind()
        machine.probe()
        buffers = _buffers(machine)
        iommu.take_back(buffers.gpa, buffers.size)
        machine.good_chain()
        machine.work.driver.publish()
        machine.work.notify()
        count, until = 0, time.monotonic() + SETTLE
        while time.monotonic() < until:
            for iova, access in iommu.questions():
                count += 1
                page = iova // PAGE * PAGE
                if iommu.try_(answer(page, machine.memory.uva(page), access)) is Outcome.CLOSED:
                    raise Failure("a wrong answer ends the connection")
            time.sleep(0.001)
        if count > QUESTIONS:
            raise Failure(f"{count} questions in {SETTLE:g} s about what was answered wrongly")
        iommu.allow_all()
        _goes_on(machine)
        ctx.recovers(machine)
        machine.close()


@clause("hostile", "iotlb-miss-unanswered", source=f"{SOURCE}: a miss that nobody answers", rings=FORMATS)
def unanswered(ctx: Context) -> None:
    """A ring whose question nobody answers waits, alone: other rings and the connection do not, it can be stopped."""
    pair = 2 if ctx.target.device == "net" else 1
    machine, iommu = ctx.behind(rings=min(ctx.facts.queues // pair, 2) * pair)
    try:
        machine.probe()
    except Failure:  # rings that are offered and not served are another clause's
        machine.close()
        machine, iommu = ctx.behind()
    ring = machine.work
    ring.driver.add_parts([(NOWHERE, length, flags) for _, length, flags in machine.good_parts()])
    before = machine.memory.snapshot()
    given = [*machine.given(), (ring.driver.avail_gpa, 4)]
    ring.driver.publish()
    iommu.asked.clear()
    for _ in range(20):
        ring.notify()
        ring.quiet(SETTLE / 10)
    ctx.unwritten(machine, before, given)
    if len(iommu.asked) > QUESTIONS:
        raise Failure(f"{len(iommu.asked)} questions in {2 * SETTLE:g} s about what nobody answers")
    machine.link.get_u64(Request.GET_FEATURES)
    if isinstance(machine, NetMachine) and len(machine.rings) > pair:
        machine.exchange([60] * 8, 1)
    elif isinstance(machine, BlkMachine) and len(machine.rings) > pair:
        machine.request(T_IN, size=SECTOR, ring=1)
    machine.enable(ring, 0)
    machine.stop(ring)
    ctx.recovers(machine)


@clause("hostile", "iotlb-channel-closed", source=f"{SOURCE}: the back-end's own channel", rings=FORMATS)
def channel_closed(ctx: Context) -> None:
    """The channel is closed while a question is open, and there is another one: all goes on once all is mapped."""
    machine, iommu = ctx.behind()
    machine.probe()
    for _ in range(4):
        iommu.deaf = True
        buffers = _buffers(machine)
        iommu.take_back(buffers.gpa, buffers.size)
        machine.offer(1)
        machine.go()
        machine.work.quiet(SETTLE / 10)
        iommu.hang_up()
        machine.work.notify()
        machine.work.quiet(SETTLE / 10)
        iommu.open(machine.link)
        iommu.deaf = False
        iommu.allow_all()
        _goes_on(machine)
        ctx.recovers(machine)


@clause("hostile", "iotlb-channel-full", source=f"{SOURCE}: the back-end's own channel; nonblocking send")
def channel_full(ctx: Context) -> None:
    """The channel is full, and nobody reads it, while there are questions: nothing waits for it."""
    machine, iommu = ctx.behind()
    machine.probe()
    assert iommu.theirs
    fill(iommu.theirs)
    buffers = _buffers(machine)
    iommu.blind = True
    for _ in range(8):
        iommu.take_back(buffers.gpa, buffers.size)
        machine.offer(1)
        machine.go()
        machine.work.quiet(SETTLE / 10)
        machine.link.get_u64(Request.GET_FEATURES)
        iommu.allow_all()
        _goes_on(machine)
        machine.reset()
    iommu.blind = False
    iommu.open(machine.link)
    ctx.recovers(machine)


def fill(sock: socket.socket) -> None:
    """Send into a socket until it takes no more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(PAGE), socket.MSG_DONTWAIT)


@clause("hostile", "iotlb-on-channel", source="vhost-user, Back-end message types: requests go one way", rings=FORMATS)
def on_channel(ctx: Context) -> None:
    """Entries, answers to no question and rubbish come on the back-end's own channel: none is an entry."""
    machine, iommu = ctx.behind()
    machine.probe()
    buffers = _buffers(machine)
    entry = iotlb(buffers.gpa, buffers.size, buffers.uva)
    for data in (
        message(Request.IOTLB_MSG, entry),
        message(BACKEND_IOTLB_MSG, entry),
        message(BACKEND_IOTLB_MSG, entry, flags=VERSION | REPLY),
        message(BACKEND_IOTLB_MSG, u64(0), flags=VERSION | REPLY) * 3,
        message(BACKEND_IOTLB_MSG, b"", flags=VERSION | REPLY, size=0xFFFF_FFFF),
        ctx.rng.randbytes(1 << 14),
    ):
        iommu.deaf = True
        iommu.take_back(buffers.gpa, buffers.size)
        machine.offer(1)
        machine.go()
        waits = machine.work.quiet(SETTLE / 10)  # a network card may lose what it cannot read
        assert iommu.channel
        with contextlib.suppress(OSError):
            iommu.channel.send(data)
        if waits and not machine.work.quiet(SETTLE / 5):
            raise Failure("an entry was taken that came on the back-end's own channel")
        machine.link.get_u64(Request.GET_FEATURES)
        iommu.open(machine.link)
        iommu.deaf = False
        ctx.recovers(machine)


@clause("hostile", "iova-wraps", source="CVE-2022-48862; virtio 1.3, 2.7.5", rings=FORMATS)
def iova_wraps(ctx: Context) -> None:
    """Buffers at I/O virtual addresses that wrap, and an entry for the last page of all there are."""
    machine, iommu = ctx.behind()
    machine.probe()
    buffers = _buffers(machine)
    for length in (PAGE, 2 * PAGE, 0xFFFF_FFFF):
        for entry in (iotlb(TOP - PAGE + 1, PAGE, buffers.uva), iotlb(0, PAGE, buffers.uva)):
            iommu.try_(entry)
        for place in range(len(machine.good_parts())):
            parts = machine.good_parts()
            parts[place] = (TOP - 15, length, parts[place][2])
            attempt_parts(ctx, machine, parts)


@clause("hostile", "iova-hole", source=f"{SOURCE}: a miss; virtio 1.3, 2.7.5", rings=FORMATS)
def iova_hole(ctx: Context) -> None:
    """Buffers that begin on a page that is mapped, and go on where nothing is, or what may only be read."""
    machine, iommu = ctx.behind()
    machine.probe()
    page = machine.memory.add(FAR, 2 * PAGE)
    machine.set_mem_table()
    for access in (0, READ, WRITE):
        iommu.allow(page.gpa, PAGE)
        iommu.forbid(page.gpa + PAGE, PAGE)
        if access:
            iommu.allow(page.gpa + PAGE, PAGE, access)
        for place, part in enumerate(machine.good_parts()):
            if (part[2] & F_WRITE and access & WRITE) or (not part[2] & F_WRITE and access & READ):
                continue
            parts = machine.good_parts()
            machine.memory.write(page.end - PAGE - 8, machine.memory.read(parts[place][0], 8))
            parts[place] = (page.gpa + PAGE - 8, max(parts[place][1], 64), parts[place][2])
            machine.work.driver.add_parts(parts)
            _stays_out(ctx, machine, page)


def _stays_out(ctx: Context, machine: Machine, page: Region) -> None:
    """Have what was added done, or not; the second page of `page` must stay as it is."""
    before = machine.memory.read(page.gpa + PAGE, PAGE)
    ctx.harmless(machine, machine.work, writable=[(page.gpa, page.size)])
    if machine.memory.read(page.gpa + PAGE, PAGE) != before:
        raise Failure("the device wrote to a page that it may not write to")
    ctx.recovers(machine)


@clause("hostile", "iova-table-hole", source=f"{SOURCE}: a miss; virtio 1.3, 2.7.5.3", rings=FORMATS)
def iova_table(ctx: Context) -> None:
    """Indirect tables at I/O virtual addresses that stand for nothing, wholly or from their second page on."""
    ctx.need(Feature.INDIRECT_DESC)
    machine, iommu = ctx.behind()
    machine.probe()
    page = machine.memory.add(FAR, 2 * PAGE)
    machine.set_mem_table()
    iommu.allow(page.gpa, PAGE)
    for at in (NOWHERE, page.gpa + PAGE, page.gpa + PAGE - DESC_BYTES, TOP - DESC_BYTES + 1):
        parts = machine.good_parts()
        add_table(machine, at, DESC_BYTES * max(len(parts), 2), parts)
        attempt(ctx, machine)


@clause("hostile", "iova-ring-anywhere", source="vhost-user, Ring addresses: I/O virtual ones", rings=FORMATS)
def ring_anywhere(ctx: Context) -> None:
    """Rings at I/O virtual addresses that stand for nothing, wrap, are odd, or lie on top of each other."""
    machine, _ = ctx.behind()
    machine.probe()
    ring = machine.work
    good = ring.driver
    for at in (NOWHERE, 0, TOP - 15, TOP - PAGE + 1, good.desc_gpa + 1):
        for name in ("desc", "avail", "used"):
            machine.stop(ring)
            places = {"desc": good.desc_gpa, "avail": good.avail_gpa, "used": good.used_gpa, name: at}
            outcome = machine.link.try_(Request.SET_VRING_ADDR, vring_addr(ring.index, 0, **places))
            if outcome is Outcome.CLOSED:
                machine, _ = ctx.behind()
                machine.probe()
                ring, good = machine.work, machine.work.driver
                continue
            machine.link.try_(Request.SET_VRING_KICK, u64(ring.index), [ring.kick_fd])
            ring.running = True
            ring.notify()
            ring.quiet(SETTLE / 20)
            machine.link.get_u64(Request.GET_FEATURES)
            ctx.recovers(machine)
            good = ring.driver
