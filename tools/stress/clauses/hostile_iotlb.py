"""Messages about an IOTLB, with an IOMMU and without one (vhost-user, "IOMMU support")."""

from __future__ import annotations

from vhostmp.tools.stress.clause import Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request
from vhostmp.tools.stress.frontend import message, u64
from vhostmp.tools.stress.iommu import INVALIDATE, RW, iotlb
from vhostmp.tools.stress.link import Link, Outcome
from vhostmp.tools.stress.machine import PAGE
from vhostmp.tools.stress.verdict import Failure

SOURCE = "vhost-user, IOMMU support"
TOP = (1 << 64) - 1
GROWTH = 128 << 20
ENTRIES = 50_000
BATCH = 500
NOWHERE = 0x5000_0000_0000
"""I/O virtual address that nothing needs."""


def _link(ctx: Context) -> Link:
    machine, _ = ctx.behind(start=False)
    return machine.link


def _each(ctx: Context, *payloads: bytes) -> None:
    """Send messages that may be refused, before a ring runs and while all do: the connection goes on, or ends."""
    link = _link(ctx)
    for payload in payloads:
        if link.try_(Request.IOTLB_MSG, payload) is Outcome.CLOSED:
            link.close()
            link = _link(ctx)
    link.close()
    machine, iommu = ctx.behind()
    for payload in payloads:
        machine.probe()
        if iommu.try_(payload) is Outcome.CLOSED:
            machine.close()
            machine, iommu = ctx.behind()
        iommu.allow_all()  # what is left of the bad one is replaced
    machine.probe()


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


@clause("hostile", "iotlb-sizes", source="vhost-user, IOTLB message: 32 bytes")
def sizes(ctx: Context) -> None:
    """IOTLB messages that are shorter or longer than one."""
    whole = iotlb(NOWHERE, PAGE)
    for payload in (b"", whole[:8], whole[:-1], whole + b"\0", whole * 2, bytes(4096)):
        link = _link(ctx)
        ctx.rejects(link, Request.IOTLB_MSG, payload)
        link.close()


@clause("hostile", "iotlb-before-features", source=f"{SOURCE}: once ACCESS_PLATFORM has been negotiated")
def before_features(ctx: Context) -> None:
    """Entries, and some taken back, before the features: refused or not, nothing of them is there afterwards."""
    ctx.behind(start=False)[0].close()
    link = ctx.link(more=[ProtocolFeature.BACKEND_REQ])
    for kind in (2, INVALIDATE):
        if link.try_(Request.IOTLB_MSG, iotlb(0, TOP, kind=kind)) is Outcome.CLOSED:
            return
    machine = ctx.machine(ctx.setup(features=ctx.features(Feature.ACCESS_PLATFORM)), link)
    machine.probe()


@clause("hostile", "iotlb-before-memory", source=f"{SOURCE}: addresses must be within SET_MEM_TABLE's regions")
def before_memory(ctx: Context) -> None:
    """Entries before there is a memory table; then one comes, and they are of it."""
    ctx.behind(start=False)[0].close()
    link = ctx.link(more=[ProtocolFeature.BACKEND_REQ])
    link.must(Request.SET_FEATURES, u64(ctx.features(Feature.ACCESS_PLATFORM)))
    for first in range(0, 64 * PAGE, PAGE):
        if link.try_(Request.IOTLB_MSG, iotlb((1 << 20) + first, PAGE, 0x7A00_0000_0000 + first)) is Outcome.CLOSED:
            return
    machine = ctx.machine(ctx.setup(features=ctx.features(Feature.ACCESS_PLATFORM)), link)
    machine.probe()


@clause("hostile", "iotlb-unasked", source=f"{SOURCE}: a front-end is not expected to take the initiative")
def unasked(ctx: Context) -> None:
    """Entries that nobody asked for, and some taken back that never were, among requests."""
    machine, iommu = ctx.behind()
    uva = machine.memory.regions[0].uva
    for turn in range(8):
        for at in range(64):
            iommu.try_(iotlb(NOWHERE + ctx.rng.randrange(1 << 20) * PAGE, PAGE, uva, ctx.rng.randrange(1, RW + 1)))
            iommu.try_(iotlb(NOWHERE - (at + 1) * PAGE, PAGE, kind=INVALIDATE))
        iommu.allow_all()
        machine.traffic(4 + turn)


@clause("hostile", "iotlb-flood", source="CVE-2026-74713: entries without a bound", seconds=60)
def flood(ctx: Context) -> None:
    """Fifty thousand entries, each of its own: a back-end keeps a bounded number of them, and goes on."""
    machine, iommu = ctx.behind()
    link, uva = machine.link, machine.memory.regions[0].uva
    before = ctx.process.resident() if ctx.process else 0
    for first in range(0, ENTRIES, BATCH):
        parts = [message(Request.IOTLB_MSG, iotlb(NOWHERE + ((first + n) << 13), PAGE, uva)) for n in range(BATCH)]
        try:
            link.send_raw(b"".join(parts))
        except ConnectionError:
            return
        if not link.drain():
            return
        if not first % (20 * BATCH):
            iommu.allow_all()  # it may have had to go
            machine.probe()
    if ctx.process and ctx.process.resident() > before + GROWTH:
        raise Failure("memory grows with every entry")
    ctx.recovers(machine)
