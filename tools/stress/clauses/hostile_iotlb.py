"""Messages about an IOTLB, with an IOMMU and without one (vhost-user, "IOMMU support")."""

from __future__ import annotations

import struct

from vhostmp.tools.stress.clause import Context, clause
from vhostmp.tools.stress.consts import Feature, Request
from vhostmp.tools.stress.frontend import message
from vhostmp.tools.stress.link import Link, Outcome
from vhostmp.tools.stress.verdict import Failure

UPDATE = 2
INVALIDATE = 3
RW = 3
TOP = (1 << 64) - 1
GROWTH = 128 << 20
ENTRIES = 50_000


def iotlb(iova: int, size: int, uaddr: int = 0, perm: int = RW, kind: int = UPDATE) -> bytes:
    """Pack an IOTLB message. Source: vhost-user, "An IOTLB message"."""
    return struct.pack("=QQQBB6x", iova, size, uaddr, perm, kind)


def _link(ctx: Context) -> Link:
    ctx.need(Feature.ACCESS_PLATFORM)
    machine = ctx.machine(ctx.setup(features=ctx.features(Feature.ACCESS_PLATFORM)), start=False)
    return machine.link


def _each(ctx: Context, *payloads: bytes) -> None:
    """Send messages that may be refused: the connection goes on, or ends."""
    link = _link(ctx)
    for payload in payloads:
        if link.try_(Request.IOTLB_MSG, payload) is Outcome.CLOSED:
            link.close()
            link = _link(ctx)


@clause("hostile", "iotlb-without-iommu", source="vhost-user, IOTLB_MSG")
def without_iommu(ctx: Context) -> None:
    """IOTLB messages of all sizes, and ACCESS_PLATFORM was not negotiated."""
    for payload in (b"", bytes(8), bytes(31), bytes(32), iotlb(0, TOP), b"\xff" * 32):
        machine = ctx.machine(start=False)
        machine.link.send_raw(message(Request.IOTLB_MSG, payload))
        machine.link.drain()
        machine.link.close()


@clause("hostile", "iotlb-whole-space", source="CVE-2022-48862; CVE-2026-74713")
def whole_space(ctx: Context) -> None:
    """Updates and invalidations of all addresses, whose size is 2^64 and so 0."""
    _each(ctx, iotlb(0, TOP), iotlb(0, 0), iotlb(0, TOP, kind=INVALIDATE), iotlb(TOP, 1), iotlb(0, 0, kind=INVALIDATE))


@clause("hostile", "iotlb-wraps", source="CVE-2022-48862")
def wraps(ctx: Context) -> None:
    """Entries that wrap, at either end."""
    _each(ctx, iotlb(TOP - 4095, 8192), iotlb(4096, TOP), iotlb(0, 4096, TOP - 100), iotlb(TOP, TOP, TOP))


@clause("hostile", "iotlb-kinds", source="vhost-user, IOTLB message")
def kinds(ctx: Context) -> None:
    """Permissions and types that are none."""
    _each(
        ctx,
        *(iotlb(0, 4096, perm=perm) for perm in (0, 4, 255)),
        *(iotlb(0, 4096, kind=kind) for kind in (0, 1, 4, 5, 6, 99, 255)),
    )


@clause("hostile", "iotlb-outside-table", source="vhost-user, IOTLB message")
def outside_table(ctx: Context) -> None:
    """Entries for addresses of the front-end's at which there is no memory."""
    _each(ctx, iotlb(0, 4096, 0x1234000), iotlb(1 << 20, 1 << 40, 0x7FFF_0000_0000), iotlb(0, 4096, 0))


@clause("hostile", "iotlb-flood", source="CVE-2026-74713: entries without a bound", seconds=60)
def flood(ctx: Context) -> None:
    """Fifty thousand entries, each of its own: a back-end keeps a bounded number of them."""
    link = _link(ctx)
    before = ctx.process.resident() if ctx.process else 0
    for first in range(0, ENTRIES, 500):
        parts = [
            message(Request.IOTLB_MSG, iotlb((first + n) << 13, 4096, 0x7A00_0000_0000 + first)) for n in range(500)
        ]
        try:
            link.send_raw(b"".join(parts))
        except ConnectionError:
            return
        if not link.drain():
            return
    if ctx.process and ctx.process.resident() > before + GROWTH:
        raise Failure("memory grows with every entry")


@clause("hostile", "iotlb-miss-unanswered", source="a miss that nobody answers; vhost-user, IOMMU support")
def unanswered(ctx: Context) -> None:
    """Rings behind an IOMMU whose entries never come: they wait, the connection answers, the rings can be stopped."""
    ctx.need(Feature.ACCESS_PLATFORM)
    machine = ctx.machine(ctx.setup(features=ctx.features(Feature.ACCESS_PLATFORM)), start=False)
    try:
        machine.start_all()
    except Failure:
        return
    before = machine.memory.snapshot()
    machine.good_chain()
    machine.work.driver.publish()
    given = [*machine.given(), (machine.work.driver.avail_gpa, 4)]
    machine.work.notify()
    machine.work.quiet(0.1)
    ctx.unwritten(machine, before, given)
    machine.link.must(Request.SET_VRING_ENABLE, struct.pack("=II", machine.work.index, 0))
    machine.stop(machine.work)
